"""Vessels and airways of the lungs: end points in every lobe, and the trees that reach them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.chest import shapes
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.mediastinum import (
    ARTERY_LEFT,
    ARTERY_RIGHT,
    ARTERY_TRUNCUS,
    BRONCHUS_ENDS,
    LEFT_VEINS,
    RIGHT_VEINS,
)
from pe_infer.phantom.chest.tree import Habit, Root, Tree, airways_beside, grow
from pe_infer.phantom.raster import F32, Capsules
from pe_infer.phantom.sampling import Draw

_LUNG_VOLUME_MM3 = 2.3e6  # one reference lung, to turn a number of end points into a distance
LOBES = ("right upper", "right middle", "right lower", "left upper", "lingula", "left lower")


@dataclass(frozen=True, slots=True, kw_only=True)
class LungTrees:
    """Trees in reference coordinates; ``airways`` are lumens."""

    arteries: Tree
    veins: Tree
    airways: Capsules

    def hilar(self) -> Capsules:
        """Return the thick proximal branches, which carry connective tissue into the lung."""
        return Capsules.join(
            [tree.capsules(tree.radius_mm > 2.4) for tree in (self.arteries, self.veins)]
        )


def end_points(
    rng: np.random.Generator,
    per_lung: int,
    dome_rise_mm: float,
    left_rise_mm: float,
    chest_shape: float = 0.0,
) -> F32:
    """Return about ``2 * per_lung`` points, spread evenly over both lungs, off the surfaces."""
    pitch = (_LUNG_VOLUME_MM3 / per_lung) ** (1 / 3)
    back = 112 + 24 * chest_shape
    axes = [np.arange(low, high, pitch) for low, high in ((-132, 132), (-105, back), (-175, 104))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    p = (grid + rng.uniform(-0.45, 0.45, grid.shape) * pitch).astype(np.float32)
    side = np.where(p[:, 0] > 0, 1, -1)
    wall = shapes.oval(p, chest_shape)
    level = np.where(side > 0, shapes.cage_level(wall, 1), shapes.cage_level(wall, -1))

    def outside(
        centre: tuple[float, float, float], semi: tuple[float, float, float]
    ) -> NDArray[np.bool_]:
        q = (p - np.array(centre, np.float32)) / np.array(semi, np.float32)
        return np.asarray((q * q).sum(1) > 1)

    keep = level < 0.96
    if chest_shape:
        keep &= shapes.arch_level(p) > 4
    keep &= outside((16, -30, -80), (58, 56, 50)) & outside(
        (-60, 8, -187 + dome_rise_mm), (89, 102, 103)
    )
    keep &= outside((68, 14, -193 + dome_rise_mm + left_rise_mm), (81, 97, 100))
    keep &= (np.abs(p[:, 0]) > 26) & (shapes.spine_level(p) > 1.5)
    keep &= outside((26, 40, -20), (18, 20, 140)) & outside((8, -10, 30), (40, 62, 30))
    return np.asarray(p[keep], np.float32)


def lobe_of(p: F32) -> NDArray[np.int64]:
    """Return the index into ``LOBES`` of reference points, by the fissures."""
    left = p[:, 0] > 0
    lower = p[:, 2] < 34 - (70 - p[:, 1]) * 1.08
    upper = p[:, 2] > np.where(left, -32, -36)
    right_lobe = np.where(lower, 2, np.where(upper, 0, 1))
    left_lobe = np.where(lower, 5, np.where(upper, 3, 4))
    return np.asarray(np.where(left, left_lobe, right_lobe), np.int64)


def _artery_roots(points: F32, vessel_scale: float) -> list[Root]:
    lobe = lobe_of(points)
    starts: dict[str, tuple[float, float, float, float]] = {
        "right upper": ARTERY_TRUNCUS[-1],
        "right middle": (-49, 6, -30, 5.0),
        "right lower": ARTERY_RIGHT[-1],
        "left upper": (44, 9, -2, 6.0),
        "lingula": (54, 21, -26, 5.0),
        "left lower": ARTERY_LEFT[-1],
    }
    return [
        Root(label=name, start=s[:3], radius_mm=s[3] * vessel_scale, targets=points[lobe == index])
        for index, (name, s) in enumerate(starts.items())
    ]


def _vein_roots(points: F32, vessel_scale: float) -> list[Root]:
    lobe = lobe_of(points)
    roots: list[Root] = []
    for path, lobes in (
        (RIGHT_VEINS[0], (0, 1)),
        (RIGHT_VEINS[1], (2,)),
        (LEFT_VEINS[0], (3, 4)),
        (LEFT_VEINS[1], (5,)),
    ):
        tip = path[-1]
        targets = points[np.isin(lobe, lobes)]
        roots.append(
            Root(
                label=LOBES[lobes[0]],
                start=tip[:3],
                radius_mm=tip[3] * vessel_scale,
                targets=targets,
            )
        )
    return roots


def grow_lungs(draw: Draw, config: PhantomConfig, vessel_scale: float) -> LungTrees:
    """Grow the arteries, the airways beside them, and the veins between them."""
    per_lung = draw.count("terminals_per_lung", config.terminals_per_lung)
    tip_mm = draw.uniform("terminal_radius_mm", config.terminal_radius_mm) * vessel_scale
    shape = draw.uniform("chest_shape", config.chest_shape)
    exponent = draw.uniform("murray_exponent", config.murray_exponent)
    habit = Habit(
        exponent=exponent,
        smallest_share=config.smallest_branch_share,
        curve=draw.uniform("branch_curve", config.branch_curve),
        early=draw.uniform("early_division", config.early_division),
    )
    rise = draw.uniform("diaphragm_rise_mm", (-14.0, 16.0))
    left_rise = draw.uniform("left_rise_mm", (-8, 8))
    targets = end_points(draw.rng("artery_ends"), per_lung, rise, left_rise, shape)
    roots = _artery_roots(targets, vessel_scale)
    arteries = grow(roots, tip_mm, draw.rng("artery_tree"), habit)
    targets = end_points(draw.rng("vein_ends"), int(per_lung * 0.8), rise, left_rise, shape)
    roots = _vein_roots(targets, vessel_scale)
    veins = grow(roots, tip_mm, draw.rng("vein_tree"), habit)
    airways = airways_beside(
        arteries, BRONCHUS_ENDS, draw.uniform("smallest_airway_mm", (0.8, 1.2))
    )
    return LungTrees(arteries=arteries, veins=veins, airways=airways)
