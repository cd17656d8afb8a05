"""What a node says of itself: structured logs and metrics, without patient data.

Studies, series and instances appear under an alias, a keyed hash of their UID: the same in every
line of a node, and of no use without its key.
"""

import hashlib
import hmac
import logging
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pe_infer.errors import PeInferError

_ALIAS_CHARACTERS: Final = 12
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class _Lenient:
    """A log on a full disk or a closed terminal must not keep slices from being taken."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._output.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._output.flush()


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
            else structlog.dev.ConsoleRenderer(colors=False, repr_native_str=True)
        )
        self.log: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            structlog.WriteLogger(cast(TextIO, _Lenient(output))),
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
        self.step_seconds = self._gauge("step_seconds", "Longest step of a series under way")
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

    def failed(self, event: str, exc: BaseException, **fields: object) -> None:
        """Log an exception that nobody expected, and where it was raised.

        Its message is left out: it may quote what was in a file or came over the network, or name
        a file, and there are UIDs in names of files. Of errors raised on purpose the code is there.
        """
        places = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(exc.__traceback__)
        ]
        self.log.error(
            event,
            error=type(exc).__name__,
            code=exc.code if isinstance(exc, PeInferError) else None,
            places=places,
            **fields,
        )

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
