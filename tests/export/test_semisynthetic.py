"""Emboli painted into a chest: vessels get darker, the noise stays, the truth says where."""

from pathlib import Path

import numpy as np
import pytest

from export.datasets import generate
from export.datasets.generate_semisynthetic import chosen_backgrounds
from export.datasets.semisynthetic.backgrounds import Backgrounds, open_background
from export.datasets.semisynthetic.chest import KINDS, RealChests, contrast_share, insert_emboli
from export.datasets.semisynthetic.painted import hu_of
from export.datasets.semisynthetic.variation import varied
from export.datasets.semisynthetic.vessels import Vessels, find_vessels
from export.datasets.store import StoredStudy, study_name
from export.training.config import DataSettings, load_settings
from pe_infer import dicom
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry

SPACING_MM, PITCH_MM = 0.75, 2.5
NOISE_HU = 5.0
CONFIGS = Path(__file__).parents[2] / "export" / "configs"


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    """(24, 160, 160) HU: body, two lungs, a heart, ribs, and vessels along the body axis."""
    y, x = np.mgrid[0:160, 0:160] - 80.0
    plane = np.full((160, 160), -1024.0, dtype=np.float32)
    plane[(x / 78) ** 2 + (y / 70) ** 2 < 1] = 40.0
    for side in (-36, 36):
        plane[((x - side) / 26) ** 2 + (y / 48) ** 2 < 1] = -850.0
        plane[np.hypot(x - 1.85 * side, y) < 3] = 400.0  # a rib
    plane[np.hypot(x, y + 5) < 17] = 350.0
    for number in range(8):
        centre = (-36 if number % 2 else 36, -30 + 8 * number)
        plane[np.hypot(x - centre[0], y - centre[1]) < 2 + 0.3 * number] = 350.0
    noise = np.random.default_rng(0).normal(0, NOISE_HU, (24, 160, 160)).astype(np.float32)
    return plane[None] + noise


def slices_of(hu: np.ndarray) -> list[Slice]:
    info = SeriesInfo(body_part_examined="CHEST", contrast_bolus_agent="yes")
    return [
        Slice(
            pixels=np.rint(plane + 1024).clip(0).astype(np.uint16),
            rescale_intercept=-1024.0,
            geometry=SliceGeometry(
                rows=160,
                cols=160,
                row_spacing_mm=SPACING_MM,
                col_spacing_mm=SPACING_MM,
                image_position_mm=(-60.0, -60.0, PITCH_MM * index),
                thickness_mm=PITCH_MM,
            ),
            series=info,
            sop_instance_uid=f"2.25.{index + 1}",
        )
        for index, plane in enumerate(hu)
    ]


@pytest.fixture(scope="module")
def vessels(chest: np.ndarray) -> Vessels:
    """The vessels of the chest."""
    return find_vessels(chest, SPACING_MM, PITCH_MM)


@pytest.fixture(scope="module")
def chests(chest: np.ndarray) -> RealChests:
    """Pairs, of slices that come from head to feet."""
    return RealChests(slices_of(chest)[::-1], "made up")


def test_vessels_of_the_lung_are_found_and_heart_and_ribs_are_not(vessels: Vessels) -> None:
    assert vessels.mask[12, 98, 116]  # the centre of the seventh vessel
    assert not vessels.mask[:, 70:80, 78:82].any()
    assert not vessels.mask[:, :, :20].any()
    assert vessels.mask.mean() < 0.05
    assert float(vessels.radius_mm[vessels.mask].min()) > 0
    first, last, middle = vessels.lung
    assert (first, last) == (0, 23)
    assert middle == pytest.approx(80, abs=2)


def test_marked_arteries_are_vessels_too(chest: np.ndarray, vessels: Vessels) -> None:
    arteries = np.zeros(chest.shape, np.bool_)
    arteries[5:20, 70:80, 75:85] = True  # in the heart
    arteries[5:20, 20:25, 75:85] = True  # no contrast agent there
    found = find_vessels(chest, SPACING_MM, PITCH_MM, arteries)
    assert found.mask[10, 75, 80]
    assert not found.mask[:, 20:25].any()
    assert (found.mask | ~vessels.mask).all()


def test_emboli_take_the_place_of_contrast_agent_and_of_nothing_else(
    chest: np.ndarray, vessels: Vessels
) -> None:
    for seed in range(6):
        painted = insert_emboli(vessels, SPACING_MM, PITCH_MM, np.random.default_rng(seed))
        after = chest - painted.drop_hu
        assert painted.mask.any()
        assert not (painted.mask & ~vessels.mask).any()
        assert float(painted.drop_hu.min()) >= 0.0
        assert float(after[painted.mask].mean()) < 130.0
        assert float(after.min()) > -1100.0  # no black holes where emboli meet
        far = painted.drop_hu > 30.0
        assert painted.mask.sum() <= far.sum() < 5 * painted.mask.sum()


def test_what_lies_around_a_vessel_decides_how_much_of_a_voxel_it_fills() -> None:
    smooth = np.full((3, 30, 30), 40.0, np.float32)
    smooth[:, :, 15:] = -850.0
    vessels = np.zeros(smooth.shape, np.bool_)
    vessels[:, 4:8, 4:8] = vessels[:, 4:8, 22:26] = True
    smooth[vessels] = 350.0
    smooth[:, 6, 8] = 195.0  # half contrast agent, half tissue
    smooth[:, 6, 26] = -250.0  # half contrast agent, half lung
    share = contrast_share(smooth, vessels, 350.0)
    assert float(share[1, 6, 6]) == pytest.approx(1.0)
    assert float(share[1, 6, 8]) == pytest.approx(0.5, abs=0.06)
    assert float(share[1, 6, 26]) == pytest.approx(0.5, abs=0.06)
    assert float(share[1, 20, 6]) == pytest.approx(0.0, abs=0.01)
    assert float(share[1, 20, 26]) == pytest.approx(0.0, abs=0.01)


def test_a_pair_differs_in_emboli_only_and_keeps_the_noise(chests: RealChests) -> None:
    sharp = 0
    for seed in range(8):
        clean, clotted = chests.pair(seed)
        before, after = (np.stack([hu_of(i) for i in s.slices]) for s in (clean, clotted))
        assert (clean.positive, clotted.positive) == (False, True)
        assert not clean.lesion_mask.any()
        assert [i.position_um for i in clotted.slices] == sorted(
            i.position_um for i in clotted.slices
        )
        assert ((after - before) <= 1.0).all()
        far = after < before - 30
        assert clotted.lesion_mask.sum() * 0.8 <= far.sum() < 6 * clotted.lesion_mask.sum()
        core = clotted.lesion_mask[:, 1:] & clotted.lesion_mask[:, :-1]
        occlusive = all(lesion.kind == "occlusive" for lesion in clotted.lesions)
        if clotted.parameters["softness_px"] == 0.0 and occlusive:
            sharp += 1
            steps = np.abs(np.diff(after, axis=1)[core])
            assert float(np.median(steps)) / 0.6745 > 0.6 * NOISE_HU * np.sqrt(2)
        again = chests.pair(seed)[1]
        np.testing.assert_array_equal(again.lesion_mask, clotted.lesion_mask)
        assert again.lesions == clotted.lesions
    assert sharp


def test_the_truth_says_what_where_and_how_much(chests: RealChests) -> None:
    lesions = [lesion for seed in range(20) for lesion in chests.pair(seed)[1].lesions]
    assert {lesion.kind for lesion in lesions} == set(KINDS)
    assert {lesion.place.split()[0] for lesion in lesions} == {"left", "right"}
    assert {lesion.place.split()[1] for lesion in lesions} == {"lower", "middle", "upper"}
    assert {lesion.place.split()[2] for lesion in lesions} <= {"subsegmental", "segmental", "lobar"}
    for lesion in lesions:
        assert (lesion.centre_mm[0] > 0) is lesion.place.startswith("left")
    _, clotted = chests.pair(3)
    volumes = [lesion.volume_mm3 for lesion in clotted.lesions]
    assert volumes == sorted(volumes, reverse=True)
    g = clotted.slices[0].geometry
    voxel = g.row_spacing_mm * g.col_spacing_mm * PITCH_MM
    assert 0.5 < sum(volumes) / (clotted.lesion_mask.sum() * voxel) < 3.0
    assert clotted.lesion_mask.sum(axis=(1, 2)).max() * SPACING_MM**2 > 11.0
    largest = clotted.lesions[0].centre_mm
    z = int(np.argmin([abs(i.geometry.image_position_mm[2] - largest[2]) for i in clotted.slices]))
    x, y, _ = clotted.slices[z].geometry.image_position_mm
    row, col = (
        round((largest[1] - y) / g.row_spacing_mm),
        round((largest[0] - x) / g.col_spacing_mm),
    )
    assert clotted.lesion_mask[z, row, col]


def test_pairs_are_stored_as_those_of_phantoms_are(chests: RealChests, tmp_path: Path) -> None:
    data = load_settings(CONFIGS / "pe-data.toml", DataSettings)
    generate.store_pair(tmp_path, 5, data.grid.to_grid(), chests)
    record = StoredStudy(tmp_path / study_name(5, positive=True)).record
    assert record.phantom["semi-synthetic"] == "made up"
    assert record.phantom["emboli"][0]["kind"] in KINDS
    assert max(record.clot_pixels) >= data.min_pixels
    assert len(record.slab_planes) > 5


def test_several_backgrounds_take_turns(chest: np.ndarray, chests: RealChests) -> None:
    other = RealChests(slices_of(chest), "another")
    both = Backgrounds([chests, other])
    assert [both.pair(seed)[0].source for seed in (4, 5)] == ["made up", "another"]
    assert both.digest() not in {chests.digest(), other.digest()}
    assert Backgrounds([other, chests]).digest() != both.digest()


def test_backgrounds_are_named_in_one_way(tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / "pe-data.toml", DataSettings)
    for root, folder, source in (
        (tmp_path, None, None),  # the settings name none
        (None, tmp_path, None),
        (tmp_path, tmp_path, "text"),
        (None, None, None),
    ):
        with pytest.raises(ConfigurationError, match="give --root"):
            chosen_backgrounds(settings, root, folder, source)
    with pytest.raises(ConfigurationError, match="'knee'"):
        open_background("knee", tmp_path, "text")
    with pytest.raises(ConfigurationError, match="belong to a NIfTI volume"):
        open_background("chest", tmp_path, "text", arteries="a.nii.gz")


def test_planes_without_lung_or_contrast_agent_are_refused(chest: np.ndarray) -> None:
    with pytest.raises(InputError, match="no lung"):
        find_vessels(np.full((6, 96, 96), 40.0, dtype=np.float32), SPACING_MM, PITCH_MM)
    with pytest.raises(InputError, match="contrast agent"):
        find_vessels(np.minimum(chest, 60.0), SPACING_MM, PITCH_MM)
    with pytest.raises(InputError, match="1 slices"):
        RealChests(slices_of(chest[:1]), "made up")


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


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["chest_contrast", "chest_ctpa_lower"])
def test_emboli_in_real_chests_are_plausible(shared_data: Path, folder: str) -> None:
    series = dicom.open_series(shared_data / folder)
    chests = RealChests(list(series.slices()), folder)
    mask = chests.vessels.mask
    assert 0.0003 < mask.mean() < 0.02
    clean, clotted = chests.pair(1)
    before, after = (np.stack([hu_of(i) for i in s.slices]) for s in (clean, clotted))
    assert float(before[clotted.lesion_mask].mean()) > 150.0
    assert 0.0 < float(after[clotted.lesion_mask].mean()) < 130.0
