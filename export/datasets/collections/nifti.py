"""NIfTI volumes in HU as slices. The only user of nibabel."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.errors import Code, ConfigurationError, GeometryError, InputError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry, Vector

RAS_TO_LPS: Final = np.diag([-1.0, -1.0, 1.0])
AIR_BELOW_HU: Final = -500.0  # a CT in HU has air around the patient
MASK_FROM: Final = 0.5
_REMEDY = "Download the volume again, or leave it out."


def shape_of(path: Path) -> tuple[int, int, int]:
    """Columns, rows and slices of a volume, from its header.

    Raises:
        ConfigurationError: nibabel is not installed.
        InputError: The file is no volume.
    """
    shape = tuple(int(side) for side in _load(path).shape)
    return (shape[0], shape[1], shape[2])


def read_slices(path: Path) -> list[Slice]:
    """A volume in HU as slices, in the order of its third axis.

    The header's scaling (``scl_slope``, ``scl_inter``) has been applied, so that values are HU;
    they are rounded to whole ones. The affine is RAS and in mm, which becomes LPS; a sheared one
    (gantry tilt) gives slices whose centres drift, as a tilted DICOM series has.

    Returns:
        Slices with their number (from 1 on) as ``sop_instance_uid``.

    Raises:
        ConfigurationError: nibabel is not installed.
        InputError: The file is no volume, or holds no HU.
        GeometryError: Its slices are not axial.
    """
    volume = _load(path)
    hu = _values(volume, path)
    if not np.isfinite(hu).all() or float(hu.min()) > AIR_BELOW_HU:
        raise InputError(
            f"{path}: lowest value {float(hu.min()):g}, expected air of about -1000 HU: these are "
            f"no HU. {_REMEDY}",
            code=Code.UNSUPPORTED_PIXELS,
        )
    affine = np.asarray(volume.affine, dtype=np.float64)
    axes = RAS_TO_LPS @ affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    origin = RAS_TO_LPS @ affine[:3, 3]
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


def read_mask(path: Path, like: Path) -> NDArray[np.bool_]:
    """A mask on the lattice of a volume: (slices, rows, cols), as `read_slices` orders them.

    Args:
        path: The mask; voxels above 0 are the finding, whatever number they hold.
        like: The volume it belongs to.

    Raises:
        ConfigurationError: nibabel is not installed.
        InputError: A file is no volume, or the mask has another shape.
    """
    mask, volume = _load(path), _load(like)
    if mask.shape != volume.shape:
        raise InputError(
            f"{path}: shape {tuple(mask.shape)}, expected {tuple(volume.shape)} of {like.name}. "
            f"{_REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    return np.ascontiguousarray((_values(mask, path) > MASK_FROM).transpose(2, 1, 0))


def _load(path: Path) -> Any:
    try:
        import nibabel  # noqa: PLC0415  # an extra, imported only where a volume is read
    except ImportError as exc:
        raise ConfigurationError(
            f"{path}: NIfTI volumes need nibabel: pip install -e '.[export]'"
        ) from exc
    try:
        volume: Any = nibabel.load(path, mmap=False)
        dimensions = len(volume.shape)
    except Exception as exc:  # nibabel raises whatever the damage leads to
        raise InputError(
            f"{path}: cannot be read as NIfTI: {exc}. {_REMEDY}", code=Code.UNREADABLE_FILE
        ) from exc
    if dimensions != 3:
        raise InputError(
            f"{path}: shape {tuple(volume.shape)}, expected columns x rows x slices. {_REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    return volume


def _values(volume: Any, path: Path) -> NDArray[np.float32]:
    """Scaled voxels (columns, rows, slices) float32."""
    try:
        return np.asarray(volume.get_fdata(dtype=np.float32))
    except Exception as exc:  # the file may be cut short
        raise InputError(
            f"{path}: its voxels cannot be read: {exc}. {_REMEDY}", code=Code.UNDECODABLE_PIXELS
        ) from exc


def _vector(values: NDArray[np.float64]) -> Vector:
    return (float(values[0]), float(values[1]), float(values[2]))
