"""Blood painted into a head: where it may lie, what stays as it was, and the truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.datasets import generate
from export.datasets.semisynthetic.head import BLOOD_HU, SHAPES, RealHeads
from export.datasets.semisynthetic.regions import Regions, find_regions
from export.datasets.store import StoredStudy, study_name
from export.training.config import DataSettings, load_settings
from pe_infer import dicom
from pe_infer.errors import InputError
from pe_infer.geometry import Slice, SliceGeometry

SIDE, SPACING_MM, STEP_MM = 200, 1.0, 5.0
TILT = np.deg2rad(15.0)
NOISE_HU = 3.0


def made_head(count: int = 24) -> list[Slice]:
    """A tilted ellipsoid of brain in a skull, with ventricles, sulci and an old infarct."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:SIDE, 0:SIDE] * SPACING_MM - SIDE / 2 * SPACING_MM
    slices = []
    for index in range(count):
        z = (index - 8) * STEP_MM
        size = np.sqrt(max(1.0 - (z / 85.0) ** 2, 0.0))
        radius = np.hypot(x / 68, y / 82)
        hu = np.where(radius < size + 0.09, 1000.0, -1000.0)
        hu[radius < size] = 32.0
        wall = np.abs(radius - size + 0.05) < 0.05
        hu[wall & (radius < size) & (np.sin(14 * np.arctan2(y, x)) > 0.6)] = 6.0  # sulci
        if abs(z - 20) < 18:
            for side in (-14, 14):
                hu[np.hypot((x - side) / 7, (y - 5) / 28) < 1] = 4.0
        hu[(np.hypot(x - 40, y - 30) < 14) & (radius < size - 0.1)] = 12.0  # an old infarct
        hu += rng.normal(0, NOISE_HU, hu.shape)
        slices.append(
            Slice(
                pixels=np.rint(hu + 1024).astype(np.uint16),
                rescale_intercept=-1024.0,
                geometry=SliceGeometry(
                    rows=SIDE,
                    cols=SIDE,
                    row_spacing_mm=SPACING_MM,
                    col_spacing_mm=SPACING_MM,
                    image_position_mm=(-100.0, -100.0, z),
                    col_direction=(0.0, float(np.cos(TILT)), float(-np.sin(TILT))),
                    thickness_mm=STEP_MM,
                ),
                sop_instance_uid=f"2.25.{index + 1}",
            )
        )
    return slices


def hu_of(slices: tuple[Slice, ...]) -> np.ndarray:
    return np.stack([s.host_pixels * s.rescale_slope + s.rescale_intercept for s in slices])


@pytest.fixture(scope="module")
def heads() -> RealHeads:
    return RealHeads(made_head(), "made up")


@pytest.fixture(scope="module")
def regions() -> Regions:
    slices = made_head()
    return find_regions(hu_of(tuple(slices)).astype(np.float32), slices)


def test_the_brain_is_what_the_skull_encloses(regions: Regions) -> None:
    assert regions.cavity[8, 100, 100]
    assert not regions.cavity[:, 2, 2].any()
    inside = np.pi * 68 * 82
    assert regions.cavity[8].sum() == pytest.approx(inside, rel=0.08)
    assert regions.depth_mm[8, 100, 100] == pytest.approx(66, abs=5)


def test_ventricles_sulci_and_old_infarcts_are_told_apart(regions: Regions) -> None:
    assert regions.ventricles[12, 105, 114] > 0.8
    assert regions.ventricles[12, 105, 86] > 0.8
    assert regions.ventricles[:, 130, 140].max() == 0.0
    assert regions.sulci[:, 130, 140].max() == 0.0  # the infarct
    edge = regions.sulci[8] * (regions.depth_mm[8] < 10)
    assert edge.max() > 0.8
    assert regions.tissue[8, 60, 100]


@pytest.mark.parametrize("kind", SHAPES)
def test_blood_lies_where_its_kind_belongs(regions: Regions, kind: str) -> None:
    smaller, _ = regions.cropped()
    share, _ = SHAPES[kind](smaller, np.random.default_rng(2))
    blood = (share > 0.5) & smaller.cavity
    assert blood.any()
    depth = smaller.depth_mm[blood]
    if kind in ("epidural", "subdural"):
        assert float(depth.min()) < 2.0
        assert float(depth.max()) < 18.0
    elif kind == "intraventricular":
        assert float(smaller.ventricles[blood].min()) > 0.4
    elif kind == "subarachnoid":
        assert float(smaller.sulci[blood].min()) > 0.3
    else:
        assert float(smaller.tissue[blood].mean()) > 0.9
    if kind in ("subdural", "intraparenchymal"):
        sides = smaller.grid(0.0)[0] + np.zeros(smaller.cavity.shape, np.float32)
        assert len(np.unique(np.sign(sides[blood & (np.abs(sides) > 2)]))) == 1


def test_a_pair_differs_in_blood_only_and_keeps_the_noise(heads: RealHeads) -> None:
    for seed in range(5):
        clean, bleeding = heads.pair(seed)
        before, after = hu_of(clean.slices), hu_of(bleeding.slices)
        assert bleeding.positive
        assert not clean.positive
        assert not clean.lesion_mask.any()
        blood = bleeding.lesion_mask
        assert blood.sum() > 30
        far = np.abs(after - before) > 5
        assert far.sum() < 5 * blood.sum()
        mean = after[blood].mean()
        assert BLOOD_HU[0] - 16 < mean < BLOOD_HU[1] + 8
        core = blood & (np.abs(after - before) > 15)
        steps = np.diff(after, axis=2)[core[:, :, 1:] & core[:, :, :-1]]
        deviation = float(np.median(np.abs(steps))) / 0.6745
        assert deviation == pytest.approx(NOISE_HU * np.sqrt(2), rel=0.4)
        assert {b.kind for b in bleeding.lesions} <= set(SHAPES)
        assert all(b.volume_mm3 > 300 for b in bleeding.lesions)


def test_all_kinds_come_and_the_same_seed_gives_the_same_study(heads: RealHeads) -> None:
    kinds = {b.kind for seed in range(16) for b in heads.pair(seed)[1].lesions}
    assert kinds == set(SHAPES)
    one, other = (heads.pair(3)[1] for _ in range(2))
    np.testing.assert_array_equal(hu_of(one.slices), hu_of(other.slices))
    assert one.lesions == other.lesions


def test_the_centre_of_a_bleed_is_a_voxel_of_it(heads: RealHeads) -> None:
    _, bleeding = heads.pair(1)
    bleed = bleeding.lesions[0]
    nearest = []
    for image, plane in zip(bleeding.slices, bleeding.lesion_mask, strict=True):
        g = image.geometry
        rows, cols = np.nonzero(plane)
        if len(rows):
            points = (
                np.array(g.image_position_mm)
                + cols[:, None] * g.col_spacing_mm * np.array(g.row_direction)
                + rows[:, None] * g.row_spacing_mm * np.array(g.col_direction)
            )
            nearest.append(np.linalg.norm(points - np.array(bleed.centre_mm), axis=1).min())
    assert min(nearest) < 0.01


def test_a_pair_is_stored_as_those_of_phantoms_are(heads: RealHeads, tmp_path: Path) -> None:
    data = load_settings(Path(__file__).parents[2] / "export/configs/ich-data.toml", DataSettings)
    generate.store_pair(tmp_path, 5, data.grid.to_grid(), heads)
    record = StoredStudy(tmp_path / study_name(5, positive=True)).record
    assert record.phantom["semi-synthetic"] == "made up"
    assert max(record.clot_pixels) >= data.min_pixels
    assert len(record.slab_planes) > 10


def test_what_is_no_head_is_refused() -> None:
    slices = made_head()
    hu = hu_of(tuple(slices)).astype(np.float32)
    with pytest.raises(InputError, match="inside bone"):
        find_regions(np.minimum(hu, 60.0), slices)
    with pytest.raises(InputError, match="no fluid"):
        find_regions(np.where((hu < 20) & (hu > -100), 32.0, hu).astype(np.float32), slices)
    turned = replace(slices[0].geometry, row_direction=(-1.0, 0.0, 0.0))
    with pytest.raises(InputError, match="patient's left"):
        find_regions(hu, [replace(slices[0], geometry=turned), *slices[1:]])


@pytest.mark.slow
def test_blood_in_the_real_head_is_plausible(shared_data: Path) -> None:
    slices = list(dicom.open_series(shared_data / "head_tilted", prefer_contrast=False).slices())
    heads = RealHeads(slices, "dcm_qa_ct, BSD-2")
    regions = heads.regions
    volume = float((regions.cavity * regions.voxel_ml[:, None, None]).sum())
    assert 900 < volume < 1900  # ml of an adult's brain and its fluid
    assert 5 < float((regions.ventricles * regions.voxel_ml[:, None, None]).sum()) < 120
    for seed in (2, 8):
        clean, bleeding = heads.pair(seed)
        changed = np.abs(hu_of(bleeding.slices) - hu_of(clean.slices)) > 10
        assert bleeding.lesion_mask.sum() > 500
        assert changed.sum() < 4 * bleeding.lesion_mask.sum()
        assert 40 < hu_of(bleeding.slices)[bleeding.lesion_mask].mean() < 80
