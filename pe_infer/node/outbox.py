"""Deliveries: every parcel to every destination, however long it takes.

One thread per destination, so that one that is down holds up no other. What is to be done is in
the ledger only; a node that was killed goes on from there. A try that succeeded and was not noted
is made again with the same UIDs, event ids and names: at least once, and idempotent where it is
received.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pe_infer.errors import Code, NodeError
from pe_infer.node.commitment import CommitmentReport
from pe_infer.node.destinations import sender_to
from pe_infer.node.destinations.base import DONE, Errand, Outcome, Sender
from pe_infer.node.entries import Delivery
from pe_infer.node.ledger import Ledger
from pe_infer.node.parcels import Contents, read_contents
from pe_infer.node.settings import DicomDestination, NodeSettings
from pe_infer.node.watch import Watch

POLL_S: Final = 5.0  # another process may have had something sent again
JITTER: Final = 0.2  # share of a wait that is left to chance, so that nodes do not move in step
_MAX_DOUBLINGS: Final = 60
_NO_SUCH_CLASS: Final = 0x0122
_NOT_WHOLE: Final = (FileNotFoundError, KeyError, TypeError, ValueError)


@dataclass(slots=True, kw_only=True)
class _Lane:
    """One destination.

    Attributes:
        name: Of the destination.
        sender: Who sends.
        commitment_s: How long a commitment may take.
        thread: Which sends.
        wake: There may be something to do.
        answered: The commitment that was asked for last has been answered.
        transaction_uid: Of that commitment.
        stored: By delivery, SOP instance UIDs of what the destination has, as long as it has not
            everything. Lost at a restart: then everything is sent again.
    """

    name: str
    sender: Sender
    commitment_s: float
    thread: threading.Thread | None = None
    wake: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)
    transaction_uid: str | None = None
    stored: dict[int, set[str]] = field(default_factory=dict)


class Outbox:
    """Sends what the ledger says is to be sent. Thread-safe.

    To one destination deliveries go in the order of their parcels. One that fails is tried again
    after a wait that doubles, and then after those that have failed less often; meanwhile those of
    other series go on, and those of its own series wait, so that an alert comes before its
    withdrawal and a result before the one that supersedes it. What is stored and waits for its
    commitment has been taken, and holds up nothing; neither does what a destination refuses for
    good, which is set aside with the reason.
    """

    def __init__(
        self,
        settings: NodeSettings,
        ledger: Ledger,
        parcels: Path,
        watch: Watch,
        *,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Prepare to send; nothing is sent before `start`.

        Args:
            settings: Destinations, waits, timeouts, this node's AE title.
            ledger: What is to be sent.
            parcels: Folder of the parcels.
            watch: Logs and metrics.
            clock: Seconds since 1970.
            chance: Uniform in [0, 1).

        Raises:
            NodeError: A certificate of a destination cannot be used.
        """
        self._retry = settings.retry
        self._ledger = ledger
        self._parcels = parcels
        self._watch = watch
        self._clock = clock
        self._chance = chance
        self._stopping = threading.Event()
        self._noting = threading.Lock()
        self._lanes = {
            told.name: _Lane(
                name=told.name,
                sender=sender_to(told, settings, watch, self.commitment),
                commitment_s=told.commitment_s if isinstance(told, DicomDestination) else 0.0,
            )
            for told in settings.destinations
        }

    def start(self) -> None:
        """Begin to send, also what was left by an earlier process."""
        for name, count in self._ledger.open_deliveries().items():
            if name not in self._lanes:
                self._watch.log.warning("destination_unknown", destination=name, deliveries=count)
        for lane in self._lanes.values():
            # A daemon, for it holds nothing that is not in the ledger: a destination that does not
            # answer must not keep the process from ending.
            lane.thread = threading.Thread(
                target=self._run, args=(lane,), name=f"outbox-{lane.name}", daemon=True
            )
            lane.thread.start()

    def wake(self) -> None:
        """Look at once whether there is something to send: a parcel was entered."""
        for lane in self._lanes.values():
            lane.wake.set()

    def stop(self, timeout_s: float) -> None:
        """End after what is being sent; what is cut short is sent again after the next start.

        Args:
            timeout_s: How long to wait for that.
        """
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        for lane in self._lanes.values():
            lane.wake.set()
            lane.answered.set()
        for lane in self._lanes.values():
            if lane.thread is not None:
                lane.thread.join(max(0.0, deadline - time.monotonic()))
                if lane.thread.is_alive():
                    self._watch.log.warning("outbox_cut_short", destination=lane.name)

    def commitment(self, report: CommitmentReport) -> None:
        """Note what a destination says about a storage commitment that it was asked for.

        A report that answers nothing, or answers twice, is ignored.

        Raises:
            NodeError: It cannot be noted.
        """
        with self._noting:
            delivery = self._ledger.delivery_of(report.transaction_uid)
            if delivery is None or delivery.state != "stored":
                self._watch.log.info("commitment_report_ignored")
                return
            uids = {found.sop_instance_uid for found in self._contents(delivery).objects}
            self._note(delivery, _judged(report, uids))
            lane = self._lanes.get(delivery.destination)
            if lane is None:
                return
            lane.stored.pop(delivery.id, None)
            if uids - report.committed:
                lane.stored[delivery.id] = uids & report.committed
            if lane.transaction_uid == report.transaction_uid:
                lane.answered.set()
            lane.wake.set()

    # In a destination's thread.

    def _run(self, lane: _Lane) -> None:
        while True:
            lane.wake.clear()
            if self._stopping.is_set():
                return
            try:
                wait_s = self._step(lane)
            except Exception as exc:  # noqa: BLE001 (no thread ends but by `stop`)
                self._watch.failed("outbox_failed", exc, destination=lane.name)
                wait_s = POLL_S
            lane.wake.wait(wait_s)

    def _step(self, lane: _Lane) -> float:
        """Deliver what is due first; returns for how long there is nothing to do."""
        longest_s = max(self._retry.most_s, lane.commitment_s)
        due = self._ledger.due(lane.name, now=self._clock(), longest_s=longest_s, limit=1)
        delivery = next(iter(due), None)
        if delivery is not None:
            self._deliver(lane, delivery)
        open_deliveries = self._ledger.open_deliveries().get(lane.name, 0)
        self._watch.waiting_deliveries.labels(lane.name).set(open_deliveries)
        next_at = self._ledger.next_due_at(lane.name)
        return POLL_S if next_at is None else min(POLL_S, max(0.0, next_at - self._clock()))

    def _deliver(self, lane: _Lane, delivery: Delivery) -> None:
        if delivery.state == "waiting" and delivery.attempts == 0:
            lane.stored.pop(delivery.id, None)  # it is to be sent again as a whole
        try:
            outcome = self._outcome(lane, delivery)
        except Exception as exc:  # noqa: BLE001 (the next try may go well, the others have to go on)
            self._watch.failed("delivery_failed", exc, destination=lane.name)
            outcome = Outcome(state=delivery.state, error=type(exc).__name__)
        with self._noting:
            current = self._ledger.delivery(delivery.id)
            if current is None or current.state not in {"waiting", "stored"}:
                return  # forgotten, or committed meanwhile
            if outcome.error is not None or outcome.state != "stored":  # else noted by `_ask`
                self._note(current, outcome)
            if outcome.state in {"done", "refused"}:
                lane.stored.pop(delivery.id, None)

    def _outcome(self, lane: _Lane, delivery: Delivery) -> Outcome:
        try:
            return lane.sender.send(
                Errand(
                    parcel=delivery.parcel,
                    contents=self._contents(delivery),
                    stored=lane.stored.setdefault(delivery.id, set()),
                    all_stored=delivery.state == "stored",
                    ask=lambda: self._ask(lane, delivery),
                    answered=lane.answered.wait,
                    stopping=self._stopping.is_set,
                )
            )
        except NodeError as exc:
            if exc.code is not Code.INVALID_ATTRIBUTE and not isinstance(exc.__cause__, _NOT_WHOLE):
                raise
            return Outcome(
                state="refused",
                error="the parcel is not whole: make it again with pe-infer node replay",
            )

    def _ask(self, lane: _Lane, delivery: Delivery) -> str:
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        with self._noting:
            lane.transaction_uid = transaction_uid
            lane.answered.clear()
            self._ledger.update_delivery(
                delivery.id,
                state="stored",
                due_at=self._clock() + lane.commitment_s,
                transaction_uid=transaction_uid,
            )
        self._report(delivery, Outcome(state="stored"))
        return transaction_uid

    # In any thread.

    def _contents(self, delivery: Delivery) -> Contents:
        folder = self._parcels / delivery.parcel.folder
        contents = read_contents(folder)
        for found in contents.objects:
            if not found.path.is_file():
                raise NodeError(
                    f"{folder}: an object is missing: make the parcel again"
                ) from FileNotFoundError()
        return contents

    def _note(self, delivery: Delivery, outcome: Outcome) -> None:
        retried = outcome.state in {"waiting", "stored"}
        noted = self._ledger.update_delivery(
            delivery.id,
            state=outcome.state,
            due_at=self._clock() + self._wait_s(delivery.attempts) if retried else 0.0,
            error=outcome.error,
            transaction_uid=delivery.transaction_uid if outcome.state == "stored" else None,
        )
        if noted:  # not dropped meanwhile
            self._report(delivery, outcome)

    def _wait_s(self, attempts: int) -> float:
        """How long to wait after a failed try that so many others have gone before."""
        doubled_s = self._retry.first_s * 2.0 ** min(attempts, _MAX_DOUBLINGS)
        return min(self._retry.most_s, doubled_s) * (1 - JITTER * self._chance())

    def _report(self, delivery: Delivery, outcome: Outcome) -> None:
        failed = outcome.error is not None and outcome.state != "refused"
        label = "failed" if failed else outcome.state
        self._watch.deliveries.labels(delivery.destination, label).inc()
        series = self._ledger.series_entry(delivery.parcel.series_id)
        log = self._watch.log.info if outcome.error is None else self._watch.log.warning
        log(
            f"delivery_{label}",
            destination=delivery.destination,
            series=None if series is None else self._watch.alias(series.series_instance_uid),
            kind=delivery.parcel.kind,
            version=delivery.parcel.version,
            error=outcome.error,
        )


def _judged(report: CommitmentReport, uids: set[str]) -> Outcome:
    lost = uids - report.committed
    if not lost:
        return DONE
    reasons = {report.failed.get(uid, 0) for uid in lost}
    quoted = ", ".join(f"0x{reason:04X}" for reason in sorted(reasons))
    return Outcome(
        state="refused" if reasons == {_NO_SUCH_CLASS} else "waiting",
        error=f"{len(lost)} of {len(uids)} objects not committed: reason {quoted}",
    )
