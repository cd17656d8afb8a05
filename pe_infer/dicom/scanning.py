"""What lies in folders and files: every DICOM instance, and a count of all that was left aside."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pydicom.dataset import Dataset

from pe_infer.dicom.conversion import dataset_name
from pe_infer.dicom.reading import cannot_open, is_dicomdir, looks_like_dicom, read_header
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
        skipped: How many files were left aside, by reason: ``hidden`` (a folder counts as one),
            ``not_dicom``, ``dicomdir``, ``not_a_file``.
        broken: DICOM files whose header cannot be read, files and folders that cannot be opened.
    """

    instances: list[Instance] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    broken: list[DicomError] = field(default_factory=list)


def scan(source: Source) -> Scan:
    """Find DICOM instances and read their headers.

    Folders are searched to any depth; links are followed, each folder is visited once. In a folder,
    hidden files and folders, files that are no DICOM, DICOMDIR, sockets and the like are counted
    and left aside; folders that cannot be looked into are in ``broken``. A file named by the caller
    must be DICOM: otherwise it is in ``broken`` too.

    Raises:
        ConfigurationError: ``source`` is empty or of another type, or a path does not exist.
    """
    if isinstance(source, str | os.PathLike | Dataset) or not isinstance(source, Iterable):
        source = [source]
    items = list(source)
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
        if os.path.isdir(path):  # noqa: PTH112  # unlike Path.is_dir, never raises
            for file in _files(path, found):
                _scan_file(file, found, named=False)
        elif os.path.lexists(path):
            _scan_file(path, found, named=True)
        else:
            raise ConfigurationError(
                f"{path}: does not exist, or lies where you may not look. Check the path."
            )
    return found


def _files(folder: Path, found: Scan) -> Iterator[Path]:
    """Yield the files that might be DICOM; what cannot be looked into is in ``found.broken``."""

    def refuse(cause: OSError) -> None:
        found.broken.append(cannot_open(cause.filename, cause))

    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        try:
            status = Path(root).stat()
        except OSError as exc:
            refuse(exc)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        if hidden:
            found.skipped["hidden"] += len(hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith("."):
                continue
            if _is_special(path):
                found.skipped["not_a_file"] += 1
            else:
                yield path


def _is_special(path: Path) -> bool:
    """Tell whether this is a pipe, a socket, a device or a link to nowhere."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError as exc:
        return exc.errno in {errno.ENOENT, errno.ELOOP}  # otherwise opening it tells the reason


def _scan_file(path: Path, found: Scan, *, named: bool) -> None:
    try:
        if not named and not looks_like_dicom(path):
            found.skipped["not_dicom"] += 1
            return
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
