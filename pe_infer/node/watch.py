"""What a node says of itself: structured logs and metrics, without patient data.

Studies, series and instances appear under an alias, a keyed hash of their UID: the same in every
line of a node, and of no use without its key.
"""

import hashlib
import hmac
import logging
import sys
from collections.abc import Sequence
from typing import Final, Literal, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_ALIAS_CHARACTERS: Final = 12
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Watch:
    """Logs and metrics of one node. Thread-safe."""

    def __init__(
        self,
        key: bytes,
        *,
        level: Literal["debug", "info", "warning", "error"] = "info",
        form: Literal["json", "text"] = "json",
        output: TextIO = sys.stderr,
    ) -> None:
        """Set up logs and metrics.

        Args:
            key: Of the aliases; secret, the same for the life of a state folder.
            level: Least severe lines that are written.
            form: ``"json"``: a line of JSON per event; ``"text"``: for people.
            output: Where lines go.
        """
        self._key = key
        renderer: structlog.typing.Processor = (
            structlog.processors.JSONRenderer()
            if form == "json"
            else structlog.dev.ConsoleRenderer(colors=False)
        )
        self.log: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            structlog.PrintLogger(output),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                renderer,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(
                logging.getLevelNamesMapping()[level.upper()]
            ),
        )
        self.registry = CollectorRegistry()
        self.associations = self._counter("associations", "Associations, by outcome", "outcome")
        self.slices = self._counter("slices", "C-STORE requests, by status", "status")
        self.slice_bytes = self._counter("slice_bytes", "Bytes of slices taken")
        self.store_seconds = self._histogram("store_seconds", "C-STORE request to response")
        self.open_studies = self._gauge("open_studies", "Series in memory")
        self.waiting_slices = self._gauge("waiting_slices", "Slices taken and not judged yet")
        self.results = self._counter("results", "Results", "bundle", "verdict")
        self.alerts = self._counter("alerts", "Provisional alerts", "bundle", "outcome")
        self.result_seconds = self._histogram("result_seconds", "Last slice to result")
        self.deliveries = self._counter("deliveries", "Deliveries", "destination", "outcome")
        self.waiting_deliveries = self._gauge(
            "waiting_deliveries", "Deliveries to be made", "destination"
        )
        self.free_disk_bytes = self._gauge("free_disk_bytes", "Room left for slices")

    def alias(self, uid: str) -> str:
        """Stands for a UID in logs."""
        return alias_of(uid, self._key)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"pe_infer_node_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"pe_infer_node_{name}", documentation, labels, registry=self.registry)

    def _histogram(
        self, name: str, documentation: str, buckets: Sequence[float] = _SECONDS
    ) -> Histogram:
        return Histogram(
            f"pe_infer_node_{name}", documentation, registry=self.registry, buckets=buckets
        )


def alias_of(uid: str, key: bytes) -> str:
    """Stands for a UID in logs of the node that has the key."""
    return hmac.new(key, uid.encode(), hashlib.sha256).hexdigest()[:_ALIAS_CHARACTERS]
