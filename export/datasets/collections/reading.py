"""A study of an index as slices, in the form the product takes, with the collection's labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from export.datasets.collections import matlab, nifti, nrrd
from export.datasets.collections.base import Collection, IndexedStudy
from pe_infer import dicom
from pe_infer.dicom.reading import translated
from pe_infer.errors import Code, InputError
from pe_infer.geometry import PatientGrid, Slice
from pe_infer.phantom.truth import as_slices
from pe_infer.result import QualityFlag
from pe_infer.sequencer import Sequencer


@dataclass(frozen=True, kw_only=True, eq=False)
class RealStudy:
    """A study that was read.

    Attributes:
        slices: As they came.
        flags: What was tolerated when a series was chosen and read.
        mask: (slices, rows, cols) of the finding, in the order of ``slices``; ``None`` without one.
    """

    slices: tuple[Slice, ...]
    flags: tuple[QualityFlag, ...] = ()
    mask: NDArray[np.bool_] | None = None

    def mask_slices(self) -> tuple[Slice, ...] | None:
        """The mask on the lattice of the slices: 1000 within the finding, 0 elsewhere."""
        return None if self.mask is None else as_slices(self.mask, self.slices)


def read_study(
    collection: Collection, study: IndexedStudy, root: Path, *, prefer_contrast: bool = True
) -> RealStudy:
    """Read the slices of one study.

    Args:
        collection: It belongs to.
        study: Of the index.
        root: Folder of the collection.
        prefer_contrast: For the choice of a series, as ``pe_infer.dicom.open_series`` has it.

    Raises:
        InputError: A file is missing, damaged, or the product's rules refuse the study.
    """
    paths = [root / name for name in study.files]
    for path in (*paths, *([root / study.mask] if study.mask else [])):
        if not path.exists():
            raise InputError(
                f"{path}: does not exist. Unpack the collection again, or say --root where it lies "
                "now.",
                code=Code.UNREADABLE_FILE,
            )
    if study.form != "dicom":
        volumes = {"nifti": nifti, "nrrd": nrrd}[study.form]
        mask = volumes.read_mask(root / study.mask, paths[0]) if study.mask else None
        return RealStudy(slices=tuple(volumes.read_slices(paths[0])), mask=mask)
    source = paths if collection.repair is None else _repaired(collection, paths)
    series = dicom.open_series(source, prefer_contrast=prefer_contrast)
    slices = tuple(series.slices())
    return RealStudy(
        slices=slices,
        flags=tuple(series.flags),
        mask=matlab.read_mask(root / study.mask, paths, slices) if study.mask else None,
    )


def accepted(slices: Sequence[Slice], grid: PatientGrid) -> tuple[Slice, ...]:
    """The slices that a stream keeps, ascending: without duplicates, one per position.

    Raises:
        SeriesError: A stream would refuse the study: gaps, foreign slices, one position twice.
    """
    sequencer = Sequencer(grid)
    kept: dict[int, Slice] = {}
    for image in slices:
        if sequencer.add(image, _digest(image)):
            kept[image.position_um] = image
    sequencer.judge()
    return tuple(kept[position] for position in sequencer.positions_um)


def _repaired(collection: Collection, paths: Sequence[Path]) -> list[pydicom.Dataset]:
    datasets: list[pydicom.Dataset] = []
    files = [
        file for path in paths for file in (sorted(path.glob("*.dcm")) if path.is_dir() else [path])
    ]
    for path in files:
        with translated(
            str(path),
            "read the DICOM file",
            code=Code.UNREADABLE_FILE,
            remedy="Download the file again.",
        ):
            dataset = pydicom.dcmread(path)
            if collection.repair is not None:
                collection.repair(dataset)
        datasets.append(dataset)
    return datasets


def _digest(image: Slice) -> bytes:
    digest = hashlib.sha256(image.host_pixels.tobytes())
    digest.update(repr((image.rescale_slope, image.rescale_intercept, image.padding)).encode())
    return digest.digest()
