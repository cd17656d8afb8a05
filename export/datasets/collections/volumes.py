"""Volumes in HU as slices, whatever file format they come in."""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.errors import Code, GeometryError, InputError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry, Vector

AIR_BELOW_HU: Final = -500.0  # a CT in HU has air around the patient
MASK_FROM: Final = 0.5
REMEDY: Final = "Download the volume again, or leave it out."


def as_slices(
    hu: NDArray[np.float32], axes: NDArray[np.float64], origin: NDArray[np.float64], path: Path
) -> list[Slice]:
    """A volume in HU as slices, in the order of its third axis; values are rounded to whole ones.

    Args:
        hu: (columns, rows, slices).
        axes: (3, 3): the columns are the steps in mm from column to column, row to row and slice to
            slice, in patient coordinates (LPS). Where the third is not perpendicular (gantry tilt),
            the centres of the slices drift, as those of a tilted DICOM series do.
        origin: (3,) LPS position in mm of the first voxel's centre.
        path: For messages.

    Returns:
        Slices with their number (from 1 on) as ``sop_instance_uid``.

    Raises:
        InputError: The values are no HU.
        GeometryError: The slices are not axial.
    """
    if not np.isfinite(hu).all() or float(hu.min()) > AIR_BELOW_HU:
        raise InputError(
            f"{path}: lowest value {float(hu.min()):g}, expected air of about -1000 HU: these are "
            f"no HU. {REMEDY}",
            code=Code.UNSUPPORTED_PIXELS,
        )
    spacing = np.linalg.norm(axes, axis=0)
    info = SeriesInfo(series_instance_uid=path.name, study_instance_uid=path.name)
    pixels = np.clip(np.rint(hu), -1024, 4095).astype(np.int16)
    slices: list[Slice] = []
    try:
        normal = np.cross(axes[:, 0] / spacing[0], axes[:, 1] / spacing[1])
        thickness = float(abs(normal @ axes[:, 2]))
        for index in range(hu.shape[2]):
            geometry = SliceGeometry(
                rows=hu.shape[1],
                cols=hu.shape[0],
                row_spacing_mm=float(spacing[1]),
                col_spacing_mm=float(spacing[0]),
                image_position_mm=_vector(origin + index * axes[:, 2]),
                row_direction=_vector(axes[:, 0] / spacing[0]),
                col_direction=_vector(axes[:, 1] / spacing[1]),
                thickness_mm=thickness,
            )
            slices.append(
                Slice(
                    pixels=np.ascontiguousarray(pixels[:, :, index].T),
                    geometry=geometry,
                    series=info,
                    sop_instance_uid=str(index + 1),
                    source=f"{path.name} slice {index + 1}",
                )
            )
    except GeometryError as exc:
        raise GeometryError(f"{path}: {exc}", code=exc.code) from exc
    return slices


def as_mask(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(columns, rows, slices) to (slices, rows, cols): voxels above 0, whatever they hold."""
    return np.ascontiguousarray((values > MASK_FROM).transpose(2, 1, 0))


def refuse_other_shape(mask: tuple[int, ...], scan: tuple[int, ...], path: Path, like: str) -> None:
    """Refuse a mask that is not on the lattice of its scan.

    Raises:
        InputError: The shapes differ.
    """
    if mask != scan:
        raise InputError(
            f"{path}: shape {mask}, expected {scan} of {like}. {REMEDY}", code=Code.BAD_GEOMETRY
        )


def _vector(values: NDArray[np.float64]) -> Vector:
    return (float(values[0]), float(values[1]), float(values[2]))
