"""Parcels' objects to a C-STORE SCP, and storage commitment."""

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from pynetdicom import _config
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import EVT_CONN_OPEN, EVT_N_EVENT_REPORT, Event
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)
from pynetdicom.status import code_to_category

from pe_infer.dicom.commitment import commitment_request
from pe_infer.node.commitment import CommitmentReport, take_report
from pe_infer.node.destinations.base import DONE, Errand, Outcome, reason
from pe_infer.node.parcels import StoredObject
from pe_infer.node.settings import DicomDestination
from pe_infer.node.watch import Watch

# Files are sent as they are on the disk: with a path, and with this, nothing is decoded.
_config.STORE_SEND_CHUNKED_DATASET = True

_SLOWEST_BYTES_PER_S: Final = 125_000  # what a destination is given beside the time to answer
_ANSWER_S: Final = 2.0  # how long a commitment report may come on the association that asked
_REQUEST_COMMITMENT: Final = 1  # action type
_NO_SUCH_CLASS: Final = 0x0122
_OUT_OF_RESOURCES: Final = range(0xA700, 0xA800)
_DOES_NOT_MATCH: Final = range(0xA900, 0xAA00)
_NOT_UNDERSTOOD: Final = range(0xC000, 0xD000)
_STORED: Final = {"Success", "Warning"}


class DicomSender:
    """Stores objects by C-STORE, one association per try.

    Presentation contexts are proposed for the classes and transfer syntaxes of the objects and for
    nothing else; files are never re-encoded. Success and warnings count as stored. A class or a
    transfer syntax that is not accepted and the statuses 0x0122, 0xA9xx and 0xCxxx refuse an object
    for good, without keeping the others from being sent; of a parcel with a refused object no
    commitment is asked for.
    """

    def __init__(
        self,
        destination: DicomDestination,
        *,
        calling_ae_title: str,
        timeout_s: float,
        watch: Watch,
        on_commitment: Callable[[CommitmentReport], None],
        context: ssl.SSLContext | None,
    ) -> None:
        """Use a destination.

        Args:
            destination: Where it is and what it is asked for.
            calling_ae_title: This node's.
            timeout_s: How long it may say nothing.
            watch: For what is no error of a parcel.
            on_commitment: Takes reports that come on the association that asks for them.
            context: For TLS; ``None``: the connection is not encrypted.
        """
        self._settings = destination
        self._calling_ae_title = calling_ae_title
        self._timeout_s = timeout_s
        self._watch = watch
        self._on_commitment = on_commitment
        self._context = context
        self._offers_commitment = True

    def send(self, errand: Errand) -> Outcome:
        """Store the objects of a parcel that are not there yet, and ask for commitment."""
        objects = errand.contents.objects
        missing = [
            found
            for found in objects
            if not errand.all_stored and found.sop_instance_uid not in errand.stored
        ]
        asks = self._settings.commitment and bool(objects)
        if not missing and not asks:
            return DONE
        contexts = [build_context(*pair) for pair in sorted({_context_of(o) for o in missing})]
        if asks:
            contexts.append(build_context(StorageCommitmentPushModel))
        try:
            with self._associated(contexts) as association:
                outcome = self._store(association, missing, errand)
                if outcome is not DONE or not asks:
                    return outcome
                return self._ask(association, errand)
        except _NoAssociationError as exc:
            return Outcome(state="stored" if errand.all_stored else "waiting", error=str(exc))

    def _store(
        self, association: Association, missing: Sequence[StoredObject], errand: Errand
    ) -> Outcome:
        accepted = {
            (cx.abstract_syntax, cx.transfer_syntax[0]) for cx in association.accepted_contexts
        }
        refused, failed = [], []
        for found in missing:
            name, syntax = _names(found)
            if _context_of(found) not in accepted:
                refused.append(f"{name} in {syntax} is not accepted")
                continue
            if errand.stopping():
                failed.append("the node is stopping")
                break
            status = self._status(association, found)
            if status is None:
                failed.append(f"{name}: no answer")
                break
            if code_to_category(status) in _STORED:
                errand.stored.add(found.sop_instance_uid)
                continue
            (refused if _is_final(status) else failed).append(f"{name}: status 0x{status:04X}")
            if status in _OUT_OF_RESOURCES:
                break
        if failed:
            return Outcome(state="waiting", error="; ".join(failed))
        return Outcome(state="refused", error="; ".join(refused)) if refused else DONE

    def _status(self, association: Association, found: StoredObject) -> int | None:
        """Store an object; ``None`` if the association has ended, or nothing was answered."""
        transfer_s = found.path.stat().st_size / _SLOWEST_BYTES_PER_S
        association.dimse_timeout = self._timeout_s + transfer_s
        try:
            status = association.send_c_store(found.path).get("Status")
        except RuntimeError:  # the other side has aborted it
            return None
        return None if status is None else int(status)

    def _ask(self, association: Association, errand: Errand) -> Outcome:
        if all(
            cx.abstract_syntax != StorageCommitmentPushModel for cx in association.accepted_contexts
        ):
            return self._not_offered()
        instances = [(o.sop_class_uid, o.sop_instance_uid) for o in errand.contents.objects]
        request = commitment_request(errand.ask(), instances)
        association.dimse_timeout = self._timeout_s
        try:
            response, _ = association.send_n_action(
                request,
                _REQUEST_COMMITMENT,
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
            )
            status = response.get("Status")
        except RuntimeError:  # the other side has aborted it
            status = None
        if status is None:
            return Outcome(state="stored", error="no answer to the request for commitment")
        if status == _NO_SUCH_CLASS:
            return self._not_offered()
        if code_to_category(status) not in _STORED:
            return Outcome(state="stored", error=f"request for commitment: status 0x{status:04X}")
        errand.answered(min(_ANSWER_S, self._settings.commitment_s))
        return Outcome(state="stored")

    def _not_offered(self) -> Outcome:
        if self._offers_commitment:
            self._watch.log.warning("commitment_not_offered", destination=self._settings.name)
        self._offers_commitment = False
        return DONE

    @contextmanager
    def _associated(self, contexts: list[PresentationContext]) -> Iterator[Association]:
        """An association; one that has ended already if no context was accepted.

        Raises:
            _NoAssociationError: There is none.
        """
        entity = ApplicationEntity(self._calling_ae_title)
        entity.acse_timeout = entity.dimse_timeout = self._timeout_s
        entity.connection_timeout = self._timeout_s
        entity.network_timeout = None  # every wait has its own limit
        where = self._settings
        try:
            association = entity.associate(
                where.host,
                where.port,
                contexts,
                ae_title=where.ae_title,
                tls_args=None if self._context is None else (self._context, where.host),
                evt_handlers=[
                    (EVT_CONN_OPEN, self._limit_waits),
                    (EVT_N_EVENT_REPORT, take_report, [self._on_commitment, self._watch]),
                ],
            )
        except OSError as exc:  # the name of the host is not known
            raise _NoAssociationError(reason(exc)) from exc
        try:
            if not association.is_established and not association.rejected_contexts:
                raise _NoAssociationError(_why_none(association))
            yield association
        finally:
            association.release()

    def _limit_waits(self, event: Event) -> None:
        """A destination that stops reading must not hold the connection's thread for ever."""
        wrapper = event.assoc.dul.socket
        if wrapper is not None and wrapper.socket is not None:
            wrapper.socket.settimeout(self._timeout_s)


class _NoAssociationError(Exception):
    """The destination cannot be reached, or does not want to talk to us."""


def _why_none(association: Association) -> str:
    if not association.is_rejected:
        return "no connection, or it was closed or not answered"
    answer = association.acceptor.primitive
    return f"association rejected: {answer.reason_str}" if answer else "association rejected"


def _context_of(found: StoredObject) -> tuple[str, str]:
    return found.sop_class_uid, found.transfer_syntax_uid


def _names(found: StoredObject) -> tuple[str, str]:
    context = build_context(*_context_of(found))
    sop_class = context.abstract_syntax
    return sop_class.name if sop_class else "unknown", context.transfer_syntax[0].name


def _is_final(status: int) -> bool:
    return status == _NO_SUCH_CLASS or status in _DOES_NOT_MATCH or status in _NOT_UNDERSTOOD
