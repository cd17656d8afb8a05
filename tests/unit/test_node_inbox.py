"""Slices on disk: what is kept is never lost, whatever else happens at the same time."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from receiving import forget

from pe_infer.errors import Code, NodeError
from pe_infer.node.durable import taken
from pe_infer.node.inbox import Header, Inbox, checked_uid
from pe_infer.node.ledger import Ledger


def header(number: int = 1, series: str = "2.25.2") -> Header:
    return Header(
        study_instance_uid="2.25.1",
        series_instance_uid=series,
        sop_instance_uid=f"2.25.3.{number}",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def inbox(tmp_path: Path, ledger: Ledger) -> Inbox:
    return Inbox(tmp_path, ledger)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "slices").rglob("*") if path.is_file())


class Pieces:
    """Content that is not in memory as a whole."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.size = sum(map(len, pieces))

    def pieces(self) -> Iterator[bytes]:
        yield from self._pieces


def test_a_slice_that_is_kept_is_a_private_file_and_an_entry(
    tmp_path: Path, inbox: Inbox, ledger: Ledger
) -> None:
    kept = inbox.keep(header(), b"slice", calling_ae_title="SCANNER")
    assert kept is not None
    path = inbox.path(kept)
    assert path.read_bytes() == b"slice"
    assert path.parent == tmp_path / "slices" / "2.25.1" / "2.25.2"
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o600, 0o700]
    assert ledger.instances(kept.series_id) == [kept]
    assert not list(inbox.scratch.iterdir())


def test_content_in_pieces_is_the_same_slice(inbox: Inbox) -> None:
    kept = inbox.keep(header(), b"slice", calling_ae_title="A")
    assert inbox.keep(header(), Pieces(b"sl", b"ice"), calling_ae_title="B") is None
    other = inbox.keep(header(2), Pieces(b"sl", b"ice"), calling_ae_title="B")
    assert kept is not None
    assert other is not None
    assert inbox.path(other).read_bytes() == b"slice"


def test_two_copies_that_differ_are_both_kept(tmp_path: Path, inbox: Inbox) -> None:
    first = inbox.keep(header(), b"one", calling_ae_title="A")
    second = inbox.keep(header(), b"two", calling_ae_title="A")
    assert first is not None
    assert second is not None
    assert len(files(tmp_path)) == 2
    assert (inbox.path(first).read_bytes(), inbox.path(second).read_bytes()) == (b"one", b"two")


def test_the_names_of_new_folders_are_on_disk_once_and_found_ones_are_not_trusted(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made a folder that is there may have ended before its fsync."""
    synced: list[str] = []
    fsync = os.fsync

    def see(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    (tmp_path / "slices" / "2.25.1" / "2.25.2").mkdir(parents=True)
    inbox = Inbox(tmp_path, ledger)
    monkeypatch.setattr(os, "fsync", see)
    inbox.keep(header(), b"one", calling_ae_title="A")
    assert synced[:2] == ["2.25.1", "slices"]
    assert synced[2].endswith(".part")
    assert synced[3:] == ["2.25.2"]
    synced.clear()
    inbox.keep(header(2), b"two", calling_ae_title="A")
    assert synced[1:] == ["2.25.2"]


@pytest.mark.parametrize(
    "uid", ["", "1", "../2.25.1", "1.2/3", "1.2.03", "1..2", "1.2.", "1.2\n", "1.2\x00", "1." * 40]
)
def test_what_is_no_uid_becomes_no_file_name(tmp_path: Path, inbox: Inbox, uid: str) -> None:
    with pytest.raises(NodeError) as caught:
        checked_uid(uid, "StudyInstanceUID")
    assert caught.value.code is Code.INVALID_ATTRIBUTE
    bad = Header(
        study_instance_uid="2.25.1",
        series_instance_uid=uid,
        sop_instance_uid="2.25.3",
        sop_class_uid="1.2",
        transfer_syntax_uid="1.2",
    )
    with pytest.raises(NodeError, match="SeriesInstanceUID"):
        inbox.keep(bad, b"slice", calling_ae_title="A")
    assert files(tmp_path) == []


def test_a_full_disk_takes_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, inbox: Inbox, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        inbox.keep(header(), b"one", calling_ae_title="A")
        patched.setattr(os, "fsync", full)
        with pytest.raises(NodeError) as caught:
            inbox.keep(header(2), b"two", calling_ae_title="A")
        assert caught.value.code is Code.NODE_FULL
        assert "2.25" not in str(caught.value)
    assert len(files(tmp_path)) == 1
    assert not list(inbox.scratch.iterdir())
    assert inbox.keep(header(2), b"two", calling_ae_title="A") is not None
    assert ledger.count("2.25.1", "2.25.2") == 2


def test_a_series_that_is_full_takes_no_new_slice_and_knows_its_own(
    tmp_path: Path, inbox: Inbox
) -> None:
    for number in (1, 2):
        inbox.keep(header(number), b"slice", calling_ae_title="A", most=2)
    with pytest.raises(NodeError) as caught:
        inbox.keep(header(3), b"slice", calling_ae_title="A", most=2)
    assert caught.value.code is Code.NODE_FULL
    assert len(files(tmp_path)) == 2
    assert inbox.keep(header(1), b"slice", calling_ae_title="A", most=2) is None
    assert inbox.keep(header(1, "2.25.9"), b"slice", calling_ae_title="A", most=2) is not None


def test_one_instance_on_several_associations_at_once_is_kept_once(
    tmp_path: Path, inbox: Inbox, ledger: Ledger
) -> None:
    new: list[object] = []
    start = threading.Barrier(4)

    def keep() -> None:
        for number in range(5):
            start.wait()
            new.append(inbox.keep(header(number), b"slice", calling_ae_title="A"))

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(entry is not None for entry in new) == 5
    assert len(files(tmp_path)) == ledger.count("2.25.1", "2.25.2") == 5


def test_a_slice_that_comes_while_its_series_is_deleted_is_kept(
    tmp_path: Path, inbox: Inbox, ledger: Ledger
) -> None:
    kept = []
    folder = tmp_path / "slices" / "2.25.1" / "2.25.2"
    inbox.keep(header(0), b"slice", calling_ae_title="A")
    going = threading.Event()

    def keep() -> None:
        number = 0
        while not going.is_set() or number < 10:
            number += 1
            entry = inbox.keep(header(number), b"slice", calling_ae_title="A")
            kept.append(entry)

    thread = threading.Thread(target=keep)
    thread.start()
    gone = 0
    for _ in range(5):
        with taken(folder) as there:
            for series in ledger.series():
                gone += series.instances
                forget(ledger, series.id)
            if there:
                shutil.rmtree(folder)
    going.set()
    thread.join()
    left = [entry for series in ledger.series() for entry in ledger.instances(series.id)]
    assert None not in kept
    assert gone + len(left) == len(kept) + 1
    assert all(inbox.path(entry).read_bytes() == b"slice" for entry in left)
    assert len(files(tmp_path)) == len(left)


def test_a_file_whose_entry_was_not_made_is_entered_at_the_next_start(
    tmp_path: Path, inbox: Inbox, ledger: Ledger
) -> None:
    """As a process that was killed between the two leaves it."""
    kept = inbox.keep(header(), b"slice", calling_ae_title="A")
    assert kept is not None
    forget(ledger, kept.series_id)
    (inbox.scratch / "half.part").write_bytes(b"sl")
    again = Inbox(tmp_path, ledger)
    assert again.recover(lambda _path: header()) == 1
    assert again.recover(lambda _path: header()) == 0
    (series,) = ledger.series()
    assert [entry.file for entry in ledger.instances(series.id)] == [kept.file]
    assert not list(again.scratch.iterdir())
    assert again.keep(header(), b"slice", calling_ae_title="A") is None


def test_what_is_not_as_it_was_written_is_not_entered(
    tmp_path: Path, inbox: Inbox, ledger: Ledger
) -> None:
    for number in (1, 2, 3, 4):
        inbox.keep(header(number), b"slice", calling_ae_title="A")
    (series,) = ledger.series()
    first, second, third, _ = ledger.instances(series.id)
    forget(ledger, series.id)
    inbox.path(first).write_bytes(b"sli")  # cut short
    stray = tmp_path / "slices" / "2.25.1" / "2.25.2" / "stray.dcm"
    stray.write_bytes(b"slice")
    told = {
        inbox.path(first): header(1),
        inbox.path(second): header(9),  # of another instance
        inbox.path(third): None,  # cannot be read
        stray: header(1),
    }
    assert inbox.recover(lambda path: told.get(path, header(4))) == 1
    assert [entry.sop_instance_uid for entry in ledger.instances(ledger.series()[0].id)] == [
        "2.25.3.4"
    ]
    assert len(files(tmp_path)) == 5


def test_what_is_recovered_is_on_disk_before_it_is_entered(
    inbox: Inbox, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = inbox.keep(header(), b"slice", calling_ae_title="A")
    assert kept is not None
    forget(ledger, kept.series_id)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(NodeError):
            inbox.recover(lambda _path: header())
    assert ledger.series() == []


def test_opening_an_inbox_leaves_what_is_arriving_alone(tmp_path: Path, ledger: Ledger) -> None:
    """A second process looks at a node that runs."""
    first = Inbox(tmp_path, ledger)
    (first.scratch / "x.part").write_bytes(b"sl")
    Inbox(tmp_path, ledger)
    assert (first.scratch / "x.part").exists()
