"""Files that are whole or not there, and on disk when a call returns."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from receiving import eventually

from pe_infer.errors import Code, ConfigurationError, NodeError, PeInferError
from pe_infer.node.durable import held, make_private_folder, taken, write_file, write_folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is forced to disk, and what gets its name, in order."""
    seen: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def see_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def see_rename(path: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(Path, "rename", see_rename)
    return seen


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, scratch: Path, steps: list[tuple[str, str]]
) -> None:
    write_file(tmp_path / "a", b"1", scratch=scratch)
    part = steps[0][1]
    assert part.endswith(".part")
    assert steps == [("fsync", part), ("rename", "a"), ("fsync", tmp_path.name)]


def test_a_file_is_private_and_replaces_one_of_its_name(tmp_path: Path, scratch: Path) -> None:
    write_file(tmp_path / "a", b"old", scratch=scratch)
    write_file(tmp_path / "a", iter([b"n", b"ew"]), scratch=scratch)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_full_half_way_leaves_nothing_and_is_told_without_a_file_name(
    tmp_path: Path, scratch: Path
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"first"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NodeError, match="Free some space") as caught:
        write_file(tmp_path / "1.2.3.dcm", pieces(), scratch=scratch)
    assert caught.value.code is Code.NODE_FULL
    assert "1.2.3" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_a_file_that_cannot_be_forced_to_disk_is_not_there(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NodeError) as caught:
        write_file(tmp_path / "a", b"1", scratch=scratch)
    assert caught.value.code is Code.NODE_STATE
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_a_folder_of_files_is_on_disk_as_a_whole_before_it_has_its_name(
    tmp_path: Path, scratch: Path, steps: list[tuple[str, str]]
) -> None:
    def fill(folder: Path) -> None:
        for name in "ab":
            (folder / name).write_text(name)

    write_folder(tmp_path / "parcel", fill, scratch=scratch)
    assert sorted(steps[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert steps[2][0] == "fsync"
    assert steps[2][1].endswith(".part")
    assert steps[3:] == [("rename", "parcel"), ("fsync", tmp_path.name)]
    assert not list(scratch.iterdir())


def test_a_folder_that_cannot_be_filled_is_not_there(tmp_path: Path, scratch: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_folder(tmp_path / "parcel", fill, scratch=scratch)
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOENT])
def test_a_disk_that_is_full_is_told_by_whatever_error_it_comes(
    tmp_path: Path, scratch: Path, number: int
) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise ConfigurationError("a file failed") from OSError(number, "why")

    with pytest.raises(PeInferError) as caught:
        write_folder(tmp_path / "parcel", fill, scratch=scratch)
    full = number != errno.ENOENT
    assert caught.value.code is (Code.NODE_FULL if full else Code.INVALID_ARGUMENT)
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path, scratch: Path) -> None:
    write_folder(tmp_path / "parcel", lambda f: (f / "a").touch(), scratch=scratch)
    with pytest.raises(NodeError):
        write_folder(tmp_path / "parcel", lambda f: (f / "b").touch(), scratch=scratch)
    assert [path.name for path in (tmp_path / "parcel").iterdir()] == ["a"]
    assert not list(scratch.iterdir())


def test_every_folder_on_the_way_is_private_and_its_name_on_disk(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    make_private_folder(tmp_path / "a" / "b" / "c")
    assert steps == [("fsync", tmp_path.name), ("fsync", "a"), ("fsync", "b")]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_who_takes_a_folder_waits_for_those_who_hold_it(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    order: list[str] = []

    def take() -> None:
        with taken(folder) as there:
            order.append(f"taken {there}")

    with held(folder):
        thread = threading.Thread(target=take)
        thread.start()
        with held(folder):  # holders do not wait for each other
            pass
        order.append("let go")
    thread.join()
    assert order == ["let go", "taken True"]


def test_a_folder_that_goes_while_one_waits_for_it_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    make_private_folder(folder)
    held_by_thread = threading.Event()

    def hold() -> None:
        with held(folder):
            assert folder.is_dir()
            held_by_thread.set()

    with taken(folder):
        thread = threading.Thread(target=hold)
        thread.start()
        eventually(lambda: _waits_for_a_lock(folder.stat().st_ino))
        folder.rmdir()
    thread.join()
    assert held_by_thread.is_set()


def _waits_for_a_lock(inode: int) -> bool:
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{inode} " in line for line in lines)
