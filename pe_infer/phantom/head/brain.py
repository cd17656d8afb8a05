"""The brain of one patient: fields on the coarse lattice, and thin structures as capsules."""

from dataclasses import dataclass

import numpy as np

from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.fields import (
    Fields,
    Point,
    both_sides,
    bump,
    largest,
    smallest,
    table,
    union,
)
from pe_infer.phantom.head.skull import Skull, vault_point
from pe_infer.phantom.raster import F32, Capsules
from pe_infer.phantom.sampling import Draw

_FOLD_WAVES = 28
_FOLD_RADIUS = 72.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Brain:
    """Fields on the coarse lattice, (w, v, u) float32; distances in mm, negative inside.

    Attributes:
        gap: Width of the space between inner table and brain.
        fold: Signed distance to the middle of the nearest sulcus.
        fold_half: Half the width of a sulcus; negative where there is none.
        midline: Signed distance to the middle of the falx, which sways a little.
        ventricle: Ventricles.
        cistern: Cisterns of the base and around the brain stem.
        stem: Midbrain, pons, medulla, cord.
        nuclei: Caudate, lentiform nucleus, thalamus.
        tentorium: Height above the tentorium; negative below it.
        infra: Where the posterior fossa's content lies.
        cerebellum: Its surface.
        infarct: Old infarcts; None without any.
        pale: How much darker the white matter is, HU.
    """

    gap: F32
    fold: F32
    fold_half: F32
    midline: F32
    ventricle: F32
    cistern: F32
    stem: F32
    nuclei: F32
    tentorium: F32
    infra: F32
    cerebellum: F32
    infarct: F32 | None
    pale: F32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides the looks of a brain.

    Attributes:
        age_years: Of the patient.
        sulcus_mm: Half the width of a typical sulcus.
        ventricle_scale: 1 = a middle-aged adult.
        falx_mm: Half the thickness of the falx.
        tentorium_mm: Half the thickness of the tentorium.
        cortex_mm: Thickness of the gray matter.
        sylvian_mm: Half the width of the Sylvian fissure.
        fissure_mm: Half the width of the fissure between the hemispheres.
    """

    age_years: float
    sulcus_mm: float
    ventricle_scale: float
    falx_mm: float
    tentorium_mm: float
    cortex_mm: float
    sylvian_mm: float
    fissure_mm: float


def sample_shape(draw: Draw, config: HeadConfig) -> Shape:
    """Draw the age, and what mostly follows from it."""
    age = draw.uniform("age_years", config.age_years)
    old = float(np.clip((age - 30) / 55, 0, 1.1))
    return Shape(
        age_years=age,
        sulcus_mm=draw.uniform("sulcus_mm", (0.3, 0.65))
        + old * draw.uniform("atrophy", (0.1, 0.9)),
        ventricle_scale=(
            draw.uniform("ventricle_scale", (0.9, 1.35)) + old * draw.uniform("wide", (0.05, 0.9))
        ),
        falx_mm=draw.uniform("falx_mm", (0.3, 0.6)),
        tentorium_mm=draw.uniform("tentorium_mm", (0.35, 0.7)),
        cortex_mm=draw.uniform("cortex_mm", (2.5, 3.3)),
        sylvian_mm=draw.uniform("sylvian_mm", (0.5, 1.2))
        + old * draw.uniform("sylvian_old", (0.2, 2)),
        fissure_mm=draw.uniform("fissure_mm", (0.5, 1.0)) + 0.8 * old,
    )


def sylvian_height(y: F32) -> F32:
    """Height of the Sylvian fissure on the side of the brain."""
    return np.asarray(-11 + 0.32 * (y + 36), np.float32)


def tentorium_height(ax: F32, y: F32) -> F32:
    """Height of the tentorium behind the petrous ridges."""
    middle = table(y, ((8, 3), (24, 7), (34, 8), (60, -1), (88, -14)))
    drop = table(y, ((10, 0.015), (30, 0.014), (50, 0.0075), (84, 0.0008)))
    return np.asarray(middle - drop * ax * ax, np.float32)


def _folds(draw: Draw, f: Fields) -> tuple[F32, F32]:
    """Signed distance to the nearest sulcus, and noise of the same kind that varies slowly."""
    rng = draw.rng("folds")
    centre_y, centre_z = 4.0, -4.0
    y, z = f.y - centre_y, f.z - centre_z
    radius = np.sqrt(f.x * f.x + y * y * 0.68 + z * z + 9)
    # On a sphere, so that sulci run inwards; lengths along y shrink to it.
    scale = np.float32(_FOLD_RADIUS) / radius
    q = (f.x * scale, y * np.float32(0.82) * scale, z * scale)
    heading = rng.standard_normal((_FOLD_WAVES, 3))
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    number = 2 * np.pi / rng.uniform(17.0, 27.0, _FOLD_WAVES)
    phase = rng.uniform(0, 2 * np.pi, _FOLD_WAVES)
    level = np.zeros_like(radius)
    slow = np.zeros_like(radius)
    for k in range(_FOLD_WAVES):
        along = sum(q[i] * np.float32(heading[k, i]) for i in range(3))
        level += np.cos(along * np.float32(number[k]) + np.float32(phase[k]))
        if k < 8:
            slow += np.cos(along * np.float32(number[k] * 0.45) + np.float32(2 * phase[k]))
    fold = f.normalised(level, 0.02 * float(np.sqrt(_FOLD_WAVES)))
    return np.clip(fold, -12, 12), np.asarray(slow / 2, np.float32)


def _ventricles(draw: Draw, f: Fields, size: float, nuclei: F32) -> F32:
    parts: list[Capsules] = []
    for side, name in ((1.0, "left"), (-1.0, "right")):
        s = size * draw.uniform(f"{name}_ventricle", (0.88, 1.12))
        low = draw.uniform(f"{name}_occipital_horn", (0.2, 1.1))

        def chain(points: list[Point], radii: list[float], side: float = side) -> Capsules:
            return Capsules.chain([(side * x, y, z) for x, y, z in points], radii)

        parts += [
            chain(
                [(9, -41, 6), (6.5, -31, 12), (5, -18, 18), (6.5, -2, 23), (12, 15, 24)],
                [2.2 * s, 4.2 * s, 4.3 * s, 4.3 * s, 4.5 * s],
            ),
            chain([(12, 15, 24), (23, 31, 16), (28, 35, 8)], [4.5 * s, 6 * s, 5.2 * s]),
            chain([(23, 31, 14), (25, 48, 9), (24, 60, 8)], [5 * s, 3.4 * s * low, 1.2 * s * low]),
            chain(
                [(28, 35, 6), (36, 18, -10), (35, 0, -18), (30, -10, -20)],
                [4.5 * s, 1.9 * s, 1.5 * s, 1.2 * s],
            ),
        ]
    lateral = f.tubes(parts)
    septum = np.asarray(0.6 - f.ax, np.float32)
    lateral = largest(lateral, septum, 0.6 - nuclei)
    third = f.axis_distance((0, -3, -1), (1.5 * size**1.6 + 0.3, 13, 11))
    fourth = f.axis_distance((0, 31, -31), (7.5, 4.5 * size**0.4, 9.5))
    fourth = largest(fourth, np.asarray(f.ax * 0.55 + f.y - 34.5, np.float32))
    aqueduct = f.tubes([Capsules.chain([(0, 12, -2), (0, 21, -10), (0, 28, -24)], 1.0)])
    return smallest(lateral, third, fourth, aqueduct)


def _infarct(draw: Draw, config: HeadConfig, f: Fields, skull: Skull, clouds: F32) -> F32 | None:
    """An old infarct of a territory, or a lacune: filled with fluid, alike in both classes."""
    if not draw.chance("old_infarct", config.old_infarct_probability):
        return None
    rng = draw.rng("infarct")
    side = float(rng.choice([-1.0, 1.0]))
    if rng.uniform() < 0.4:
        centre: Point = (side * rng.uniform(12, 26), rng.uniform(-22, 12), rng.uniform(2, 20))
        size = float(rng.uniform(2.0, 6.0))
        return np.asarray(f.axis_distance(centre, (size, size * 1.3, size)) + clouds, np.float32)
    centre = (side * rng.uniform(42, 62), rng.uniform(-40, 60), rng.uniform(-10, 40))
    wide = float(rng.uniform(12, 26))
    wedge = f.axis_distance(centre, (wide * 1.1, wide, wide * 0.9)) + 4 * clouds
    return largest(np.asarray(wedge, np.float32), skull.cavity + 1.0)


def build_brain(
    draw: Draw,
    config: HeadConfig,
    shape: Shape,
    f: Fields,
    skull: Skull,
    noise: tuple[F32, F32],
) -> Brain:
    """Evaluate the brain.

    Args:
        draw: Source of random numbers.
        config: Ranges and probabilities.
        shape: What the patient's age has decided.
        f: Shapes on the coarse lattice.
        skull: Of the same lattice.
        noise: Smooth noise of unit variance, correlated over about 4 and 15 mm.
    """
    grain, clouds = noise
    fold, slow = _folds(draw, f)
    frontal = 1 + 0.5 * np.clip(-f.y / 60, 0, 1)
    gap = np.asarray(
        (0.3 + 1.1 * shape.sulcus_mm) * frontal * (1 + 0.25 * clouds) + 0.3, np.float32
    )
    depth = -skull.cavity - gap
    deepest = 15 + 4.5 * slow
    wide = shape.sulcus_mm * (1.0 + 0.55 * slow) + 0.15 * grain
    half = wide * (1 - 0.75 * depth / deepest)
    half = np.where(depth > deepest, -(depth - deepest) * 0.9, half)
    calm = np.clip((-22 - f.z) / 10, 0, 1)  # the base of the brain is smoother
    fold_half = np.asarray(half - 0.8 * calm, np.float32)

    caudate = f.axis_distance((13.5, -25, 13), (5.2, 12, 9.5), paired=True)
    shifted = np.asarray(f.ax - 0.28 * (f.y + 9), np.float32)
    lentiform = np.asarray(
        np.sqrt(((shifted - 24) / 6.5) ** 2 + ((f.y + 9) / 17) ** 2 + ((f.z - 4) / 10) ** 2) - 1,
        np.float32,
    ) * np.float32(7.0)
    thalamus = f.axis_distance((10.5, 7, 6), (9, 14.5, 9.5), paired=True)
    nuclei = smallest(caudate, lentiform, thalamus)
    ventricle = _ventricles(draw, f, shape.ventricle_scale, caudate)

    stem = f.tubes(
        [
            Capsules.chain(
                [(0, 8, 4), (0, 10, -14), (0, 12, -24), (0, 13, -36), (0, 18, -48), (0, 21, -66)],
                [15, 13.5, 14, 14, 9, 7],
            ),
            Capsules.chain([(0, 21, -66), (0, 28, -130)], [6.5, 5]),
            *both_sides([(8, 14, -30), (24, 26, -32)], [9, 8]),  # to the cerebellum
        ],
        30.0,
    )
    tentorium = np.asarray(f.z - tentorium_height(f.ax, f.y), np.float32)
    infra = largest(tentorium, -skull.petrous)
    infra = np.where(f.ax < 14, np.minimum(infra, f.z + 14), infra).astype(np.float32)
    loose = 1.2 + 1.6 * shape.sulcus_mm
    magna = f.axis_distance((0, 64, -58), (draw.uniform("cisterna_magna_mm", (8.0, 20.0)), 11, 10))
    cerebellum = largest(
        skull.cavity + np.float32(loose),
        tentorium + 1.0,
        1.1 + skull.ridge - skull.petrous,
        np.asarray(15.0 - f.y, np.float32),
        np.asarray(-60.0 - f.z, np.float32),
        2.0 - magna,
    )
    w = shape.sulcus_mm
    around = largest(stem - (1.4 + 1.2 * w), np.abs(f.z + 11) - 11, -(f.y + 2))
    cistern = smallest(
        union(
            f.axis_distance((0, -17, -20), (9.5 + 1.5 * w, 8 + 1.5 * w, 4.5 + w)),
            f.axis_distance((0, -5, -16), (5 + w, 6, 6)),
            3.0,
        ),
        f.tubes(
            both_sides([(9, -17, -19), (22, -22, -15), (36, -26, -11)], [2.2 + w, 1.5 + w, 1.0 + w])
        ),
        around,
        f.axis_distance((0, 28, 0), (9 + 3 * w, 2.5 + 1.6 * w, 6)),
        f.axis_distance((0, 33, 9), (4, 5, 3 + w)),
    )
    sick = np.clip((shape.age_years - 35) / 55, 0, 1)
    pale = np.zeros_like(grain)
    strength = draw.uniform("white_matter_disease_hu", (2.0, 10.0))
    present = draw.chance(
        "white_matter_disease", float(sick) * config.white_matter_disease_probability
    )
    if present:
        near = np.exp(-np.maximum(ventricle, 0) / draw.uniform("pale_reach_mm", (4.0, 11.0)))
        patches = np.clip(clouds + 0.5 * grain - 0.4, 0, 1.2) * np.clip((f.z - 5) / 20, 0, 1)
        pale = np.asarray(strength * (near + 0.5 * patches), np.float32)
    sway = 1.2 * bump(f.z, 30, 50) * np.tanh(clouds)
    return Brain(
        gap=gap,
        fold=fold,
        fold_half=fold_half,
        midline=np.asarray(f.x - sway, np.float32),
        ventricle=ventricle,
        cistern=cistern,
        stem=stem,
        nuclei=nuclei,
        tentorium=tentorium,
        infra=infra,
        cerebellum=cerebellum,
        infarct=_infarct(draw, config, f, skull, clouds),
        pale=pale,
    )


def vessels(draw: Draw) -> list[Capsules]:
    """Return venous sinuses and large arteries, in reference coordinates."""
    angles = np.linspace(0.15, np.pi * 1.02, 16)
    wide = draw.uniform("sinus_radius_mm", (2.2, 4.2))
    right = draw.uniform("right_transverse", (0.4, 1.0))
    left = draw.uniform("left_transverse", (0.4, 1.0))
    top = [vault_point(float(a), 0.965) for a in angles]
    found = [Capsules.chain(top, wide * np.linspace(0.35, 1.0, 16))]
    for side, size in ((1.0, left), (-1.0, right)):
        path = [(2, 82, -13), (20, 79, -13), (42, 62, -14), (55, 40, -17), (50, 29, -36)]
        path += [(40, 22, -56)]
        found.append(Capsules.chain([(side * x, y, z) for x, y, z in path], wide * size))
        carotid = [(16, -8, -34), (11, -20, -30), (11, -24, -25), (11, -18, -19)]
        middle = [(11, -18, -19), (20, -21, -17), (33, -26, -12), (37, -18, -6)]
        front = [(11, -18, -19), (3, -26, -15), (2, -36, -8), (2, -44, 4), (2, -40, 18)]
        back = [(1, -2, -16), (10, -2, -14), (17, 10, -11), (14, 26, -4)]
        arteries = ((carotid, 2.3), (middle, 1.4), (front, 1.1), (back, 1.1))
        for points, radius in arteries:
            found.append(Capsules.chain([(side * x, y, z) for x, y, z in points], radius))
        found.append(Capsules.chain([(side * 14, 10, -72), (side * 4, 4, -52), (0, -1, -42)], 1.4))
    found.append(Capsules.chain([(0, -1, -42), (0, -4, -28), (0, -3, -16)], 1.7))
    found.append(Capsules.chain([(0, 28, 5), (0, 36, 7), (0, 60, -1), (0, 82, -13)], 2.0))
    return found


def calcifications(draw: Draw, config: HeadConfig) -> list[tuple[Capsules, float]]:
    """Return capsules in reference coordinates and their HU, alike for both classes."""
    rng = draw.rng("calcifications")
    found: list[tuple[Capsules, float]] = []

    def speck(centre: Point, spread: float, count: int, size: tuple[float, float]) -> Capsules:
        points = np.array(centre) + rng.standard_normal((count, 3)) * spread
        shift = rng.standard_normal((count, 3)) * size[0]
        return Capsules.of(points, points + shift, rng.uniform(*size, count), size[0])

    if draw.chance("pineal_calcification", config.pineal_calcification_probability):
        found.append((speck((0, 25, 2), 1.0, 4, (0.8, 2.3)), rng.uniform(110, 420)))
    for side in (-1.0, 1.0):
        name = "left" if side > 0 else "right"
        share = config.choroid_calcification_probability
        if draw.chance(f"{name}_choroid_calcification", share):
            glomus = speck((side * 24, 33, 13), 1.8, 5, (0.8, 2.4))
            found.append((glomus, rng.uniform(90, 380)))
        if draw.chance(f"{name}_artery_calcification", config.artery_calcification_probability):
            found.append((speck((side * 13.5, -20, -27), 1.6, 3, (0.6, 1.3)), 420.0))
    if draw.chance("falx_calcification", config.falx_calcification_probability):
        for _ in range(int(rng.integers(1, 5))):
            _, y, z = vault_point(float(rng.uniform(0.3, 2.6)), 0.8)
            length = rng.uniform(2, 11)
            plaque = Capsules.chain([(0.3, y, z), (0.2, y + length, z + 0.3 * length)], 1.1)
            found.append((plaque, rng.uniform(120, 480)))
    if draw.chance("ganglia_calcification", config.ganglia_calcification_probability):
        for side in (-1.0, 1.0):
            size = (0.4, rng.uniform(0.7, 1.8))
            value = rng.uniform(55, 180)
            found.append((speck((side * 19.5, -8, 3), 2.2, 7, size), value))
    return found
