"""DICOM headers of very many files: which study, series and patient every file belongs to.

Pixels are not read, but the length of a file says whether they are all there.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import pydicom
from pydicom.dataset import Dataset

from export.datasets.collections.base import Follow, LeftOut
from pe_infer.dicom.reading import Quiet, stated_transfer_syntax, translated
from pe_infer.errors import Code, DicomError

CHUNK: Final = 256  # files that one process reads at a time
_IDENTITY = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_LAYOUT = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames")
_REMEDY = "Download the file again; until then it is left out."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """Whose image a file is."""

    path: Path
    patient: str  # empty where a header need not name one
    study_uid: str
    series_uid: str
    sop_uid: str


Read: TypeAlias = FileIdentity | LeftOut


def read_identities(
    paths: Sequence[Path], *, workers: int, follow: Follow, patient_required: bool = True
) -> Iterator[Read]:
    """Read the headers of files, in their order.

    Args:
        paths: DICOM files.
        workers: Processes; with 1 they are read in this one.
        follow: Shows progress.
        patient_required: Whether a header has to name its patient.

    Returns:
        The identity of every file, or why it is left out: ``unreadable``, ``truncated``,
        ``no identity``.
    """
    read = partial(_read_chunk, patient_required=patient_required)
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    if workers == 1:
        found = (identity for chunk in chunks for identity in read(chunk))
        yield from follow(found, len(paths))
        return
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(read, chunks)
        yield from follow((identity for part in parts for identity in part), len(paths))


def _read_chunk(paths: Sequence[Path], *, patient_required: bool) -> list[Read]:
    with Quiet():
        return [_read(path, patient_required=patient_required) for path in paths]


def _read(path: Path, *, patient_required: bool) -> Read:
    try:
        with translated(
            str(path), "read the DICOM header", code=Code.UNREADABLE_FILE, remedy=_REMEDY
        ):
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=[*_IDENTITY, *_LAYOUT]
            )
            values = [str(header.get(keyword) or "") for keyword in _IDENTITY]
            size, needed = path.stat().st_size, _pixel_bytes(header)
    except DicomError as exc:
        return LeftOut(what=path.name, reason="unreadable", message=str(exc))
    if not all(values if patient_required else values[1:]):
        lacking = ", ".join(k for k, value in zip(_IDENTITY, values, strict=True) if not value)
        message = f"{path}: has no {lacking}, so its study is not known. {_REMEDY}"
        return LeftOut(what=path.name, reason="no identity", message=message)
    if size < needed:
        message = f"{path}: the file has {size} bytes, its pixels alone need {needed}. {_REMEDY}"
        return LeftOut(what=path.name, reason="truncated", message=message)
    patient, study, series, sop = values
    return FileIdentity(path=path, patient=patient, study_uid=study, series_uid=series, sop_uid=sop)


def _pixel_bytes(header: Dataset) -> int:
    """Least length of the pixel data; 0 where it is compressed."""
    syntax = stated_transfer_syntax(header)
    if syntax is None or syntax.is_private or syntax.is_compressed:
        return 0
    rows, cols, bits, samples = (int(header.get(keyword) or 0) for keyword in _LAYOUT[:4])
    return rows * cols * samples * bits // 8 * int(header.get("NumberOfFrames") or 1)
