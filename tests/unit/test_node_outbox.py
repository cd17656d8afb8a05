"""The outbox: order, retries, refusals, restarts; any destination will do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deliveries import Console, Pacs, Sending, console, eventually, pacs, running

from pe_infer.errors import NodeError
from pe_infer.node import outbox as outbox_module
from pe_infer.node.ledger import Ledger
from pe_infer.node.outbox import JITTER

MakeSending = Callable[..., Sending]


@pytest.fixture
def hook() -> Iterator[Console]:
    with console() as peer:
        yield peer


@pytest.fixture
def archive() -> Iterator[Pacs]:
    with pacs() as peer:
        yield peer


def event_ids(hook: Console) -> list[str]:
    return [headers["X-PE-Infer-Event-Id"] for headers, _ in hook.posted]


def metric(sending: Sending, outcome: str, destination: str = "console") -> float | None:
    return sending.watch.registry.get_sample_value(
        "pe_infer_node_deliveries_total", {"destination": destination, "outcome": outcome}
    )


def test_what_an_earlier_process_left_is_sent_at_the_start(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    with running(sending):
        eventually(sending.all_done)
    assert event_ids(hook) == ["1-result-1"]
    assert metric(sending, "done") == 1


def test_a_parcel_that_is_entered_is_sent_to_every_destination(
    tmp_path: Path, hook: Console, archive: Pacs
) -> None:
    folder = {"kind": "folder", "name": "results", "path": tmp_path / "results"}
    sending = Sending(tmp_path / "state", (hook.destination(), archive.destination(), folder))
    with running(sending) as outbox:
        sending.result(sending.series())
        outbox.wake()
        eventually(sending.all_done)
    assert len(hook.posted) == 1
    assert len(archive.stored) == 3
    assert len(list((tmp_path / "results").glob("*/*/result-v1/*.dcm"))) == 3


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_waits_double_up_to_the_longest_less_what_is_left_to_chance(
    tmp_path: Path, hook: Console, chance: float
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    hook.statuses = [500] * 5
    with running(sending, chance) as outbox:
        for tries, wait_s in enumerate((10.0, 20.0, 40.0, 60.0, 60.0), start=1):
            eventually(lambda n=tries: sending.ledger.deliveries()[0].attempts == n)
            (delivery,) = sending.ledger.deliveries()
            assert delivery.due_at == sending.clock.now + wait_s * (1 - JITTER * chance)
            assert delivery.error == "HTTP status 500"
            sending.clock.now = delivery.due_at - 0.001
            outbox.wake()
            assert len(hook.posted) == tries
            sending.clock.now = delivery.due_at
            outbox.wake()
        eventually(sending.all_done)
    assert len(hook.posted) == 6
    assert metric(sending, "failed") == 5
    assert (
        sending.watch.registry.get_sample_value(
            "pe_infer_node_waiting_deliveries", {"destination": "console"}
        )
        == 0
    )


def test_a_destination_that_is_down_gets_everything_when_it_is_up_again(
    tmp_path: Path, archive: Pacs
) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    archive.stop()
    for _ in range(3):
        sending.result(sending.series())
    with running(sending) as outbox:
        eventually(lambda: [d.attempts for d in sending.ledger.deliveries()] == [1, 1, 1])
        archive.start()
        assert archive.stored == {}
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    assert len(archive.stored) == 9


def test_a_destination_that_is_down_holds_up_no_other(
    tmp_path: Path, hook: Console, archive: Pacs
) -> None:
    sending = Sending(tmp_path, (archive.destination(), hook.destination()))
    archive.stop()
    with running(sending) as outbox:
        for _ in range(5):
            sending.result(sending.series())
        outbox.wake()
        eventually(lambda: sending.states().count("done") == 5)
        assert len(hook.posted) == 5
    archive.start()


def test_a_delivery_that_fails_holds_up_its_own_series_only(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    failing, other = sending.series(), sending.series()
    sending.alert(failing)
    hook.statuses = [503]
    with running(sending) as outbox:
        eventually(lambda: len(hook.posted) == 1)
        sending.withdrawn_result(failing)
        sending.result(failing, version=2)
        sending.result(other)
        outbox.wake()
        eventually(lambda: sending.states().count("done") == 1)
        assert event_ids(hook) == ["1-alert-1", "2-result-1"]
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    assert event_ids(hook)[2:] == ["1-alert-1", "1-withdrawal-1", "1-result-1", "1-result-2"]


def test_parcels_that_fail_for_ever_do_not_hold_up_a_new_one(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    for _ in range(3):
        sending.result(sending.series())
    for delivery in sending.ledger.deliveries():
        for _ in range(9):
            sending.ledger.update_delivery(delivery.id, state="waiting", due_at=1.0)
    sending.result(sending.series())
    hook.statuses = [204, 503, 503, 503]
    with running(sending):
        eventually(lambda: [d.attempts for d in sending.ledger.deliveries()] == [10, 10, 10, 1])
    assert event_ids(hook) == ["4-result-1", "1-result-1", "2-result-1", "3-result-1"]
    assert sending.states() == ["waiting", "waiting", "waiting", "done"]


def test_what_is_dropped_while_it_is_being_sent_stays_dropped(
    tmp_path: Path, archive: Pacs
) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    archive.hold.clear()
    try:
        with running(sending), Ledger(tmp_path / "ledger.db") as other:
            eventually(lambda: archive.contexts)
            assert other.drop("pacs", reason="gone") == 1
            archive.hold.set()
    finally:
        archive.hold.set()
    assert sending.states() == ["refused"]
    assert sending.ledger.deliveries()[0].error == "gone"


def test_what_is_refused_is_set_aside_with_the_reason_and_later_parcels_go(
    tmp_path: Path, hook: Console
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    series = sending.series()
    sending.alert(series)
    sending.result(series)
    hook.statuses = [400]
    with running(sending):
        eventually(lambda: sending.states() == ["refused", "done"])
    assert sending.ledger.deliveries()[0].error == "HTTP status 400"
    assert metric(sending, "refused") == 1
    (line,) = [line for line in sending.log() if line["event"] == "delivery_refused"]
    assert line["error"] == "HTTP status 400"
    assert line["destination"] == "console"
    assert line["level"] == "warning"


def test_what_was_sent_and_not_noted_is_sent_again_after_a_restart(
    tmp_path: Path, archive: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())

    def killed(*_: object, **__: object) -> None:
        raise NodeError("the process has ended")

    with monkeypatch.context() as patch:
        patch.setattr(sending.ledger, "update_delivery", killed)
        with running(sending):
            eventually(lambda: "outbox_failed" in sending.logged.getvalue())
    assert sending.states() == ["waiting"]
    first = list(archive.order)
    archive.order.clear()
    with Ledger(tmp_path / "ledger.db") as reopened:
        sending.ledger = reopened
        with running(sending):
            eventually(sending.all_done)
    assert archive.order == first[:3]
    assert len(archive.stored) == 3


def test_what_another_process_has_sent_again_is_sent_as_a_whole(
    tmp_path: Path, archive: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "POLL_S", 0.01)
    sending = Sending(tmp_path, (archive.destination(),))
    series = sending.series()
    sending.result(series)
    with running(sending), Ledger(tmp_path / "ledger.db") as other:
        eventually(sending.all_done)
        assert other.send_again(series) == 1
        eventually(lambda: len(archive.order) == 6)
        eventually(sending.all_done)
    assert archive.order[3:] == archive.order[:3]


def test_tries_count_anew_when_something_is_sent_again(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    series = sending.series()
    sending.result(series)
    hook.statuses = [500, 400, 500]
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        sending.clock.now += 10.0
        outbox.wake()
        eventually(lambda: sending.states() == ["refused"])
        sending.ledger.send_again(series)
        outbox.wake()
        eventually(lambda: len(hook.posted) == 3)
        eventually(lambda: sending.ledger.deliveries()[0].due_at == sending.clock.now + 10.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "0.dcm").unlink(),
        lambda folder: (folder / "contents.json").write_text("["),
        lambda folder: (folder / "document.json").write_text("{}"),
        lambda folder: (folder / "document.json").unlink(),
    ],
)
def test_a_parcel_that_is_not_whole_is_set_aside(
    tmp_path: Path, hook: Console, damage: Callable[[Path], Any]
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    series = sending.series()
    damage(sending.parcels / sending.result(series).folder)
    sending.result(series, version=2)
    with running(sending):
        eventually(lambda: sending.states() == ["refused", "done"])
    assert "pe-infer node replay" in str(sending.ledger.deliveries()[0].error)


def test_an_unexpected_error_ends_no_thread(
    tmp_path: Path, hook: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "POLL_S", 0.01)
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    due = sending.ledger.due
    failures = [OSError("Family^Given"), OSError("Family^Given")]

    def failing(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return due(*arguments, **named)

    monkeypatch.setattr(sending.ledger, "due", failing)
    with running(sending):
        eventually(sending.all_done)
    failed = [line for line in sending.log() if line["event"] == "outbox_failed"]
    assert [line["error"] for line in failed] == ["OSError", "OSError"]
    assert "Family" not in sending.logged.getvalue()


def test_an_unexpected_error_of_a_try_is_tried_again(
    tmp_path: Path, hook: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    with monkeypatch.context() as patch:
        patch.setattr(outbox_module, "read_contents", lambda _folder: 1 / 0)
        with running(sending):
            eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
    assert sending.ledger.deliveries()[0].error == "ZeroDivisionError"
    sending.clock.now += 10.0
    with running(sending):
        eventually(sending.all_done)


def test_deliveries_to_a_destination_that_is_no_longer_configured_are_told(tmp_path: Path) -> None:
    folder = {"kind": "folder", "name": "gone", "path": tmp_path / "results"}
    sending = Sending(tmp_path / "state", (folder,))
    sending.result(sending.series())
    sending.settings = sending.settings.model_copy(update={"destinations": ()})
    with running(sending):
        pass
    assert [(line["event"], line["deliveries"]) for line in sending.log()] == [
        ("destination_unknown", 1)
    ]


def test_a_stop_waits_for_what_is_being_sent_but_not_for_long(
    tmp_path: Path, hook: Console
) -> None:
    sending = Sending(tmp_path, (hook.destination(),), timeout_s=1.0)
    sending.result(sending.series())
    hook.silent.set()
    with running(sending) as outbox:
        eventually(lambda: hook.posted)
        outbox.stop(0.01)
        assert "outbox_cut_short" in sending.logged.getvalue()
    assert sending.states() == ["waiting"]


def test_logs_hold_neither_uids_nor_names(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    archive.status = {"1.2.840.10008.5.1.4.1.1.7": 0xA700}
    series_id = sending.series()
    sending.result(series_id)
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        archive.status.clear()
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    series = sending.ledger.series_entry(series_id)
    assert series is not None
    logged = sending.logged.getvalue()
    assert sending.watch.alias(series.series_instance_uid) in logged
    for secret in ("1.2.826", "2.25.", "Family", str(tmp_path), *archive.stored):
        assert secret not in logged


def test_a_clock_that_is_set_back_does_not_hold_up_a_delivery(
    tmp_path: Path, hook: Console
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    hook.statuses = [500]
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        sending.clock.now -= 365 * 86400.0
        outbox.wake()
        eventually(sending.all_done)


def test_a_clock_that_is_set_back_a_little_does_not_send_early(
    tmp_path: Path, hook: Console
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    hook.statuses = [500]
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        sending.clock.now -= 30.0
        outbox.wake()
        (waiting,) = sending.ledger.deliveries()
        assert waiting.state == "waiting"
        assert not sending.ledger.due("console", now=sending.clock.now, longest_s=60.0)
