"""What the second version of the chest phantom can do; each ability is a field that can be off."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from phantoms import stored_means
from scipy.ndimage import binary_dilation

from pe_infer.phantom.acquisition import Layout, Noise
from pe_infer.phantom.chest import (
    DEFAULT,
    PhantomConfig,
    PhantomStudy,
    clots,
    generate,
    generate_pair,
    shapes,
)
from pe_infer.phantom.chest.emboli import SEGMENTAL_RADIUS_MM, Planner, choose_narrowing
from pe_infer.phantom.chest.frame import sample_frame
from pe_infer.phantom.chest.layout import sample_layout
from pe_infer.phantom.chest.lungs import grow_lungs
from pe_infer.phantom.chest.motion import Motion
from pe_infer.phantom.chest.scanner import Scanner
from pe_infer.phantom.chest.tissues import Tissues, sample_tissues
from pe_infer.phantom.chest.tree import Habit, Root, Tree, grow, narrowed
from pe_infer.phantom.raster import Capsules, Lattice, add_occupancy
from pe_infer.phantom.sampling import Draw

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
VERSION_1 = PhantomConfig.load(CONFIGS / "pe-phantom-v1.toml")
VERSION_2 = DEFAULT
SHIFTED = PhantomConfig.load(CONFIGS / "pe-shifted.toml")
DIGEST_2 = "3ed09e85c6e565757b0b3326cb09154207c308a20a0054e6709afa32cac4aa5d"
SHIFTED_DIGEST = "be3ad325947eefe81cbd5c48e3f7fe1cc6999c854e797e40d9ffed0e87175140"


def tiny(config: PhantomConfig) -> PhantomConfig:
    return dataclasses.replace(
        config,
        matrix=96,
        pixel_spacing_mm=(3.8, 3.8),
        slice_spacing_mm=(9.0, 9.0),
        thickness_per_spacing=(1.0, 1.0),
        padded_circle_probability=0.0,
        terminals_per_lung=(200, 200),
    )


PLAIN = tiny(VERSION_1)
# Of seed 1 of version 2, `tiny`; its emboli are small.
STORED_MEANS = [59, 359, 428, 165, 673, 502, 528, 720, 786, 452, 720, 836, 254, 597, 593, 312]
EVERYTHING = dataclasses.replace(
    tiny(VERSION_2),
    motion_probability=1.0,
    arms_down_probability=1.0,
    fissure_probability=1.0,
    ground_glass_probability=1.0,
    narrowed_artery_probability=1.0,
    chronic_probability=0.5,
    calcified_probability=1.0,
    distal_fade=(0.2, 0.3),
    central_probability=1.0,
    subsegmental_probability=0.0,
    smallest_embolus_mm=2.4,  # smaller ones change voxels that are not half artery
    subsegmental_emboli_max=0,
)


def hu(study: PhantomStudy) -> NDArray[np.float64]:
    return np.stack([s.pixels * s.rescale_slope + s.rescale_intercept for s in study.slices])


def tissues_of(config: PhantomConfig, seed: int = 3) -> Tissues:
    draw = Draw(seed)
    return sample_tissues(draw, config, sample_frame(draw, config))


def scanner_of(config: PhantomConfig, seed: int = 3) -> tuple[Scanner, Layout]:
    draw = Draw(seed)
    frame = sample_frame(draw, config)
    layout = sample_layout(draw, config, frame)
    return Scanner(draw, config, layout, sample_tissues(draw, config, frame), frame), layout


@pytest.fixture(scope="module")
def lung_arteries() -> Tree:
    draw = Draw(5)
    return grow_lungs(
        draw, dataclasses.replace(VERSION_2, terminals_per_lung=(500, 500)), 1.0
    ).arteries


@pytest.fixture(scope="module")
def everything() -> tuple[PhantomStudy, PhantomStudy]:
    return generate_pair(1, EVERYTHING)


@pytest.fixture(scope="module")
def plain() -> PhantomStudy:
    return generate(3, positive=False, config=PLAIN)


def test_configurations_are_those_that_were_committed_before_training() -> None:
    assert VERSION_2.digest() == DIGEST_2
    assert SHIFTED.digest() == SHIFTED_DIGEST


def test_later_fields_count_in_the_digest_as_soon_as_they_change_something() -> None:
    assert dataclasses.replace(VERSION_1, chest_shape=(0.0, 0.0)).digest() == VERSION_1.digest()
    assert dataclasses.replace(VERSION_1, chest_shape=(0.0, 0.1)).digest() != VERSION_1.digest()


def test_studies_of_the_default_look_as_they_did_when_it_was_committed() -> None:
    pair = generate_pair(1, tiny(VERSION_2))
    for study in pair:
        assert stored_means(study.slices) == pytest.approx(STORED_MEANS, abs=1.5)
    assert pair[1].embolus_mask.sum() == pytest.approx(27, abs=3)


def test_with_everything_on_a_pair_differs_only_at_the_emboli(
    everything: tuple[PhantomStudy, PhantomStudy],
) -> None:
    negative, positive = everything
    assert negative.parameters == positive.parameters
    assert positive.emboli
    change = hu(positive) - hu(negative)
    near = binary_dilation(positive.artery_mask | positive.embolus_mask, np.ones((3, 7, 7)))
    assert change.any()
    assert not change[~near].any()


def test_the_negative_does_not_know_whether_a_positive_is_made(
    everything: tuple[PhantomStudy, PhantomStudy],
) -> None:
    alone = generate(1, positive=False, config=EVERYTHING)
    np.testing.assert_array_equal(hu(alone), hu(everything[0]))
    assert alone.parameters == everything[0].parameters


def test_the_truth_sums_volumes_by_kind(everything: tuple[PhantomStudy, PhantomStudy]) -> None:
    volumes = everything[1].truth()["volume_mm3_by_kind"]
    assert set(volumes) == {e.kind for e in everything[1].emboli}
    assert sum(volumes.values()) == pytest.approx(sum(e.volume_mm3 for e in everything[1].emboli))
    assert everything[0].truth()["volume_mm3_by_kind"] == {}


@pytest.mark.parametrize(
    "change",
    [
        {"chest_shape": (1.0, 1.0)},
        {"arms_down_probability": 1.0},
        {"fissure_probability": 1.0},
        {"narrowed_artery_probability": 1.0},
        {"hilar_nodes_max": 12},
        {"plug_chains_max": 12},
        {"ground_glass_probability": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_field_of_the_patient_changes_negatives(
    change: dict[str, object], plain: PhantomStudy
) -> None:
    other = generate(3, positive=False, config=PhantomConfig(**PLAIN.to_mapping() | change))  # type: ignore[arg-type]  # any field
    difference = hu(other) - hu(plain)
    assert np.abs(difference).max() > 15
    if change.keys() & {"fissure_probability", "ground_glass_probability"}:
        assert difference.mean() > 0
        assert difference[np.abs(difference) > 3].min() > -60


def test_neighbouring_slices_have_like_noise_if_asked_for() -> None:
    for bounds, expected in (((0.0, 0.0), 0.0), ((0.6, 0.6), 0.6)):
        scanner, _ = scanner_of(dataclasses.replace(PLAIN, noise_z_correlation=bounds))
        first, second = (scanner.noise(k).ravel() for k in (0, 1))
        assert np.corrcoef(first, second)[0, 1] == pytest.approx(expected, abs=0.1)
        assert second.std() == pytest.approx(first.std(), rel=0.15)


def test_a_sharp_kernel_has_more_noise_if_asked_for() -> None:
    sharp = dataclasses.replace(PLAIN, kernel_sharpness=(1.0, 1.0))
    few, many = (
        scanner_of(dataclasses.replace(sharp, noise_kernel_gain=gain))[0].noise(0).std()
        for gain in (0.0, 1.0)
    )
    assert many / few == pytest.approx(np.exp(0.6), rel=1e-4)


def test_noise_is_lower_in_the_lungs_if_asked_for() -> None:
    config = dataclasses.replace(PLAIN, noise_lung_drop=(0.4, 0.4))
    flat, uneven = (scanner_of(c)[0] for c in (PLAIN, config))
    assert (flat.uneven, uneven.uneven) == (False, True)
    air = np.ones((96, 96), np.float32)
    np.testing.assert_allclose(uneven.noise(0, air), 0.6 * flat.noise(0), rtol=1e-5)


def test_iterative_reconstruction_makes_noise_coarse() -> None:
    def fine_share(strength: float) -> float:
        noise = Noise(np.random.default_rng(1), 128, 0.7, 0.3, strength)
        power = np.abs(np.fft.fft2(noise.slice(np.random.default_rng(2)))) ** 2
        cycles = np.hypot(*np.meshgrid(*[np.fft.fftfreq(128, 0.7)] * 2))
        return float(power[cycles > 0.25].sum() / power.sum())

    assert fine_share(1.0) < 0.5 * fine_share(0.0)


def test_arms_beside_the_trunk_bring_streaks() -> None:
    config = dataclasses.replace(PLAIN, arms_down_probability=1.0)
    up, down = (scanner_of(c)[0].noise(0) for c in (PLAIN, config))
    rows_alike = [np.corrcoef(n[:, :-12].ravel(), n[:, 12:].ravel())[0, 1] for n in (up, down)]
    assert down.std() > 1.1 * up.std()
    assert rows_alike[1] > rows_alike[0] + 0.02


def test_breathing_shows_part_of_the_patient_twice() -> None:
    config = dataclasses.replace(PLAIN, motion_probability=1.0, motion_mm=(8.0, 8.0))
    draw = Draw(3)
    frame = sample_frame(draw, config)
    layout = sample_layout(draw, config, frame)
    motion = Motion.of(draw, config, layout, frame)
    moved = int(motion.share.argmax())
    assert 0 < np.count_nonzero(motion.share) < len(motion.share)
    point = np.zeros((20, 20), np.float32)
    point[10, 10] = 100
    seen = motion.apply(point, moved)
    assert np.count_nonzero(seen) == 2
    assert seen.sum() == pytest.approx(100)
    assert motion.apply(point, int(motion.share.argmin())) is point
    still = Motion.of(Draw(3), PLAIN, layout, frame)
    assert not still.share.any()


def test_the_chest_of_measured_shape_is_a_map_that_can_be_undone() -> None:
    points = np.random.default_rng(0).uniform((-120, -90, -150), (120, 100, 90), (200, 3))
    there = shapes.measured(points, 1.0)
    np.testing.assert_allclose(shapes.oval(there.astype(np.float32), 1.0), points, atol=0.05)
    beside_the_spine = np.array([[55.0, 103.0, -20.0]], np.float32)
    assert shapes.cage_level(beside_the_spine, 1)[0] > 1
    assert shapes.cage_level(shapes.oval(beside_the_spine, 1.0), 1)[0] < 1
    assert shapes.arch_level(beside_the_spine)[0] > 0
    assert shapes.arch_level(np.array([[0.0, 100.0, -20.0]], np.float32))[0] < 0


def test_habits_of_a_tree() -> None:
    targets = np.random.default_rng(1).uniform(-40, 40, (300, 3)).astype(np.float32)
    root = Root(label="all", start=(90, 0, 0), radius_mm=9, targets=targets)
    usual, early, tapered, curved = (
        grow([root], 0.5, np.random.default_rng(2), habit)
        for habit in (Habit(), Habit(early=0.7), Habit(exponent=2.5), Habit(curve=1.0))
    )

    def first_division_mm(tree: Tree) -> float:
        children = np.bincount(tree.parent[tree.parent >= 0])
        return float(np.linalg.norm(tree.end[np.flatnonzero(children > 1)[0]] - root.start))

    assert first_division_mm(early) < 0.5 * first_division_mm(usual)
    assert tapered.radius_mm.max() > 1.5 * usual.radius_mm.max()
    lengths = [float(np.linalg.norm(t.end - t.start, axis=1).sum()) for t in (usual, curved)]
    assert lengths[1] > 1.01 * lengths[0]


def test_a_narrowing_thins_what_lies_behind_it_and_nothing_else(lung_arteries: Tree) -> None:
    config = dataclasses.replace(VERSION_2, narrowed_artery_probability=1.0)
    chosen = choose_narrowing(Draw(4), config, lung_arteries)
    assert chosen is not None
    segment, factor = chosen
    thin = narrowed(lung_arteries, segment, factor)
    ratio = thin.radius_mm / lung_arteries.radius_mm
    behind = ratio < 0.99
    assert behind[segment]
    np.testing.assert_allclose(ratio[behind], factor, rtol=1e-5)
    for k in np.flatnonzero(behind):
        assert k == segment or behind[thin.parent[k]]
    assert thin.start_radius_mm[segment] == lung_arteries.start_radius_mm[segment]
    assert choose_narrowing(Draw(4), VERSION_1, lung_arteries) is None


def test_in_a_late_phase_all_vessels_are_alike() -> None:
    late = tissues_of(dataclasses.replace(VERSION_2, late_phase_probability=1.0)).blood
    artery = late["artery"][0]
    assert 125 <= artery <= 230
    for name in ("aorta", "cava", "veins", "atrium_left", "ventricle_right"):
        assert late[name][0] == pytest.approx(artery, rel=0.13)


def test_poor_opacification_is_what_the_parameters_say() -> None:
    config = dataclasses.replace(
        PLAIN, poor_opacification_probability=1.0, poor_artery_hu=(110.0, 120.0)
    )
    draw = Draw(3)
    blood = sample_tissues(draw, config, sample_frame(draw, config)).blood
    assert 110 <= blood["artery"][0] <= 120
    assert draw.values["artery_hu"] == blood["artery"][0]
    usual = tissues_of(PLAIN).blood
    assert blood["aorta"] == usual["aorta"]
    assert blood["ventricle_right"][0] < usual["ventricle_right"][0]


def test_contrast_that_has_not_arrived_is_missing() -> None:
    tissues = dataclasses.replace(tissues_of(PLAIN), slow_flow=0.0)
    even = np.zeros(3, np.float32)
    arrived = np.array([1.0, 0.5, 0.0], np.float32)
    full = float(tissues.artery_hu(even)[0])
    assert tissues.artery_hu(even, arrived).tolist() == pytest.approx(
        [full, full / 2, tissues.unopacified_hu]
    )


def path_of(radius: float) -> NDArray[np.float64]:
    z = np.linspace(-9, 9, 7)
    return np.stack([0 * z, 0 * z, z, 0 * z + radius], 1)


def lumen_share(capsules: Capsules, channel: Capsules | None) -> NDArray[np.float32]:
    """(z, y, x) of the clot in a straight artery of 5 mm radius along z."""
    lattice = Lattice(origin_mm=(-5, -5, -21), step_mm=(0.25, 0.25, 1.0), shape=(43, 41, 41))
    inside, free = np.zeros((2, *lattice.shape), np.float32)
    add_occupancy(inside, capsules, lattice, 0.25)
    if channel is not None:
        add_occupancy(free, channel, lattice, 0.25)
    lumen = np.hypot(lattice.axis(0)[None, :], lattice.axis(1)[:, None]) < 5
    return np.asarray(inside * (1 - free) * lumen, np.float32)


def test_a_mural_thrombus_is_a_crescent_with_a_channel_beside_it() -> None:
    for seed in range(5):
        share = lumen_share(*clots.mural(path_of(5.0), np.random.default_rng(seed)))
        area = share.sum((1, 2)) * 0.25**2 / (np.pi * 25)
        assert 0.2 < area[21] < 0.75  # in the middle
        assert area[16] < area[21] + 0.02  # tapering towards the ends
        assert area[[4, 38]].max() < 0.05  # beyond them no shell is left
        middle = share[21] > 0.5
        ring = np.hypot(*np.meshgrid(*[np.linspace(-5, 5, 41)] * 2))
        wall = middle[(ring > 4.4) & (ring < 4.8)].mean()
        assert 0.25 < wall < 0.97  # a broad base on one wall, and free wall opposite


def test_a_web_is_a_band_with_blood_on_both_sides() -> None:
    share = lumen_share(clots.web(path_of(5.0), np.random.default_rng(1)), None)
    area = share.sum((1, 2)) * 0.25**2 / (np.pi * 25)
    assert 0.02 < area[21] < 0.25


def test_plans_follow_the_shares_of_chronic_and_subsegmental_emboli(lung_arteries: Tree) -> None:
    def plans(**change: float) -> list[clots.EmbolusPlan]:
        config = PhantomConfig(**VERSION_2.to_mapping() | change)  # type: ignore[arg-type]  # any field
        found: list[clots.EmbolusPlan] = []
        for seed in range(12):
            draw = Draw(seed)
            planner = Planner(
                draw,
                config,
                sample_frame(draw, config),
                lung_arteries,
                vessel_scale=1.0,
                visible_mm=0.9,
                narrowing=None,
            )
            found += planner.plan()
        return found

    small = plans(subsegmental_probability=1.0, chronic_probability=0.0)
    assert {p.place.rsplit(" ", 1)[1] for p in small} == {"subsegmental"}
    tips = [float(p.capsules.end_radius_mm.max()) for p in small if p.kind == "occlusive"]
    assert min(tips) < 1.3 * SEGMENTAL_RADIUS_MM
    fresh = plans(subsegmental_probability=0.0, chronic_probability=0.0)
    assert not {p.kind for p in fresh} & set(clots.CHRONIC_KINDS)
    old = plans(subsegmental_probability=0.0, chronic_probability=1.0, calcified_probability=1.0)
    assert np.mean([p.kind in clots.CHRONIC_KINDS for p in old]) > 0.8
    assert all((p.calcium is not None) == (p.kind == "mural") for p in old)
    assert {p.kind for p in old} >= {"mural", "web"}


def test_calcium_in_an_old_thrombus_is_brighter_than_the_thrombus() -> None:
    rng = np.random.default_rng(0)
    clot, _ = clots.mural(path_of(5.0), rng)
    lime = clots.calcified(path_of(5.0), clot, rng)
    assert len(lime) == 2
    assert lime.start_radius_mm.max() < 2
    assert max(VERSION_2.embolus_hu) < clots.CALCIUM_HU
