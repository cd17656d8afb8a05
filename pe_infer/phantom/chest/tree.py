"""Space-filling vessel trees: end points are divided again and again, a branch serves every part.

All branches of one generation are grown together with array operations. Radii follow Murray's law
with the number of end points served: r = r_end * n ** (1 / habit.exponent).
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.raster import F32, Capsules

MURRAY_EXPONENT = 3.1
_LONGEST_STRAIGHT_MM = 9.0
_THICK_SHARE = 0.08  # of a lobe's end points: lobar and segmental branches


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """Where a tree enters the lung: a labelled stump with the end points it has to reach.

    Attributes:
        label: Lobe.
        start: (3,) position in reference mm.
        radius_mm: Calibre of the stump.
        targets: (n, 3) end points in reference mm.
    """

    label: str
    start: tuple[float, float, float]
    radius_mm: float
    targets: F32


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """How trees branch.

    Attributes:
        exponent: Of Murray's law.
        smallest_share: Of a branch's end points, the fewest that one of its children serves.
        curve: 0 makes straight branches; with 1 they leave in the direction of their parent.
        early: Share by which the thickest branches are shorter, so that they divide near the hilum.
    """

    exponent: float = MURRAY_EXPONENT
    smallest_share: float = 0.28
    curve: float = 0.0
    early: float = 0.0


VERSION_1: Final = Habit()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Branches as parallel arrays; segments are in order of generation, parents before children.

    Attributes:
        start: (n, 3) float32 reference mm.
        end: (n, 3) float32 reference mm.
        radius_mm: (n,) radius at the end; a segment tapers from its parent's.
        start_radius_mm: (n,).
        parent: (n,) index of the segment before, -1 at a root.
        root: (n,) index of the root.
        labels: Label per root.
    """

    start: F32
    end: F32
    radius_mm: F32
    start_radius_mm: F32
    parent: NDArray[np.int64]
    root: NDArray[np.int64]
    labels: tuple[str, ...]

    def capsules(self, which: NDArray[np.bool_] | slice = slice(None)) -> Capsules:
        """Return the segments as round cones in reference coordinates."""
        return Capsules.of(
            self.start[which], self.end[which], self.start_radius_mm[which], self.radius_mm[which]
        )


def _split_order(
    points: NDArray[np.float64],
    group: NDArray[np.int64],
    groups: int,
    tip: NDArray[np.float64],
    heading: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Coordinate of every point across its group's widest direction perpendicular to the branch."""
    helper = np.where(np.abs(heading[:, 2:3]) < 0.8, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    u = np.cross(heading, helper)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v = np.cross(heading, u)
    offset = points - tip[group]
    pu, pv = (offset * u[group]).sum(1), (offset * v[group]).sum(1)
    count = np.maximum(np.bincount(group, minlength=groups), 1)
    pu -= (np.bincount(group, pu, groups) / count)[group]
    pv -= (np.bincount(group, pv, groups) / count)[group]
    uu, vv, uv = (np.bincount(group, a * b, groups) for a, b in ((pu, pu), (pv, pv), (pu, pv)))
    angle = 0.5 * np.arctan2(2 * uv, uu - vv)
    return np.asarray(pu * np.cos(angle)[group] + pv * np.sin(angle)[group], np.float64)


class _Segments:
    """Collects the straight pieces of branches while a tree grows."""

    def __init__(self) -> None:
        self.pieces: list[tuple[NDArray[np.float64] | NDArray[np.int64], ...]] = []
        self._made = 0

    def add(
        self,
        tip: NDArray[np.float64],
        end: NDArray[np.float64],
        bend: NDArray[np.float64],
        radii: tuple[NDArray[np.float64], NDArray[np.float64]],
        parent: NDArray[np.int64],
        root: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Cut branches into short pieces along a bow; return each one's last index."""
        begin, radius = radii
        length = np.linalg.norm(end - tip, axis=1)
        steps = np.maximum(1, np.ceil(length / _LONGEST_STRAIGHT_MM)).astype(int)
        last = np.zeros(len(tip), np.int64)
        for step in range(int(steps.max())):
            on = steps > step
            t0, t1 = (step / steps)[on, None], ((step + 1) / steps)[on, None]
            a = tip[on] + (end - tip)[on] * t0 + bend[on] * (4 * t0 * (1 - t0))
            b = tip[on] + (end - tip)[on] * t1 + bend[on] * (4 * t1 * (1 - t1))
            ra = begin[on] + (radius - begin)[on] * t0[:, 0]
            rb = begin[on] + (radius - begin)[on] * t1[:, 0]
            before = parent[on] if step == 0 else last[on]
            self.pieces.append((a, b, ra, rb, before, root[on]))
            last[on] = self._made + np.arange(on.sum())
            self._made += int(on.sum())
        return last


def grow(
    roots: list[Root], end_radius_mm: float, rng: np.random.Generator, habit: Habit = VERSION_1
) -> Tree:
    """Grow one tree per root until every end point is served."""
    points = np.concatenate([r.targets for r in roots]).astype(np.float64)
    served = [k for k, r in enumerate(roots) if len(r.targets)]
    group = np.repeat(np.arange(len(served)), [len(roots[k].targets) for k in served])
    tip = np.array([roots[k].start for k in served], np.float64)
    calibre = np.array([roots[k].radius_mm for k in served], np.float64)
    parent = np.full(len(served), -1)
    root = np.array(served)
    whole = np.array([len(r.targets) for r in roots])
    segments = _Segments()
    before = np.zeros((len(tip), 3))  # directions of the parents
    while len(points):
        groups = len(tip)
        count = np.bincount(group, minlength=groups)
        centre = np.stack([np.bincount(group, points[:, k], groups) / count for k in range(3)], 1)
        reach = centre - tip
        share = np.where(count == 1, 1.0, rng.uniform(0.3, 0.5, groups))
        if habit.early:
            share[count > _THICK_SHARE * whole[root]] *= 1 - habit.early
        heading = reach / np.maximum(np.linalg.norm(reach, axis=1, keepdims=True), 1e-3)
        end = tip + reach * share[:, None]
        bend = rng.standard_normal((groups, 3)) * 0.07 * np.linalg.norm(end - tip, axis=1)[:, None]
        if habit.curve:
            turn = (before - heading) * np.linalg.norm(before, axis=1, keepdims=True)
            bend += 0.25 * habit.curve * np.linalg.norm(end - tip, axis=1)[:, None] * turn
        radius = np.minimum(end_radius_mm * count ** (1 / habit.exponent), calibre)
        begin = np.minimum(calibre, radius * 1.12)
        last = segments.add(tip, end, bend, (begin, radius), parent, root)
        growing = count[group] > 1
        points, group = points[growing], group[growing]
        if not len(points):
            break
        across = _split_order(points, group, groups, end, heading)
        order = np.lexsort((across, group))
        points, group = points[order], group[order]
        rank = np.arange(len(points)) - np.searchsorted(group, np.arange(groups))[group]
        cut = np.round(count * rng.uniform(habit.smallest_share, 1 - habit.smallest_share, groups))
        cut = np.clip(cut, 1, np.maximum(count - 1, 1))
        used, group = np.unique(2 * group + (rank >= cut[group]), return_inverse=True)
        source = used // 2
        tip, calibre, parent, root = end[source], radius[source], last[source], root[source]
        before = heading[source]
    a, b, ra, rb, parents, where = (
        np.concatenate([p[k] for p in segments.pieces]) for k in range(6)
    )
    return Tree(
        start=a.astype(np.float32),
        end=b.astype(np.float32),
        start_radius_mm=ra.astype(np.float32),
        radius_mm=rb.astype(np.float32),
        parent=parents.astype(np.int64),
        root=where.astype(np.int64),
        labels=tuple(r.label for r in roots),
    )


def narrowed(tree: Tree, segment: int, factor: float) -> Tree:
    """Return the tree with all that lies beyond the start of a segment thinner by ``factor``."""
    beyond = np.zeros(len(tree.parent), bool)
    beyond[segment] = True
    for k in range(segment + 1, len(beyond)):  # parents come before children
        beyond[k] = tree.parent[k] >= 0 and beyond[tree.parent[k]]
    ends = np.where(beyond, np.float32(factor), np.float32(1))
    starts = ends.copy()
    starts[segment] = 1
    return replace(
        tree,
        radius_mm=tree.radius_mm * ends,
        start_radius_mm=tree.start_radius_mm * starts,
    )


def airways_beside(
    tree: Tree, bronchi: dict[str, tuple[float, float, float, float]], smallest_mm: float
) -> Capsules:
    """Return bronchi (lumen) beside the arteries of ``tree``, from the named stumps on.

    Every node of the tree is moved aside by both radii, in a direction fixed per side as far as the
    branch allows, so that parents and children still meet.
    """
    heading = tree.end - tree.start
    heading = heading / np.maximum(np.linalg.norm(heading, axis=1, keepdims=True), 1e-3)
    side = np.where(tree.end[:, :1] > 0, [[-0.6, 0.3, -0.3]], [[0.6, 0.3, -0.3]])
    across = side - (side * heading).sum(1, keepdims=True) * heading
    across = across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 0.2)
    lumen = np.minimum(0.72 * tree.radius_mm, 3.6)
    end = tree.end + across * (tree.radius_mm + lumen + 0.9)[:, None]
    first = tree.parent < 0
    stump = np.array([bronchi[label] for label in tree.labels], np.float32)[tree.root]
    start = np.where(first[:, None], stump[:, :3], end[tree.parent])
    start_lumen = np.where(first, stump[:, 3], lumen[tree.parent])
    chosen = np.flatnonzero(lumen > smallest_mm)
    return Capsules.of(start[chosen], end[chosen], start_lumen[chosen], lumen[chosen])
