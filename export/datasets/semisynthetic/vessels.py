"""Vessels with contrast agent in a real chest: where emboli may be painted.

They are found by their brightness inside the closed lung and by how they hang together, so that the
heart, the aorta, ribs and the sternum are left alone; a mask of the pulmonary arteries adds those
of the mediastinum. Arteries and veins of the lung are not told apart. All numbers are [ours].
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_infer.errors import Code, InputError

LUNG_HU: Final = -500.0
OUTSIDE_BELOW_HU: Final = -300.0
AIR_HU: Final = -930.0  # median of air around the patient is below, that of lung is above
CLOSING_MM: Final = 16.0  # closes the lung over its vessels, up to the hila
VESSEL_HU: Final = 130.0
LARGEST_VESSEL_MM: Final = 10.0  # radius of the in-plane opening that removes heart and aorta
COARSE_MM: Final = 1.5  # pixels that lungs are closed on
RIM_MM: Final = 10.0  # of the lungs' hull, where ribs and the sternum are
DIRECTIONS: Final = 24  # that the hull is seen from
LEAST_MM3: Final = 60.0  # of vessels that hang together: smaller ones are noise or nodules

Volume: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Vessels:
    """Where emboli may lie.

    Attributes:
        mask: (planes, rows, cols) vessels with contrast agent.
        radius_mm: (planes, rows, cols) distance to the wall.
        smooth_hu: (planes, rows, cols) planes without their noise.
        lung: Box around the lungs: first and last plane, middle column.
    """

    mask: Mask
    radius_mm: Volume
    smooth_hu: Volume
    lung: tuple[int, int, float]


def find_vessels(
    hu: Volume, spacing_mm: float, pitch_mm: float, arteries: Mask | None = None
) -> Vessels:
    """Vessels with contrast agent in the lung and the hila.

    Args:
        hu: (planes, rows, cols) HU.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.
        arteries: (planes, rows, cols) pulmonary arteries, where somebody marked them.

    Raises:
        InputError: The planes hold no lung, or no such vessel.
    """
    smooth = ndimage.gaussian_filter(hu, (0.3, 0.8, 0.8))
    bright = smooth > VESSEL_HU
    step = max(1, round(COARSE_MM / spacing_mm))
    lung, inside = _lung(smooth[:, ::step, ::step], spacing_mm * step)
    large = _large(bright[:, ::step, ::step], spacing_mm * step)
    allowed = (inside & ~large).repeat(step, axis=1).repeat(step, axis=2)
    mask = bright & allowed[:, : hu.shape[1], : hu.shape[2]]
    if arteries is not None:
        mask |= bright & arteries
    mask = ndimage.binary_opening(mask, np.ones((1, 2, 2), dtype=bool))
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1) * spacing_mm**2 * pitch_mm
    sizes[0] = 0
    mask = (sizes >= LEAST_MM3)[labels]
    if not mask.any():
        raise InputError(
            f"no vessel above {VESSEL_HU:.0f} HU in the lung: emboli need contrast agent",
            code=Code.INVALID_ARGUMENT,
        )
    box = tuple(
        slice(max(0, int(where.min()) - 1), int(where.max()) + 2) for where in np.nonzero(mask)
    )
    radius = np.zeros(mask.shape, np.float32)
    radius[box] = ndimage.distance_transform_edt(mask[box], (pitch_mm, spacing_mm, spacing_mm))
    planes, _, cols = np.nonzero(lung)
    return Vessels(
        mask=mask,
        radius_mm=radius,
        smooth_hu=smooth.astype(np.float32),
        lung=(int(planes.min()), int(planes.max()), float(cols.min() + cols.max()) / 2 * step),
    )


def _lung(smooth: Volume, spacing_mm: float) -> tuple[Mask, Mask]:
    """Air of the lungs, and the same closed in plane, without its rim.

    Raises:
        InputError: There is none.
    """
    air = np.stack(
        [plane & ~_outside(values) for plane, values in zip(smooth < LUNG_HU, smooth, strict=True)]
    )
    labels, count = ndimage.label(air)
    if count == 0:
        raise InputError("no lung in these planes", code=Code.INVALID_ARGUMENT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    lung = np.isin(labels, np.flatnonzero(sizes > 0.05 * sizes.max()))
    radius_px = CLOSING_MM / spacing_mm
    outside = np.stack([ndimage.distance_transform_edt(~p) > radius_px for p in lung])
    closed = np.stack([ndimage.distance_transform_edt(~p) > radius_px for p in outside])
    return lung, closed & (_hull_depth_px(lung) > RIM_MM / spacing_mm)


def _outside(plane: Volume) -> Mask:
    """Air around the patient: what reaches the rim of a plane, other than lung that a crop cut."""
    labels, _ = ndimage.label(plane < OUTSIDE_BELOW_HU)
    rim = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    air = [n for n in rim.tolist() if n and float(np.median(plane[labels == n])) < AIR_HU]
    return np.isin(labels, air)


def _hull_depth_px(lung: Mask) -> Volume:
    """Depth of every pixel in the convex hull of both lungs of its plane; negative outside."""
    rows, cols = np.indices(lung.shape[1:], dtype=np.float32)
    depth = np.full(lung.shape, np.inf, np.float32)
    for angle in np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS:
        along: Volume = np.asarray(np.cos(angle) * cols + np.sin(angle) * rows, np.float32)
        for plane, air in zip(depth, lung, strict=True):
            reach = along[air].max() if air.any() else -np.inf
            np.minimum(plane, reach - along, out=plane)
    return depth


def _large(bright: Mask, spacing_mm: float) -> Mask:
    """What remains of bright places that a disc of ``LARGEST_VESSEL_MM`` opens."""
    widest, sampling = LARGEST_VESSEL_MM, (spacing_mm, spacing_mm)
    core = [ndimage.distance_transform_edt(plane, sampling) > widest for plane in bright]
    opened = [
        ndimage.distance_transform_edt(~plane, sampling) <= widest + 2.0
        if plane.any()
        else np.zeros(plane.shape, np.bool_)
        for plane in core
    ]
    return np.stack(opened)
