"""Measuring what float16 costs: graphs whose errors are known."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundles as toy
from onnx import helper
from phantoms import coarse_phantom

from export.certificate_summary import StudyRecord, summarise
from export.certify import run, work_folder
from export.phantoms import chosen_phantom
from export.precision import Comparison, Inside, Measured
from export.spread import LARGEST_FLOAT32, Spread
from pe_infer.bundle import Bundle
from pe_infer.bundle_check import build_bundle
from pe_infer.certificate import STEPS, Certificate, TensorError, graph_hashes, program_digest
from pe_infer.engines.base import EngineOptions, select
from pe_infer.errors import ConfigurationError, InputError, ScopeError
from pe_infer.executor import StudyOutputs
from pe_infer.manifest import Manifest
from pe_infer.phantom import Phantom, open_phantom

RUNTIME = select("onnxruntime", EngineOptions(precision="float32", threads=1))
COUNT = 12
HALF_STEP = 2.0**-11  # largest relative error of rounding to float16


def bundle_with(folder: Path, files: dict[str, bytes], **precision: str) -> Bundle:
    """A toy with other graphs, and another precision of the nodes that are named."""
    document, graphs = toy.pe_like()
    for node in document["nodes"]:
        if node["name"] in precision:
            node["precision"] = precision[node["name"]]
    return build_bundle(folder, document, {**graphs, **files})


def measured(bundle: Bundle, *, details: bool = True) -> Measured:
    return Comparison(bundle, RUNTIME).run(toy.slabs(COUNT), details=details)


def summary(bundle: Bundle) -> dict[str, Any]:
    """Of a pair of equal studies, once written and read again."""
    record = StudyRecord.of(measured(bundle), gated=[False] * COUNT)
    again = StudyRecord.from_json(json.loads(json.dumps(record.to_json())))
    return summarise([again, again], bundle.manifest)


def error_of(found: dict[str, Any], node: str, tensor: str) -> TensorError:
    errors: tuple[TensorError, ...] = found["errors"]
    return next(e for e in errors if (e.node, e.tensor) == (node, tensor))


def encoder(weight: float) -> bytes:
    """One channel of features is the middle plane times ``weight``, the others are zero."""
    first = np.zeros((4, toy.PLANES, 1, 1), np.float16)
    first[0, 1] = weight
    return toy.graph(
        [
            helper.make_node("Conv", ["slab", "w1"], ["features"], strides=[2, 2]),
            helper.make_node("Conv", ["features", "w2"], ["attention"]),
            helper.make_node("GlobalAveragePool", ["attention"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logit"]),
        ],
        {"slab": ["N", toy.PLANES, toy.SIDE, toy.SIDE]},
        {"features": ["N", 4, 4, 4], "attention": ["N", 1, 4, 4], "logit": ["N", 1]},
        {"w1": first, "w2": toy.weights(2, 1, 4, 1, 1)},
    )


def accumulator(kept: float) -> bytes:
    """The state h is multiplied with ``kept`` in a product and the first gates are added."""
    state = [1, toy.HIDDEN, 4, 4]
    weights = (kept * np.eye(toy.HIDDEN)).reshape(toy.HIDDEN, toy.HIDDEN, 1, 1)
    return toy.graph(
        [
            helper.make_node("Conv", ["h", "u"], ["r"]),
            helper.make_node("Split", ["x"], ["first", "rest"], axis=1),
            helper.make_node("Add", ["r", "first"], ["h_next"]),
            helper.make_node("Add", ["rest", "c"], ["c_next"]),
            helper.make_node("Identity", ["h_next"], ["y"]),
        ],
        {"x": [1, 2 * toy.HIDDEN, 4, 4], "h": state, "c": state},
        {"y": state, "h_next": state, "c_next": state},
        {"u": weights.astype(np.float16)},
    )


# errors


def test_what_computes_in_float32_is_exact(tmp_path: Path) -> None:
    names = ("encoder", "project_down", "down", "project_up", "up", "score")
    found = summary(bundle_with(tmp_path / "exact", {}, **dict.fromkeys(names, "float32")))

    for error in found["errors"]:
        assert error.own.max == error.accumulated.max == error.accumulated.relative_max == 0
        assert error.magnitude_max > 0
    assert all(growth.error.max == 0 for growth in found["growth"])
    assert all(logit.max == 0 for logit in found["logits"])
    assert found["ranges"] == ()
    assert found["largest_score_error"] == 0


def test_the_error_of_a_copy_is_that_of_rounding(tmp_path: Path) -> None:
    found = summary(bundle_with(tmp_path / "copy", {"encoder.onnx": encoder(1.0)}))
    middle = np.stack([slab[1, ::2, ::2] for _, slab in toy.slabs(COUNT)])
    apart = np.abs(middle - middle.astype(np.float16).astype(np.float32))
    features = np.concatenate([apart.reshape(-1), np.zeros(3 * apart.size, np.float32)])

    error = error_of(found, "encoder", "features")
    assert error.own == error.accumulated  # nothing lies before it
    assert error.own.max == pytest.approx(apart.max(), rel=1e-3)
    exact = float(np.quantile(features, 0.99, method="inverted_cdf"))
    assert exact * 0.999 <= error.own.p99 <= exact * 1.07
    assert error.own.relative_max == pytest.approx(apart.max() / error.magnitude_p99, rel=1e-3)
    assert error.sequence == "features"


def test_an_exact_node_passes_on_what_it_was_given(tmp_path: Path) -> None:
    found = summary(bundle_with(tmp_path / "mixed", {}, project_down="float32"))
    exact = error_of(found, "project_down", "y")
    assert exact.own.max == 0
    assert exact.accumulated.max > 0


def test_a_scan_is_measured_with_its_states(tmp_path: Path) -> None:
    """Its own error is that of one step; the accumulated one is that of the study."""
    files = {"down.onnx": accumulator(1.0)}
    found = summary(bundle_with(tmp_path / "scan", files, encoder="float32"))
    state = error_of(found, "down", "h_next")
    assert state.sequence is None
    assert 0 < state.own.max <= 1.01 * state.magnitude_max * HALF_STEP
    assert state.accumulated.max > 2 * state.own.max


def test_magnitudes_of_the_rounded_variant_are_seen_too(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "copy", {"encoder.onnx": encoder(1.0)})
    largest = max(slab[1, ::2, ::2].astype(np.float16).max() for _, slab in toy.slabs(COUNT))
    assert measured(bundle, details=False).tensors["encoder", "features"].half_largest == largest


def test_growth_is_that_of_the_last_ten_steps(tmp_path: Path) -> None:
    details = measured(toy.write_toy(tmp_path / "toy")).details
    assert details is not None
    for steps in STEPS:
        spread = details.growth["down", "h_next", steps].to_json()
        assert sum(spread["counts"]) == 10 * toy.HIDDEN * 4 * 4


def test_a_leaky_accumulator_grows_until_it_forgets(tmp_path: Path) -> None:
    keeps = summary(bundle_with(tmp_path / "keeps", {"down.onnx": accumulator(0.999)}))
    forgets = summary(bundle_with(tmp_path / "forgets", {"down.onnx": accumulator(0.5)}))

    def after(found: dict[str, Any], steps: int) -> float:
        (growth,) = (
            g for g in found["growth"] if (g.node, g.tensor, g.steps) == ("down", "h_next", steps)
        )
        return float(growth.error.max)

    assert {growth.steps for growth in keeps["growth"]} == set(STEPS)
    assert after(keeps, 1000) > 10 * after(keeps, 10)
    assert after(forgets, 1000) < 3 * after(forgets, 10)


# range


def test_an_overflow_is_reported_where_it_happens(tmp_path: Path) -> None:
    bundle = bundle_with(
        tmp_path / "loud", {"encoder.onnx": encoder(60000.0), "project_down.onnx": _louder()}
    )
    found = summary(bundle)

    ranges = {r.node: r for r in found["ranges"]}
    assert ranges["project_down"].head_room < 1
    assert ranges["project_down"].largest > 65504
    assert ranges["encoder"].head_room == pytest.approx(65504 / ranges["encoder"].largest, rel=1e-3)
    assert 1 < ranges["encoder"].head_room < 1.2
    assert error_of(found, "project_down", "y").own.max == pytest.approx(LARGEST_FLOAT32, rel=1e-3)
    certificate = Certificate.model_validate({**_names(bundle), **found})
    assert any("'project_down' overflows" in text for text in certificate.shortcomings())
    assert any("'project_down': some values of y are not" in t for t in certificate.shortcomings())


def test_a_node_that_reads_nothing_finite_has_no_range(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    inside = Inside()
    inside.add("x", np.array([np.inf, np.nan], np.float32))
    record = dataclasses.replace(judged(0.5, 0.5), inside={"project_up": inside})
    assert summarise([record], bundle.manifest)["ranges"] == ()


def _louder() -> bytes:
    weights = np.zeros((2 * toy.HIDDEN, 4, 1, 1), np.float16)
    weights[:, 0] = 8.0
    return toy.graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        {"x": ["N", 4, 4, 4]},
        {"y": ["N", 2 * toy.HIDDEN, 4, 4]},
        {"w": weights},
    )


def _names(bundle: Bundle) -> dict[str, Any]:
    return {
        "format_version": 1,
        "bundle": "toy 0.1.0",
        "graphs": graph_hashes(bundle.manifest),
        "program": program_digest(bundle.manifest),
        "conversion_version": 1,
        "pe_infer_version": "0.1.0",
        "onnxruntime_version": "1",
        "phantom_configuration": "a" * 64,
        "first_seed": 0,
        "pairs": 1,
        "held_out": True,
    }


def test_small_values_are_counted_as_subnormal(tmp_path: Path) -> None:
    small = bundle_with(tmp_path / "small", {"encoder.onnx": encoder(2.0**-16)})
    ranges = {r.node: r for r in summary(small)["ranges"]}
    assert ranges["project_down"].subnormal_share > 0.9  # what it reads
    usual = {r.node: r for r in summary(toy.write_toy(tmp_path / "toy"))["ranges"]}
    assert usual["project_down"].subnormal_share < 0.01


def test_details_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    assert measured(toy.write_toy(tmp_path / "toy"), details=False).details is None


def test_both_variants_give_what_the_product_gives(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy", "radnet_like")
    found = measured(bundle)
    errors = {
        key: np.abs(found.exact.slabs[key] - found.half.slabs[key]).max()
        for key in found.exact.slabs
    }
    assert all(0 < error < 0.01 for error in errors.values())
    assert found.tensors["score", "logit"].accumulated.largest == errors["slab_logit"]


def test_a_study_without_slabs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no slab"):
        Comparison(toy.write_toy(tmp_path / "toy"), RUNTIME).run([])


# verdicts


def manifest(bundle: Bundle, rule: dict[str, Any] | None = None) -> Manifest:
    document = bundle.manifest.model_dump(mode="json")
    document["operating_points"] = [
        {"name": "balanced", "threshold": 0.5},
        {"name": "sensitive", "threshold": 0.2},
    ]
    return Manifest.model_validate_json(json.dumps({**document, "rule": rule or document["rule"]}))


def judged(exact: float, half: float) -> StudyRecord:
    """A study with these probabilities."""
    outputs = [
        StudyOutputs(
            positions_um=np.arange(1),
            slabs={"slab_logit": np.zeros((1, 1), np.float32)},
            study={"study_logit": np.log(np.float32([p / (1 - p)]))},
        )
        for p in (exact, half)
    ]
    record = Measured(exact=outputs[0], half=outputs[1], tensors={}, details=None)
    return StudyRecord.of(record, gated=[False])


def test_flips_are_told_apart_by_their_distance(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    records = [
        judged(0.495, 0.501),  # near
        judged(0.52, 0.49),  # beyond
        judged(0.23, 0.19),  # beyond, of the other point
        judged(0.95, 0.8),
        judged(0.15, float("nan")),  # no verdict in float16: beyond, of both
    ]
    found = summarise(records, manifest(bundle))
    flips = {f.operating_point: (f.within, f.beyond) for f in found["flips"]}
    assert flips == {"balanced": (1, 2), "sensitive": (0, 2)}
    assert found["largest_score_error"] == 1
    assert found["study_scores"] == (0, 1, 1, 0, 1, 1, 0, 0, 0, 1)
    assert found["slab_scores"] == (0, 0, 0, 0, 0, 5, 0, 0, 0, 0)
    errors = {logit.output: logit for logit in found["logits"]}
    assert errors["study_logit"].max == pytest.approx(LARGEST_FLOAT32, rel=1e-3)
    assert errors["slab_logit"].max == 0


def test_logits_of_updates_are_measured_too() -> None:
    outputs = [
        StudyOutputs(
            positions_um=np.arange(1),
            slabs={
                name: np.full((1, 1), logit, np.float32) for name in ("slab_logit", "online_logit")
            },
            study={},
        )
        for logit in (1.0, 1.25)
    ]
    found = Measured(exact=outputs[0], half=outputs[1], tensors={}, details=None)
    logits = StudyRecord.of(found, gated=[False]).logits
    assert logits == {"slab_logit": ([1.0], [1.25]), "online_logit": ([1.0], [1.25])}


def test_neighbouring_slabs_decide_where_that_is_the_rule(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy", "radnet_like")
    logits = {
        "slab_logit": ([3.0, 0.1, 3.0], [3.0, -0.1, 3.0]),
    }
    record = StudyRecord(
        gated=[False, True, False, False], logits=logits, tensors={}, inside=None, growth=None
    )
    found = summarise([record], bundle.manifest)
    (flips,) = found["flips"]
    assert (flips.within, flips.beyond) == (0, 1)  # 0.525 and 0.475
    assert found["slabs"] == 3


# magnitudes


def test_spreads_tell_quantiles() -> None:
    values = np.random.default_rng(0).lognormal(0, 4, 5000).astype(np.float32)
    whole, first, second = Spread(), Spread(), Spread()
    whole.add(-values)
    first.add(values[:100])
    second.add(values[100:])
    first.merge(Spread.from_json(json.loads(json.dumps(second.to_json()))))
    for share in (0.01, 0.5, 0.99):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert exact <= whole.quantile(share) <= 1.0626 * exact
        assert whole.quantile(share) == first.quantile(share)
    assert whole.largest == first.largest == values.max()


def test_what_is_not_finite_counts_as_the_largest() -> None:
    spread = Spread()
    spread.add(np.float32([np.nan, -np.inf, 1.0]))
    assert spread.largest == spread.quantile(0.5) == LARGEST_FLOAT32
    assert Spread().quantile(0.99) == 0


# the command


@pytest.fixture(scope="module")
def coarse() -> Phantom:
    """Few, coarse slices."""
    return coarse_phantom("chest")


def test_goes_on_and_sums_up_what_others_measured(tmp_path: Path, coarse: Phantom) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    asked: list[list[int]] = []

    def certify(*seeds: int) -> Certificate:
        return run(
            bundle,
            seeds,
            tmp_path / "work",
            coarse,
            detailed_pairs=1,
            threads=1,
            follow=lambda left: asked.append(list(left)) or left,  # type: ignore[func-returns-value]
        )

    first, second, both = certify(7), certify(8), certify(7, 8)

    assert asked == [[7], [8]]
    assert (first.pairs, second.first_seed, both.pairs, both.studies) == (1, 8, 2, 4)
    assert both.slabs == first.slabs + second.slabs > 40
    assert both.inner_studies == 4
    assert both.graphs == graph_hashes(bundle.manifest)
    assert both.phantom_configuration == coarse.digest()
    assert both.misfit(bundle.manifest) == ""
    assert not both.held_out  # the toy does not say what it was trained on
    assert certify(7, 8) == both


def test_pairs_of_other_graphs_thresholds_phantoms_and_runtimes_lie_elsewhere(
    tmp_path: Path, coarse: Phantom
) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    weights = bundle_with(tmp_path / "weights", {"up.onnx": toy.recurrence(77)})
    document, files = toy.pe_like()
    document["operating_points"][0]["threshold"] = 0.6
    stricter = build_bundle(tmp_path / "stricter", document, files)
    document["version"] = "9.9.9"
    renamed = build_bundle(tmp_path / "renamed", document, files)

    folders = [
        work_folder(bundle, coarse, "1.30"),
        work_folder(bundle, coarse, "1.31"),
        work_folder(bundle, open_phantom("chest"), "1.30"),
        work_folder(weights, coarse, "1.30"),
        work_folder(stricter, coarse, "1.30"),
    ]
    assert len(set(folders)) == len(folders)
    assert work_folder(renamed, coarse, "1.30") == folders[-1]


def test_measures_again_what_was_not_looked_into(tmp_path: Path, coarse: Phantom) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    asked: list[list[int]] = []

    def certify(*seeds: int, detailed: int = 1) -> Certificate:
        return run(
            bundle,
            seeds,
            tmp_path,
            coarse,
            detailed_pairs=detailed,
            threads=1,
            follow=lambda left: asked.append(list(left)) or left,  # type: ignore[func-returns-value]
        )

    assert certify(7, 8).inner_studies == 2
    assert certify(7, 8, detailed=2).inner_studies == 4
    assert asked == [[7, 8], [8]]


def test_seeds_of_the_training_are_refused(tmp_path: Path, coarse: Phantom) -> None:
    document, files = toy.pe_like()
    document["training"] = {"seeds": {"training of stage 1": [0, 10]}}
    bundle = build_bundle(tmp_path / "toy", document, files)
    with pytest.raises(ConfigurationError, match="the bundle used 0 to 9 for training"):
        run(bundle, [9], tmp_path, coarse, detailed_pairs=1, threads=1, follow=lambda left: left)


def test_a_head_is_measured_like_a_chest(tmp_path: Path) -> None:
    document, files = toy.radnet_like()
    document["scope"]["body_part"] = ["HEAD"]
    bundle = build_bundle(tmp_path / "toy", document, files)
    coarse = coarse_phantom("head")
    assert chosen_phantom(bundle.manifest).anatomy == "head"
    found = run(
        bundle, [7], tmp_path, coarse, detailed_pairs=1, threads=1, follow=lambda left: left
    )
    assert (found.studies, found.inner_studies) == (2, 2)
    assert found.phantom_configuration == coarse.digest()


def test_a_phantom_that_the_bundle_was_not_made_for_is_refused(tmp_path: Path) -> None:
    chests = toy.write_toy(tmp_path / "chests").manifest
    assert chosen_phantom(chests, "chest").anatomy == "chest"
    with pytest.raises(ScopeError, match="BodyPartExamined"):
        chosen_phantom(chests, "head")
    anything = Bundle.load(toy.make(tmp_path / "anything", scope={})).manifest
    with pytest.raises(ConfigurationError, match="all fit its scope"):
        chosen_phantom(anything)
    assert chosen_phantom(anything, "head").anatomy == "head"
