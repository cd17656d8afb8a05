"""Which series is whose turn, and who has room."""

import math
import threading

from prometheus_client import Gauge

from pe_infer.node.agenda import Agenda
from pe_infer.node.capacity import RESULT_BYTES, Backlog, Slots


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def gauge() -> Gauge:
    return Gauge("shown", "what is counted", registry=None)


def test_series_are_taken_in_turn() -> None:
    agenda = Agenda(Clock())
    for series in (3, 1, 2):
        agenda.wake(series)
    order = []
    for _ in range(6):
        series = agenda.take(0)
        assert series is not None
        order.append(series)
        agenda.give_back(series, 0.0)
    assert order == [3, 1, 2, 3, 1, 2]


def test_a_series_is_held_by_one_thread_and_woken_for_the_next_turn() -> None:
    agenda = Agenda(Clock())
    agenda.wake(1)
    assert agenda.take(0) == 1
    agenda.wake(1)
    assert agenda.take(0) is None
    agenda.give_back(1, None)  # it was woken since: it is not forgotten
    assert agenda.take(0) == 1
    agenda.give_back(1, None)
    assert 1 not in agenda
    assert agenda.take(0) is None


def test_a_series_is_due_at_its_time_or_when_it_is_woken() -> None:
    clock = Clock()
    agenda = Agenda(clock)
    for series, at in ((1, 5.0), (2, math.inf)):
        agenda.wake(series)
        assert agenda.take(0) == series
        agenda.give_back(series, at)
        assert series in agenda
    assert agenda.take(0) is None
    agenda.wake(2)
    assert agenda.take(0) == 2
    agenda.give_back(2, math.inf)
    clock.now = 5.0
    assert agenda.take(0) == 1
    agenda.give_back(1, 9.0)
    agenda.wake(1)
    assert agenda.take(0) == 1
    agenda.give_back(1, None)
    clock.now = 10.0  # when it was to be due once
    assert agenda.take(0) is None


def test_who_waits_for_a_series_hears_of_it_and_of_the_end() -> None:
    agenda = Agenda(Clock())
    found: list[int | None] = []
    taker = threading.Thread(target=lambda: found.append(agenda.take(60)))
    taker.start()
    agenda.wake(7)
    taker.join(60)
    assert found == [7]
    waiter = threading.Thread(target=lambda: found.append(agenda.take(600)))
    waiter.start()
    agenda.close()
    waiter.join(60)
    assert found == [7, None]
    agenda.wake(8)
    assert agenda.take(600) is None


def test_the_backlog_counts_every_slice_once() -> None:
    shown = gauge()
    backlog = Backlog(3, shown)
    for slice_id in (1, 2, 2):
        backlog.add(1, slice_id)
    assert backlog.room()
    backlog.add(2, 3)
    assert not backlog.room()
    backlog.passed(1, 1)
    backlog.add(1, 1)  # its thread was faster than who took it
    assert backlog.room()
    backlog.begin(1, [1, 2])  # from the first one on again
    assert not backlog.room()
    backlog.drop(1)
    backlog.passed(2, 3)
    assert [sample.value for metric in shown.collect() for sample in metric.samples] == [0]


def test_room_is_owed_to_every_series_until_it_is_dropped() -> None:
    backlog = Backlog(3, gauge())
    backlog.add(1, 1)
    backlog.add(1, 2)
    backlog.begin(2, [3])
    backlog.passed(2, 3)  # judged, and its result is to come
    assert backlog.owed_bytes == 2 * RESULT_BYTES
    backlog.drop(1)
    backlog.drop(2)
    backlog.drop(3)
    assert backlog.owed_bytes == 0


def test_places_go_to_the_oldest_that_wait() -> None:
    woken: list[int] = []
    slots = Slots(1, woken.append, gauge())
    assert slots.acquire(5)
    assert slots.acquire(5)
    assert not slots.acquire(7)
    assert not slots.acquire(6)
    assert slots.waits(6)
    assert woken == []
    slots.release(5)
    assert woken == [6]
    assert not slots.acquire(8)  # 6 and 7 are older
    assert slots.acquire(6)
    slots.release(7)  # does not wait any more
    slots.release(6)
    assert woken[-1] == 8
    assert slots.acquire(8)


def test_all_free_places_are_given() -> None:
    woken: list[int] = []
    slots = Slots(2, woken.append, gauge())
    assert slots.acquire(1)
    assert slots.acquire(2)
    for series in (3, 4):
        assert not slots.acquire(series)
    slots.release(1)
    slots.release(2)
    assert not slots.acquire(4)
    assert slots.acquire(3)
    assert woken[-1] == 4
    assert slots.acquire(4)
