"""Which series a thread is to look at, and when; no two threads look at one series."""

import heapq
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    at: float
    ticket: int
    held: bool = False
    woken_at: float = math.inf  # while a thread holds it


class Agenda:
    """Series and when each is due, first come, first served. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start empty; times are those of ``clock``, in seconds."""
        self._clock = clock
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._heap: list[tuple[float, int, int]] = []  # at, ticket, series; old tickets are void
        self._tickets = itertools.count()
        self._closed = False

    def __contains__(self, series_id: int) -> bool:
        """Whether a series is due at some time, or held."""
        with self._changed:
            return series_id in self._entries

    def wake(self, series_id: int) -> None:
        """Have a series looked at now, or again after the thread that holds it gives it back."""
        now = self._clock()
        with self._changed:
            entry = self._entries.get(series_id)
            if entry is not None and entry.held:
                entry.woken_at = min(entry.woken_at, now)
            elif entry is None or entry.at > now:
                self._enter(series_id, now)

    def take(self, timeout: float) -> int | None:
        """Wait for a series that is due, and hold it; ``None`` if none is after a while.

        Args:
            timeout: Longest wait, in seconds.
        """
        with self._changed:
            if (series_id := self._due()) is None and not self._closed:
                next_at = self._heap[0][0] if self._heap else math.inf
                self._changed.wait(max(0.0, min(timeout, next_at - self._clock())))
                series_id = self._due()
            return series_id

    def give_back(self, series_id: int, at: float | None) -> None:
        """Let go of a series.

        Args:
            series_id: One that this thread holds.
            at: When it is due again, infinity until it is woken; ``None``: it is forgotten, unless
                it was woken since.
        """
        with self._changed:
            woken_at = self._entries.pop(series_id).woken_at
            due = min(woken_at, math.inf if at is None else at)
            if at is not None or woken_at < math.inf:
                self._enter(series_id, due)

    def close(self) -> None:
        """Let `take` return at once from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _due(self) -> int | None:
        now = self._clock()
        while not self._closed and self._heap and self._heap[0][0] <= now:
            _, ticket, series_id = heapq.heappop(self._heap)
            entry = self._entries.get(series_id)
            if entry is not None and entry.ticket == ticket and not entry.held:
                entry.held = True
                return series_id
        return None

    def _enter(self, series_id: int, at: float) -> None:
        ticket = next(self._tickets)
        self._entries[series_id] = _Entry(at=at, ticket=ticket)
        if at < math.inf:
            heapq.heappush(self._heap, (at, ticket, series_id))
            self._changed.notify()
