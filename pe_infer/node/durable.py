"""Files that are whole and there after a power failure: write, fsync, rename, fsync the folder.

Messages name the folder that fails and never a file: names of slices are made of UIDs.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pe_infer.errors import Code, NodeError, PeInferError

_FULL = {errno.ENOSPC, errno.EDQUOT}


def make_private_folder(folder: Path) -> None:
    """Make a folder, and those above it, that only this user may read; its name is on disk.

    Raises:
        NodeError: It cannot be made.
    """
    with translated(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path.parent)


def write_file(path: Path, content: bytes | Iterable[bytes], *, scratch: Path) -> None:
    """Write a file so that, whatever happens, it is there as a whole or not at all.

    Args:
        path: Its place; one that is there is replaced. Its folder is there and on disk.
        content: What to write, as a whole or in pieces.
        scratch: Folder of the same file system for the file while it is not whole.

    Raises:
        NodeError: It cannot be written (``node.full`` where the disk has no room).
    """
    part = scratch / f"{uuid.uuid4().hex}.part"
    try:
        with translated(scratch):
            descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in (content,) if isinstance(content, bytes) else content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_folder(folder: Path, fill: Callable[[Path], None], *, scratch: Path) -> None:
    """Make a folder of files so that it is there as a whole or not at all.

    Args:
        folder: Its place; it does not exist. The folder that it is in is there and on disk.
        fill: Writes the files, no folders, into the folder that it is given.
        scratch: Folder of the same file system for the files while they are not all there.

    Raises:
        NodeError: It cannot be written (``node.full`` where the disk has no room).
    """
    part = scratch / f"{uuid.uuid4().hex}.part"
    try:
        with translated(scratch):
            part.mkdir(mode=0o700)
            with _full_disk_unwrapped():
                fill(part)
            for path in part.iterdir():
                sync_file(path)
            sync_folder(part)
            part.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _full_disk_unwrapped() -> Iterator[None]:
    """Raise an error that was made of a full disk as what it was: it passes, others do not."""
    try:
        yield
    except PeInferError as exc:
        cause = exc.__cause__
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise OSError(cause.errno, cause.strerror) from exc
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a folder that stays where it is until the end; it is made if it is missing.

    Raises:
        NodeError: It cannot be made.
    """
    while True:
        make_private_folder(folder)
        with _lock(folder, fcntl.LOCK_SH) as there:
            if there:
                yield
                return


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Wait until nobody holds a folder, in any process, and keep others from it until the end.

    Yields:
        Whether it is there.
    """
    with _lock(folder, fcntl.LOCK_EX) as there:
        yield there


@contextmanager
def _lock(folder: Path, how: int) -> Iterator[bool]:
    """Lock a folder; false if it is not there, or not there any more when it is locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, how)
        try:
            there = os.path.samestat(os.fstat(descriptor), folder.stat())
        except FileNotFoundError:
            there = False
        yield there
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Have the content of a file on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Raise what goes wrong with files as `NodeError`; ``folder`` is for the message."""
    try:
        yield
    except OSError as exc:
        full = exc.errno in _FULL
        raise NodeError(
            f"{folder}: cannot be written to: {exc.strerror}. "
            + ("Free some space." if full else "Check the disk and who may write there."),
            code=Code.NODE_FULL if full else Code.NODE_STATE,
        ) from exc
