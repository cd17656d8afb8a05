"""Emboli put into planes: only vessels get darker, and the truth says where."""

import numpy as np
import pytest

from export.datasets.semisynthetic.chest import Vessels, find_vessels, insert_emboli
from export.datasets.semisynthetic.variation import varied
from pe_infer.errors import InputError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry

SPACING_MM, PITCH_MM = 0.75, 2.5


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    """(24, 160, 160) HU: body, two lungs, a heart, and vessels along the body axis."""
    y, x = np.mgrid[0:160, 0:160] - 80.0
    plane = np.full((160, 160), -1024.0, dtype=np.float32)
    plane[(x / 78) ** 2 + (y / 70) ** 2 < 1] = 40.0
    for side in (-36, 36):
        plane[((x - side) / 26) ** 2 + (y / 48) ** 2 < 1] = -850.0
    plane[np.hypot(x, y + 5) < 17] = 350.0
    for number in range(8):
        centre = (-36 if number % 2 else 36, -30 + 8 * number)
        plane[np.hypot(x - centre[0], y - centre[1]) < 2 + 0.3 * number] = 350.0
    noise = np.random.default_rng(0).normal(0, 5, (24, 160, 160)).astype(np.float32)
    return plane[None] + noise


@pytest.fixture(scope="module")
def vessels(chest: np.ndarray) -> Vessels:
    """The vessels of the chest."""
    return find_vessels(chest, SPACING_MM, PITCH_MM)


def test_vessels_of_the_lung_are_found_and_the_heart_is_not(vessels: Vessels) -> None:
    assert vessels.mask[12, 98, 116]  # the centre of the seventh vessel
    assert not vessels.mask[:, 70:80, 78:82].any()
    assert vessels.mask.mean() < 0.05
    assert float(vessels.radius_mm[vessels.mask].min()) > 0


def test_emboli_darken_vessels_and_nothing_else(chest: np.ndarray, vessels: Vessels) -> None:
    rng = np.random.default_rng(1)
    out, truth = insert_emboli(chest, vessels, SPACING_MM, PITCH_MM, rng)
    assert truth.any()
    assert not (truth & ~vessels.mask).any()
    assert (out <= chest + 1e-3).all()
    assert float(out[truth].mean()) < 150.0
    assert float(chest[truth].mean()) > 280.0
    changed = np.abs(out - chest) > 30.0
    assert truth.sum() <= changed.sum() < 4 * truth.sum()


def test_same_seed_same_emboli(chest: np.ndarray, vessels: Vessels) -> None:
    one, other = (
        insert_emboli(chest, vessels, SPACING_MM, PITCH_MM, np.random.default_rng(5))[0]
        for _ in range(2)
    )
    np.testing.assert_array_equal(one, other)


def test_planes_without_lung_are_refused() -> None:
    with pytest.raises(InputError, match="no lung"):
        find_vessels(np.full((6, 96, 96), 40.0, dtype=np.float32), SPACING_MM, PITCH_MM)


def test_planes_without_contrast_agent_are_refused(chest: np.ndarray) -> None:
    with pytest.raises(InputError, match="contrast agent"):
        find_vessels(np.minimum(chest, 60.0), SPACING_MM, PITCH_MM)


def test_patient_of_another_size_keeps_the_centre_of_the_lattice() -> None:
    geometry = SliceGeometry(
        rows=4,
        cols=6,
        row_spacing_mm=1.0,
        col_spacing_mm=2.0,
        image_position_mm=(-10.0, 20.0, 30.0),
    )
    image = Slice(pixels=np.zeros((4, 6), np.int16), geometry=geometry, series=SeriesInfo())
    moved = varied(image, scale=0.9, shift_mm=1.5).geometry
    assert (moved.row_spacing_mm, moved.col_spacing_mm) == pytest.approx((0.9, 1.8))
    x, y, z = geometry.centre_mm
    assert moved.centre_mm == pytest.approx((0.9 * x, 0.9 * y, z + 1.5))
