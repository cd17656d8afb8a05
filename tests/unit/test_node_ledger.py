"""The ledger as a database that has to last: what it opens, refuses and survives."""

import math
import multiprocessing
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

import pe_infer.node.ledger as ledger_module
from pe_infer.errors import Code, NodeError
from pe_infer.node.entries import NewInstance
from pe_infer.node.ledger import Ledger


def slice_of(number: int = 1, *, series: str = "2.25.2", **changes: Any) -> NewInstance:
    values: dict[str, Any] = {
        "study_instance_uid": "2.25.1",
        "series_instance_uid": series,
        "sop_instance_uid": f"2.25.3.{number}",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "sha256": f"{number:064x}",
        "bytes": 10,
        "file": f"2.25.1/{series}/{number}.dcm",
        "calling_ae_title": "SCANNER",
    }
    return NewInstance(**{**values, **changes})


def test_slices_are_there_after_reopening_in_order_of_arrival(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        added = [ledger.add(slice_of(number)) for number in (3, 1, 2)]
    with Ledger(tmp_path / "l") as ledger:
        (series,) = ledger.series()
        assert series.instances == 3
        assert ledger.instances(series.id) == added
        assert ledger.instances(series.id, after=added[0].id) == added[1:]
        assert ledger.count("2.25.1", "2.25.2") == 3


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        ledger.add(slice_of())
        assert (tmp_path / "l-wal").stat().st_size > 0
        for pragma, value in (("synchronous", 2), ("foreign_keys", 1)):
            assert ledger._connection.execute(f"PRAGMA {pragma}").fetchone()[0] == value


def test_the_same_instance_with_other_bytes_is_another_entry(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        first = ledger.add(slice_of())
        assert ledger.add(slice_of()) is None
        other = ledger.add(slice_of(sha256="f" * 64, file="other"))
        assert first is not None
        assert other is not None
        assert other.id > first.id


def test_a_late_slice_reopens_what_was_concluded_and_not_what_is_ignored(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        for series in ("2.25.2", "2.25.9"):
            ledger.add(slice_of(series=series))
        judged, ignored = ledger.series()
        ledger.route(ignored.id, bundle=None, reason="no rule")
        ledger.conclude(
            judged.id, version=1, verdict="negative", folder="p", last_instance=1, destinations=()
        )
        assert [entry.state for entry in ledger.series()] == ["concluded", "ignored"]
        for series in ("2.25.2", "2.25.9"):
            ledger.add(slice_of(2, series=series))
        assert [entry.state for entry in ledger.series()] == ["receiving", "ignored"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([None, None], None),
        ([None, 3, None, 3], 3),
        ([3, 4, None], 0),
        ([1, 2, 2, 1], 0),
    ],
)
def test_a_series_has_a_number_of_slices_while_none_of_them_says_another(
    tmp_path: Path, counts: list[int | None], expected: int | None
) -> None:
    for number, count in enumerate(counts):
        with Ledger(tmp_path / "l") as ledger:  # and a restart changes nothing
            ledger.add(slice_of(number, expected=count))
    with Ledger(tmp_path / "l") as ledger:
        assert [entry.expected for entry in ledger.series()] == [expected]


def test_a_ledger_of_another_version_is_left_alone(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").close()
    with sqlite3.connect(tmp_path / "l") as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(NodeError, match="version 7"):
        Ledger(tmp_path / "l")


def test_a_ledger_that_does_not_count_versions_on_learns_it(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").close()
    with sqlite3.connect(tmp_path / "l") as connection:
        connection.execute("DROP TABLE gone")
    connection.close()
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.add(slice_of()) is not None


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "l") as connection:
        connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    with pytest.raises(NodeError, match="version 0"):
        Ledger(tmp_path / "l")
    with sqlite3.connect(tmp_path / "l") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    connection.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"no database" * 100)
    with pytest.raises(NodeError, match="cannot open") as caught:
        Ledger(tmp_path / "l")
    assert caught.value.code is Code.NODE_STATE


def test_a_damaged_ledger_is_found_when_it_is_opened(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        for number in range(60):
            ledger.add(slice_of(number))
    content = bytearray((tmp_path / "l").read_bytes())
    content[8192:12288] = b"\xff" * 4096
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(NodeError, match=r"damaged|malformed"):
        Ledger(tmp_path / "l")


def test_a_folder_without_a_file_system_for_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeError):
        Ledger(tmp_path / "missing" / "l")


def test_a_failed_step_leaves_nothing_and_the_ledger_usable(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        ledger.add(slice_of())
        with pytest.raises(NodeError, match="UNIQUE"):
            ledger.add(slice_of(2, file=slice_of().file))
        assert ledger.count("2.25.1", "2.25.2") == 1
        assert ledger.add(slice_of(2)) is not None


def test_a_full_disk_is_told_apart_and_the_ledger_goes_on_afterwards(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(NodeError) as caught:
            for number in range(1000):
                ledger.add(slice_of(number))
        assert caught.value.code is Code.NODE_FULL
        ledger._connection.execute("PRAGMA max_page_count = 1000000")
        assert ledger.add(slice_of(5000)) is not None


def test_a_commit_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "BUSY_S", 0.05)
    with Ledger(tmp_path / "l") as ledger:
        ledger._connection.set_authorizer(_no_commit)
        with pytest.raises(NodeError):
            ledger.add(slice_of())
        ledger._connection.set_authorizer(None)
        assert ledger.series() == []
        assert ledger.add(slice_of()) is not None


def test_a_ledger_that_another_process_holds_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "BUSY_S", 0.05)
    with Ledger(tmp_path / "l") as ledger:
        process, done = _holder(tmp_path / "l")
        try:
            with pytest.raises(NodeError, match="locked"):
                ledger.add(slice_of())
        finally:
            done.set()
            process.join()
        assert ledger.add(slice_of()) is not None


def test_threads_that_add_at_once_enter_each_instance_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        new: list[int] = []

        def add() -> None:
            new.extend(n for n in range(20) if ledger.add(slice_of(n)) is not None)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(new) == list(range(20))
        assert ledger.count("2.25.1", "2.25.2") == 20


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.close()
    with pytest.raises(NodeError, match="closed"):
        ledger.series()


def _results(ledger: Ledger, series: str, *versions: int) -> int:
    """Results of a series for the destination "pacs"; the number of the series."""
    new = ledger.add(slice_of(series=series, file=series))
    assert new is not None
    for version in versions:
        ledger.conclude(
            new.series_id,
            version=version,
            verdict="negative",
            folder=f"{series}-{version}",
            last_instance=new.id,
            destinations=("pacs",),
        )
    return new.series_id


def _due(ledger: Ledger, now: float = 100.0) -> list[str]:
    return [delivery.parcel.folder for delivery in ledger.due("pacs", now=now)]


def _fail(ledger: Ledger, delivery_id: int, *, times: int, due_at: float) -> None:
    for _ in range(times):
        assert ledger.update_delivery(delivery_id, state="waiting", due_at=due_at, error="late")


def test_what_fails_again_and_again_keeps_nothing_newer_waiting(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        for series in ("often", "once", "once, earlier", "new", "newest"):
            _results(ledger, series, 1)
        often, once, earlier, *_ = ledger.deliveries()
        _fail(ledger, often.id, times=9, due_at=10.0)
        _fail(ledger, once.id, times=1, due_at=90.0)
        _fail(ledger, earlier.id, times=1, due_at=80.0)
        expected = ["new-1", "newest-1", "once, earlier-1", "once-1", "often-1"]
        assert _due(ledger) == expected
        assert _due(ledger, now=85.0) == [name for name in expected if name != "once-1"]


def test_a_later_version_waits_for_an_earlier_one_however_often_that_has_failed(
    tmp_path: Path,
) -> None:
    with Ledger(tmp_path / "l") as ledger:
        _results(ledger, "a", 1, 2)
        _fail(ledger, ledger.deliveries()[0].id, times=9, due_at=90.0)
        assert _due(ledger, now=80.0) == []
        assert _due(ledger, now=100.0) == ["a-1"]
        ledger.update_delivery(ledger.deliveries()[0].id, state="done")
        assert _due(ledger) == ["a-2"]


def test_what_is_dropped_is_refused_and_nothing_else(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        series_id = _results(ledger, "a", 1, 2, 3)
        done, stored, waiting = (delivery.id for delivery in ledger.deliveries())
        ledger.update_delivery(done, state="done")
        ledger.update_delivery(stored, state="stored", due_at=9.0, transaction_uid="2.25.9")
        assert ledger.drop("folder", reason="gone") == 0
        assert ledger.settled(before=math.inf) == []
        assert ledger.drop("pacs", reason="gone") == 2
        assert [(d.state, d.error) for d in ledger.deliveries()] == [
            ("done", None),
            ("refused", "gone"),
            ("refused", "gone"),
        ]
        assert ledger.delivery_of("2.25.9") is None
        assert [entry.id for entry in ledger.settled(before=math.inf)] == [series_id]
        assert not ledger.update_delivery(waiting, state="waiting", error="failed meanwhile")
        assert ledger.open_deliveries() == {}


def _no_commit(action: int, operation: str | None, *_: object) -> int:
    refused = action == sqlite3.SQLITE_TRANSACTION and operation == "COMMIT"
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def _holder(path: Path) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, done))
    process.start()
    assert ready.wait(60)
    return process, done


def _hold(path: Path, ready: Any, done: Any) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    ready.set()
    done.wait(60)
    connection.close()
