"""NIfTI volumes in HU as slices. The only user of nibabel."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from export.datasets.collections.volumes import REMEDY, as_mask, as_slices, refuse_other_shape
from pe_infer.errors import Code, ConfigurationError, InputError
from pe_infer.geometry import Slice

RAS_TO_LPS: Final = np.diag([-1.0, -1.0, 1.0])


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

    The header's scaling (``scl_slope``, ``scl_inter``) has been applied, so that values are HU. The
    affine is RAS and in mm, which becomes LPS.

    Returns:
        See ``export.datasets.collections.volumes.as_slices``.

    Raises:
        ConfigurationError: nibabel is not installed.
        InputError: The file is no volume, or holds no HU.
        GeometryError: Its slices are not axial.
    """
    volume = _load(path)
    affine = np.asarray(volume.affine, dtype=np.float64)
    axes, origin = RAS_TO_LPS @ affine[:3, :3], RAS_TO_LPS @ affine[:3, 3]
    return as_slices(_values(volume, path), axes, origin, path)


def read_mask(path: Path, like: Path) -> NDArray[np.bool_]:
    """A mask on the lattice of a volume: (slices, rows, cols), as `read_slices` orders them.

    Args:
        path: The mask; voxels above 0 are the finding, whatever number they hold.
        like: The volume it belongs to.

    Raises:
        ConfigurationError: nibabel is not installed.
        InputError: A file is no volume, or the mask has another shape.
    """
    mask = _load(path)
    refuse_other_shape(tuple(mask.shape), tuple(_load(like).shape), path, like.name)
    return as_mask(_values(mask, path))


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
            f"{path}: cannot be read as NIfTI: {exc}. {REMEDY}", code=Code.UNREADABLE_FILE
        ) from exc
    if dimensions != 3:
        raise InputError(
            f"{path}: shape {tuple(volume.shape)}, expected columns x rows x slices. {REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    return volume


def _values(volume: Any, path: Path) -> NDArray[np.float32]:
    """Scaled voxels (columns, rows, slices) float32."""
    try:
        return np.asarray(volume.get_fdata(dtype=np.float32))
    except Exception as exc:  # the file may be cut short
        raise InputError(
            f"{path}: its voxels cannot be read: {exc}. {REMEDY}", code=Code.UNDECODABLE_PIXELS
        ) from exc
