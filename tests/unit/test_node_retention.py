"""What a node deletes, and what a process that ends while it deletes leaves behind."""

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deliveries import Clock
from node_states import conclude, header, receive

from pe_infer.errors import NodeError
from pe_infer.node import retention as module
from pe_infer.node.durable import held
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.retention import Retention


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as ledger:
        yield ledger


@pytest.fixture
def inbox(tmp_path: Path, ledger: Ledger) -> Inbox:
    return Inbox(tmp_path, ledger)


@pytest.fixture
def retention(tmp_path: Path, ledger: Ledger) -> Retention:
    return Retention(tmp_path, ledger)


def files(state_dir: Path) -> list[str]:
    """What is there, without the ledger."""
    return sorted(
        path.relative_to(state_dir).as_posix()
        for path in state_dir.rglob("*")
        if path.is_file() and not path.name.startswith("ledger.db")
    )


def settle(tmp_path: Path, ledger: Ledger, inbox: Inbox, series: str = "2") -> int:
    series_id = receive(inbox, series)
    conclude(tmp_path, ledger, series_id)
    return series_id


def test_what_is_settled_and_old_goes_with_all_its_files(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    settle(tmp_path, ledger, inbox)
    assert not retention.purge(before=time.time() - 3600)
    assert len(files(tmp_path)) == 6
    assert len(retention.due(before=math.inf)) == 1
    assert len(retention.purge(before=math.inf)) == 1
    assert not files(tmp_path)
    assert not ledger.series()
    assert not (tmp_path / "slices" / "1.2.3").exists()


def test_what_is_received_or_on_its_way_stays(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    receiving = receive(inbox, "1")
    waiting = receive(inbox, "2")
    conclude(tmp_path, ledger, waiting, destinations=("pacs", "folder"))
    ignored = receive(inbox, "3")
    ledger.route(ignored, bundle=None, reason="a scout")
    assert [entry.id for entry in retention.purge(before=math.inf)] == [ignored]
    first, second = ledger.deliveries()
    ledger.update_delivery(first.id, state="done")
    ledger.update_delivery(second.id, state="stored")
    assert not retention.purge(before=math.inf)
    ledger.update_delivery(second.id, state="refused", error="no")
    assert [entry.id for entry in retention.purge(before=math.inf)] == [waiting]
    assert [entry.id for entry in ledger.series()] == [receiving]


def test_what_was_received_in_the_future_counts_as_received_now(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was a year ahead, and was set right."""
    hour_s, now = 3600.0, time.time()
    settle(tmp_path, ledger, inbox, "1")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 365 * 24 * hour_s)
        settle(tmp_path, ledger, inbox, "2")
    clock = Clock()
    clock.now = now + hour_s
    retention = Retention(tmp_path, ledger, clock=clock)
    assert len(retention.purge(before=clock.now - 0.5 * hour_s)) == 1
    (entry,) = ledger.series()
    assert (entry.first_at, entry.last_at) == (clock.now, clock.now)
    clock.now += hour_s
    assert retention.purge(before=clock.now - 2 * hour_s) == []
    clock.now += hour_s
    assert len(retention.purge(before=clock.now - 1.5 * hour_s)) == 1


def test_one_series_can_be_named(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    first, second = (settle(tmp_path, ledger, inbox, series) for series in "12")
    assert [entry.id for entry in retention.purge(before=math.inf, series_id=second)] == [second]
    assert [entry.id for entry in ledger.series()] == [first]
    assert len(files(tmp_path)) == 6


def test_the_number_of_a_series_that_is_gone_is_not_given_again(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    before = settle(tmp_path, ledger, inbox)
    retention.purge(before=math.inf)
    assert receive(inbox) != before


def test_entries_whose_slices_were_moved_away_go_at_the_next_start(
    tmp_path: Path,
    ledger: Ledger,
    inbox: Inbox,
    retention: Retention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settle(tmp_path, ledger, inbox)
    move = module._move

    def fail(folder: Path, target: Path) -> None:
        move(folder, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_move", fail)
        retention.purge(before=math.inf)
    assert len(ledger.series()) == 1
    assert not list((tmp_path / "slices").rglob("*.dcm"))
    retention.clear()
    assert not ledger.series()
    assert not files(tmp_path)


def test_files_that_nothing_names_go_at_the_next_start_and_are_not_taken_up(
    tmp_path: Path,
    ledger: Ledger,
    inbox: Inbox,
    retention: Retention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settle(tmp_path, ledger, inbox)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.shutil, "rmtree", fail)
        retention.purge(before=math.inf)
    assert not ledger.series()
    assert len(files(tmp_path)) == 6
    assert Inbox(tmp_path, ledger).recover(lambda _: header()) == 0
    retention.clear()
    assert not files(tmp_path)


def test_a_slice_that_is_being_taken_is_waited_for_and_kept(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    settle(tmp_path, ledger, inbox)
    gone: list[Any] = []
    purge = threading.Thread(target=lambda: gone.extend(retention.purge(before=math.inf)))
    with held(tmp_path / "slices" / "1.2.3" / "1.2.3.2"):  # as `Inbox.keep` does
        purge.start()
        assert inbox.keep(header(instance="9"), b"late", calling_ae_title="CT_1") is not None
        assert purge.is_alive()
    purge.join(timeout=30)
    assert not purge.is_alive()
    assert not gone
    assert len(ledger.instances(ledger.series()[0].id)) == 4
    assert len(list((tmp_path / "slices").rglob("*.dcm"))) == 4


def test_a_slice_that_comes_while_its_series_goes_is_a_series_of_its_own(
    tmp_path: Path,
    ledger: Ledger,
    inbox: Inbox,
    retention: Retention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = settle(tmp_path, ledger, inbox)
    move = module._move
    late = threading.Thread(
        target=lambda: inbox.keep(header(instance="9"), b"late", calling_ae_title="CT_1")
    )

    def send_then_move(folder: Path, target: Path) -> None:
        if not late.ident:
            late.start()
        move(folder, target)

    monkeypatch.setattr(module, "_move", send_then_move)
    assert [entry.id for entry in retention.purge(before=math.inf)] == [before]
    late.join(timeout=60)
    (entry,) = ledger.series()
    assert entry.id != before
    assert entry.state == "receiving"
    (instance,) = ledger.instances(entry.id)
    assert files(tmp_path) == [f"slices/{instance.file}"]


def test_entries_and_files_agree_whoever_is_first(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    together = threading.Barrier(2, timeout=60)

    def keep(series: str) -> None:
        together.wait()
        assert inbox.keep(header(series, "9"), b"late", calling_ae_title="CT_1")

    for series in map(str, range(1, 31)):
        settle(tmp_path, ledger, inbox, series)
        late = threading.Thread(target=keep, args=(series,))
        late.start()
        together.wait()
        retention.purge(before=math.inf)
        late.join(timeout=60)
        entry = ledger.series()[-1]
        assert entry.state == "receiving"
        assert len(ledger.instances(entry.id)) in {1, 4}
    entered = [
        tmp_path / "slices" / instance.file
        for entry in ledger.series()
        for instance in ledger.instances(entry.id)
    ]
    assert len(ledger.series()) == 30
    assert sorted(entered) == sorted((tmp_path / "slices").rglob("*.dcm"))


def test_versions_of_a_series_that_comes_again_are_counted_on(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    """Objects of another content must not have the UIDs of those that a PACS has."""
    for version in (1, 2):
        series_id = settle(tmp_path, ledger, inbox)
        entry = ledger.series_entry(series_id)
        assert entry is not None
        assert entry.version == version
        assert len(retention.purge(before=math.inf)) == 1
    other = ledger.series_entry(receive(inbox, "3"))
    assert other is not None
    assert other.version == 0


def test_a_series_without_a_result_that_comes_again_goes_on_from_the_last_result(
    tmp_path: Path, ledger: Ledger, inbox: Inbox, retention: Retention
) -> None:
    settle(tmp_path, ledger, inbox)
    retention.purge(before=math.inf)
    ledger.route(receive(inbox), bundle=None, reason="a scout")
    retention.purge(before=math.inf)
    entry = ledger.series_entry(receive(inbox))
    assert entry is not None
    assert entry.version == 1


def test_the_folder_of_what_goes_is_there_before_another_user_needs_it(
    tmp_path: Path, retention: Retention
) -> None:
    """Else a purge by root makes it, and the node can delete nothing any more."""
    (tmp_path / "removing").mkdir(exist_ok=True)
    retention.clear()
    assert (tmp_path / "removing").stat().st_mode & 0o777 == 0o700


def test_a_series_that_cannot_be_deleted_keeps_no_other(
    tmp_path: Path,
    ledger: Ledger,
    inbox: Inbox,
    retention: Retention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stays, goes = (settle(tmp_path, ledger, inbox, series) for series in "12")
    move = module._move

    def fail(folder: Path, target: Path) -> None:
        if folder.name == "1.2.3.1":
            raise PermissionError
        move(folder, target)

    monkeypatch.setattr(module, "_move", fail)
    with pytest.raises(NodeError):
        retention.purge(before=math.inf)
    assert [entry.id for entry in ledger.series()] == [stays]
    assert goes != stays
