"""Outlines of the reference adult: chest cavity, body surface and spine as functions of height.

Reference LPS in mm, carina near z = 0, arms raised. The tables give half-widths and centres.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_infer.phantom.raster import F32

_CAGE_Z = (-230, -175, -140, -105, -80, -35, 5, 35, 65, 85, 98, 105)
_CAGE_LATERAL = (118, 118, 121, 124, 128, 125, 119, 118, 104, 86, 58, 45)
_CAGE_MEDIAL = (
    -118,
    -118,
    -121,
    -124,
    -128,
    -125,
    -119,
    -60,
    5,
    16,
    34,
    43,
)  # the two halves part at the top
_CAGE_DEPTH = (106, 106, 106, 106, 103, 94, 83, 70, 48, 30, 9, 0.5)
_CAGE_Y = (2, 2, 2, 2, 2, 4, 5, 5, 13, 12, 12, 12)

_BODY_Z = (-230, -105, -80, -35, 5, 35, 65, 85, 110, 128, 145, 300)
_BODY_WIDTH = (162, 166, 174, 180, 190, 198, 208, 200, 160, 105, 66, 60)
_BODY_FRONT = (-118, -124, -122, -115, -102, -95, -84, -75, -66, -64, -62, -78)
_BODY_BACK = (125, 128, 130, 130, 126, 116, 104, 97, 86, 74, 64, 66)

_BODY_NARROWING = (0.0, 0.04, 0.07, 0.1, 0.13, 0.12, 0.09, 0.06, 0.0, 0.0, 0.0, 0.0)

_SPINE_Z = (-230, -170, -105, -80, -35, -15, 5, 35, 65, 85, 120, 260)
_SPINE_Y = (50, 55, 60, 62, 65, 62, 58, 50, 30, 20, 8, 0)
_SPINE_X_RADIUS = (20, 19, 18, 17, 16, 16, 15.5, 15, 14, 13.5, 12, 11)
_SPINE_Y_RADIUS = (16, 16, 15.5, 15, 14.5, 14, 13.5, 12.5, 11, 10, 9, 8.5)

VERTEBRA_PITCH_MM = 23.0
FIRST_VERTEBRA_Z_MM = 88.0  # the first thoracic vertebra


def power(x: F32) -> F32:
    """Return ``|x| ** 2.5``, cheaply."""
    return np.asarray(x * x * np.sqrt(np.abs(x)), np.float32)


def table(z: F32, heights: tuple[float, ...], values: tuple[float, ...]) -> F32:
    """Interpolate a table of heights in mm."""
    return np.interp(z, heights, values).astype(np.float32)


def cage_level(point: F32, side: int) -> F32:
    """Return a level function (1 on the surface) of half of the chest; ``side`` +1 is left."""
    x, y, z = side * point[..., 0], point[..., 1], point[..., 2]
    lateral, medial = table(z, _CAGE_Z, _CAGE_LATERAL), table(z, _CAGE_Z, _CAGE_MEDIAL)
    depth = table(z, _CAGE_Z, _CAGE_DEPTH)
    total = power((x - (lateral + medial) / 2) * 2 / (lateral - medial))
    total = total + power((y - table(z, _CAGE_Z, _CAGE_Y)) / depth)
    return np.asarray(total**0.4, np.float32)


def body_level(point: F32) -> F32:
    """Return a level function of the trunk and neck without arms (1 on the surface)."""
    x, y, z = point[..., 0], point[..., 1], point[..., 2]
    front, back = table(z, _BODY_Z, _BODY_FRONT), table(z, _BODY_Z, _BODY_BACK)
    total = power(x / table(z, _BODY_Z, _BODY_WIDTH))
    total = total + power((y - (front + back) / 2) * 2 / (back - front))
    return np.asarray(total**0.4, np.float32)


def oval(point: F32, amount: float, midline: float = 0.0) -> F32:
    """Map points of a chest of measured shape to the oval that the tables describe.

    A measured chest is narrower in front, and its lungs reach back beside the spine.

    Args:
        point: (..., 3) reference mm.
        amount: 0 is the oval itself, 1 the measured shape.
        midline: How much of the reach beside the spine there is behind it as well.
    """
    if not amount:
        return point
    x, y, z = point[..., 0], point[..., 1], point[..., 2]
    front = np.clip((-5 - y) / 85, 0, 1.2)
    wide = np.abs(x)
    beside = np.clip((wide - 8) / 34, 0, 1) * (1 - 0.6 * np.clip((wide - 70) / 45, 0, 1))
    beside = np.maximum(beside, midline)
    back = np.clip((y - 25) / 55, 0, 1.3) * np.clip((100 - z) / 60, 0, 1) * beside
    mapped = np.stack([x * (1 + 0.2 * amount * front**1.5), y - 19 * amount * back, z], -1)
    return np.asarray(mapped, np.float32)


def measured(point: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """Map points of the oval chest back: the inverse of `oval`."""
    out = point
    for _ in range(8 if amount else 0):
        out = point - (oval(out.astype(np.float32), amount) - out)
    return out


def arch_level(point: F32) -> F32:
    """Return a distance (mm, negative inside) of the wedge of bone and muscle behind the spine."""
    beyond = point[..., 1] - table(point[..., 2], _SPINE_Z, _SPINE_Y) - 2
    wedge = np.abs(point[..., 0]) - 18 - 0.018 * np.maximum(beyond, 0) ** 2
    slope = 1 / np.hypot(1, 0.036 * np.clip(beyond, 0, 60))
    return np.asarray(np.maximum(slope * wedge, -beyond), np.float32)


def body_narrowing(point: F32, amount: float) -> F32:
    """Return points (..., 3) moved so that the trunk of the tables becomes narrower."""
    if not amount:
        return point
    out = point.copy()
    out[..., 0] *= 1 + np.float32(amount) * table(point[..., 2], _BODY_Z, _BODY_NARROWING)
    return out


def rib_point(
    angle_rad: NDArray[np.float64], z: NDArray[np.float64], out_mm: float
) -> NDArray[np.float64]:
    """Return points ``out_mm`` outside the chest; the angle runs from back over left to front."""
    z32 = np.asarray(z, np.float32)
    width = table(z32, _CAGE_Z, _CAGE_LATERAL) + out_mm
    depth = table(z32, _CAGE_Z, _CAGE_DEPTH) + out_mm
    sine, cosine = np.sin(angle_rad), np.cos(angle_rad)
    x = width * np.sign(sine) * np.abs(sine) ** 0.8
    y = table(z32, _CAGE_Z, _CAGE_Y) + depth * np.sign(cosine) * np.abs(cosine) ** 0.8
    return np.stack([x, y, z], -1)


def spine_centre_y(z: ArrayLike) -> NDArray[np.float64]:
    """Return y of the middle of the vertebral bodies at height ``z``."""
    return np.asarray(np.interp(np.asarray(z, np.float64), _SPINE_Z, _SPINE_Y), np.float64)


def spine_level(point: F32) -> F32:
    """Return a level function of the column of vertebral bodies (1 on the surface)."""
    z = point[..., 2]
    x = point[..., 0] / table(z, _SPINE_Z, _SPINE_X_RADIUS)
    y = (point[..., 1] - table(z, _SPINE_Z, _SPINE_Y)) / table(z, _SPINE_Z, _SPINE_Y_RADIUS)
    return np.asarray(np.sqrt(x * x + y * y), np.float32)
