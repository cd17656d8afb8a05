"""All series in progress: threads that feed their slices to studies, and when a series ends."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pe_infer.detector import Detector
from pe_infer.errors import Code, EngineError, NodeError
from pe_infer.node.agenda import Agenda
from pe_infer.node.capacity import Backlog, Slots, check_room_for_result
from pe_infer.node.entries import Instance
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.objects import WriteResults, warm_up, write_results
from pe_infer.node.parcels import Packer
from pe_infer.node.progress import Progress
from pe_infer.node.reports import Reporter
from pe_infer.node.routing import Router
from pe_infer.node.settings import NodeSettings
from pe_infer.node.study import StoppedError, Study, StudySetup, Taken
from pe_infer.node.watch import Watch
from pe_infer.result import NotProcessed

POLL_S: Final = 1.0  # how often the ledger is asked for what another process has reopened
_TURN: Final = 8  # slices of a series before it is another one's turn
_LOOK_S: Final = 0.2  # how often slabs that may ask for an alert are looked at
_TRIES: Final = 2  # before a series is refused for a failure that is not its own
_FIRST_WAIT_S: Final = 0.5  # after the disk or the ledger has failed; then twice as long
_LONGEST_WAIT_S: Final = 60.0
_SCRATCH: Final = "packing"


class Studies:
    """Takes series up, feeds them, ends them. Thread-safe."""

    def __init__(
        self,
        settings: NodeSettings,
        ledger: Ledger,
        inbox: Inbox,
        parcels: Path,
        detectors: Mapping[str, Detector],
        watch: Watch,
        on_parcel: Callable[[], None],
        *,
        write_results: WriteResults = write_results,
        clock: Callable[[], float] = time.monotonic,
        poll_s: float = POLL_S,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            settings: Of the node.
            ledger: What there is to do, and where results are entered.
            inbox: Where slices are.
            parcels: Folder of the parcels.
            detectors: By the names that the settings use.
            watch: Logs and metrics.
            on_parcel: Called when a parcel was entered.
            write_results: Makes DICOM objects.
            clock: Seconds.
            poll_s: How often the ledger is asked for series that another process has reopened.

        Raises:
            ConfigurationError: A rule names a bundle that is not loaded.
            NodeError: The folder of the parcels cannot be used.
        """
        self._ledger = ledger
        self._watch = watch
        self._clock = clock
        self._poll_s = poll_s
        self._next_poll = -math.inf
        self._quiet_s = settings.studies.quiet_s
        self._parcels = parcels
        self._reserve_bytes = settings.limits.free_disk_bytes
        self._stopping = threading.Event()
        self._agenda = Agenda(clock)
        self._backlog = Backlog(settings.limits.waiting_slices, watch.waiting_slices)
        self._slots = Slots(settings.limits.open_studies, self._agenda.wake, watch.open_studies)
        self._packer = Packer(parcels, parcels.parent / _SCRATCH, write_results)
        self._reporter = Reporter(
            settings, ledger, self._packer, watch, on_parcel=on_parcel, clock=clock
        )
        self._setup = StudySetup(
            ledger=ledger,
            inbox=inbox,
            detectors=detectors,
            router=Router(
                settings.routing,
                {name: detector.bundle.manifest.scope for name, detector in detectors.items()},
            ),
            slots=self._slots,
            watch=watch,
            stopping=self._stopping.is_set,
        )
        self._progress = Progress(
            settings.studies.stuck_s, clock, step_seconds=watch.step_seconds, alias=self._alias
        )
        # A series' entries in these are touched by the thread that holds it, but for _newest_at.
        self._studies: dict[int, Study] = {}
        self._newest_at: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        self._waits: dict[int, float] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"pe_infer studies {number}")
            for number in range(1, settings.studies.threads + 1)
        ]

    @property
    def healthy(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def problems(self) -> list[str]:
        """What keeps studies from being judged; empty: nothing. No patient data."""
        return self._progress.problems()

    def start(self) -> None:
        """Take up what was in progress, and start the threads.

        Raises:
            NodeError: The ledger or the folder of the parcels fails.
        """
        if removed := self._packer.remove_others(self._ledger.parcel_folders()):
            self._watch.log.info("unfinished_parcels_removed", parcels=removed)
        for entry in self._ledger.series(state="receiving"):
            self._backlog.begin(entry.id, [i.id for i in self._ledger.instances(entry.id)])
            self._agenda.wake(entry.id)
        warm_up()
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after the slices in hand; what is open goes on at the next start.

        Args:
            timeout_s: How long to wait for the threads.
        """
        self._stopping.set()
        self._agenda.close()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._watch.log.warning("studies_do_not_stop", timeout_s=timeout_s)
        for study in list(self._studies.values()):
            study.close()

    def room(self) -> bool:
        """Whether more slices may be taken: not while too many wait."""
        return self._backlog.room()

    def owed_bytes(self) -> int:
        """What the results that are still to come may take on the disk."""
        return self._backlog.owed_bytes

    def offer(self, instance: Instance) -> None:
        """Note that a slice was taken, which is on disk. Returns at once."""
        self._backlog.add(instance.series_id, instance.id)
        self._newest_at[instance.series_id] = self._clock()
        if not self._slots.waits(instance.series_id):
            self._agenda.wake(instance.series_id)

    # What the threads do.

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._poll()
            except Exception as exc:  # noqa: BLE001  the thread has to live
                self._watch.failed("poll_failed", exc)
            if (series_id := self._agenda.take(self._poll_s)) is not None:
                self._progress.begin(series_id)
                at = self._guarded_turn(series_id)
                study = self._studies.get(series_id)
                if study is None or not study.engine_is_behind:
                    self._progress.end(series_id)
                self._agenda.give_back(series_id, at)

    def _poll(self) -> None:
        """Take up series that another process has reopened."""
        now = self._clock()
        if now < self._next_poll:
            return
        self._next_poll = now + self._poll_s
        for entry in self._ledger.series(state="receiving"):
            if entry.id not in self._agenda:
                self._agenda.wake(entry.id)

    def _guarded_turn(self, series_id: int) -> float | None:
        """A turn; when the next one is due, whatever happens; ``None`` if there is none."""
        try:
            at = self._turn(series_id)
        except StoppedError:
            return math.inf
        except NodeError as exc:
            wait_s = self._longer_wait(series_id)
            self._watch.log.warning(
                "study_delayed", series_id=series_id, code=exc.code, wait_s=wait_s
            )
            return self._clock() + wait_s
        except Exception as exc:  # noqa: BLE001  one series must not take the others with it
            return self._after_failure(series_id, exc)
        if series_id not in self._failures:
            self._waits.pop(series_id, None)
        return at

    def _turn(self, series_id: int) -> float | None:
        study = self._studies.get(series_id) or self._take_up(series_id)
        if study is None:
            self._forget(series_id)
            return None
        for _ in range(_TURN):
            instance = next(
                iter(self._ledger.instances(series_id, after=study.after, limit=1)), None
            )
            if instance is None:
                return self._caught_up(study)
            if study.ended:  # it came before the result could be entered
                self._drop(series_id)
                break
            taken = study.take(instance)
            if taken is Taken.IGNORED:
                self._reporter.ignore(study)
                self._forget(series_id)
                return None
            if taken is Taken.NO_ROOM:
                return math.inf
            if taken is Taken.PASSED:
                self._backlog.passed(series_id, instance.id)
                self._progress.moved(series_id)
            self._reporter.alert(study)
            if taken is Taken.BUSY or self._stopping.is_set():
                break
        return self._clock()

    def _take_up(self, series_id: int) -> Study | None:
        """A study of all slices of a series, if it is one to be judged."""
        entry = self._ledger.series_entry(series_id)
        if entry is None or entry.state != "receiving":
            return None
        refusal = None
        if self._failures.get(series_id, 0) >= _TRIES:
            refusal = NotProcessed(
                code=Code.ENGINE_FAILED,
                message=f"the program has failed {_TRIES} times to judge the series; its log says "
                "how",
            )
        self._backlog.begin(series_id, [i.id for i in self._ledger.instances(series_id)])
        self._newest_at.setdefault(series_id, self._clock())
        version = entry.version + 1
        parcels = self._ledger.parcels(series_id)
        alerted = any(made.kind == "alert" and made.version == version for made in parcels)
        study = Study(self._setup, entry, alerted=alerted, refusal=refusal)
        self._studies[series_id] = study
        return study

    def _caught_up(self, study: Study) -> float | None:
        """Conclude a series if it has ended; when to look at it again."""
        series_id = study.entry.id
        entry = self._ledger.series_entry(series_id)
        if entry is None:  # purged
            self._forget(series_id)
            return None
        newest_at = self._newest_at[series_id]
        quiet_at = newest_at + self._quiet_s
        now = self._clock()
        if now < quiet_at and not study.complete(entry.expected):
            study.look()
            self._reporter.alert(study)
            return min(quiet_at, now + _LOOK_S) if study.alerts else quiet_at
        check_room_for_result(self._parcels, self._reserve_bytes)
        concluded = self._reporter.conclude(study)
        if concluded is not None:
            study.log(
                "result",
                bundle=concluded.bundle,
                verdict=concluded.verdict,
                code=concluded.code,
                slices=study.slices,
                ending_s=round(concluded.result_at - now, 3),
                result_s=round(concluded.result_at - newest_at, 3),
                parcel_s=round(self._clock() - newest_at, 3),
            )
            self._watch.result_seconds.observe(concluded.result_at - newest_at)
            if concluded.verdict != "not_processed":
                self._progress.judged(concluded.bundle)
        self._forget(series_id)
        return self._clock()  # a slice may have come meanwhile

    def _after_failure(self, series_id: int, exc: Exception) -> float | None:
        failures = self._failures.get(series_id, 0) + 1
        self._failures[series_id] = failures
        self._watch.failed("study_failed", exc, series_id=series_id, failures=failures)
        study = self._studies.get(series_id)
        subject = None if study is None else study.subject
        if subject is not None and isinstance(exc, EngineError) and failures >= _TRIES:
            self._progress.failed(series_id, subject.bundle.manifest.name)
        self._drop(series_id)
        if failures <= _TRIES:
            return self._clock()
        return self._clock() + self._longer_wait(series_id)

    def _longer_wait(self, series_id: int) -> float:
        """Seconds until the next try: twice as long each time."""
        wait_s = self._waits.get(series_id, _FIRST_WAIT_S)
        self._waits[series_id] = min(2 * wait_s, _LONGEST_WAIT_S)
        return wait_s

    def _drop(self, series_id: int) -> None:
        """Let go of a study; the next turn begins anew."""
        if (study := self._studies.pop(series_id, None)) is not None:
            study.close()

    def _alias(self, series_id: int) -> str:
        study = self._studies.get(series_id)
        return self._watch.alias(study.entry.series_instance_uid) if study else str(series_id)

    def _forget(self, series_id: int) -> None:
        self._drop(series_id)
        self._backlog.drop(series_id)
        self._slots.release(series_id)
        for kept in (self._newest_at, self._failures, self._waits):
            kept.pop(series_id, None)
