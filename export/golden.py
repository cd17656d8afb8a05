"""Input of a bundle's self-test: a few smooth slabs that look a little like a chest or a head."""

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import PatientGrid

SLABS = 3
AIR, LUNG, SOFT, BONE, CONTRAST = 0, 30, 178, 235, 222  # of a slab in [0, 255]
AIR_HU, SCALP_HU, SKULL_HU, BRAIN_HU, FLUID_HU, BLOOD_HU = -1000, 20, 900, 34, 8, 65


def golden_slabs(channels: int, rows: int, cols: int) -> NDArray[np.uint8]:
    """(``SLABS``, channels, rows, cols) uint8: body, lungs, spine, vessels, some with fillings."""
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float64)
    y, x = y / rows - 0.5, x / cols - 0.5
    slabs = np.empty((SLABS, channels, rows, cols), dtype=np.uint8)
    for slab in range(SLABS):
        for channel in range(channels):
            z = 0.1 * slab + 0.02 * channel
            image = np.full((rows, cols), float(AIR))
            _paint(image, x, y, (0.0, 0.0), (0.46, 0.36), SOFT)
            _paint(image, x, y, (-0.21, -0.02), (0.17 - 0.1 * z, 0.25), LUNG)
            _paint(image, x, y, (0.21, -0.02), (0.17 - 0.1 * z, 0.25), LUNG)
            _paint(image, x, y, (0.0, 0.22), (0.05, 0.05), BONE)
            for number in range(8):
                angle = 0.8 * number + z
                centre = (0.2 * np.cos(angle), 0.14 * np.sin(angle) - 0.02)
                radius = 0.012 + 0.004 * number
                _paint(image, x, y, centre, (radius, radius), CONTRAST)
                if number % 2:
                    _paint(image, x, y, centre, (0.6 * radius, 0.6 * radius), SOFT)
            slabs[slab, channel] = np.rint(image)
    return slabs


def golden_heads(grid: PatientGrid) -> NDArray[np.uint8]:
    """(``SLABS``, channels, rows, cols) uint8: skull, brain, ventricles, a bleed in the middle."""
    rows, cols = grid.rows, grid.cols
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float64)
    y, x = y / rows - 0.5, x / cols - 0.5
    slabs = np.empty((SLABS, grid.planes_per_slab, len(grid.windows), rows, cols), dtype=np.uint8)
    for slab in range(SLABS):
        for plane in range(grid.planes_per_slab):
            z = 0.05 * slab + 0.01 * plane
            hu = np.full((rows, cols), float(AIR_HU))
            _paint(hu, x, y, (0.0, 0.0), (0.3 - z, 0.38 - z), SCALP_HU)
            _paint(hu, x, y, (0.0, 0.0), (0.28 - z, 0.36 - z), SKULL_HU)
            _paint(hu, x, y, (0.0, 0.0), (0.26 - z, 0.34 - z), BRAIN_HU)
            for side in (-1, 1):
                _paint(hu, x, y, (side * 0.05, -0.02), (0.02, 0.1), FLUID_HU)
            if slab == 1:
                _paint(hu, x, y, (0.14, 0.04), (0.05, 0.07), BLOOD_HU)
            for number, window in enumerate(grid.windows):
                share = (hu - window.low_hu) / (window.high_hu - window.low_hu)
                slabs[slab, plane, number] = np.rint(255 * np.clip(share, 0, 1))
    return slabs.reshape(SLABS, grid.channels, rows, cols)


def golden_positions_um(step_um: int) -> NDArray[np.int64]:
    """(``SLABS``,) positions of the golden slabs, ``step_um`` apart."""
    return np.arange(SLABS, dtype=np.int64) * step_um


def _paint(
    image: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    centre: tuple[float, float],
    radius: tuple[float, float],
    value: float,
) -> None:
    inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2
    image[inside <= 1.0] = value
