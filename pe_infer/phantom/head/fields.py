"""Shapes on the coarse lattice of a tilted gantry, given in reference coordinates."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.head.frame import Frame
from pe_infer.phantom.raster import F32, Capsules, Lattice, lower_distance

Point = tuple[float, float, float]
Shape: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

_FAR_MM = np.float32(60.0)


class Fields:
    """Evaluates signed distances (mm, negative inside) on one lattice.

    Attributes:
        x: (w, v, u) reference coordinate to the left.
        y: To the back.
        z: To the head.
        ax: ``|x|``.
    """

    def __init__(self, lattice: Lattice, frame: Frame) -> None:
        self.lattice = lattice
        self._frame = frame
        self.x, self.y, self.z = frame.reference_grid(lattice)
        self.ax: F32 = np.abs(self.x)

    def axis_distance(self, centre: Point, semi: Point, *, paired: bool = False) -> F32:
        """Signed distance of an ellipsoid; of both of its mirror images if ``paired``."""
        k0 = np.zeros(self.lattice.shape, np.float32)
        k1 = np.zeros_like(k0)
        for coordinate, middle, radius in zip(
            (self.ax if paired else self.x, self.y, self.z), centre, semi, strict=True
        ):
            q = (coordinate - np.float32(middle)) * np.float32(1 / radius)
            q *= q
            k0 += q
            q *= np.float32(radius**-2)
            k1 += q
        np.sqrt(k0, out=k0)
        k0 *= (k0 - 1) / np.sqrt(np.maximum(k1, 1e-12))
        return k0

    def tubes(self, chains: Sequence[Capsules], reach_mm: float = 20.0) -> F32:
        """Signed distance of capsules, exact up to ``reach_mm``; they are straight in the slice.

        Radii and directions are taken in gantry coordinates: a tilt shears them a little.
        """
        out = np.full(self.lattice.shape, _FAR_MM, np.float32)
        lower_distance(out, self.capsules(chains), self.lattice, reach_mm)
        return out

    def capsules(self, chains: Sequence[Capsules]) -> Capsules:
        """Map capsules of the reference to gantry coordinates."""
        return gantry_capsules(self._frame, chains)

    def normalised(self, level: F32, least: float = 1e-3) -> F32:
        """Turn a level function (0 on the surface) into a distance, exact to first order."""
        return np.asarray(level / np.maximum(self.slope(level), np.float32(least)), np.float32)

    def slope(self, level: F32) -> F32:
        """Length of the gradient per mm of the patient."""
        su, sv, sw = self.lattice.step_mm
        gw, gv, gu = np.gradient(level, sw, sv, su)
        tilt = self._frame.tilt_rad
        gy = (gv + gw * np.float32(np.sin(tilt))) * np.float32(1 / np.cos(tilt))
        return np.asarray(np.sqrt(gu * gu + gy * gy + gw * gw), np.float32)


def gantry_capsules(frame: Frame, chains: Sequence[Capsules]) -> Capsules:
    """Map capsules of the reference to gantry coordinates; radii grow with the mean scale."""
    caps = Capsules.join(chains)
    scale = frame.mean_scale
    return Capsules.of(
        frame.to_gantry(caps.start),
        frame.to_gantry(caps.end),
        caps.start_radius_mm * scale,
        caps.end_radius_mm * scale,
    )


def both_sides(points: Sequence[Point], radii: Sequence[float]) -> list[Capsules]:
    """Return a chain on the left and its mirror image."""
    return [Capsules.chain([(side * x, y, z) for x, y, z in points], radii) for side in (1.0, -1.0)]


def union(a: F32, b: F32, width_mm: float) -> F32:
    """Return the union of two shapes with a rounded groove of the given width between them."""
    share = np.clip(0.5 + 0.5 * (b - a) / np.float32(width_mm), 0, 1)
    return np.asarray(b + (a - b) * share - np.float32(width_mm) * share * (1 - share), np.float32)


def smallest(*shapes: Shape) -> F32:
    """Return the union of shapes."""
    return np.asarray(np.minimum.reduce(shapes), np.float32)


def largest(*shapes: Shape) -> F32:
    """Return what all shapes have in common."""
    return np.asarray(np.maximum.reduce(shapes), np.float32)


def bump(coordinate: F32, centre: float, width: float) -> F32:
    """Return a Gaussian of height 1."""
    return np.asarray(np.exp(-(((coordinate - centre) * np.float32(1 / width)) ** 2)), np.float32)


def table(coordinate: F32, nodes: Sequence[tuple[float, float]]) -> F32:
    """Interpolate a table of (coordinate, value)."""
    at, values = zip(*nodes, strict=True)
    return np.asarray(np.interp(coordinate, at, values), np.float32)
