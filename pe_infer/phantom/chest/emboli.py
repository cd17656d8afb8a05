"""Emboli: chains of capsules along the centre lines of the arteries, later clipped to the lumen.

An embolus is *occlusive* (fills the lumen), *eccentric* (lies against one wall), *central*
(contrast all around it, the "polo mint"), or *irregular*.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.chest.mediastinum import (
    ARTERY_LEFT,
    ARTERY_RIGHT,
    ARTERY_TRUNCUS,
    ARTERY_TRUNK,
    smooth,
)
from pe_infer.phantom.chest.tree import Tree
from pe_infer.phantom.raster import Capsules
from pe_infer.phantom.sampling import Draw

LOBAR_RADIUS_MM = 2.7  # branches of at least this radius count as lobar
SEGMENTAL_RADIUS_MM = 1.6  # below it an embolus is called subsegmental
SMALLEST_RADIUS_MM = 1.25
_STEP_MM = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbolusPlan:
    """An embolus before it is drawn.

    Attributes:
        place: Which artery, e.g. ``"left lower segmental"``.
        kind: occlusive, eccentric, central or irregular.
        capsules: In patient coordinates.
        lumen_radius_mm: Mean radius of the artery along it.
        length_mm: Length along the centre line.
        hu: Its Hounsfield units.
    """

    place: str
    kind: str
    capsules: Capsules
    lumen_radius_mm: float
    length_mm: float
    hu: float


def _cut(path: NDArray[np.float64], start_mm: float, length_mm: float) -> NDArray[np.float64]:
    """Return the part of a path (n, 4) between two lengths, resampled about every ``_STEP_MM``."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1))])
    stop = min(start_mm + length_mm, float(along[-1]))
    at = np.linspace(start_mm, stop, max(2, int(np.ceil((stop - start_mm) / _STEP_MM)) + 1))
    return np.stack([np.interp(at, along, path[:, k]) for k in range(4)], 1)


def _length(path: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1).sum())


def _shape(path: NDArray[np.float64], kind: str, rng: np.random.Generator) -> Capsules:
    """Return the capsules of one embolus along ``path`` (n, 4), reference mm."""
    points, radius = path[:, :3], path[:, 3]
    heading = np.gradient(points, axis=0)
    heading /= np.maximum(np.linalg.norm(heading, axis=1, keepdims=True), 1e-6)
    aside = rng.standard_normal(3)
    across = aside - (heading @ aside)[:, None] * heading
    across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-6)
    ripple = 1 + 0.08 * rng.standard_normal(len(path))
    if kind == "occlusive":
        return Capsules.chain(points, radius * 1.12)
    if kind == "eccentric":
        size = rng.uniform(0.55, 0.8)
        return Capsules.chain(
            points + across * (radius * (1.05 - size))[:, None], radius * size * ripple
        )
    if kind == "central":
        size = rng.uniform(0.45, 0.7)
        drift = across * (radius * rng.uniform(0.0, 0.15))[:, None]
        return Capsules.chain(points + drift, radius * size * ripple)
    wobble = rng.standard_normal((len(path), 3)) * 0.28 * radius[:, None]
    return Capsules.chain(points + wobble, radius * rng.uniform(0.4, 0.85, len(path)))


def _upstream(
    tree: Tree, tip: int, length_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return a path (n, 4) of ``length_mm`` from segment ``tip`` towards the root."""
    stop = rng.uniform(0.3, 1.0)
    end = tree.start[tip] + (tree.end[tip] - tree.start[tip]) * stop
    nodes = [np.array([*end, tree.radius_mm[tip]], np.float64)]
    covered, segment = 0.0, tip
    while covered < length_mm and segment >= 0:
        node = np.array([*tree.start[segment], tree.start_radius_mm[segment]], np.float64)
        covered += float(np.linalg.norm(node[:3] - nodes[-1][:3]))
        nodes.append(node)
        segment = int(tree.parent[segment])
    return np.array(nodes[::-1])


def _kind(rng: np.random.Generator, config: PhantomConfig) -> str:
    if rng.uniform() < config.occlusive_probability:
        return "occlusive"
    return str(rng.choice(["eccentric", "central", "irregular"]))


class Planner:
    """Chooses the emboli of one study."""

    def __init__(
        self,
        draw: Draw,
        config: PhantomConfig,
        frame: Frame,
        tree: Tree,
        *,
        vessel_scale: float,
        visible_mm: float,
    ) -> None:
        """Keep what the choices need.

        Args:
            draw: Source of random numbers.
            config: Shares and ranges.
            frame: From reference to patient.
            tree: Arteries in reference coordinates.
            vessel_scale: Calibre of the central arteries, 1 = reference.
            visible_mm: Radius of a lumen that fills half of a voxel wherever it lies; the first
                embolus of a study is at least as large.
        """
        self._visible_mm = visible_mm
        self._config = config
        self._frame = frame
        self._tree = tree
        self._rng = draw.rng("emboli")
        self._paths = {
            "main": smooth(ARTERY_TRUNK, vessel_scale, 4.0),
            "left main": smooth(ARTERY_LEFT, vessel_scale, 4.0),
            "right main": smooth(ARTERY_RIGHT, vessel_scale, 4.0),
            "right truncus": smooth(ARTERY_TRUNCUS, vessel_scale, 4.0),
        }

    def _finish(self, path: NDArray[np.float64], place: str, kind: str) -> EmbolusPlan:
        cut = _cut(path, 0.0, np.inf)
        return EmbolusPlan(
            place=place,
            kind=kind,
            capsules=self._frame.capsules(_shape(cut, kind, self._rng)),
            lumen_radius_mm=float(cut[:, 3].mean()) * self._frame.mean_scale,
            length_mm=_length(cut) * self._frame.mean_scale,
            hu=float(self._rng.uniform(*self._config.embolus_hu)),
        )

    def _saddle(self) -> EmbolusPlan:
        right = _cut(self._paths["right main"], 0.0, self._rng.uniform(18, 50))
        left = _cut(self._paths["left main"], 0.0, self._rng.uniform(14, 42))
        path = np.concatenate([right[::-1], left[1:]])
        return self._finish(
            path, "saddle", str(self._rng.choice(["central", "irregular", "eccentric"]))
        )

    def _central(self) -> EmbolusPlan:
        place = str(
            self._rng.choice(
                ["left main", "right main", "right truncus", "main"], p=[0.42, 0.42, 0.1, 0.06]
            )
        )
        path = self._paths[place]
        length = self._rng.uniform(14, 48)
        start = self._rng.uniform(6.0, max(7.0, _length(path) - 0.6 * length))
        start = min(start, 0.6 * _length(path))
        kind = _kind(self._rng, self._config)
        if place == "main" and kind == "occlusive":
            kind = "eccentric"
        beyond = start > 38 and place in ("left main", "right main")
        name = place.replace("main", "interlobar") if beyond else place
        return self._finish(_cut(path, start, length), name, kind)

    def _peripheral(self, low_mm: float, high_mm: float, *, first: bool) -> EmbolusPlan | None:
        low_mm = max(low_mm, self._visible_mm) if first else low_mm
        radius = self._tree.radius_mm
        fits = np.flatnonzero((radius >= low_mm) & (radius < high_mm))
        if not len(fits):
            return None
        band = self._rng.uniform(low_mm, min(high_mm, float(radius[fits].max())))
        near = fits[np.argsort(np.abs(radius[fits] - band))[:12]]
        tip = int(self._rng.choice(near))
        length = self._rng.uniform(6, 32) if high_mm < 3 else self._rng.uniform(10, 45)
        path = _upstream(self._tree, tip, length, self._rng)
        size = float(radius[tip])
        kind = _kind(self._rng, self._config)
        if first and 0.45 * size < self._visible_mm:
            kind = "occlusive"
        if size >= LOBAR_RADIUS_MM:
            order = "lobar"
        else:
            order = "segmental" if size >= SEGMENTAL_RADIUS_MM else "subsegmental"
        lobe = self._tree.labels[int(self._tree.root[tip])]
        return self._finish(path, f"{lobe} {order}", kind)

    def plan(self) -> list[EmbolusPlan]:
        """Return at least one embolus: central, lobar or only segmental disease."""
        config, rng = self._config, self._rng
        pick = rng.uniform()
        plans: list[EmbolusPlan | None] = []
        central = pick < config.central_probability
        lobar = central or pick < config.central_probability + config.lobar_probability
        if central:
            if rng.uniform() < config.saddle_probability:
                plans.append(self._saddle())
            else:
                plans += [
                    self._central()
                    for _ in range(int(rng.integers(1, max(1, config.central_emboli_max) + 1)))
                ]
        if lobar:
            count = int(rng.integers(0 if central else 1, max(1, config.lobar_emboli_max) + 1))
            plans += [
                self._peripheral(LOBAR_RADIUS_MM, 20.0, first=not central and k == 0)
                for k in range(count)
            ]
        count = int(rng.integers(0 if lobar else 1, max(1, config.segmental_emboli_max) + 1))
        plans += [
            self._peripheral(SMALLEST_RADIUS_MM, LOBAR_RADIUS_MM, first=not lobar and k == 0)
            for k in range(count)
        ]
        found = [p for p in plans if p is not None]
        sure = central or (bool(plans) and plans[0] is not None)
        return found if sure else [self._central(), *found]
