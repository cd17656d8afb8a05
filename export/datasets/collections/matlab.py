"""Masks in MATLAB files, for DICOM series: one plane for each file of a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from export.datasets.collections.volumes import MASK_FROM
from pe_infer.dicom.reading import Quiet, translated
from pe_infer.errors import Code, InputError
from pe_infer.geometry import Slice

VARIABLE: Final = "Mask"
_REMEDY = "Download the file again, or leave the study out."


def read_array(path: Path) -> NDArray[np.bool_]:
    """The variable ``Mask`` of a file: (rows, cols, planes); values above 0 are the finding.

    Raises:
        InputError: The file is no MATLAB file up to version 7, or has no such variable of three
            dimensions. Version 7.3 is HDF5, which SciPy does not read.
    """
    try:
        content = loadmat(path, variable_names=[VARIABLE])
    except NotImplementedError as exc:
        raise InputError(
            f"{path}: a MATLAB file of version 7.3, expected up to 7. Save it again with "
            f"save(..., '{VARIABLE}', '-v7').",
            code=Code.UNREADABLE_FILE,
        ) from exc
    except (MatReadError, OSError, ValueError, TypeError) as exc:
        raise InputError(
            f"{path}: cannot be read as a MATLAB file: {exc}. {_REMEDY}", code=Code.UNREADABLE_FILE
        ) from exc
    if VARIABLE not in content or np.ndim(content[VARIABLE]) != 3:
        raise InputError(
            f"{path}: has no variable {VARIABLE!r} of rows x columns x planes. {_REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    return np.asarray(content[VARIABLE]) > MASK_FROM


def read_mask(path: Path, files: Sequence[Path], slices: Sequence[Slice]) -> NDArray[np.bool_]:
    """A mask on the lattice of a series.

    Args:
        path: The MATLAB file; plane k belongs to file k.
        files: Of the series, in the order of their names.
        slices: That were read of them, in any order.

    Returns:
        (slices, rows, cols), in the order of ``slices``.

    Raises:
        InputError: The numbers of planes and files, or the sizes of planes and slices, differ; or a
            slice comes from none of the files.
    """
    mask = read_array(path)
    if mask.shape[2] != len(files):
        raise InputError(
            f"{path}: {mask.shape[2]} planes, expected one for each of {len(files)} files of "
            f"{files[0].parent if files else 'the series'}. {_REMEDY}",
            code=Code.BAD_GEOMETRY,
        )
    place = {_sop_uid(file): number for number, file in enumerate(files)}
    planes: list[NDArray[np.bool_]] = []
    for image in slices:
        number = place.get(image.sop_instance_uid)
        expected = (image.geometry.rows, image.geometry.cols)
        if number is None or mask.shape[:2] != expected:
            raise InputError(
                f"{path}: planes of {mask.shape[:2]} pixels, expected {expected} of "
                f"{image.source}, which is file {number}. {_REMEDY}",
                code=Code.BAD_GEOMETRY,
            )
        planes.append(mask[:, :, number])
    return np.stack(planes)


def _sop_uid(path: Path) -> str:
    with (
        Quiet(),
        translated(str(path), "read the DICOM header", code=Code.UNREADABLE_FILE, remedy=_REMEDY),
    ):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"])
    return str(header.get("SOPInstanceUID") or "")
