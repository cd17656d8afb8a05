"""What a study has to say, into parcels and the ledger."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pe_infer.errors import Code, NodeError
from pe_infer.node.entries import Parcel, Verdict, Withdrawal
from pe_infer.node.ledger import Ledger
from pe_infer.node.objects import Outcome, Unjudged
from pe_infer.node.parcels import Packer, Subject
from pe_infer.node.settings import NodeSettings
from pe_infer.node.study import Study
from pe_infer.node.watch import Watch
from pe_infer.result import NotProcessed, StudyResult

ALERT_AGAIN_S: Final = 1.0  # after the disk or the ledger has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Concluded:
    """What a series has ended with.

    Attributes:
        bundle: Who judged it.
        verdict: What was said.
        code: Why nothing was, if so.
        result_at: When the result was known, by the reporter's clock.
    """

    bundle: str
    verdict: Verdict
    code: str | None
    result_at: float


class Reporter:
    """Makes parcels of studies and enters them. Thread-safe for different series."""

    def __init__(
        self,
        settings: NodeSettings,
        ledger: Ledger,
        packer: Packer,
        watch: Watch,
        *,
        on_parcel: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Take what all reports share.

        Args:
            settings: Of the node.
            ledger: Where parcels are entered.
            packer: Makes them.
            watch: Logs and metrics.
            on_parcel: Called when one was entered.
            clock: Seconds.
        """
        self._ledger = ledger
        self._packer = packer
        self._watch = watch
        self._on_parcel = on_parcel
        self._clock = clock
        self._destinations = [to.name for to in settings.destinations]
        self._alerted = [to.name for to in settings.destinations if to.kind != "dicom" or to.alerts]

    def alert(self, study: Study) -> None:
        """Send the alert that a study asks for, if its version has had none.

        One that cannot be made is logged, and tried again if the disk is at fault: it never
        endangers the result.
        """
        update, subject = study.alert, study.subject
        if update is None or subject is None or study.alerted or study.refusal is not None:
            return
        if self._clock() < study.alert_due_at:
            return
        alert = subject.alert(
            probability=update.probability or 0.0,
            position_mm=update.position_mm,
            slices=study.slices,
        )
        try:
            folder = self._packed(study, subject, alert)
            self._ledger.alert(
                study.entry.id,
                version=study.version,
                folder=folder,
                destinations=self._alerted,
            )
        except NodeError as exc:
            study.log("alert_delayed", code=exc.code)
            study.alert_due_at = self._clock() + ALERT_AGAIN_S
            return
        study.alerted = True
        self._watch.alerts.labels(bundle=subject.bundle.manifest.name, outcome="raised").inc()
        study.log("alert", bundle=subject.bundle.manifest.name, slices=study.slices)
        self._on_parcel()

    def conclude(self, study: Study) -> Concluded | None:
        """End a study: make its result and enter it.

        Returns:
            What it says; ``None`` if no slice says which bundle the series is for: there is no
            result.

        Raises:
            StoppedError: The node stops.
            NodeError: The disk or the ledger fails; call again.
            EngineError: The engine has failed.
        """
        if (subject := study.subject) is None:
            self._set_aside(study)
            return None
        outcome = study.outcome(subject)
        result_at = self._clock()
        verdict, code = _verdict(outcome)
        bundle = subject.bundle.manifest.name
        alert = self._standing_alert(study)
        confirmed = verdict == "positive" and (
            alert is not None and self._packer.raised_by(alert) in {bundle, None}
        )
        self._ledger.conclude(
            study.entry.id,
            version=study.version,
            verdict=verdict,
            folder=self._packed(study, subject, outcome),
            last_instance=study.after,
            destinations=self._destinations,
            withdrawal=None if confirmed else self._withdrawal(study, alert),
        )
        self._watch.results.labels(bundle=bundle, verdict=verdict).inc()
        if alert is not None:
            self._count_end(alert, "confirmed" if confirmed else "withdrawn")
        self._on_parcel()
        return Concluded(bundle=bundle, verdict=verdict, code=code, result_at=result_at)

    def ignore(self, study: Study) -> None:
        """End a study that nobody is to judge: there is no result.

        Raises:
            NodeError: The disk or the ledger fails; call again.
        """
        reason = study.decision.reason if study.decision is not None else ""
        alert = self._standing_alert(study)
        self._ledger.route(
            study.entry.id,
            bundle=None,
            reason=reason,
            withdrawal=self._withdrawal(study, alert),
        )
        study.log("ignored", why=reason.partition(":")[0])
        if alert is not None:
            self._count_end(alert, "withdrawn")
            self._on_parcel()

    def _set_aside(self, study: Study) -> None:
        refusal = study.refusal
        if refusal is None:
            refusal = NotProcessed(code=Code.NO_CT_SERIES, message="it holds no axial CT image")
        alert = self._standing_alert(study)
        self._ledger.set_aside(
            study.entry.id,
            reason=f"{refusal.code}: {refusal.message}",
            last_instance=study.after,
            withdrawal=self._withdrawal(study, alert),
        )
        study.log("set_aside", code=refusal.code)
        if alert is not None:
            self._count_end(alert, "withdrawn")
            self._on_parcel()

    def _standing_alert(self, study: Study) -> Parcel | None:
        """The alert of the version, which an earlier process may have sent; if not withdrawn."""
        made = {
            parcel.kind: parcel
            for parcel in self._ledger.parcels(study.entry.id)
            if parcel.version == study.version
        }
        return None if "withdrawal" in made else made.get("alert")

    def _withdrawal(self, study: Study, alert: Parcel | None) -> Withdrawal | None:
        if alert is None:
            return None
        return Withdrawal(
            version=alert.version,
            folder=self._packer.withdrawal(study.entry, alert),
            destinations=self._alerted,
        )

    def _packed(self, study: Study, subject: Subject, outcome: Outcome) -> str:
        """Make a parcel; without objects if what says no verdict cannot have any."""
        try:
            return self._packer.pack(subject, outcome, study.sources(), alerted=study.alerted)
        except NodeError:
            raise
        except Exception as exc:
            if isinstance(outcome, StudyResult):
                raise  # the series is then refused, and that is said
            self._watch.failed("objects_failed", exc, series_id=study.entry.id)
            return self._packer.pack(subject, outcome, None)

    def _count_end(self, alert: Parcel, outcome: str) -> None:
        bundle = self._packer.raised_by(alert) or ""
        self._watch.alerts.labels(bundle=bundle, outcome=outcome).inc()


def _verdict(outcome: StudyResult | Unjudged) -> tuple[Verdict, str | None]:
    if isinstance(outcome, Unjudged):
        return "not_processed", outcome.reason.code
    if outcome.positive is None:
        return "not_processed", outcome.not_processed.code if outcome.not_processed else None
    return "positive" if outcome.positive else "negative", None
