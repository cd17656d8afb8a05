"""Studies of heads as scanners send them: mixed spacing, a tilted gantry, any order of arrival."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import study
from toy_bundles import make, radnet_like

from pe_infer import Detector, Flag, Slice, StudyResult

SIDE = 8
GRID: dict[str, Any] = {
    "planes_per_slab": 1,
    "slab_step": 1,
    "pitch_um": 5000,
    "through_plane": "source",
    "windows": [
        {"low_hu": 0, "high_hu": 80},
        {"low_hu": -20, "high_hu": 180},
        {"low_hu": -800, "high_hu": 2000},
    ],
    "gate": {"low_hu": 0, "high_hu": 100, "min_fraction": 0.1, "enclosed_by_hu": 150},
}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def heads(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Detector]:
    """A bundle that looks both ways over the slices of a head, on one engine."""
    folder = tmp_path_factory.mktemp("heads") / "bundle"
    make(folder, radnet_like, grid=GRID, scope={"body_part": ["HEAD"]}, min_slabs=3)
    with Detector(folder, engine=request.param, precision="float32", cache_dir=None) as made:
        yield made


def head(steps_mm: list[float], tilt_degrees: float, seed: int = 0) -> list[Slice]:
    """Brain in a skull, two slices of air above; slices as thick as their distance.

    The table moves along the body and the gantry leans, so centres drift from slice to slice.
    """
    rng, lean = np.random.default_rng(seed), math.radians(tilt_degrees)
    images, z_mm = [], 0.7
    for index, image in enumerate(study([0] * len(steps_mm))):
        hu = np.full((SIDE, SIDE), -1000)
        if index < len(steps_mm) - 2:
            hu[1:7, 1:7] = 900
            hu[2:6, 2:6] = rng.integers(0, 90, (4, 4))
        geometry = replace(
            image.geometry,
            row_spacing_mm=10.0,
            col_spacing_mm=10.0,
            image_position_mm=(-35.0, -35.0, z_mm),
            col_direction=(0.0, math.cos(lean), -math.sin(lean)),
            thickness_mm=steps_mm[index],
        )
        series = replace(image.series, body_part_examined="HEAD")
        images.append(replace(image, pixels=hu.astype(np.int16), geometry=geometry, series=series))
        z_mm += steps_mm[index] / math.cos(lean)
    return images


def streamed(detector: Detector, images: list[Slice]) -> StudyResult:
    with detector.open() as stream:
        for image in images:
            stream.push(image)
        return stream.finish(timeout=60)


def flags(result: StudyResult) -> set[Flag]:
    return {flag.flag for flag in result.quality}


def assert_same(found: StudyResult, whole: StudyResult) -> None:
    assert found.probability == pytest.approx(whole.probability, abs=1e-5)
    assert found.positive == whole.positive
    assert flags(found) - {Flag.OUT_OF_ORDER} == flags(whole)
    for one, other in zip(found.evidence, whole.evidence, strict=True):
        assert (one.position_mm, one.gated) == (other.position_mm, other.gated)
        assert one.sop_instance_uid == other.sop_instance_uid
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
        if one.attention is not None and other.attention is not None:
            np.testing.assert_allclose(one.attention.values, other.attention.values, atol=1e-4)


@pytest.mark.parametrize(
    ("steps_mm", "kept"),
    [([5.0] * 10 + [4.0] * 10, True), ([2.5] * 12 + [5.0] * 12, False)],
    ids=["thick", "thin and thick"],
)
def test_mixed_spacing_and_tilt_are_flagged_and_give_one_result_in_any_order(
    heads: Detector, steps_mm: list[float], kept: bool
) -> None:
    images = head(steps_mm, 14.0)
    whole = heads.detect(images)
    assert whole.status == "processed"
    assert flags(whole) >= {Flag.GANTRY_TILT, Flag.IRREGULAR_SPACING}
    assert (len(whole.evidence) == len(images)) == kept
    for order in (images, images[::-1], random.Random(0).sample(images, len(images))):
        assert_same(streamed(heads, order), whole)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(
    st.lists(st.sampled_from([1.0, 2.5, 4.0, 5.0, 6.0]), min_size=1, max_size=2),
    st.integers(8, 14),
    st.sampled_from([0.0, -9.0, 22.0]),
    st.randoms(use_true_random=False),
)
def test_streaming_a_head_in_any_order_equals_the_whole_study(
    heads: Detector, parts_mm: list[float], each: int, tilt: float, shuffle: random.Random
) -> None:
    images = head([step for step in parts_mm for _ in range(each)], tilt, seed=each)
    assume(images[-3].position_um > 25_000)  # three slabs at every phase
    whole = heads.detect(images)
    assert (Flag.GANTRY_TILT in flags(whole)) == (tilt != 0)
    for order in (images, images[::-1], shuffle.sample(images, len(images))):
        assert_same(streamed(heads, order), whole)
