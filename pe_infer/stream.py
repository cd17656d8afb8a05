"""One study: slices in, updates out, a verdict at the end.

``push`` runs in the caller's thread: it validates a slice, resamples it in its plane, and names the
slabs that became final. The detector's worker makes those slabs, runs the online nodes, and once
the study has ended the rest. All state of the study lives here; engines hold none.
"""

import copy
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import numpy as np

from pe_infer.checks import assess, refused
from pe_infer.conclusion import (
    Background,
    SlabRecord,
    alerts,
    refuse_nonfinite,
    update_probability,
)
from pe_infer.engines.lane import Lane
from pe_infer.errors import (
    Code,
    EngineError,
    PeInferError,
    SeriesError,
    StreamCancelledError,
    StreamError,
    StreamTimeoutError,
)
from pe_infer.executor import Executor, StudyOutputs
from pe_infer.geometry import Slice
from pe_infer.preprocess import Resampler, SlabMaker
from pe_infer.result import CheckResult, Flag, QualityFlag, StudyResult, Timings, Update
from pe_infer.scope import check_scope
from pe_infer.sequencer import Advance, Sequencer

MAX_PENDING_SLABS: Final = 16  # of one stream, waiting for the worker; `push` waits beyond
MAX_BATCH: Final = 8  # slabs that the worker takes at once: no other stream waits longer than that


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSetup:
    """What a detector gives to a stream.

    Attributes:
        background: Bundle, engines and operating point.
        lane: Where the study's slabs are made and its networks run.
        resample: Brings slices there.
        volume: Makes slabs of them.
        convert: Turns what users push into slices, with what was tolerated.
        schedule: Asks the worker to call `Stream.work` soon.
    """

    background: Background
    lane: Lane
    resample: Resampler
    volume: SlabMaker
    convert: Callable[[object], tuple[Sequence[Slice], Sequence[QualityFlag]]]
    schedule: Callable[["Stream"], None]


@dataclass(slots=True)
class _Clock:
    opened: float = field(default_factory=time.perf_counter)
    last_push: float = field(default_factory=time.perf_counter)
    push_s: float = 0.0
    slabs_s: float = 0.0
    online_s: float = 0.0
    deferred_s: float = 0.0
    recomputed_slabs: int = 0


class Stream:
    """One study on its way. Made by `Detector.open`.

    Any thread may call any method; pushes are taken one after the other. A failed call leaves the
    stream as it was, except that a failure of the engine ends it. As a context manager it is
    cancelled on exit unless it has finished.
    """

    def __init__(self, setup: StreamSetup) -> None:
        """Start an empty study."""
        self._setup = setup
        self._resample = setup.resample
        self._pushing = threading.Lock()  # held by one push or finish at a time
        self._changed = threading.Condition()  # guards everything below
        self._sequencer = Sequencer(setup.background.manifest.grid)
        self._volume = setup.volume
        self._executor: Executor | None = None
        self._flags: dict[Flag, QualityFlag] = {}
        self._pending: deque[int] = deque()
        self._records: list[SlabRecord] = []  # slabs that are done, in order of arrival
        self._updates: deque[tuple[int, Update]] = deque()  # with the index of their record
        self._working = 0  # slabs in the worker's hands
        self._scheduled = False
        self._finishing = False
        self._result: StudyResult | None = None
        self._failure: PeInferError | None = None
        self._cancelled = False
        self._clock = _Clock()

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel the study unless it has finished."""
        if self._result is None:
            self.cancel()

    def push(self, item: object, *, timeout: float | None = None) -> list[Update]:
        """Take a slice.

        Args:
            item: A `Slice`, a pydicom ``Dataset`` or the path of a DICOM file; multi-frame
                instances count as one. Its pixels may be changed once this returns.
            timeout: Seconds to wait for the worker while ``MAX_PENDING_SLABS`` slabs wait for it,
                or while it is busy with slabs that a late slice changes; ``None``: as long as it
                takes.

        Returns:
            The slabs completed since the last call, in order; often none.

        Raises:
            InputError: The slice cannot be used; the study goes on without it.
            ScopeError: The series is not what the bundle is for.
            StreamTimeoutError: The worker did not keep up in time; the slice was not taken.
            StreamError: The stream is finished or cancelled.
            EngineError: The engine has failed; the stream has ended.
        """
        slices, flags = self._setup.convert(item)
        return self.push_slices(slices, flags, timeout=timeout)

    def push_slices(
        self,
        slices: Sequence[Slice],
        flags: Sequence[QualityFlag] = (),
        *,
        timeout: float | None = None,
    ) -> list[Update]:
        """Take slices that are already decoded, all or none; ``flags`` go to the result.

        See `push`.
        """
        deadline = _deadline(timeout)
        with self._turn(deadline):
            if self._finishing:
                raise StreamError("the study has been finished; open a new stream")
            self._wait_for_room(deadline)
            started = time.perf_counter()
            staged = self._sequencer.copy()
            flags = [*flags, *self._scope_flags(slices)]
            taken = [image for image in slices if staged.add(image, self._digest(image))]
            resampled = [(image.position_um, self._resample(image)) for image in taken]
            advance = staged.advance()
            with self._changed:
                self._refuse_if_ended()
                self._forget_after(advance.kept, deadline)
                self._sequencer = staged
                for position_um, pixels in resampled:
                    self._volume.put(position_um, pixels)
                self._note(flags)
                self._hand_over(advance)
                self._clock.last_push = time.perf_counter()
                self._clock.push_s += self._clock.last_push - started
        return self.updates()

    def updates(self) -> list[Update]:
        """The slabs completed since the last call, in order; often none."""
        with self._changed:
            ready = [update for _, update in self._updates]
            self._updates.clear()
        return ready

    def finish(self, *, timeout: float | None = None) -> StudyResult:
        """End the study and wait for its result. Calling it again returns the same result.

        Args:
            timeout: Seconds to wait; ``None``: as long as it takes.

        Raises:
            SeriesError: The slices do not form one volume, slices are missing, or there are fewer
                slabs than the bundle needs; the stream stays open for further slices.
            StreamTimeoutError: The result is not there in time; it goes on being made, call again.
            StreamError: The stream was cancelled.
            EngineError: The engine has failed; the stream has ended.
        """
        deadline = _deadline(timeout)
        with self._turn(deadline):
            if not self._finishing:
                self._begin_to_finish(deadline)
        with self._changed:
            self._wait_until(lambda: self._result is not None, deadline, "the result is not there")
            assert self._result is not None  # noqa: S101 (the wait has just ended)
            return self._result

    def cancel(self) -> None:
        """Drop the study. What is in the worker's hands ends at its next step.

        Does nothing if it has finished.
        """
        with self._changed:
            if self._result is None:
                self._cancelled = True
                self._pending.clear()
                self._release()
                self._changed.notify_all()

    # What the worker calls.

    def work(self) -> bool:
        """Do one batch of slabs, or end the study. Called by the detector's worker alone.

        Returns:
            Whether there is more to do.
        """
        with self._changed:
            batch = [] if self._ended() else self._next_batch()
            if not batch and not (self._finishing and not self._ended()):
                self._scheduled = False
                return False
            self._working = max(1, len(batch))
        failure: PeInferError | None = None
        try:
            if batch:
                self._run(batch)
            else:
                self._conclude()
        except _StoppedError:
            pass
        except PeInferError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 (whatever it is, whoever waits must hear of it)
            failure = EngineError(f"the worker failed: {error!r}")
            failure.__cause__ = error
        with self._changed:
            self._working = 0
            self._failure = failure
            if self._cancelled or failure is not None:
                self._pending.clear()
                self._release()
            self._scheduled = not self._ended() and bool(self._pending or self._finishing)
            self._changed.notify_all()
            return self._scheduled

    def _run(self, batch: Sequence[int]) -> None:
        manifest = self._setup.background.manifest
        started = time.perf_counter()
        with self._changed:
            lattice, direction = self._sequencer.lattice, self._sequencer.direction
        slabs = self._volume.slabs(batch, lattice)
        made = time.perf_counter()
        if self._executor is None:
            compiled = self._setup.background.compiled
            self._executor = compiled.executor(direction, self._setup.lane)
        passing = [(slab.position_um, slab.tensor) for slab in slabs if not slab.gated]
        outputs = (
            self._executor.push(passing, checkpoint=self._stop_if_cancelled) if passing else {}
        )
        done = time.perf_counter()
        refuse_nonfinite(outputs)
        said = outputs.get(manifest.update_output)
        logits = None if said is None else iter(said.reshape(-1).tolist())
        with self._changed:
            self._clock.slabs_s += made - started
            self._clock.online_s += done - made
            for slab in slabs:
                probability = (
                    None
                    if slab.gated or logits is None
                    else update_probability(manifest, next(logits))
                )
                self._records.append(
                    SlabRecord(
                        position_um=slab.position_um,
                        probability=probability,
                        gated=slab.gated,
                        measured=slab.measured,
                    )
                )
                self._updates.append((len(self._records) - 1, self._update()))

    def _conclude(self) -> None:
        background = self._setup.background
        started = time.perf_counter()
        enough = self._passed() >= background.manifest.min_slabs
        checks = self._checked() if enough else ()
        outputs: StudyOutputs | None = None
        if self._executor is not None and enough and not refused(checks):
            outputs = self._executor.finish(checkpoint=self._stop_if_cancelled)
            refuse_nonfinite({**outputs.slabs, **outputs.study})
        self._clock.deferred_s = time.perf_counter() - started
        result = background.conclude(
            sequencer=self._sequencer,
            records=sorted(self._records, key=lambda record: record.position_um),
            outputs=outputs,
            checks=checks,
            flags=tuple(self._flags.values()),
            timings=self._timings,
        )
        with self._changed:
            if not self._cancelled:
                self._result = result
                self._release()

    def _passed(self) -> int:
        return sum(not record.gated for record in self._records)

    def _checked(self) -> tuple[CheckResult, ...]:
        """The bundle's checks of the images, over the slabs that are done."""
        manifest = self._setup.background.manifest
        return assess(manifest.checks, [r.measured for r in self._records if not r.gated])

    def _timings(self) -> Timings:
        clock, now = self._clock, time.perf_counter()
        return Timings(
            total_s=now - clock.opened,
            push_s=clock.push_s,
            slabs_s=clock.slabs_s,
            online_s=clock.online_s,
            deferred_s=clock.deferred_s,
            last_slice_to_result_s=now - clock.last_push,
            recomputed_slabs=clock.recomputed_slabs,
        )

    def _update(self) -> Update:
        records = self._records
        newest = records[-1]
        probabilities = [r.probability for r in records if r.probability is not None]
        return Update(
            position_mm=newest.position_um / 1000.0,
            slabs=self._passed(),
            probability=newest.probability,
            running_maximum=max(probabilities, default=None),
            covered_mm=abs(newest.position_um - records[0].position_um) / 1000.0,
            provisional_alert=alerts(self._setup.background.manifest, records)
            and not refused(self._checked()),
        )

    # What push and finish do.

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        """Hold the right to change the study."""
        if not self._pushing.acquire(timeout=_remaining(deadline)):
            raise StreamTimeoutError("another push or finish did not end in time; call again")
        try:
            with self._changed:
                self._refuse_if_ended()
            yield
        finally:
            self._pushing.release()

    def _wait_for_room(self, deadline: float) -> None:
        with self._changed:
            self._wait_until(
                lambda: len(self._pending) + self._working < MAX_PENDING_SLABS,
                deadline,
                f"{MAX_PENDING_SLABS} slabs wait for the engine and the slice was not taken",
            )

    def _begin_to_finish(self, deadline: float) -> None:
        manifest = self._setup.background.manifest
        flags = self._sequencer.judge()
        staged = self._sequencer.copy()
        advance = staged.advance(
            final=True, direction=self._setup.background.compiled.program.best_arrival()
        )
        if (count := advance.kept + len(advance.centres_um)) < manifest.min_slabs:
            raise SeriesError(
                f"the slices make {count} slabs, bundle {manifest.name!r} needs at least "
                f"{manifest.min_slabs} "
                f"({manifest.grid.planes_per_slab} planes of {manifest.grid.pitch_um / 1000:g} mm "
                "each): "
                "send the whole series",
                code=Code.TOO_FEW_SLABS,
            )
        with self._changed:
            self._refuse_if_ended()
            self._forget_after(advance.kept, deadline)
            self._sequencer = staged
            self._note(flags)
            self._finishing = True
            self._hand_over(advance)

    def _forget_after(self, kept: int, deadline: float) -> None:
        """Drop the slabs handed over after the first ``kept`` ones: a slice came late."""
        if kept >= len(self._records) + self._working + len(self._pending):
            return
        self._wait_until(
            lambda: not self._working,
            deadline,
            "the slice came late, slabs that it changes are at work, and it was not taken",
        )
        self._clock.recomputed_slabs += max(0, len(self._records) - kept)
        while self._pending and len(self._records) + len(self._pending) > kept:
            self._pending.pop()
        del self._records[kept:]
        while self._updates and self._updates[-1][0] >= kept:
            self._updates.pop()
        self._volume.forget_planes()
        if self._executor is not None:
            self._executor.truncate(self._passed())

    def _hand_over(self, advance: Advance) -> None:
        self._pending.extend(advance.centres_um)
        if not self._scheduled and (self._pending or self._finishing):
            self._scheduled = True
            self._setup.schedule(self)

    def _digest(self, image: Slice) -> bytes:
        """Stands for the decoded pixels and what turns them into HU."""
        stored = self._resample.stored(image)
        meaning = f"{stored.dtype} {image.rescale_slope} {image.rescale_intercept} {image.padding}"
        digest = hashlib.blake2b(stored.data, digest_size=16, person=b"pe_infer slice")
        digest.update(meaning.encode())
        return digest.digest()

    def _scope_flags(self, slices: Sequence[Slice]) -> list[QualityFlag]:
        if self._sequencer.first is not None or not slices:
            return []
        manifest = self._setup.background.manifest
        return check_scope(manifest.scope, slices[0].series, bundle=manifest.name)

    def _note(self, flags: Sequence[QualityFlag]) -> None:
        for flag in flags:
            self._flags.setdefault(flag.flag, flag)

    # Shared; the caller holds self._changed.

    def _next_batch(self) -> list[int]:
        return [self._pending.popleft() for _ in range(min(MAX_BATCH, len(self._pending)))]

    def _ended(self) -> bool:
        return self._cancelled or self._failure is not None or self._result is not None

    def _refuse_if_ended(self) -> None:
        if self._failure is not None:
            raise copy.copy(self._failure) from self._failure
        if self._cancelled:
            raise StreamCancelledError("the stream was cancelled; open a new one")

    def _wait_until(self, condition: Callable[[], bool], deadline: float, late: str) -> None:
        def ready() -> bool:
            return condition() or self._cancelled or self._failure is not None

        if not self._changed.wait_for(ready, _remaining(deadline)):
            raise StreamTimeoutError(f"{late} in time; call again")
        self._refuse_if_ended()

    def _stop_if_cancelled(self) -> None:
        if self._cancelled:
            raise _StoppedError

    def _release(self) -> None:
        """Let go of what is large."""
        if not self._working or self._result is not None:
            self._executor = None
            self._volume.clear()


class _StoppedError(Exception):
    """The study was cancelled while the worker had it."""


def _deadline(timeout: float | None) -> float:
    return np.inf if timeout is None else time.monotonic() + timeout


def _remaining(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
