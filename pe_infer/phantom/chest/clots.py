"""The shapes of emboli, as capsules along the centre line of an artery, later clipped to the lumen.

A fresh embolus is *occlusive* (fills the lumen), *eccentric* (lies against one wall at acute
angles), *central* (contrast all around it, the "polo mint", or the rails of a railway), or
*irregular*. An old one is *mural* (a crescent along the wall, at obtuse angles, with a channel
beside it) or a *web* (a band in the lumen, fixed to the wall at its ends).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.raster import Capsules

CALCIUM_HU: Final = 420.0
CHRONIC_KINDS: Final = ("mural", "web")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbolusPlan:
    """An embolus before it is drawn.

    Attributes:
        place: Which artery, e.g. ``"left lower segmental"``.
        kind: occlusive, eccentric, central, irregular, mural or web.
        capsules: In patient coordinates.
        lumen_radius_mm: Mean radius of the artery along it.
        length_mm: Length along the centre line.
        hu: Its Hounsfield units.
        channel: What blood flows through within the capsules.
        calcium: Where it is calcified.
    """

    place: str
    kind: str
    capsules: Capsules
    lumen_radius_mm: float
    length_mm: float
    hu: float
    channel: Capsules | None = None
    calcium: Capsules | None = None


def _across(path: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return (n, 3) unit vectors across the path, all towards about the same side."""
    points = path[:, :3]
    heading = np.gradient(points, axis=0)
    heading /= np.maximum(np.linalg.norm(heading, axis=1, keepdims=True), 1e-6)
    aside = rng.standard_normal(3)
    across = aside - (heading @ aside)[:, None] * heading
    across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-6)
    return np.asarray(across, np.float64)


def acute(path: NDArray[np.float64], kind: str, rng: np.random.Generator) -> Capsules:
    """Return the capsules of a fresh embolus along ``path`` (n, 4), reference mm."""
    points, radius = path[:, :3], path[:, 3]
    across = _across(path, rng)
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


def mural(path: NDArray[np.float64], rng: np.random.Generator) -> tuple[Capsules, Capsules]:
    """Return an old thrombus along one wall, and the channel beside it that blood flows through."""
    points, radius = path[:, :3], path[:, 3]
    across = _across(path, rng)
    open_share = rng.uniform(0.55, 0.8)
    ends = np.sin(np.linspace(0, np.pi, len(path))) ** 0.5  # the crescent tapers off at its ends
    clot = points + across * (radius * (0.15 + 1.75 * (1 - ends)))[:, None]
    middle = points - across * (radius * (1.04 - open_share))[:, None]
    first, last = (_unit(points[k] - points[k + step]) for k, step in ((0, 1), (-1, -1)))
    ahead, beyond = middle[0] + 3 * radius[0] * first, middle[-1] + 3 * radius[-1] * last
    channel = Capsules.chain(
        np.concatenate([ahead[None], middle, beyond[None]]),
        open_share * np.concatenate([radius[:1], radius, radius[-1:]]),
    )
    return Capsules.chain(clot, radius * 1.12), channel


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-6), np.float64)


def web(path: NDArray[np.float64], rng: np.random.Generator) -> Capsules:
    """Return a band along the lumen, fixed to opposite walls at its ends."""
    points, radius = path[:, :3], path[:, 3]
    across = _across(path, rng)
    lean = np.linspace(-1.0, 1.0, len(path))[:, None] * rng.uniform(0.7, 1.0)
    thick = np.maximum(rng.uniform(0.16, 0.3) * radius, 0.5)
    return Capsules.chain(points + lean * across * radius[:, None], thick)


def calcified(path: NDArray[np.float64], clot: Capsules, rng: np.random.Generator) -> Capsules:
    """Return small lumps of calcium within the middle part of a clot along ``path``."""
    k = len(clot) // 2
    centre = clot.start[k]
    lumps = centre + rng.normal(0.0, 0.35, (3, 3)) * path[len(path) // 2, 3]
    return Capsules.chain(lumps, 0.3 * path[len(path) // 2, 3] * rng.uniform(0.6, 1.0, 3))
