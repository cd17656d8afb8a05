"""Where the voxels of a mask are, for comparison with what a network says."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import Slice, Vector


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
