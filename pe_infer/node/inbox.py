"""Slices on disk: a slice that `Inbox.keep` has taken is never lost."""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pe_infer.errors import Code, NodeError
from pe_infer.node.durable import (
    held,
    make_private_folder,
    sync_file,
    sync_folder,
    translated,
    write_file,
)
from pe_infer.node.entries import Instance, NewInstance
from pe_infer.node.ledger import Ledger

_UID: Final = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_MAX_UID: Final = 64
FILES: Final = "slices"
_SCRATCH: Final = "arriving"
_DIGEST_CHARACTERS: Final = 16  # of a file's name
_MOST_REMEMBERED: Final = 4096  # folders


class Content(Protocol):
    """Bytes that need not all be in memory."""

    @property
    def size(self) -> int:
        """How many."""

    def pieces(self) -> Iterator[bytes]:
        """All of them, in order; as often as asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the node has to know of an instance before it takes it.

    Attributes:
        study_instance_uid: As the data set says.
        series_instance_uid: As the data set says.
        sop_instance_uid: As the data set says.
        sop_class_uid: As the data set says.
        transfer_syntax_uid: Encoding of the file.
        expected: How many instances the series has, if it says so.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    expected: int | None = None


class Inbox:
    """The folder of slices, and their entries in the ledger. Thread-safe.

    ``slices/<study>/<series>/<instance>-<digest>.dcm``: UIDs are validated before they become
    names. Two copies of an instance that differ are both kept: whether their pixels do is for the
    study to judge.

    From a slice's file to its entry the folder of its series is held: who deletes a series takes
    the folder first, in this process or another (`durable.taken`).
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        """Open the inbox.

        Args:
            folder: Made if missing. One process at a time keeps slices in it.
            ledger: Where slices are entered.

        Raises:
            NodeError: The folder cannot be used.
        """
        self._ledger = ledger
        self._files = folder / FILES
        self._scratch = folder / _SCRATCH
        self._making = threading.Lock()
        self._made: set[Path] = set()
        for path in (self._files, self._scratch):
            make_private_folder(path)

    @property
    def scratch(self) -> Path:
        """Folder for what is arriving, of the same file system as the slices."""
        return self._scratch

    def path(self, instance: Instance) -> Path:
        """Where a slice is."""
        return self._files / instance.file

    def keep(
        self,
        header: Header,
        content: bytes | Content,
        *,
        calling_ae_title: str,
        most: int | None = None,
    ) -> Instance | None:
        """Take a slice. When this returns, it is on disk and in the ledger.

        Args:
            header: What the slice says of itself.
            content: The whole file, with preamble and file meta information.
            calling_ae_title: Who sent it.
            most: How many slices its series may have (a few more, if they come at once).

        Returns:
            Its entry; ``None`` if this very slice was taken before.

        Raises:
            NodeError: A UID is none (``dicom.invalid_attribute``), the disk or the series is full
                (``node.full``), or the disk or the ledger fails (``node.state``). The slice is not
                entered; its file may be there, and is entered by `recover` then.
        """
        hashed = hashlib.sha256()
        for piece in (content,) if isinstance(content, bytes) else content.pieces():
            hashed.update(piece)
        digest = hashed.hexdigest()
        file = _place(header, digest)
        size = len(content) if isinstance(content, bytes) else content.size
        entry = _entry(header, digest, size, file, calling_ae_title)
        if (
            most is not None
            and self._ledger.count(entry.study_instance_uid, entry.series_instance_uid) >= most
            and not self._ledger.knows_file(entry.file)
        ):
            raise NodeError(f"a series has {most} slices already", code=Code.NODE_FULL)
        with held(self._ready(self._files / file.parent)):
            write_file(
                self._files / file,
                content if isinstance(content, bytes) else content.pieces(),
                scratch=self._scratch,
            )
            return self._ledger.add(entry)

    def recover(self, read: Callable[[Path], Header | None]) -> int:
        """Clear up after a process that ended, before slices are kept again.

        What was half written goes. Files that are whole and not in the ledger are entered: the
        process ended before they were.

        Args:
            read: Reads a file's header; ``None`` where that cannot be: such a file is left alone.

        Returns:
            How many were entered.

        Raises:
            NodeError: The disk or the ledger fails.
        """
        entered = 0
        with translated(self._scratch):
            shutil.rmtree(self._scratch)
            make_private_folder(self._scratch)
        for path in sorted(self._files.glob("*/*/*.dcm")):
            file = path.relative_to(self._files)
            if self._ledger.knows_file(file.as_posix()):
                continue
            with translated(self._files):
                with path.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                size = path.stat().st_size
            header = read(path)
            try:
                if header is None or file != _place(header, digest):  # not as it was written
                    continue
            except NodeError:
                continue
            with held(self._ready(path.parent)):
                with translated(self._files):
                    sync_file(path)  # its writer may have ended before the disk had it
                    sync_folder(path.parent)
                entered += self._ledger.add(_entry(header, digest, size, file, "")) is not None
        return entered

    def _ready(self, folder: Path) -> Path:
        """Have a series' folder, and the names of it and its study on disk.

        One thread at a time makes folders: one that finds a folder cannot tell whether the thread
        that made it, or a process that has ended, came to the fsync.
        """
        with self._making:
            if folder not in self._made or not folder.exists():
                make_private_folder(folder)
                with translated(self._files):
                    sync_folder(folder.parent)
                    sync_folder(self._files)
                if len(self._made) >= _MOST_REMEMBERED:
                    self._made.clear()
                self._made.add(folder)
        return folder


def _place(header: Header, digest: str) -> Path:
    """Where a slice goes, below the folder of slices; its UIDs are checked."""
    return Path(
        checked_uid(header.study_instance_uid, "StudyInstanceUID"),
        checked_uid(header.series_instance_uid, "SeriesInstanceUID"),
        f"{checked_uid(header.sop_instance_uid, 'SOPInstanceUID')}"
        f"-{digest[:_DIGEST_CHARACTERS]}.dcm",
    )


def _entry(
    header: Header, digest: str, size: int, file: Path, calling_ae_title: str
) -> NewInstance:
    return NewInstance(
        study_instance_uid=header.study_instance_uid,
        series_instance_uid=header.series_instance_uid,
        sop_instance_uid=header.sop_instance_uid,
        sop_class_uid=header.sop_class_uid,
        transfer_syntax_uid=header.transfer_syntax_uid,
        sha256=digest,
        bytes=size,
        file=file.as_posix(),
        calling_ae_title=calling_ae_title,
        expected=header.expected,
    )


def checked_uid(uid: str, keyword: str) -> str:
    """A UID that may become a file name (PS3.5 section 9.1).

    Raises:
        NodeError: It is none.
    """
    if len(uid) <= _MAX_UID and _UID.fullmatch(uid):
        return uid
    raise NodeError(
        f"{keyword} is no UID of at most {_MAX_UID} digits and dots; the sender has to mend it",
        code=Code.INVALID_ATTRIBUTE,
    )


def without_files(message: str) -> str:
    """A message with instances in place of the files of an inbox that it names."""
    return re.sub(r"\S*/[0-9.]+/[0-9.]+/([0-9.]+)-[0-9a-f]{16}\.dcm", r"instance \1", message)
