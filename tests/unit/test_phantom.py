"""The synthetic studies: repeatable, paired, and true to their own ground truth."""

import dataclasses
import json
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from phantoms import stored_means
from scipy.ndimage import binary_dilation

from pe_infer.errors import ConfigurationError
from pe_infer.phantom.acquisition import Layout, apply_kernel
from pe_infer.phantom.chest import DEFAULT, PhantomConfig, PhantomStudy, generate, generate_pair
from pe_infer.phantom.chest.tree import Root, grow
from pe_infer.phantom.raster import Capsules, Lattice, Upsampler, add_occupancy
from pe_infer.phantom.sampling import Draw, stream
from pe_infer.phantom.truth import distance_mm, mask_voxels_mm

VERSION_1 = PhantomConfig.load(
    Path(__file__).parents[2] / "export" / "configs" / "pe-phantom-v1.toml"
)
SMALL = dataclasses.replace(
    VERSION_1,
    matrix=128,
    pixel_spacing_mm=(2.6, 2.9),
    slice_spacing_mm=(5.0, 5.0),
    thickness_per_spacing=(1.0, 1.0),
    noise_hu=(8.0, 12.0),
    padded_circle_probability=0.0,
)
SEEDS = (1, 2, 3)
CONFIGURATION_DIGEST = "aabd5ab174d290f8ded75879d094f4777feb2ed537f9350673693640d6f92c6c"
STORED_MEANS = (  # of seed 1, without and with emboli
    [110, 348, 420, 275, 866, 568, 606, 790, 914, 572, 789, 875, 168, 354, 334, 165],
    [110, 348, 420, 275, 866, 568, 603, 790, 914, 572, 785, 875, 168, 354, 334, 165],
)
# Of version 1 of the generator: slices, mean HU of the negative study, places and HU of the emboli,
# embolus and artery voxels.
KNOWN = {
    1: (
        60,
        -487.2,
        [
            "left interlobar",
            "right upper segmental",
            "right lower segmental",
            "left lower segmental",
            "right lower segmental",
            "left lower segmental",
        ],
        [50.24, 36.37, 50.05, 61.28, 70.75, 54.57],
        377,
        4665,
    ),
    2: (
        58,
        -547.3,
        ["right truncus", "left upper segmental", "left lower segmental"],
        [40.87, 71.22, 77.23],
        139,
        5254,
    ),
    3: (
        65,
        -409.0,
        ["right lower lobar", "right upper lobar", "left lower lobar"],
        [74.76, 65.37, 39.3],
        139,
        5201,
    ),
}


@pytest.fixture(scope="module")
def pairs() -> dict[int, tuple[PhantomStudy, PhantomStudy]]:
    return {seed: generate_pair(seed, SMALL) for seed in SEEDS}


def hu(study: PhantomStudy) -> NDArray[np.float64]:
    return np.stack([s.pixels * s.rescale_slope + s.rescale_intercept for s in study.slices])


def test_the_same_seed_gives_the_same_study(
    pairs: dict[int, tuple[PhantomStudy, PhantomStudy]],
) -> None:
    for positive in (False, True):
        again = generate(1, positive=positive, config=SMALL)
        first = pairs[1][positive]
        np.testing.assert_array_equal(hu(again), hu(first))
        np.testing.assert_array_equal(again.embolus_mask, first.embolus_mask)
        assert again.emboli == first.emboli
        assert again.parameters == first.parameters
        assert [s.sop_instance_uid for s in again.slices] == [
            s.sop_instance_uid for s in first.slices
        ]


def test_different_seeds_give_different_patients(
    pairs: dict[int, tuple[PhantomStudy, PhantomStudy]],
) -> None:
    drawn = [pairs[seed][0].parameters for seed in SEEDS]
    for name in ("artery_hu", "body_scale", "noise_hu", "pixel_spacing_mm", "shift_z_mm"):
        assert len({values[name] for values in drawn}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_differs_only_at_the_emboli(
    seed: int, pairs: dict[int, tuple[PhantomStudy, PhantomStudy]]
) -> None:
    negative, positive = pairs[seed]
    assert not negative.positive
    assert not negative.emboli
    assert not negative.embolus_mask.any()
    assert positive.positive
    assert positive.emboli
    assert negative.parameters == positive.parameters
    change = hu(positive) - hu(negative)
    # Partial voxels reach one pixel beyond the mask in the slice, and one slice up and down; the
    # kernel adds one pixel.
    near = binary_dilation(positive.artery_mask | positive.embolus_mask, np.ones((3, 5, 5)))
    assert not change[~near].any()
    inside = change[positive.embolus_mask]
    assert inside.mean() < -30


@pytest.mark.parametrize("seed", SEEDS)
def test_emboli_lie_in_arteries_and_in_the_mask(
    seed: int, pairs: dict[int, tuple[PhantomStudy, PhantomStudy]]
) -> None:
    study = pairs[seed][1]
    assert not (study.embolus_mask & ~study.artery_mask).any()
    g = study.slices[0].geometry
    z = np.array([s.geometry.image_position_mm[2] for s in study.slices])
    for embolus in study.emboli:
        x_mm, y_mm, z_mm = embolus.centre_mm
        col = round((x_mm - g.image_position_mm[0]) / g.col_spacing_mm)
        row = round((y_mm - g.image_position_mm[1]) / g.row_spacing_mm)
        assert study.embolus_mask[int(np.abs(z - z_mm).argmin()), row, col]
        assert embolus.volume_mm3 > 0
        assert SMALL.embolus_hu[0] <= embolus.hu <= SMALL.embolus_hu[1]
    volumes = [e.volume_mm3 for e in study.emboli]
    assert volumes == sorted(volumes, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_tissue_has_plausible_hounsfield_units(
    seed: int, pairs: dict[int, tuple[PhantomStudy, PhantomStudy]]
) -> None:
    study = pairs[seed][0]
    values = hu(study)
    assert values.min() >= -1024
    assert values.max() <= 3071
    rows, cols = (np.flatnonzero(study.artery_mask.any((0, axis))) for axis in (2, 1))
    lung = (values > -950) & (values < -500)
    lung[:, : rows[0] - 10] = lung[:, rows[-1] + 10 :] = False  # the core of the table is no lung
    lung[:, :, : cols[0] - 10] = lung[:, :, cols[-1] + 10 :] = False
    assert lung.mean(axis=(1, 2)).max() > 0.08
    voxel_ml = study.slices[0].geometry.col_spacing_mm ** 2 * 5.0 / 1000
    assert 1500 < lung.sum() * voxel_ml < 9000
    # Whole pixels of lumen: narrower ones share their voxels with the lung.
    lumen = ~binary_dilation(~study.artery_mask, np.ones((1, 3, 3)))
    assert abs(np.median(values[lumen]) / float(study.parameters["artery_hu"]) - 1) < 0.2
    assert values[:, 0, :].mean() < -800  # air in front of the patient


@pytest.mark.parametrize("seed", SEEDS)
def test_slices_form_one_ascending_series(
    seed: int, pairs: dict[int, tuple[PhantomStudy, PhantomStudy]]
) -> None:
    negative, positive = pairs[seed]
    positions = np.array([s.position_um for s in positive.slices])
    assert set(np.diff(positions)) == {5000}
    assert {s.geometry.rows for s in positive.slices} == {128}
    assert len({s.series for s in positive.slices}) == 1
    uids = {s.sop_instance_uid for study in (negative, positive) for s in study.slices}
    assert len(uids) == 2 * len(positions)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    series = positive.slices[0].series
    assert (series.modality, series.body_part_examined) == ("CT", "CHEST")
    assert series.patient_position == "HFS"
    masks = positive.mask_slices()
    assert [m.position_um for m in masks] == [s.position_um for s in positive.slices]
    np.testing.assert_array_equal(
        np.stack([m.pixels for m in masks]), positive.embolus_mask * np.int16(1000)
    )


def test_padding_leaves_the_pixels_inside_the_circle_alone() -> None:
    coarse = dataclasses.replace(SMALL, slice_spacing_mm=(20.0, 20.0))
    padded = dataclasses.replace(coarse, padded_circle_probability=1.0)
    plain, circled = (generate(4, positive=False, config=c) for c in (coarse, padded))
    for a, b in zip(plain.slices, circled.slices, strict=True):
        assert b.padding is not None
        inside = b.pixels != b.padding[0]
        assert 0.7 < inside.mean() < 0.85
        np.testing.assert_array_equal(a.pixels[inside], b.pixels[inside])


def test_embolus_voxels_are_those_of_the_mask_in_patient_coordinates(
    pairs: dict[int, tuple[PhantomStudy, PhantomStudy]],
) -> None:
    negative, positive = pairs[1]
    voxels = mask_voxels_mm(positive.slices, positive.embolus_mask)
    assert voxels.shape == (int(positive.embolus_mask.sum()), 3)
    for embolus in positive.emboli:
        assert distance_mm(voxels, embolus.centre_mm) < 1e-3
    x, y, z = voxels[0].tolist()
    far = distance_mm(voxels[:1], (x + 3.0, y, z - 4.0))
    assert far == pytest.approx(5.0, rel=1e-4)
    assert distance_mm(mask_voxels_mm(negative.slices, negative.embolus_mask), (x, y, z)) == float(
        "inf"
    )


def test_a_seed_means_the_same_patient_as_ever(
    pairs: dict[int, tuple[PhantomStudy, PhantomStudy]],
) -> None:
    """Data were generated with it: what it draws may not change (rounding may, by machine)."""
    found = {}
    for seed in SEEDS:
        negative, positive = pairs[seed]
        found[seed] = (
            len(positive.slices),
            round(float(hu(negative).mean()), 1),
            [e.place for e in positive.emboli],
            [round(e.hu, 2) for e in positive.emboli],
            int(positive.embolus_mask.sum()),
            int(positive.artery_mask.sum()),
        )
    for seed, (slices, mean_hu, places, embolus_hu, clot, artery) in found.items():
        known = KNOWN[seed]
        assert (slices, places) == (known[0], known[2])
        assert mean_hu == pytest.approx(known[1], abs=0.2)
        assert embolus_hu == pytest.approx(known[3], abs=0.02)
        assert clot == pytest.approx(known[4], abs=3)
        assert artery == pytest.approx(known[5], rel=1e-3)


def test_studies_are_what_the_first_training_saw(
    pairs: dict[int, tuple[PhantomStudy, PhantomStudy]],
) -> None:
    """Configuration and appearance of version 1, but for the rounding of another processor."""
    assert VERSION_1.digest() == CONFIGURATION_DIGEST
    for study, means, clot in zip(pairs[1], STORED_MEANS, (0, 377), strict=True):
        assert stored_means(study.slices) == pytest.approx(means, abs=1.5)
        assert study.embolus_mask.sum() == pytest.approx(clot, rel=0.02)
        assert study.artery_mask.sum() == pytest.approx(4665, rel=0.02)


def test_a_slice_spacing_can_be_asked_for() -> None:
    config = dataclasses.replace(
        SMALL, slice_spacing_mm=(12.5, 12.5), thickness_per_spacing=(1.2, 1.2)
    )
    study = generate(5, positive=False, config=config)
    assert study.slices[0].geometry.thickness_mm == pytest.approx(15.0)
    assert study.slices[1].position_um - study.slices[0].position_um == 12_500


def test_voxels_too_large_for_any_embolus_are_refused() -> None:
    config = dataclasses.replace(
        SMALL,
        matrix=64,
        pixel_spacing_mm=(8.0, 8.0),
        slice_spacing_mm=(120.0, 120.0),
        central_probability=0.0,
        lobar_probability=0.0,
    )
    with pytest.raises(ConfigurationError, match="smaller voxels"):
        generate(6, positive=True, config=config)


def test_the_default_configuration_is_the_committed_file() -> None:
    text = resources.files("pe_infer.phantom.chest").joinpath("default.toml").read_text("utf-8")
    assert PhantomConfig.from_mapping(tomllib.loads(text), "default.toml") == DEFAULT


def test_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    changed = dataclasses.replace(DEFAULT, slice_spacing_mm=(1.0, 1.0), nodules_max=0)
    path = tmp_path / "phantom.json"
    path.write_text(json.dumps(changed.to_mapping()), encoding="utf-8")
    assert PhantomConfig.load(path) == changed
    assert PhantomConfig.load(path).digest() == changed.digest() != DEFAULT.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": 512.5}, "whole number"),
        ({"noise_hu": 5.0}, "pair of numbers"),
        ({"noise_hu": [9.0, 5.0]}, "low <= high"),
        ({"effusion_probability": 1.5}, "between 0 and 1"),
        ({"colour": "grey"}, "colour"),
        ({"artery_hu": ["a", "b"]}, "artery_hu"),
        ({"matrix": 32}, "at least 64"),
        ({"slice_spacing_mm": [0.1, 1.0]}, r"at least 0\.3 mm"),
    ],
)
def test_a_wrong_configuration_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "phantom.json"
    path.write_text(json.dumps(DEFAULT.to_mapping() | change), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        PhantomConfig.load(path)


def test_an_unreadable_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "phantom.toml"
    path.write_text("matrix = = 3", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"phantom\.toml"):
        PhantomConfig.load(path)


def test_a_new_choice_leaves_the_others_alone() -> None:
    draw = Draw(7)
    draw.uniform("new", (0, 1))
    assert draw.uniform("old", (0, 1)) == Draw(7).uniform("old", (0, 1))
    assert stream(7, "a").uniform() != stream(7, "b").uniform()
    assert stream(7, "a").uniform() != stream(8, "a").uniform()


def test_capsule_occupancy_adds_up_to_its_volume() -> None:
    lattice = Lattice(origin_mm=(-12, -12, -12), step_mm=(0.5, 0.5, 0.5), shape=(49, 49, 49))
    out = np.zeros(lattice.shape, np.float32)
    start, end = np.array([-4, 1, 0.3]), np.array([4, 2, -1.2])
    middle = (start + end) / 2
    caps = Capsules.of(np.stack([start, middle]), np.stack([end, middle]), 3.0, 3.0)
    add_occupancy(out, caps, lattice, 0.5)
    length = float(np.linalg.norm(end - start))
    expected = np.pi * 9 * length + 4 / 3 * np.pi * 27  # the ball adds nothing: no sum, a union
    assert out.sum() * 0.125 == pytest.approx(expected, rel=0.03)
    assert out.max() == 1


def test_many_capsules_equal_one_by_one() -> None:
    rng = np.random.default_rng(0)
    a = rng.uniform(-10, 10, (60, 3))
    caps = Capsules.of(a, a + rng.uniform(-4, 4, (60, 3)), rng.uniform(0.4, 2, 60), 0.7)
    lattice = Lattice(origin_mm=(-9, -8, -7), step_mm=(0.8, 0.8, 1.2), shape=(12, 21, 23))
    together, single = np.zeros(lattice.shape, np.float32), np.zeros(lattice.shape, np.float32)
    add_occupancy(together, caps, lattice, 0.8)
    for k in range(60):
        add_occupancy(single, caps[slice(k, k + 1)], lattice, 0.8)
    np.testing.assert_allclose(together, single, atol=1e-5)


def test_upsampling_reproduces_a_linear_field() -> None:
    lattice = Lattice(origin_mm=(-20, -10, 0), step_mm=(4, 4, 4), shape=(5, 9, 12))
    z, y, x = np.meshgrid(*(lattice.axis(k) for k in (2, 1, 0)), indexing="ij")
    field = (0.3 * x - 0.2 * y + 0.1 * z).astype(np.float32)
    pixel_x, pixel_y = np.arange(-15, 15, 0.7), np.arange(-8, 18, 0.7)
    up = Upsampler(lattice, pixel_x, pixel_y)
    plane = up.plane(field, 6.5)
    box = up.box(plane, 0.0)
    assert box is not None
    exact = 0.3 * pixel_x[None, :] - 0.2 * pixel_y[:, None] + 0.65
    np.testing.assert_allclose(up.up(plane, box), exact[box], atol=1e-4)
    outside = np.ones_like(exact, bool)
    outside[box] = False
    assert not (exact[outside] < 0).any()
    assert up.box(plane, -1e3) is None


def test_a_tree_serves_every_end_point_and_thins_out() -> None:
    rng = np.random.default_rng(1)
    targets = rng.uniform(-40, 40, (150, 3)).astype(np.float32)
    empty = np.zeros((0, 3), np.float32)
    roots = [
        Root(label="none", start=(0, 0, 0), radius_mm=4, targets=empty),
        Root(label="all", start=(60, 0, 0), radius_mm=4, targets=targets),
    ]
    tree = grow(roots, 0.6, rng)
    for target in targets:
        assert np.linalg.norm(tree.end - target, axis=1).min() < 1e-3
    child = tree.parent >= 0
    np.testing.assert_allclose(tree.start[child], tree.end[tree.parent[child]], atol=1e-3)
    assert (tree.radius_mm[child] <= tree.radius_mm[tree.parent[child]] + 1e-6).all()
    assert tree.radius_mm.min() == pytest.approx(0.6, rel=1e-5)
    assert set(tree.root) == {1}


def test_slice_profile_covers_the_thickness() -> None:
    layout = Layout(
        matrix=64,
        pixel_mm=1.0,
        first_pixel_mm=(0.0, 0.0),
        z_mm=np.arange(0.0, 10.0, 2.0),
        spacing_mm=2.0,
        thickness_mm=3.0,
        subplane_mm=1.0,
        first_subplane_mm=-0.5,
    )
    for index in range(5):
        first, weights = layout.profile(index)
        planes = -0.5 + first + np.arange(len(weights))
        assert weights.sum() == pytest.approx(1)
        assert (planes * weights).sum() == pytest.approx(layout.z_mm[index])
        assert len(weights) == 4


@pytest.mark.parametrize("amount", [-0.16, 0.0, 0.2])
def test_the_kernel_keeps_the_mean(amount: float) -> None:
    image = np.random.default_rng(2).normal(size=(30, 40)).astype(np.float32)
    image[[0, -1]] = image[:, [0, -1]] = 0
    image[1, :] = image[-2, :] = image[:, 1] = image[:, -2] = 0
    assert apply_kernel(image, amount).sum() == pytest.approx(image.sum(), abs=1e-3)
    np.testing.assert_allclose(apply_kernel(np.full((5, 6), 7, np.float32), amount), 7, rtol=1e-5)
