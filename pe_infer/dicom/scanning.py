"""What lies in folders and files: every DICOM instance, and a count of all that was left aside."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pydicom.dataset import Dataset

from pe_infer.dicom.conversion import dataset_name
from pe_infer.dicom.reading import is_dicomdir, looks_like_dicom, read_header
from pe_infer.errors import Code, ConfigurationError, DicomError

Item: TypeAlias = str | os.PathLike[str] | Dataset
Source: TypeAlias = Item | Iterable[Item]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """One DICOM instance that was found.

    Attributes:
        name: File, for messages.
        header: Its attributes; with pixel data if it was given as a data set.
        path: File, ``None`` for a data set.
    """

    name: str
    header: Dataset
    path: Path | None


@dataclass(slots=True, kw_only=True)
class Scan:
    """What a source holds.

    Attributes:
        instances: DICOM instances in the order found (folders sorted by name).
        skipped: How many files were left aside, by reason: ``hidden``, ``not_dicom``, ``dicomdir``,
            ``not_a_file``.
        broken: DICOM files whose header cannot be read, or files that cannot be opened.
    """

    instances: list[Instance] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    broken: list[DicomError] = field(default_factory=list)


def scan(source: Source) -> Scan:
    """Find DICOM instances and read their headers.

    Folders are searched to any depth; links are followed, each folder is visited once. In a folder,
    hidden files, files that are no DICOM, DICOMDIR, sockets and the like are counted and left
    aside. A file named by the caller must be DICOM: otherwise it is in ``broken``.

    Raises:
        ConfigurationError: ``source`` is empty or of another type, or a path does not exist.
    """
    items = [source] if isinstance(source, str | os.PathLike | Dataset) else list(source)
    if not items:
        raise ConfigurationError("no files were given, expected a folder, files or data sets")
    found = Scan()
    for item in items:
        if isinstance(item, Dataset):
            found.instances.append(Instance(name=dataset_name(item), header=item, path=None))
            continue
        if not isinstance(item, str | os.PathLike):
            raise ConfigurationError(
                f"cannot read a {type(item).__name__}, "
                "expected a folder, a file or a pydicom Dataset"
            )
        path = Path(item)
        if path.is_dir():
            for file in _files(path, found.skipped):
                _scan_file(file, found, named=False)
        elif path.exists():
            _scan_file(path, found, named=True)
        else:
            raise ConfigurationError(f"{path}: does not exist. Check the path.")
    return found


def _files(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not _is_regular(path):  # opening a pipe would wait for a writer
                skipped["not_a_file"] += 1
            else:
                yield path


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nowhere
        return False


def _scan_file(path: Path, found: Scan, *, named: bool) -> None:
    try:
        if not named and not looks_like_dicom(path):
            found.skipped["not_dicom"] += 1
            return
        if named and not _is_regular(path):
            raise DicomError(
                f"{path}: is no ordinary file. Give DICOM files or a folder.",
                code=Code.UNREADABLE_FILE,
            )
        header = read_header(path)
    except DicomError as exc:
        found.broken.append(exc)
        return
    if is_dicomdir(header):
        if named:
            found.broken.append(
                DicomError(
                    f"{path}: is the directory of a DICOM medium and holds no image. Give the "
                    "folder it lies in.",
                    code=Code.NOT_CT,
                )
            )
        else:
            found.skipped["dicomdir"] += 1
        return
    found.instances.append(Instance(name=str(path), header=header, path=path))
