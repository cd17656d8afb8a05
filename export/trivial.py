"""Study scores that need no network.

Data on which one of them does well prove nothing about a network.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_infer.geometry import PatientGrid

BRIGHT_HU = 130.0  # vessels with contrast agent, bone
SOFT_HU = (0.0, 100.0)
BLOOD_HU = (50.0, 90.0)
FILLING_PX = 4  # dark places up to twice this wide count as inside a vessel
PLANE_STEP = 2  # every second plane of a chest is enough
BONE_HU = 150.0
CAVITY_MM2 = 500.0  # smaller places that bone encloses are air cells and marrow

Planes = NDArray[np.float32]


def chest_scores(
    hu: Planes, positions_um: NDArray[np.int64], grid: PatientGrid
) -> dict[str, float]:
    """Scores of one chest: see ``export.anatomies.Scores``."""
    del positions_um, grid
    part = hu[::PLANE_STEP]
    bright = part[part > BRIGHT_HU]
    smooth = ndimage.gaussian_filter(part, (0.0, 1.0, 1.0))
    reach = np.arange(-FILLING_PX, FILLING_PX + 1)
    disc = np.hypot(reach[:, None], reach[None, :]) <= FILLING_PX
    vessels = smooth > BRIGHT_HU
    closed = np.stack([ndimage.binary_closing(plane, disc) for plane in vessels])
    soft = smooth[closed & ~vessels & (smooth > SOFT_HU[0])]
    return {
        "mean HU": float(part.mean()),
        "noise": noise_hu(part),
        "bright volume": float(bright.size),
        "mean HU of bright voxels": float(bright.mean()) if bright.size else 0.0,
        "dark voxels in bright vessels": float((soft < SOFT_HU[1]).sum()),
        "darkest voxel in bright vessels": (
            -float(np.quantile(soft, 0.001)) if soft.size else -BRIGHT_HU
        ),
    }


def head_scores(hu: Planes, positions_um: NDArray[np.int64], grid: PatientGrid) -> dict[str, float]:
    """Scores of one head: see ``export.anatomies.Scores``.

    Volumes are in ml, of planes that stand for half the way to both neighbours. What is inside the
    skull is what bone encloses in its plane.
    """
    inside = np.stack([_cavity(plane, grid.spacing_mm) for plane in hu])
    step_mm = np.gradient(positions_um / 1000.0) if len(hu) > 1 else np.ones(1)
    voxel_ml = step_mm * grid.spacing_mm**2 / 1000
    blood = (hu >= BLOOD_HU[0]) & (hu <= BLOOD_HU[1]) & inside
    content = hu[inside]
    return {
        "mean HU": float(hu.mean()),
        "noise": noise_hu(hu),
        "bright volume": float((hu > BRIGHT_HU).sum(axis=(1, 2)) @ voxel_ml),
        "volume of 50 to 90 HU inside the skull": float(blood.sum(axis=(1, 2)) @ voxel_ml),
        "mean HU inside the skull": float(content.mean()) if content.size else 0.0,
        "asymmetry": _asymmetry(hu, inside),
    }


def noise_hu(hu: Planes) -> float:
    """Median over planes of the robust deviation of neighbouring soft-tissue pixels."""
    values: list[float] = []
    for plane in hu[:: max(1, len(hu) // 20)]:
        soft = (plane > SOFT_HU[0]) & (plane < SOFT_HU[1])
        step = np.diff(plane, axis=1)[soft[:, 1:] & soft[:, :-1]]
        if step.size > 100:
            values.append(float(np.median(np.abs(step)) / 0.6745 / np.sqrt(2)))
    return float(np.median(values)) if values else 0.0


def _cavity(plane: Planes, spacing_mm: float) -> NDArray[np.bool_]:
    """Where bone encloses at least ``CAVITY_MM2`` of a plane."""
    labels, count = ndimage.label(plane < BONE_HU)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    chosen = sizes >= CAVITY_MM2 / spacing_mm**2
    chosen[0] = False
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        chosen[edge] = False
    found: NDArray[np.bool_] = chosen[labels]
    return found


def _asymmetry(hu: Planes, inside: NDArray[np.bool_]) -> float:
    """Mean difference between the halves of the cavity, to the left and right of its middle, HU."""
    cols = np.arange(hu.shape[2])
    differences: list[float] = []
    weights: list[int] = []
    for plane, cavity in zip(hu, inside, strict=True):
        per_col = cavity.sum(axis=0)
        if not per_col.any():
            continue
        right = cavity & (cols < float(per_col @ cols) / per_col.sum())
        left = cavity & ~right
        if right.any() and left.any():
            differences.append(abs(float(plane[right].mean() - plane[left].mean())))
            weights.append(int(per_col.sum()))
    return float(np.average(differences, weights=weights)) if differences else 0.0
