"""Input of a bundle's self-test: a few smooth slabs that look a little like a chest."""

import numpy as np
from numpy.typing import NDArray

SLABS = 3
AIR, LUNG, SOFT, BONE, CONTRAST = 0, 30, 178, 235, 222  # of a slab in [0, 255]


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


def golden_positions_um(step_um: int) -> NDArray[np.int64]:
    """(``SLABS``,) positions of the golden slabs, ``step_um`` apart."""
    return np.arange(SLABS, dtype=np.int64) * step_um


def _paint(
    image: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    centre: tuple[float, float],
    radius: tuple[float, float],
    value: int,
) -> None:
    inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2
    image[inside <= 1.0] = value
