"""Ribs, sternum, shoulder girdle, arms and vertebral arches, as capsules in reference mm."""

from dataclasses import dataclass

import numpy as np

from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.shapes import (
    FIRST_VERTEBRA_Z_MM,
    VERTEBRA_PITCH_MM,
    measured,
    rib_point,
    spine_centre_y,
)
from pe_infer.phantom.raster import Capsules
from pe_infer.phantom.sampling import Draw

_SIDES = (-1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """Bones with a dense shell, and the rib cartilage without one."""

    bone: Capsules
    marrow: Capsules
    cartilage: Capsules


def _mirrored(points: list[tuple[float, float, float]], radii: list[float]) -> list[Capsules]:
    p = np.array(points)
    return [Capsules.chain(p * np.array([side, 1, 1]), np.array(radii)) for side in _SIDES]


def _ribs(rng: np.random.Generator, shape: float) -> tuple[list[Capsules], list[Capsules]]:
    bone: list[Capsules] = []
    cartilage: list[Capsules] = []
    for index in range(12):
        z0 = FIRST_VERTEBRA_Z_MM + 2 - VERTEBRA_PITCH_MM * index
        drop = (30, 48, 60, 70, 78, 84, 88, 90, 90, 85, 60, 40)[index] + rng.uniform(-4, 4)
        reach = (2.55, 2.5, 2.45, 2.4, 2.36, 2.32, 2.28, 2.2, 2.1, 2.0, 1.4, 0.9)[index]
        for side in _SIDES:
            angle = np.linspace(0.42, reach, 17)
            z = z0 - drop * (np.sin((angle - 0.42) / (reach - 0.42) * np.pi / 2)) ** 1.2
            points = measured(rib_point(angle, z, 5.5), shape)
            head = [[20.0, float(spine_centre_y(z0)) + 10.0, z0]]
            points = np.concatenate([head, points]) * np.array([side, 1, 1])
            radius = np.full(len(points), (4.7 if index < 10 else 4.2) + rng.uniform(-0.4, 0.4))
            bone.append(Capsules.chain(points, radius))
            if index < 8:
                end = points[-1]
                target_z = max(58 - 20 * index, -92)
                target = np.array([side * 15.0, -66.0 - 0.42 * (38 - target_z), target_z])
                middle = (end + target) / 2 + np.array([side * 4.0, -5.0, -4.0])
                cartilage.append(Capsules.chain(np.array([end, middle, target]), 5.5))
    return bone, cartilage


def _vertebral_arches() -> list[Capsules]:
    parts: list[Capsules] = []
    for index in range(-7, 14):
        z = FIRST_VERTEBRA_Z_MM - VERTEBRA_PITCH_MM * index
        y = float(spine_centre_y(z))
        parts += _mirrored([(13, y + 10, z), (15, y + 25, z)], [5, 4.5])
        parts += _mirrored(
            [(15, y + 25, z), (14, y + 27, z - 12), (0, y + 37, z - 10)], [4.5, 4.5, 3.5]
        )
        parts += _mirrored([(15, y + 24, z), (36, y + 35, z + 3)], [4.5, 4.2])
        parts.append(Capsules.chain([(0, y + 36, z - 8), (0, y + 55, z - 24)], [3.2, 3.4]))
    return parts


def build_skeleton(draw: Draw, config: PhantomConfig) -> Skeleton:
    """Make the bones of one patient; shells are ``1.3 to 2.2`` mm thick."""
    shape = draw.uniform("chest_shape", config.chest_shape)
    rng = draw.rng("skeleton")
    shell = draw.uniform("bone_shell_mm", (1.3, 2.2))
    ribs, cartilage = _ribs(rng, shape)
    thick: list[Capsules] = [*ribs, *_vertebral_arches()]
    width = 24 if not shape else 18
    breast_bone = np.array(
        [(0, -60, 62), (0, -70, 36), (0, -82, 0), (0, -92, -30), (0, -99, -55), (0, -106, -88)]
    )
    for offset in range(0, width, 3):  # side by side they make a flat bone, wider above
        line = breast_bone if offset <= 12 else breast_bone[:3]
        thick.extend(
            Capsules.chain(line + np.array([side * offset, offset * 0.15, 0]), 5.4)
            for side in (_SIDES if offset else (1,))
        )
    thick += _mirrored(
        [(22, -54, 66), (60, -58, 80), (108, -38, 96), (138, -8, 100)], [7, 5.5, 5.5, 6]
    )
    thick += _mirrored([(139, 12, 88), (135, 22, 74)], [10, 7])
    if draw.chance("arms_down", config.arms_down_probability):
        thick += _mirrored([(160, 6, 90), (176, 8, 70), (205, 16, -160)], [19, 12, 10.5])
    else:
        thick += _mirrored([(160, 6, 90), (168, 0, 118), (180, -14, 260)], [19, 12, 10.5])
    blade: list[Capsules] = []
    for share in np.linspace(0.0, 1.0, 27):  # between the lateral and the medial border
        upper = (136 - 58 * share, 26 + 58 * share, 80 - 6 * share)
        lower = (112 - 8 * share, 62 + 12 * share, -38 + 4 * share)
        thickness = 4.4 if share in (0.0, 1.0) else 2.2
        line = measured(np.array([upper, lower], np.float64), shape)
        blade += _mirrored([tuple(p) for p in line.tolist()], [thickness, thickness])
    blade += _mirrored([(78, 84, 60), (110, 76, 72), (138, 50, 92), (148, 20, 108)], [4, 5, 6, 6])
    return Skeleton(
        bone=Capsules.join(thick + blade),
        marrow=Capsules.join(thick).grown(-shell),
        cartilage=Capsules.join(cartilage),
    )
