"""NRRD volumes in HU as slices. The only user of SimpleITK."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.datasets.collections.volumes import REMEDY, as_mask, as_slices, refuse_other_shape
from pe_infer.errors import Code, ConfigurationError, InputError
from pe_infer.geometry import Slice


def shape_of(path: Path) -> tuple[int, int, int]:
    """Columns, rows and slices of a volume, from its header.

    Raises:
        ConfigurationError: SimpleITK is not installed.
        InputError: The file is no volume.
    """
    reader = _itk(path).ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as exc:
        raise _unreadable(path, exc) from exc
    return _shape(path, reader.GetSize())


def read_slices(path: Path) -> list[Slice]:
    """A volume in HU as slices, in the order of its third axis.

    SimpleITK gives origin and directions in LPS and mm, whatever ``space`` the header names. A
    header without ``space directions`` has no place in the patient: it is taken to be axial, with
    columns to the patient's left and rows to the back.

    Returns:
        See ``export.datasets.collections.volumes.as_slices``.

    Raises:
        ConfigurationError: SimpleITK is not installed.
        InputError: The file is no volume, or holds no HU.
        GeometryError: Its slices are not axial.
    """
    image = _read(path)
    directions = np.array(image.GetDirection(), dtype=np.float64).reshape(3, 3)
    axes = directions * np.array(image.GetSpacing())
    origin = np.array(image.GetOrigin(), dtype=np.float64)
    return as_slices(_values(image, path), axes, origin, path)


def read_mask(path: Path, like: Path) -> NDArray[np.bool_]:
    """A mask on the lattice of a volume: (slices, rows, cols), as `read_slices` orders them.

    Args:
        path: The mask; voxels above 0 are the finding, whatever number they hold.
        like: The volume it belongs to.

    Raises:
        ConfigurationError: SimpleITK is not installed.
        InputError: A file is no volume, or the mask has another shape.
    """
    refuse_other_shape(shape_of(path), shape_of(like), path, like.name)
    return as_mask(_values(_read(path), path))


def _itk(path: Path) -> Any:
    try:
        import SimpleITK  # noqa: PLC0415  # an extra, imported only where a volume is read
    except ImportError as exc:
        raise ConfigurationError(
            f"{path}: NRRD volumes need SimpleITK: pip install -e '.[export]'"
        ) from exc
    return SimpleITK


def _read(path: Path) -> Any:
    itk = _itk(path)
    try:
        image: Any = itk.ReadImage(str(path), imageIO="NrrdImageIO")
    except RuntimeError as exc:
        raise _unreadable(path, exc) from exc
    _shape(path, image.GetSize())
    return image


def _values(image: Any, path: Path) -> NDArray[np.float32]:
    """Voxels (columns, rows, slices) float32."""
    return np.asarray(_itk(path).GetArrayFromImage(image), np.float32).transpose(2, 1, 0)


def _shape(path: Path, size: tuple[int, ...]) -> tuple[int, int, int]:
    if len(size) != 3:
        raise InputError(
            f"{path}: shape {tuple(size)}, expected columns x rows x slices. {REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    return (int(size[0]), int(size[1]), int(size[2]))


def _unreadable(path: Path, exc: RuntimeError) -> InputError:
    why = str(exc).strip().splitlines()[-1]
    return InputError(f"{path}: cannot be read as NRRD: {why}. {REMEDY}", code=Code.UNREADABLE_FILE)
