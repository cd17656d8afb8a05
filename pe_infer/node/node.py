"""The parts of a node, started and stopped together."""

import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from pe_infer.bundle import shipped
from pe_infer.detector import Detector
from pe_infer.errors import PeInferError
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.operations import CLIENT, Operations
from pe_infer.node.outbox import Outbox
from pe_infer.node.receiver import Receiver, read_kept
from pe_infer.node.retention import PARCELS, Retention
from pe_infer.node.routing import IGNORE
from pe_infer.node.settings import Engine, NodeSettings, Routing
from pe_infer.node.state import StateFolder
from pe_infer.node.studies import Studies
from pe_infer.node.upper_layer import ASSOCIATION
from pe_infer.node.watch import Watch

STOP_S: Final = {"receiver": 5.0, "studies": 10.0, "outbox": 5.0, "operations": 2.0}
_HOUSEKEEPING_S: Final = 30.0
_SECONDS_PER_HOUR: Final = 3600.0
_LARGE_SLICES: Final = 1000
_LARGE_MM: Final = 1000.0


class Node:
    """A node: a context manager that runs it, or `start` and `stop`."""

    def __init__(self, settings: NodeSettings, *, output: TextIO = sys.stderr) -> None:
        """Take the settings; nothing is read, written or opened yet.

        Args:
            settings: What the node is told.
            output: Where its log goes.
        """
        self._settings = settings
        self._output = output
        self._state = StateFolder(settings.state_dir)
        self._stack = ExitStack()
        self._threads = _Threads()
        self._stopping = threading.Event()
        self._listens = False
        self._studies: Studies | None = None
        self._receiver: Receiver | None = None
        self.watch: Watch

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def start(self) -> None:
        """Take up what a process that has ended left, load the bundles, then listen.

        Raises:
            NodeError: The state folder is another node's or cannot be used (``node.state``), or a
                port or certificates cannot be used (``node.network``).
            ConfigurationError: Settings contradict each other, or a bundle.
            BundleError: A bundle is missing, altered or inconsistent.
            EngineError: The engine is absent or refuses a bundle.
        """
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        self._listens = True
        listen = self._settings.listen
        event = f"listening on {listen.host}:{listen.port}"
        self.watch.log.info(event, ae_title=listen.ae_title, tls=listen.tls is not None)

    def ready(self) -> bool:
        """Whether slices are taken: it listens, and has room."""
        return (
            self._listens
            and not self._stopping.is_set()
            and self._receiver is not None
            and self._receiver.room()
        )

    def problems(self) -> list[str]:
        """What is broken; empty: nothing. No patient data."""
        studies = self._studies
        return [*self._threads.ended(), *(studies.problems() if studies is not None else ())]

    def stop(self) -> None:
        """End: no new associations, then the studies, then the deliveries.

        What is not done is done after the next start.
        """
        if self._listens and not self._stopping.is_set():
            self.watch.log.info("stopping")
        self._stopping.set()
        self._threads.forget()
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        settings = self._settings
        stack.enter_context(self._state.claimed())
        operations = settings.operations
        watch = self.watch = Watch(
            self._state.key(),
            level=operations.log_level,
            form=operations.log_format,
            output=self._output,
        )
        ledger = stack.enter_context(Ledger(self._state.ledger))
        retention = Retention(settings.state_dir, ledger)
        retention.clear()
        inbox = Inbox(settings.state_dir, ledger)
        if entered := inbox.recover(read_kept):
            watch.log.info("slices on disk entered", slices=entered)
        with self._threads.of("operations"):
            pages = Operations(operations, watch, ready=self.ready, problems=self.problems)
            pages.start()
            stack.callback(pages.stop, STOP_S["operations"])
        with self._threads.of("detectors"):
            detectors = stack.enter_context(
                _detectors(settings.routing, settings.engine, settings.limits.open_studies, watch)
            )
        parcels = settings.state_dir / PARCELS
        outbox = Outbox(settings, ledger, parcels, watch)
        studies = self._studies = Studies(
            settings, ledger, inbox, parcels, detectors, watch, outbox.wake
        )
        receiver = self._receiver = Receiver(settings, inbox, studies, watch, outbox.commitment)
        with self._threads.of("outbox"):
            outbox.start()
            stack.callback(outbox.stop, STOP_S["outbox"])
        with self._threads.of("studies"):
            studies.start()
            stack.callback(studies.stop, STOP_S["studies"])
        with self._threads.of("housekeeping"):
            stack.enter_context(self._housekeeping(retention))
        with self._threads.of("receiver"):
            receiver.start()
            stack.callback(receiver.stop, STOP_S["receiver"])

    @contextmanager
    def _housekeeping(self, retention: Retention) -> Iterator[None]:
        """A thread that deletes what is done with, and looks after disk and threads."""
        stopping = threading.Event()

        def run() -> None:
            reported: list[str] = []
            while True:
                reported = self._look_after(retention, reported)
                if stopping.wait(_HOUSEKEEPING_S):
                    return

        thread = threading.Thread(target=run, name="pe_infer housekeeping")
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def _look_after(self, retention: Retention, reported: list[str]) -> list[str]:
        watch = self.watch
        hours = self._settings.retention.hours
        try:
            free = shutil.disk_usage(self._settings.state_dir).free
            watch.free_disk_bytes.set(free)
            if hours != "never":
                for entry in retention.purge(before=time.time() - hours * _SECONDS_PER_HOUR):
                    watch.log.info("deleted", series=watch.alias(entry.series_instance_uid))
        except (OSError, PeInferError) as exc:
            watch.log.warning("housekeeping failed", error=type(exc).__name__)
        found = self.problems()
        for problem in found:
            if problem not in reported:
                watch.log.error("not healthy", problem=problem)
        return found


class _Threads:
    """Threads that live as long as their part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, set[threading.Thread]] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What is started meanwhile belongs to a part, but for connections that come meanwhile."""
        before = set(threading.enumerate())
        yield
        started = {
            thread
            for thread in set(threading.enumerate()) - before
            if not thread.name.startswith((ASSOCIATION, CLIENT))
        }
        with self._lock:
            self._of.setdefault(part, set()).update(started)

    def forget(self) -> None:
        """They may end now."""
        with self._lock:
            self._of.clear()

    def ended(self) -> list[str]:
        """Those that have ended and should not."""
        with self._lock:
            return sorted(
                f"{part}: thread {thread.name!r} has ended; restart the node"
                for part, threads in self._of.items()
                for thread in threads
                if not thread.is_alive()
            )


def bundles_of(routing: Routing) -> list[str]:
    """The bundles that routing may choose, by the names that it uses."""
    named = [*routing.bundles, *(rule.bundle for rule in routing.rules if rule.bundle != IGNORE)]
    if routing.otherwise == "choose" and not routing.bundles:
        named += shipped()
    return list(dict.fromkeys(named))


@contextmanager
def _detectors(
    routing: Routing, engine: Engine, studies: int, watch: Watch
) -> Iterator[Mapping[str, Detector]]:
    """Load every bundle that may be chosen; its memory is in the log."""
    with ExitStack() as stack:
        loaded: dict[str, Detector] = {}
        for name in bundles_of(routing):
            detector = stack.enter_context(load_detector(name, engine))
            loaded[name] = detector
            watch.log.info(
                "bundle loaded",
                bundle=detector.bundle.manifest.name,
                version=detector.bundle.manifest.version,
                engine=detector.compiled.info.name,
                large_study_bytes=detector.memory_bound_bytes(
                    slices=_LARGE_SLICES, extent_mm=_LARGE_MM
                ),
                studies_at_once=studies,
                process_bytes=_memory_bytes(),
            )
        yield loaded


def load_detector(bundle: str, engine: Engine) -> Detector:
    """Load a bundle as the settings say.

    Raises:
        BundleError: It is missing, altered or inconsistent.
        EngineError: The engine is absent or refuses it.
        ConfigurationError: It has no such operating point, or there is no such engine.
    """
    return Detector(
        bundle,
        engine=engine.name,
        precision=engine.precision,
        threads=engine.threads,
        operating_point=engine.operating_point,
    )


def _memory_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
