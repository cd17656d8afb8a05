"""Masks: as slices, and where their voxels are, for comparison with what a network says."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import Slice, Vector

_MASK_HU = 1000


def as_slices(mask: NDArray[np.bool_], slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """A mask as slices: 1000 HU within it, 0 elsewhere.

    Args:
        mask: (slices, rows, cols).
        slices: Of the study, which give the geometry.
    """
    return tuple(
        Slice(
            pixels=(plane * np.int16(_MASK_HU)).astype(np.int16),
            geometry=image.geometry,
            series=image.series,
            sop_instance_uid=image.sop_instance_uid,
            source=f"{image.source} mask",
        )
        for plane, image in zip(mask, slices, strict=True)
    )


def mask_voxels_mm(slices: Sequence[Slice], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Patient coordinates (LPS) of all voxels of a mask: (n, 3) float32, mm.

    Args:
        slices: Of the study.
        mask: (slices, rows, cols).
    """
    points = [np.empty((0, 3), np.float32)]
    for image, plane in zip(slices, mask, strict=True):
        rows, cols = np.nonzero(plane)
        if len(rows):
            g = image.geometry
            points.append(
                (
                    np.array(g.image_position_mm)
                    + cols[:, None] * (g.col_spacing_mm * np.array(g.row_direction))
                    + rows[:, None] * (g.row_spacing_mm * np.array(g.col_direction))
                ).astype(np.float32)
            )
    return np.concatenate(points)


def distance_mm(voxels_mm: NDArray[np.float32], point_mm: Vector) -> float:
    """Distance of a point to the nearest of `mask_voxels_mm`; infinite if there are none."""
    if not len(voxels_mm):
        return float("inf")
    return float(np.linalg.norm(voxels_mm - np.array(point_mm, np.float32), axis=1).min())
