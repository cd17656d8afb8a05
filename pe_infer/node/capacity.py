"""What is bounded: slices that wait, series in memory, and the disk."""

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from prometheus_client import Gauge

from pe_infer.errors import Code, NodeError
from pe_infer.node.durable import translated

# Of the disk, for what is said about a series: 4.4 MB of a positive head of 22 slabs, 3.6 MB of a
# chest of 53 were measured, most of it key images.
RESULT_BYTES: Final = 8 << 20
_LAST_SHARE: Final = 8  # of the reserve, one part in so many is left by results too


def check_room_for_result(folder: Path, reserve_bytes: int) -> None:
    """Keep the end of the reserve for the ledger and for deleting, without which nothing goes on.

    Args:
        folder: Of the parcels.
        reserve_bytes: What slices leave free.

    Raises:
        NodeError: ``node.full``: no result is to be written now.
    """
    with translated(folder):
        free = shutil.disk_usage(folder).free
    if free < (least := reserve_bytes // _LAST_SHARE):
        raise NodeError(
            f"{folder}: {free} bytes are left on the disk and no result is written below {least}. "
            "Free some space, or lower limits.free_disk_bytes.",
            code=Code.NODE_FULL,
        )


class Backlog:
    """Slices that are taken and not judged yet, by number, and their series. Thread-safe."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        """Start empty.

        Args:
            limit: Beyond so many there is no room.
            gauge: Shows how many there are.
        """
        self._limit = limit
        self._gauge = gauge
        self._lock = threading.Lock()
        self._waiting: dict[int, set[int]] = {}
        self._passed: dict[int, int] = {}  # newest slice of a series that is judged
        self._series: set[int] = set()
        self._count = 0

    @property
    def owed_bytes(self) -> int:
        """What the results of all series that are not dropped yet may take on the disk."""
        with self._lock:
            return len(self._series) * RESULT_BYTES

    def room(self) -> bool:
        """Whether more may be taken."""
        with self._lock:
            return self._count < self._limit

    def add(self, series_id: int, instance_id: int) -> None:
        """Note a slice that was taken."""
        with self._lock:
            if instance_id > self._passed.get(series_id, 0):
                self._change(series_id, {instance_id}, set())

    def begin(self, series_id: int, instance_ids: Iterable[int]) -> None:
        """Note that all slices of a series are to be judged, from the first one on."""
        with self._lock:
            self._passed.pop(series_id, None)
            self._change(series_id, set(instance_ids), set())

    def passed(self, series_id: int, instance_id: int) -> None:
        """Note that a slice, and before it all others that came before, is judged."""
        with self._lock:
            self._passed[series_id] = instance_id
            self._change(series_id, set(), {instance_id})

    def drop(self, series_id: int) -> None:
        """Forget a series."""
        with self._lock:
            self._passed.pop(series_id, None)
            self._change(series_id, set(), self._waiting.get(series_id, set()))
            self._series.discard(series_id)

    def _change(self, series_id: int, added: set[int], removed: set[int]) -> None:
        self._series.add(series_id)
        waiting = self._waiting.setdefault(series_id, set())
        before = len(waiting)
        waiting |= added
        waiting -= removed
        self._count += len(waiting) - before
        if not waiting:
            del self._waiting[series_id]
        self._gauge.set(self._count)


class Slots:
    """Room for so many series in memory; who finds none waits, the oldest first. Thread-safe."""

    def __init__(self, count: int, wake: Callable[[int], None], gauge: Gauge) -> None:
        """Start with all free.

        Args:
            count: How many.
            wake: Called with a series that may `acquire` now.
            gauge: Shows how many are taken.
        """
        self._count = count
        self._wake = wake
        self._gauge = gauge
        self._lock = threading.Lock()
        self._holders: set[int] = set()
        self._waiting: set[int] = set()

    def acquire(self, series_id: int) -> bool:
        """Take a place; if there is none, or an older series waits for one, wait to be woken."""
        with self._lock:
            if series_id in self._holders:
                return True
            self._waiting.add(series_id)
            free = len(self._holders) < self._count
            if got := free and series_id == min(self._waiting):
                self._waiting.remove(series_id)
                self._holders.add(series_id)
        self._call_next()
        return got

    def release(self, series_id: int) -> None:
        """Give a place back, or wait for none any more."""
        with self._lock:
            self._holders.discard(series_id)
            self._waiting.discard(series_id)
        self._call_next()

    def waits(self, series_id: int) -> bool:
        """Whether a series waits to be woken."""
        with self._lock:
            return series_id in self._waiting

    def _call_next(self) -> None:
        with self._lock:
            self._gauge.set(len(self._holders))
            free = len(self._holders) < self._count
            oldest = min(self._waiting) if free and self._waiting else None
        if oldest is not None:
            self._wake(oldest)
