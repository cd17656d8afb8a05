"""One series on its way to one version of its result: slices in, an outcome at the end."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

from pe_infer import dicom
from pe_infer.detector import Detector
from pe_infer.errors import (
    Code,
    ConfigurationError,
    InputError,
    PeInferError,
    ScopeError,
    StreamTimeoutError,
)
from pe_infer.geometry import SeriesInfo
from pe_infer.node.capacity import Slots
from pe_infer.node.entries import Instance, SeriesEntry
from pe_infer.node.inbox import Inbox, without_files
from pe_infer.node.ledger import Ledger
from pe_infer.node.objects import Unjudged
from pe_infer.node.parcels import Subject
from pe_infer.node.routing import Decision, Router
from pe_infer.node.watch import Watch
from pe_infer.result import Flag, NotProcessed, QualityFlag, StudyResult, Update
from pe_infer.stream import Stream

PUSH_S: Final = 0.1  # how long a thread waits for an engine that is behind
FINISH_S: Final = 0.2  # how often a thread that waits for a result looks whether it is to stop
_OTHER_KINDS: Final = frozenset({Code.NOT_CT, Code.NOT_AXIAL_IMAGE})


class StoppedError(Exception):
    """The node stops; the study goes on at its next start."""


class Taken(Enum):
    """What became of a slice."""

    PASSED = auto()  # it is in the study, or skipped
    BUSY = auto()  # the engine is behind: offer it again
    NO_ROOM = auto()  # too many series are in memory: offer it again when woken
    IGNORED = auto()  # nobody is to judge the series: that is still to be entered


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySetup:
    """What all studies of a node share.

    Attributes:
        ledger: Of the node.
        inbox: Where slices are.
        detectors: By the name that rules use.
        router: Finds the detector.
        slots: Room in memory.
        watch: Logs and metrics.
        stopping: Whether threads are to end.
    """

    ledger: Ledger
    inbox: Inbox
    detectors: Mapping[str, Detector]
    router: Router
    slots: Slots
    watch: Watch
    stopping: Callable[[], bool]


class Study:
    """One series. For one thread at a time.

    What it holds can be made again from the ledger and the inbox at any time. What is wrong with
    the series becomes a refusal, which is its outcome. Other errors come out of its methods: after
    a `NodeError` it is as it was, after any other one it is of no use.
    """

    def __init__(
        self,
        setup: StudySetup,
        entry: SeriesEntry,
        *,
        alerted: bool = False,
        refusal: NotProcessed | None = None,
    ) -> None:
        """Take a series up from its first slice.

        Args:
            setup: Of the node.
            entry: Of the series.
            alerted: Whether an alert of this version is in a parcel.
            refusal: Why it cannot be judged, if that is known; which bundle it is for is still to
                be found.
        """
        self.entry = entry
        self.refusal = refusal
        self.alerted = alerted
        self.after = 0  # number of the newest slice that was taken
        self.alert: Update | None = None  # the first that asked for one
        self.alert_due_at = -math.inf  # when to try to send it
        self.ended = False  # whether its outcome was asked for: it takes no slices any more
        self._setup = setup
        self._decision = self._decided_before()
        self._stream: Stream | None = None
        self._held: tuple[int, dicom.Conversion] | None = None  # a slice that found the engine busy
        self._converted: list[dicom.SourceFile] = []
        self._skipped: set[int] = set()
        self._uids: set[str] = set()
        self._passed = 0
        self._result: StudyResult | None = None

    @property
    def version(self) -> int:
        """Of the result that this becomes."""
        return self.entry.version + 1

    @property
    def subject(self) -> Subject | None:
        """What its parcels are about; ``None`` while no slice has said which bundle it is for."""
        if self._decision is None or self._decision.bundle is None:
            return None
        return Subject(
            series_id=self.entry.id,
            study_instance_uid=self.entry.study_instance_uid,
            series_instance_uid=self.entry.series_instance_uid,
            version=self.version,
            bundle=self._setup.detectors[self._decision.bundle].bundle,
        )

    @property
    def decision(self) -> Decision | None:
        """Who judges it; ``None`` while no slice has said so."""
        return self._decision

    @property
    def engine_is_behind(self) -> bool:
        """Whether the engine had no room for the slice that was offered last."""
        return self._held is not None

    @property
    def slices(self) -> int:
        """How many slices are in the study."""
        return len(self._converted)

    @property
    def alerts(self) -> bool:
        """Whether slabs that are being made may ask for an alert."""
        subject = self.subject
        return (
            self._stream is not None
            and self.alert is None
            and not self.alerted
            and subject is not None
            and subject.bundle.manifest.provisional_alert is not None
        )

    def complete(self, expected: int | None) -> bool:
        """Whether all slices are there, each of them once, if the series says how many it has.

        A series that has more than it says is not believed, nor one whose slices do not agree: a
        number that grows would end it, and have it judged from the first slice on, at every slice.

        Args:
            expected: As in `SeriesEntry`.
        """
        return bool(expected) and len(self._uids) == self._passed == expected

    def sources(self) -> Sequence[Path | dicom.SourceFile]:
        """Files that the outcome is made of; where no slice could be read, all but skipped ones."""
        if self._converted:
            return tuple(self._converted)
        taken = [i for i in self._setup.ledger.instances(self.entry.id) if i.id <= self.after]
        return [self._setup.inbox.path(i) for i in taken if i.id not in self._skipped]

    def take(self, instance: Instance) -> Taken:
        """Take the next slice.

        Raises:
            NodeError: The ledger fails.
            EngineError: The engine has failed.
        """
        if self.refusal is None:
            taken = self._read(instance)
        elif self._decision is None:
            taken = self._read_header(instance)
        else:
            taken = Taken.PASSED
        if taken is Taken.PASSED:
            self.after = instance.id
            self._uids.add(instance.sop_instance_uid)
            self._passed += 1
        return taken

    def look(self) -> None:
        """Take note of the slabs that were completed meanwhile."""
        if self._stream is not None:
            self._note(self._stream.updates())

    def outcome(self, subject: Subject) -> StudyResult | Unjudged:
        """End the study and wait for its result.

        Raises:
            StoppedError: The node stops.
            EngineError: The engine has failed.
        """
        self.ended = True
        if self.refusal is None:
            try:
                self._result = self._result or self._finished()
            except (InputError, ScopeError) as exc:
                self._refuse(exc)
            else:
                return self._result
        assert self.refusal is not None  # noqa: S101  as _refuse has left it
        return subject.unjudged(self.refusal)

    def close(self) -> None:
        """Let go of what is large, and of the place in memory."""
        if self._stream is not None:
            self._stream.cancel()
        self._stream = None
        self._held = None
        self._setup.slots.release(self.entry.id)

    def log(self, event: str, **fields: object) -> None:
        """Write a line about this series."""
        self._setup.watch.log.info(
            event,
            series=self._setup.watch.alias(self.entry.series_instance_uid),
            version=self.version,
            **fields,
        )

    # Slices.

    def _read(self, instance: Instance) -> Taken:
        try:
            conversion = self._conversion(instance)
        except InputError as exc:
            if exc.code in _OTHER_KINDS:
                self._skipped.add(instance.id)
                return Taken.PASSED
            self._refuse(exc)
            return self._read_header(instance) if self._decision is None else Taken.PASSED
        first = conversion.slices[0]
        if self._ignored(first.series, first.geometry.thickness_mm, instance):
            return Taken.IGNORED
        return self._push(instance, conversion)

    def _conversion(self, instance: Instance) -> dicom.Conversion:
        if self._held is not None and self._held[0] == instance.id:
            return self._held[1]
        return dicom.convert(self._setup.inbox.path(instance))

    def _push(self, instance: Instance, conversion: dicom.Conversion) -> Taken:
        if self._stream is None:
            if not self._setup.slots.acquire(self.entry.id):
                return Taken.NO_ROOM
            self._stream = self._detector().open()
            self._note(self._stream.push_slices((), [self._choice()]))
        try:
            self._note(
                self._stream.push_slices(conversion.slices, conversion.flags, timeout=PUSH_S)
            )
        except StreamTimeoutError:
            self._held = (instance.id, conversion)
            return Taken.BUSY
        except (InputError, ScopeError) as exc:
            self._refuse(exc)
        else:
            assert conversion.source is not None  # noqa: S101  as it comes from a file
            self._converted.append(conversion.source)
        self._held = None
        return Taken.PASSED

    def _note(self, updates: Sequence[Update]) -> None:
        if self.alert is None:
            self.alert = next((update for update in updates if update.provisional_alert), None)

    # Whose series it is.

    def _decided_before(self) -> Decision | None:
        bundle = self.entry.bundle
        if bundle is None:
            return None
        if bundle not in self._setup.detectors:
            self.log("bundle_gone", bundle=bundle)
            return None
        return Decision(bundle=bundle, reason=self.entry.reason or "")

    def _read_header(self, instance: Instance) -> Taken:
        """Find the bundle of a series whose slices cannot be read."""
        try:
            readable = dicom.survey(self._setup.inbox.path(instance)).readable
        except (InputError, ConfigurationError):
            return Taken.PASSED
        except Exception as exc:  # noqa: BLE001  # such a series has to come to an end too
            self._setup.watch.failed("header_unreadable", exc, series_id=self.entry.id)
            return Taken.PASSED
        for summary, info in readable:
            if self._ignored(info, summary.thickness_mm, instance):
                return Taken.IGNORED
        return Taken.PASSED

    def _ignored(self, info: SeriesInfo, thickness_mm: float | None, instance: Instance) -> bool:
        """Decide who judges the series, unless that is known; whether nobody does."""
        if self._decision is None:
            decision = self._setup.router.decide(
                info, thickness_mm=thickness_mm, calling_ae_title=self._sender(instance)
            )
            if (bundle := decision.bundle) is not None:
                self._setup.ledger.route(self.entry.id, bundle=bundle, reason=decision.reason)
                self.log("routed", bundle=bundle)
            self._decision = decision
        return self._decision.bundle is None

    def _sender(self, instance: Instance) -> str:
        """Who sent a slice; who sent another one of the series where that is not known."""
        if instance.calling_ae_title:
            return instance.calling_ae_title
        others = self._setup.ledger.instances(self.entry.id)
        return next((i.calling_ae_title for i in others if i.calling_ae_title), "")

    def _detector(self) -> Detector:
        assert self._decision is not None  # noqa: S101  nothing is pushed before
        assert self._decision.bundle is not None  # noqa: S101  the same
        return self._setup.detectors[self._decision.bundle]

    def _choice(self) -> QualityFlag:
        assert self._decision is not None  # noqa: S101  nothing is pushed before
        manifest = self._detector().bundle.manifest
        return QualityFlag(
            flag=Flag.BUNDLE_CHOSEN,
            message=f"bundle {manifest.name!r} {manifest.version} was chosen: "
            f"{self._decision.reason}",
            values={"bundle": manifest.name, "candidates": len(self._setup.detectors)},
        )

    # The end.

    def _finished(self) -> StudyResult:
        stream = self._stream
        if stream is None:
            raise InputError("no axial CT image is left in the series", code=Code.NO_CT_SERIES)
        flags = self._skipped_flags()
        while not self._setup.stopping():
            try:
                if flags:
                    stream.push_slices((), flags, timeout=FINISH_S)
                    flags = []
                return stream.finish(timeout=FINISH_S)
            except StreamTimeoutError:
                continue
        raise StoppedError

    def _skipped_flags(self) -> list[QualityFlag]:
        count = len(self._skipped)
        skipped = QualityFlag(
            flag=Flag.FILES_SKIPPED,
            message=f"files were skipped: {count} of the series but no axial CT image",
            values={"other_kind": count},
        )
        return [skipped] if count else []

    def _refuse(self, error: PeInferError) -> None:
        self.refusal = NotProcessed(code=error.code, message=without_files(str(error)))
        self.log("refused", code=error.code)
        self.close()
