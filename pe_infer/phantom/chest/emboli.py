"""Which emboli a patient has, and in which arteries; their shapes are in ``clots``."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.chest.clots import EmbolusPlan, acute, calcified, mural, web
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
_STEP_MM = 3.0
_WIDEST_WEB_MM = 5.0  # webs are seen in lobar and smaller arteries
_WEB_SHARE = 0.5
_NARROWED_MM = (1.7, 4.0)
_CRESCENT = 0.12  # half of the thickness of the thinnest mural thrombus, per radius of the lumen


def _cut(path: NDArray[np.float64], start_mm: float, length_mm: float) -> NDArray[np.float64]:
    """Return the part of a path (n, 4) between two lengths, resampled about every ``_STEP_MM``."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1))])
    stop = min(start_mm + length_mm, float(along[-1]))
    at = np.linspace(start_mm, stop, max(2, int(np.ceil((stop - start_mm) / _STEP_MM)) + 1))
    return np.stack([np.interp(at, along, path[:, k]) for k in range(4)], 1)


def _length(path: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1).sum())


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


def _order(radius_mm: float) -> str:
    if radius_mm >= LOBAR_RADIUS_MM:
        return "lobar"
    return "segmental" if radius_mm >= SEGMENTAL_RADIUS_MM else "subsegmental"


def choose_narrowing(draw: Draw, config: PhantomConfig, tree: Tree) -> tuple[int, float] | None:
    """Return a segment beyond which a patient's arteries are too thin, and by how much; or None.

    Both studies of a pair have it: it is what old emboli leave behind, and no embolus.
    """
    if not draw.chance("narrowed_artery", config.narrowed_artery_probability):
        return None
    fits = np.flatnonzero((tree.radius_mm > _NARROWED_MM[0]) & (tree.radius_mm < _NARROWED_MM[1]))
    if not len(fits):
        return None
    segment = int(draw.rng("narrowed_where").choice(fits))
    return segment, draw.uniform("narrowed_to", (0.5, 0.8))


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
        narrowing: int | None = None,
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
            narrowing: Segment from which on the tree is too thin.
        """
        self._visible_mm = visible_mm
        self._config = config
        self._frame = frame
        self._tree = tree
        self._rng = draw.rng("emboli")
        self._later = draw.rng("emboli_later")  # for choices that version 1 did not have
        self._narrowing = narrowing
        self._paths = {
            "main": smooth(ARTERY_TRUNK, vessel_scale, 4.0),
            "left main": smooth(ARTERY_LEFT, vessel_scale, 4.0),
            "right main": smooth(ARTERY_RIGHT, vessel_scale, 4.0),
            "right truncus": smooth(ARTERY_TRUNCUS, vessel_scale, 4.0),
        }

    def _finish(
        self, path: NDArray[np.float64], place: str, kind: str, *, thin: bool = False
    ) -> EmbolusPlan:
        """Shape an embolus; ``thin`` forbids those that may fill no voxel."""
        cut = _cut(path, 0.0, np.inf)
        clot = acute(cut, kind, self._rng)
        plan = EmbolusPlan(
            place=place,
            kind=kind,
            capsules=self._frame.capsules(clot),
            lumen_radius_mm=float(cut[:, 3].mean()) * self._frame.mean_scale,
            length_mm=_length(cut) * self._frame.mean_scale,
            hu=float(self._rng.uniform(*self._config.embolus_hu)),
        )
        if not self._config.chronic_probability or thin:
            return plan
        chronic = self._later.uniform() < self._config.chronic_probability
        return self._aged(plan, cut) if chronic else plan

    def _aged(self, plan: EmbolusPlan, path: NDArray[np.float64]) -> EmbolusPlan:
        """Return an old thrombus in the place of a fresh one."""
        rng, frame = self._later, self._frame
        calcium = None
        if plan.lumen_radius_mm < _WIDEST_WEB_MM and rng.uniform() < _WEB_SHARE:
            clot, channel, kind = web(path, rng), None, "web"
        else:
            clot, channel = mural(path, rng)
            kind = "mural"
            if rng.uniform() < self._config.calcified_probability:
                calcium = frame.capsules(calcified(path, clot, rng))
        return replace(
            plan,
            kind=kind,
            capsules=frame.capsules(clot),
            channel=None if channel is None else frame.capsules(channel),
            calcium=calcium,
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
        order = _order(size)
        lobe = self._tree.labels[int(self._tree.root[tip])]
        thin = first and _CRESCENT * size < self._visible_mm
        return self._finish(path, f"{lobe} {order}", kind, thin=thin)

    def _subsegmental(self, count: int, *, first: bool) -> list[EmbolusPlan]:
        """Return up to ``count`` small emboli; with ``first``, one that can be seen or none."""
        low = self._config.smallest_embolus_mm
        if first and self._visible_mm >= SEGMENTAL_RADIUS_MM:
            return []
        made = [
            self._peripheral(low, SEGMENTAL_RADIUS_MM, first=first and k == 0) for k in range(count)
        ]
        if first and made[0] is None:
            return []
        return [plan for plan in made if plan is not None]

    def _at_narrowing(self, segment: int) -> EmbolusPlan:
        """Return an old thrombus just before the artery becomes too thin."""
        path = _upstream(self._tree, segment, float(self._later.uniform(6, 18)), self._later)
        cut = _cut(path, 0.0, np.inf)
        fresh = EmbolusPlan(
            place=f"{self._tree.labels[int(self._tree.root[segment])]} "
            + _order(float(cut[:, 3].mean())),
            kind="mural",
            capsules=Capsules.join([]),
            lumen_radius_mm=float(cut[:, 3].mean()) * self._frame.mean_scale,
            length_mm=_length(cut) * self._frame.mean_scale,
            hu=float(self._later.uniform(*self._config.embolus_hu)),
        )
        return self._aged(fresh, cut)

    def plan(self) -> list[EmbolusPlan]:
        """Return at least one embolus: central, lobar, segmental or only subsegmental disease."""
        config, rng = self._config, self._rng
        pick = rng.uniform()
        if pick >= 1 - config.subsegmental_probability:
            small = self._subsegmental(1 + int(self._later.integers(0, 3)), first=True)
            if small:
                return small
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
            self._peripheral(
                config.smallest_embolus_mm, LOBAR_RADIUS_MM, first=not lobar and k == 0
            )
            for k in range(count)
        ]
        if config.subsegmental_emboli_max:
            more = int(self._later.integers(0, config.subsegmental_emboli_max + 1))
            plans += self._subsegmental(more, first=False)
        if self._narrowing is not None and config.chronic_probability:
            plans.append(self._at_narrowing(self._narrowing))
        found = [p for p in plans if p is not None]
        sure = central or (bool(plans) and plans[0] is not None)
        return found if sure else [self._central(), *found]
