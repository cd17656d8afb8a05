"""Study scores that need no network.

Data on which one of them does well prove nothing about a network.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BRIGHT_HU = 130.0  # vessels with contrast agent
DARK_HU = (0.0, 100.0)  # as dark as an embolus
FILLING_PX = 4  # dark places up to twice this wide count as inside a vessel
PLANE_STEP = 2  # every second plane is enough

Planes = NDArray[np.float32]

NAMES = (
    "mean HU",
    "noise",
    "bright volume",
    "mean HU of bright voxels",
    "dark voxels in bright vessels",
    "darkest voxel in bright vessels",
)


def trivial_scores(hu: Planes) -> dict[str, float]:
    """All scores of one study, by name (``NAMES``).

    Args:
        hu: (planes, rows, cols) on the patient grid.
    """
    part = hu[::PLANE_STEP]
    bright = part[part > BRIGHT_HU]
    smooth = ndimage.gaussian_filter(part, (0.0, 1.0, 1.0))
    reach = np.arange(-FILLING_PX, FILLING_PX + 1)
    disc = np.hypot(reach[:, None], reach[None, :]) <= FILLING_PX
    vessels = smooth > BRIGHT_HU
    closed = np.stack([ndimage.binary_closing(plane, disc) for plane in vessels])
    soft = smooth[closed & ~vessels & (smooth > DARK_HU[0])]
    values = (
        float(part.mean()),
        noise_hu(part),
        float(bright.size),
        float(bright.mean()) if bright.size else 0.0,
        float((soft < DARK_HU[1]).sum()),
        -float(np.quantile(soft, 0.001)) if soft.size else -BRIGHT_HU,
    )
    return dict(zip(NAMES, values, strict=True))


def noise_hu(hu: Planes) -> float:
    """Median over planes of the robust deviation of neighbouring soft-tissue pixels."""
    values: list[float] = []
    for plane in hu[:: max(1, len(hu) // 20)]:
        soft = (plane > DARK_HU[0]) & (plane < DARK_HU[1])
        step = np.diff(plane, axis=1)[soft[:, 1:] & soft[:, :-1]]
        if step.size > 100:
            values.append(float(np.median(np.abs(step)) / 0.6745 / np.sqrt(2)))
    return float(np.median(values)) if values else 0.0
