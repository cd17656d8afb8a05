"""The manifest's own rules, and that its JSON schema tells the same."""

import json
import math
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import toy_bundles as toy
from hypothesis import given
from hypothesis import strategies as st

from pe_infer import manifest as m
from pe_infer import preprocess
from pe_infer.bundle import MANIFEST, SHIPPED, shipped, validate
from pe_infer.errors import BundleError, Code

Edit = Callable[[dict[str, Any]], object]


def document() -> dict[str, Any]:
    found, files = toy.pe_like()
    shapes = {
        "slab": [3, 8, 8],
        "features": [4, 4, 4],
        "attention": [1, 4, 4],
        "gates_down": [4, 4, 4],
        "hidden_down": [2, 4, 4],
        "gates_up": [4, 4, 4],
        "hidden_up": [2, 4, 4],
        "stage1_logit": [1],
        "score": [1],
        "study_logit": [1],
    }
    axes = {1: ["value"], 3: ["channel", "row", "col"]}
    found["sequences"] = {
        name: {"shape": shape, "axes": axes[len(shape)]} for name, shape in shapes.items()
    }
    found["sequences"]["study_logit"]["per"] = "study"
    found["files"] = {name: {"sha256": "0" * 64} for name in files}
    return found


def test_the_preprocessing_version_is_that_of_the_kernel() -> None:
    assert m.PREPROCESSING_VERSION == preprocess.VERSION


def test_a_manifest_survives_being_written() -> None:
    manifest = validate(document(), "test")
    again = validate(json.loads(manifest.model_dump_json()), "test")
    assert again == manifest
    assert manifest.grid.channels == 3
    assert manifest.operating_point() == manifest.operating_points[0]
    assert manifest.operating_point("balanced") == manifest.operating_points[0]
    assert manifest.operating_point("none") is None
    assert manifest.operating_point("") is None


def test_manifests_are_what_the_schema_says() -> None:
    schema = m.manifest_schema()
    jsonschema.validate(document(), schema)
    for name in shipped():
        jsonschema.validate(json.loads((SHIPPED / name / MANIFEST).read_text()), schema)
    for change in ({"colour": "red"}, {"rule": {"kind": "vote"}}, {"format_version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document(), **change}, schema)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["grid"].update(colour="red"), "grid.colour"),
        (lambda d: d["grid"]["windows"][0].update(colour="red"), "windows.0.colour"),
        (lambda d: d["grid"].update(rows="8"), "grid.rows"),
        (lambda d: d["grid"].update(rows=0), "grid sizes must be at least 1"),
        (lambda d: d["grid"].update(planes_per_slab=2), "must be odd"),
        (lambda d: d["grid"]["windows"][0].update(low_hu=900), "must be below"),
        (lambda d: d.pop("grid"), "grid"),
        (lambda d: d.update(name="../pe"), "name"),
        (lambda d: d["nodes"][0].update(kind="loop"), "nodes.0"),
        (lambda d: d["nodes"][2].update(direction="left"), "direction"),
        (lambda d: d["nodes"][2].update(states=[]), "states"),
        (lambda d: d["nodes"][2]["states"][0].update(input="x"), "named twice"),
        (lambda d: d["nodes"][2]["states"][0].update(output="y"), "named twice"),
        (lambda d: d["nodes"][1].update(name="encoder"), "node 'encoder' is defined twice"),
        (lambda d: d["nodes"][-1].update(reducer="median"), "reducer"),
        (lambda d: d["nodes"][-1]["inputs"].update(y="score"), "inputs"),
        (lambda d: d["files"].pop("up.onnx"), "['up.onnx']"),
        (lambda d: d["files"]["up.onnx"].update(sha256="00"), "sha256"),
        (lambda d: d.update(golden={"file": "golden.npz"}), "['golden.npz']"),
        (lambda d: d.update(default_operating_point="other"), "'other'"),
        (lambda d: d.update(operating_points=d["operating_points"] * 2), "defined twice"),
        (lambda d: d["operating_points"][0].update(threshold=1.5), "threshold"),
        (lambda d: d.update(calibration={"scale": 0}), "calibration.scale"),
        (lambda d: d.update(rule={"kind": "consecutive", "count": 0}), "count"),
        (lambda d: d.update(rule={"kind": "vote"}), "rule"),
        (lambda d: d["outputs"].pop("slab_logit"), "provisional_alert needs"),
        (lambda d: d["sequences"]["slab"].update(axes=["row"]), "1 axis names"),
        (lambda d: d["sequences"]["slab"].update(dtype="float16"), "dtype"),
        (lambda d: d.update(slab_channels="anyhow"), "slab_channels"),
    ],
)
def test_refuses_what_is_not_a_manifest(edit: Edit, named: str) -> None:
    found = document()
    edit(found)
    with pytest.raises(BundleError) as caught:
        validate(found, "toy/bundle.json")
    assert caught.value.code == Code.BUNDLE_INVALID
    assert named in str(caught.value)
    assert str(caught.value).startswith("toy/bundle.json: ")


@pytest.mark.parametrize("key", ["format_version", "preprocessing_version"])
def test_refuses_other_versions_before_anything_else(key: str) -> None:
    with pytest.raises(BundleError, match=f"{key} is 2, this pe_infer reads 1") as caught:
        validate({**document(), key: 2, "unknown": True}, "toy")
    assert caught.value.code == Code.BUNDLE_VERSION


@given(st.floats(-50, 50), st.floats(0.1, 3), st.floats(-3, 3))
def test_calibration_is_a_sigmoid(logit: float, scale: float, offset: float) -> None:
    found = m.Calibration(scale=scale, offset=offset).probability(logit)
    assert found == pytest.approx(0.5 * (1 + math.tanh((scale * logit + offset) / 2)), abs=1e-12)


@pytest.mark.parametrize("logit", [-1e6, 1e6])
def test_calibration_does_not_overflow(logit: float) -> None:
    assert m.Calibration().probability(logit) == (logit > 0)


def rule(count: int = 3, gated: str = "skip", fewer: str = "refuse") -> m.ConsecutiveRule:
    return m.ConsecutiveRule.model_validate(
        {"kind": "consecutive", "count": count, "gated": gated, "fewer": fewer}
    )


@pytest.mark.parametrize(
    ("found", "probabilities", "expected"),
    [
        (rule(), [0.1, 0.9, 0.8, 0.7, 0.2], 0.7),
        (rule(), [0.9, 0.1, 0.9, 0.9], 0.1),
        (rule(1), [0.2, 0.6, 0.4], 0.6),
        (rule(), [0.9, None, 0.8, 0.7], 0.7),
        (rule(gated="break"), [0.9, None, 0.8, 0.7, 0.1], 0.1),
        (rule(gated="break"), [0.9, 0.8, None, 0.8, 0.7], None),
        (rule(gated="break", fewer="shrink"), [0.9, 0.8, None, 0.8, 0.7], 0.8),
        (rule(), [0.9, 0.8], None),
        (rule(fewer="shrink"), [0.9, 0.8], 0.8),
        (rule(), [], None),
        (rule(fewer="shrink"), [None, None], None),
    ],
)
def test_neighbours_decide(
    found: m.ConsecutiveRule, probabilities: list[float | None], expected: float | None
) -> None:
    assert found.score(probabilities) == expected


@given(st.lists(st.floats(0, 1), min_size=3, max_size=20), st.floats(0, 1), st.integers(1, 3))
def test_the_score_reaches_a_threshold_when_enough_neighbours_do(
    probabilities: list[float], threshold: float, count: int
) -> None:
    score = rule(count).score(probabilities)
    assert score is not None
    longest = run = 0
    for probability in probabilities:
        run = run + 1 if probability >= threshold else 0
        longest = max(longest, run)
    assert (score >= threshold) == (longest >= count)
