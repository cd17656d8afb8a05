"""Whether studies get on: steps that do not end, and engines that fail for every series."""

import threading
from collections.abc import Callable
from typing import Final

from prometheus_client import Gauge

FAILED_SERIES: Final = 2  # one after the other: it is not for the series that an engine fails


class Progress:
    """Since when series are worked on, and for which their engine has failed. Thread-safe."""

    def __init__(
        self,
        stuck_s: float,
        clock: Callable[[], float],
        *,
        step_seconds: Gauge,
        alias: Callable[[int], str],
    ) -> None:
        """Start with nothing.

        Args:
            stuck_s: How long a step may take.
            clock: Seconds.
            step_seconds: Shows how long the longest step under way has taken.
            alias: The name of a series in problems, by its number.
        """
        self._stuck_s = stuck_s
        self._clock = clock
        self._alias = alias
        self._lock = threading.Lock()
        self._since: dict[int, float] = {}
        self._failed: dict[str, set[int]] = {}
        step_seconds.set_function(self._longest_s)

    def begin(self, series_id: int) -> None:
        """Note that a step of a series begins, unless one is under way."""
        with self._lock:
            self._since.setdefault(series_id, self._clock())

    def moved(self, series_id: int) -> None:
        """Note that a step has ended and the next one begins."""
        with self._lock:
            self._since[series_id] = self._clock()

    def end(self, series_id: int) -> None:
        """Note that no step of a series is under way."""
        with self._lock:
            self._since.pop(series_id, None)

    def failed(self, series_id: int, bundle: str) -> None:
        """Note that a bundle's engine has failed for a series, which is not judged then."""
        with self._lock:
            self._failed.setdefault(bundle, set()).add(series_id)

    def judged(self, bundle: str) -> None:
        """Note that a bundle has judged a series: its engine works."""
        with self._lock:
            self._failed.pop(bundle, None)

    def problems(self) -> list[str]:
        """What keeps studies from being judged; empty: nothing. No patient data."""
        now = self._clock()
        with self._lock:
            stuck = [series for series, at in self._since.items() if now - at > self._stuck_s]
            failed = [b for b, series in self._failed.items() if len(series) >= FAILED_SERIES]
        return [
            *(
                f"studies: series {self._alias(series)}: one step takes longer than "
                f"{self._stuck_s:g} s (studies.stuck_s); restart the node if it does not end"
                for series in sorted(stuck)
            ),
            *(
                f"studies: the engine of bundle {bundle!r} has failed for {FAILED_SERIES} series "
                "or more, one after the other; see study_failed in the log, restart the node, then "
                "have them judged with pe-infer node replay"
                for bundle in sorted(failed)
            ),
        ]

    def _longest_s(self) -> float:
        now = self._clock()
        with self._lock:
            return now - min(self._since.values(), default=now)
