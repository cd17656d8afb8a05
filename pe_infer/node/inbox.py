"""Slices on disk: a slice that `Inbox.keep` has taken is never lost."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pe_infer.errors import Code, NodeError
from pe_infer.node.durable import held, make_private_folder, write_file
from pe_infer.node.entries import Instance, NewInstance
from pe_infer.node.ledger import Ledger

_UID: Final = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_MAX_UID: Final = 64
FILES: Final = "slices"
_SCRATCH: Final = "arriving"


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
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        """Open the inbox; what was half written by a process that has ended goes.

        Args:
            folder: Made if missing. One process at a time uses it.
            ledger: Where slices are entered.

        Raises:
            NodeError: The folder cannot be used.
        """
        self._ledger = ledger
        self._files = folder / FILES
        self._scratch = folder / _SCRATCH
        make_private_folder(self._files)
        shutil.rmtree(self._scratch, ignore_errors=True)
        make_private_folder(self._scratch)

    def path(self, instance: Instance) -> Path:
        """Where a slice is."""
        return self._files / instance.file

    def keep(self, header: Header, content: bytes, *, calling_ae_title: str) -> Instance | None:
        """Take a slice. When this returns, it is on disk and in the ledger.

        Args:
            header: What the slice says of itself.
            content: The whole file, with preamble and file meta information.
            calling_ae_title: Who sent it.

        Returns:
            Its entry; ``None`` if this very slice was taken before.

        Raises:
            NodeError: A UID is none (``node.state``), or the disk is full (``node.full``) or
                fails. Nothing was taken.
        """
        digest = hashlib.sha256(content).hexdigest()
        folder = Path(
            checked_uid(header.study_instance_uid, "StudyInstanceUID"),
            checked_uid(header.series_instance_uid, "SeriesInstanceUID"),
        )
        name = f"{checked_uid(header.sop_instance_uid, 'SOPInstanceUID')}-{digest[:16]}.dcm"
        with held(self._files / folder):
            write_file(self._files / folder / name, content, scratch=self._scratch)
            return self._enter(header, digest, len(content), folder / name, calling_ae_title)

    def recover(self, read: Callable[[Path], Header | None]) -> int:
        """Enter files that are whole and not in the ledger: the process ended before it was.

        Args:
            read: Reads a file's header; ``None`` where that cannot be: such a file is left alone.

        Returns:
            How many were entered.
        """
        entered = 0
        for path in sorted(self._files.glob("*/*/*.dcm")):
            file = path.relative_to(self._files)
            if self._ledger.knows_file(file.as_posix()) or (header := read(path)) is None:
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entered += self._enter(header, digest, len(content), file, "") is not None
        return entered

    def _enter(
        self, header: Header, digest: str, size: int, file: Path, calling_ae_title: str
    ) -> Instance | None:
        return self._ledger.add(
            NewInstance(
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
