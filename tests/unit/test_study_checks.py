"""Checks of the images in whole studies: any order, every outcome, both engines on a CPU."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import REGULAR, body, positions, study
from toy_bundles import make, write_toy
from typer.testing import CliRunner

from pe_infer import Detector, Flag, Slice, StudyResult, preprocess
from pe_infer.bundle import Bundle, set_checks
from pe_infer.checks import assess, plane_measure
from pe_infer.cli.bundles_command import app
from pe_infer.errors import BundleError
from pe_infer.result import result_schema

CELLS = {"low_hu": -200.0, "high_hu": 1500.0, "quantile": 0.5, "cell_px": 1}
LEVEL = {"kind": "level", **CELLS}
ORGAN = range(30_000, 70_001)
GATE = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}


def declared(name: str, measure: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"name": name, "measure": measure, "over": 0.5, "meaning": f"bad {name}", **values}


CHECKS = [
    declared("brightness", LEVEL, refuse_below=20.0, flag_below=60.0),
    declared("noise", {**LEVEL, "kind": "noise", "cell_px": 2}, flag_above=100.0),
    declared("metal", {"kind": "area", "low_hu": 2000.0}, over=1.0, flag_above=350.0),
]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def detector(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Detector]:
    folder = make(
        tmp_path_factory.mktemp("checked") / "bundle",
        grid={"gate": GATE},
        min_slabs=2,
        checks=CHECKS,
        provisional_alert={"slab_probability": 0.0, "consecutive": 1},
    )
    with Detector(folder, engine=request.param, precision="float32", cache_dir=None) as made:
        yield made


@pytest.fixture(scope="module")
def ungated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    folder = make(tmp_path_factory.mktemp("ungated") / "bundle", checks=CHECKS)
    with Detector(folder, engine="onnxruntime", precision="float32", cache_dir=None) as made:
        yield made


def bright(hu: float, metal_pixels: int = 0) -> list[Slice]:
    """A body of these HU around an organ."""
    made = []
    for image in body(study(REGULAR), ORGAN):
        pixels = np.where(image.host_pixels == 40, np.int16(hu), image.host_pixels)
        pixels[0, :metal_pixels] = 3000
        made.append(replace(image, pixels=pixels))
    return made


def wide(images: list[Slice]) -> list[Slice]:
    """The same pixels, as large as the toy's grid."""
    return [
        replace(
            image,
            geometry=replace(
                image.geometry,
                row_spacing_mm=10.0,
                col_spacing_mm=10.0,
                image_position_mm=(-35.0, -35.0, image.position_um / 1000),
            ),
        )
        for image in images
    ]


def streamed(detector: Detector, images: list[Slice]) -> StudyResult:
    with detector.open() as stream:
        for image in images:
            stream.push(image)
        return stream.finish(timeout=60)


def outcomes(result: StudyResult) -> dict[str, str]:
    return {check.name: check.outcome for check in result.checks}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(positions(), st.randoms(use_true_random=False))
def test_values_have_the_same_bits_streaming_in_any_order(
    ungated: Detector, where: list[int], shuffle: random.Random
) -> None:
    images, manifest = wide(study(where)), ungated.bundle.manifest
    measure = plane_measure(manifest.checks, manifest.grid)
    expected = assess(
        manifest.checks, [s.measured for s in preprocess.slabs(images, manifest.grid, measure)]
    )
    if not any(result.planes for result in expected):
        return  # too short for a slab
    assert ungated.detect(images).checks == expected
    for order in (images, images[::-1], shuffle.sample(images, len(images))):
        assert streamed(ungated, order).checks == expected


def test_a_study_within_its_limits_passes(detector: Detector) -> None:
    result = detector.detect(bright(80))
    assert result.status == "processed"
    assert outcomes(result) == {"brightness": "passed", "noise": "passed", "metal": "passed"}
    assert [check.value for check in result.checks] == [80.0, 0.0, 0.0]
    assert Flag.IMAGE_CHECK not in {q.flag for q in result.quality}


def test_a_study_beyond_a_limit_is_flagged(detector: Detector) -> None:
    result = detector.detect(bright(50, metal_pixels=4))
    assert result.status == "processed"
    assert result.probability is not None
    assert outcomes(result) == {"brightness": "flagged", "noise": "passed", "metal": "flagged"}
    flags = [q for q in result.quality if q.flag is Flag.IMAGE_CHECK]
    assert [q.values["check"] for q in flags] == ["brightness", "metal"]
    assert flags[0].values["limit_hu"] == 60.0
    assert flags[1].values["value_mm2"] == 400.0


def test_a_refused_study_has_no_probability_anywhere(detector: Detector) -> None:
    images = bright(10)
    result = streamed(detector, images)
    assert result.status == "not_processed"
    assert result.not_processed is not None
    assert result.not_processed.code == "check.brightness"
    assert "bad brightness (brightness is 10 HU" in result.not_processed.message
    assert (result.probability, result.positive) == (None, None)
    assert {slab.probability for slab in result.evidence} == {None}
    assert {slab.attention for slab in result.evidence} == {None}
    assert Flag.IMAGE_CHECK in {q.flag for q in result.quality}
    jsonschema.validate(json.loads(result.to_json()), result_schema())


def test_no_alert_comes_from_images_that_would_be_refused(detector: Detector) -> None:
    def alerts(hu: float) -> set[bool]:
        with detector.open() as stream:
            for image in bright(hu):
                stream.push(image)
            stream.finish(timeout=60)
            return {update.provisional_alert for update in stream.updates()}

    assert any(alerts(80))
    assert alerts(10) == {False}


def test_slabs_without_the_organ_are_not_measured(detector: Detector) -> None:
    result = detector.detect(bright(80))
    assert 0 < result.coverage.slabs < len(result.evidence)
    assert {check.planes for check in result.checks} == {result.coverage.slabs}


def test_a_study_without_the_organ_is_not_checked(detector: Detector) -> None:
    result = detector.detect(body(study(REGULAR), range(0)))
    assert result.not_processed is not None
    assert result.not_processed.code == "gate.no_organ"
    assert result.checks == ()


def test_what_cannot_be_measured_is_refused(ungated: Detector) -> None:
    result = ungated.detect(bright(-500))
    assert result.not_processed is not None
    assert result.not_processed.code == "check.brightness"
    assert "cannot be measured in any plane" in result.not_processed.message


def test_checks_are_put_into_a_bundle_that_is_there(tmp_path: Path) -> None:
    plain = write_toy(tmp_path / "toy")
    checks = Bundle.load(make(tmp_path / "other", checks=CHECKS)).manifest.checks
    changed = set_checks(plain, checks, "0.1.1")
    assert changed.manifest.checks == checks
    assert changed.manifest.version == "0.1.1"
    assert changed.sha256 != plain.sha256
    assert dict(changed.files) == dict(plain.files)
    left = {"checks", "version"}
    assert changed.manifest.model_dump(exclude=left) == plain.manifest.model_dump(exclude=left)


def test_a_bundle_shows_its_limits(detector: Detector) -> None:
    command = ["show", str(detector.bundle.folder)]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert "refused below 20 HU, flagged below 60 HU" in shown.output
    assert "flagged above 350 mm2" in shown.output


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"refuse_below": None, "flag_below": None}, "give at least one"),
        ({"refuse_below": 70.0}, "smaller than an earlier one"),
        ({"measure": {**LEVEL, "region": {"back": 0.5}}}, "the grid has no gate"),
        ({"measure": {**LEVEL, "region": {"back": 0.0}}}, "front < back"),
        ({"name": "noise"}, "defined twice"),
    ],
)
def test_checks_that_make_no_sense_are_refused(
    tmp_path: Path, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BundleError, match=problem):
        make(tmp_path / "toy", checks=[{**CHECKS[0], **values}, *CHECKS[1:]])
