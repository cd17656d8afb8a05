"""The state folder: private, used by one node at a time, with a key of its own."""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from pe_infer.errors import NodeError
from pe_infer.node.durable import make_private_folder, translated, write_file

_LEDGER: Final = "ledger.db"
_KEY: Final = "key"
_LOCK: Final = "lock"
_KEY_BYTES: Final = 32
_TRIES: Final = 5
_BETWEEN_S: Final = 0.1
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class StateFolder:
    """Names in a state folder."""

    def __init__(self, root: Path) -> None:
        """Name a folder; nothing is read or written."""
        self.root = root
        self.ledger = root / _LEDGER

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder if it is missing, and have it for this process alone.

        Raises:
            NodeError: Another process has it, others may read it, or it cannot be used.
        """
        make_private_folder(self.root)
        self._refuse_others()
        with translated(self.root / _LOCK):
            file = (self.root / _LOCK).open("a+b")
        with file:
            if not _lock(file):
                raise NodeError(
                    f"{self.root}: process {self.pid()} uses this state_dir. Stop it, or give this "
                    "node another one."
                )
            with translated(self.root / _LOCK):
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                file.flush()
            yield

    def pid(self) -> int | None:
        """The process that has claimed the folder, if one has.

        Raises:
            NodeError: The folder cannot be read.
        """
        with translated(self.root / _LOCK):
            try:
                file = (self.root / _LOCK).open("rb")
            except FileNotFoundError:
                return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
        return None

    def key(self) -> bytes:
        """The key of aliases: random, made with the folder.

        Raises:
            NodeError: It cannot be read or written.
        """
        path = self.root / _KEY
        if not path.exists():
            write_file(path, secrets.token_bytes(_KEY_BYTES), scratch=self.root)
        with translated(path):
            return path.read_bytes()

    def check_there(self) -> None:
        """Refuse a folder that no node has used.

        Raises:
            NodeError: It is none.
        """
        with translated(self.root):
            there = self.ledger.is_file() and (self.root / _KEY).is_file()
        if not there:
            raise NodeError(
                f"{self.root}: no node has kept anything there. Name the state_dir of its settings."
            )

    def _refuse_others(self) -> None:
        mode = self.root.stat().st_mode
        if mode & _OTHERS:
            raise NodeError(
                f"{self.root}: mode {stat.S_IMODE(mode):04o} lets others in, and slices will lie "
                f"there. chmod 700 {self.root}"
            )


def _lock(file: BinaryIO) -> bool:
    """Lock a file for this process; `StateFolder.pid` of another one may have it for a moment."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_BETWEEN_S)
        else:
            return True
    return False
