"""Signed distances and occupancies: capsules on voxels, and a coarse lattice brought to pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

F32: TypeAlias = NDArray[np.float32]
Box: TypeAlias = tuple[slice, slice]

_BATCH_VOXELS = 120_000  # keeps the temporary arrays of one batch in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Capsules:
    """Round cones with spherical ends, in mm.

    Attributes:
        start: (n, 3) float32 first end points (x, y, z).
        end: (n, 3) float32 second end points.
        start_radius_mm: (n,) float32.
        end_radius_mm: (n,) float32.
    """

    start: F32
    end: F32
    start_radius_mm: F32
    end_radius_mm: F32

    @classmethod
    def of(cls, start: ArrayLike, end: ArrayLike, r0: ArrayLike, r1: ArrayLike) -> "Capsules":
        """Make capsules of anything that broadcasts to (n, 3) points and (n,) radii."""
        a = np.asarray(start, np.float32).reshape(-1, 3)
        b = np.asarray(end, np.float32).reshape(-1, 3)
        n = len(a)
        return cls(
            start=a,
            end=b,
            start_radius_mm=np.broadcast_to(np.asarray(r0, np.float32), (n,)),
            end_radius_mm=np.broadcast_to(np.asarray(r1, np.float32), (n,)),
        )

    @classmethod
    def chain(cls, points: ArrayLike, radii: ArrayLike) -> "Capsules":
        """Join consecutive points (n, 3) with radii (n,) or a scalar."""
        p = np.asarray(points, np.float32).reshape(-1, 3)
        r = np.broadcast_to(np.asarray(radii, np.float32), (len(p),))
        return cls.of(p[:-1], p[1:], r[:-1], r[1:])

    @classmethod
    def join(cls, parts: Sequence["Capsules"]) -> "Capsules":
        """Concatenate."""
        if not parts:
            return cls.of(np.zeros((0, 3)), np.zeros((0, 3)), 0.0, 0.0)
        return cls(
            start=np.concatenate([p.start for p in parts]),
            end=np.concatenate([p.end for p in parts]),
            start_radius_mm=np.concatenate([p.start_radius_mm for p in parts]),
            end_radius_mm=np.concatenate([p.end_radius_mm for p in parts]),
        )

    def __len__(self) -> int:
        """Return the number of capsules."""
        return len(self.start)

    def __getitem__(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "Capsules":
        """Return a selection."""
        return Capsules(
            start=self.start[which],
            end=self.end[which],
            start_radius_mm=self.start_radius_mm[which],
            end_radius_mm=self.end_radius_mm[which],
        )

    def grown(self, by_mm: float) -> "Capsules":
        """Return the same capsules with radii changed by ``by_mm``."""
        return Capsules.of(
            self.start, self.end, self.start_radius_mm + by_mm, self.end_radius_mm + by_mm
        )

    def bounds(self) -> tuple[F32, F32]:
        """Return (n, 3) lower and upper corners."""
        r = np.maximum(self.start_radius_mm, self.end_radius_mm)[:, None]
        return np.minimum(self.start, self.end) - r, np.maximum(self.start, self.end) + r


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Regular voxel centres: ``origin_mm + index * step_mm``; arrays on it are (z, y, x).

    Attributes:
        origin_mm: (x, y, z) of voxel (0, 0, 0).
        step_mm: (x, y, z) distances.
        shape: (z, y, x) sizes.
    """

    origin_mm: tuple[float, float, float]
    step_mm: tuple[float, float, float]
    shape: tuple[int, int, int]

    def axis(self, which: int) -> NDArray[np.float64]:
        """Return the coordinates along x (0), y (1) or z (2) in mm."""
        offsets = self.step_mm[which] * np.arange(self.shape[2 - which], dtype=np.float64)
        return np.asarray(self.origin_mm[which] + offsets, np.float64)


def _relative(low: NDArray[np.int64], size: int, lattice: Lattice, axis: int, at: F32) -> F32:
    index = low[:, axis : axis + 1] + np.arange(size)
    offset = lattice.origin_mm[axis] - at[:, axis : axis + 1].astype(np.float64)
    return (index * lattice.step_mm[axis] + offset).astype(np.float32)


def _distances(
    caps: Capsules, low: NDArray[np.int64], size: NDArray[np.int64], lattice: Lattice
) -> F32:
    """Signed distances of ``n`` capsules in boxes of one size: (n, z, y, x) float32, mm."""
    x, y, z = (_relative(low, int(size[k]), lattice, k, caps.start) for k in range(3))
    d = caps.end - caps.start
    length2 = np.maximum((d * d).sum(1), 1e-6)[:, None, None, None]
    along = (z * d[:, 2:3])[:, :, None, None] + (y * d[:, 1:2])[:, None, :, None]
    along = along + (x * d[:, 0:1])[:, None, None, :]
    square = (z * z)[:, :, None, None] + (y * y)[:, None, :, None]
    square = square + (x * x)[:, None, None, :]
    t = along / length2
    np.clip(t, 0.0, 1.0, out=t)
    along *= 2.0
    along -= t * length2
    along *= t
    square -= along
    np.maximum(square, 0.0, out=square)
    np.sqrt(square, out=square)
    r0 = caps.start_radius_mm[:, None, None, None]
    t *= caps.end_radius_mm[:, None, None, None] - r0
    t += r0
    square -= t
    return np.asarray(square, np.float32)


def _boxes(
    caps: Capsules, lattice: Lattice, margin_mm: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Lower corner and size in voxels (x, y, z), and which capsules touch the lattice at all."""
    origin, step = np.array(lattice.origin_mm), np.array(lattice.step_mm)
    shape = np.array(lattice.shape[::-1])
    lower, upper = caps.bounds()
    low = np.clip(np.ceil((lower - margin_mm - origin) / step).astype(np.int64), 0, shape)
    high = np.clip(np.floor((upper + margin_mm - origin) / step).astype(np.int64) + 1, 0, shape)
    size = high - low
    touches = (size > 0).all(1)
    size = np.minimum(-(-size // np.array([4, 4, 2])) * np.array([4, 4, 2]), shape)
    return np.minimum(low, shape - size), size, touches


def add_occupancy(out: F32, caps: Capsules, lattice: Lattice, edge_mm: float) -> None:
    """Raise ``out`` (z, y, x) to the occupancy ``clip(0.5 - distance / edge_mm, 0, 1)``."""
    low, size, touches = _boxes(caps, lattice, 0.5 * edge_mm)
    flat = out.reshape(-1)
    _, ny, nx = lattice.shape
    order = np.flatnonzero(touches)
    keys, group = np.unique(size[order], axis=0, return_inverse=True)
    group = group.reshape(-1)
    for g, key in enumerate(keys):
        members = order[group == g]
        batch = max(1, int(_BATCH_VOXELS // key.prod()))
        for first in range(0, len(members), batch):
            chosen = members[first : first + batch]
            occ = _distances(caps[chosen], low[chosen], key, lattice)
            occ *= -1.0 / edge_mm
            occ += 0.5
            np.clip(occ, 0.0, 1.0, out=occ)
            if len(chosen) == 1:
                x, y, z = low[chosen[0]]
                view = out[z : z + key[2], y : y + key[1], x : x + key[0]]
                np.maximum(view, occ[0], out=view)
                continue
            base = (low[chosen, 2] * ny + low[chosen, 1]) * nx + low[chosen, 0]
            inside = (np.arange(key[2])[:, None, None] * ny + np.arange(key[1])[:, None]) * nx
            index = base[:, None, None, None] + (inside + np.arange(key[0]))
            touched = occ > 0
            np.maximum.at(flat, index[touched], occ[touched])


def lower_distance(out: F32, caps: Capsules, lattice: Lattice, reach_mm: float) -> None:
    """Lower ``out`` (z, y, x) to the signed distance, exact up to ``reach_mm`` around capsules."""
    low, size, touches = _boxes(caps, lattice, reach_mm)
    for i in np.flatnonzero(touches):
        x, y, z = low[i]
        view = out[z : z + size[i, 2], y : y + size[i, 1], x : x + size[i, 0]]
        np.minimum(view, _distances(caps[i : i + 1], low[i : i + 1], size[i], lattice)[0], out=view)


class Upsampler:
    """Brings planes of a coarse lattice to the pixels of a slice, only where they matter."""

    def __init__(
        self, lattice: Lattice, x_mm: NDArray[np.float64], y_mm: NDArray[np.float64]
    ) -> None:
        """Prepare the weights for pixel centres ``x_mm`` (cols) and ``y_mm`` (rows)."""
        self._lattice = lattice
        self._x_index = (x_mm - lattice.origin_mm[0]) / lattice.step_mm[0]
        self._y_index = (y_mm - lattice.origin_mm[1]) / lattice.step_mm[1]

    def plane(self, volume: F32, z_mm: float) -> F32:
        """Interpolate the coarse (y, x) plane at ``z_mm``."""
        at = (z_mm - self._lattice.origin_mm[2]) / self._lattice.step_mm[2]
        k = int(np.clip(np.floor(at), 0, self._lattice.shape[0] - 2))
        t = np.float32(at - k)
        return np.asarray(volume[k] * (1 - t) + volume[k + 1] * t, np.float32)

    def box(self, plane: F32, below: float) -> Box | None:
        """Return the pixels that hold all places with ``plane < below``; None without any."""
        low = plane < below
        rows, cols = np.flatnonzero(low.any(1)), np.flatnonzero(low.any(0))
        if not len(rows):
            return None
        y0, y1 = np.searchsorted(self._y_index, (rows[0] - 1, rows[-1] + 1))
        x0, x1 = np.searchsorted(self._x_index, (cols[0] - 1, cols[-1] + 1))
        return (slice(int(y0), int(y1)), slice(int(x0), int(x1))) if y0 < y1 and x0 < x1 else None

    def up(self, plane: F32, box: Box) -> F32:
        """Interpolate the coarse plane at the pixels of ``box``."""
        ny, nx = plane.shape
        ky, ty = _nodes(self._y_index[box[0]], ny)
        kx, tx = _nodes(self._x_index[box[1]], nx)
        part = plane[ky[0] : ky[-1] + 2]
        left = part[:, kx]
        left += (part[:, kx + 1] - left) * tx
        steps = np.diff(left, axis=0)
        ky -= ky[0]
        out = steps[ky]
        out *= ty[:, None]
        out += left[ky]
        return np.asarray(out, np.float32)


def _nodes(index: NDArray[np.float64], size: int) -> tuple[NDArray[np.int64], F32]:
    clipped = np.clip(index, 0, size - 1.001)
    k = clipped.astype(np.int64)
    return k, (clipped - k).astype(np.float32)
