"""The side that is connected to: C-ECHO, C-STORE of CT images, storage commitment reports.

A C-STORE request is answered with success after `Inbox.keep` has returned, never before.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, Protocol, cast

from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

from pe_infer.dicom import (
    IMPLEMENTATION_NAME,
    IMPLEMENTATION_UID,
    IntakeHeader,
    file_head,
    read_data_set_header,
    read_intake_header,
    storage_contexts,
    store_response,
)
from pe_infer.errors import Code, DicomError, NodeError
from pe_infer.node.commitment import CommitmentReport, take_report
from pe_infer.node.entries import Instance
from pe_infer.node.inbox import Header, Inbox, checked_uid
from pe_infer.node.settings import Limits, NodeSettings
from pe_infer.node.tls import server_context
from pe_infer.node.upper_layer import Bounds, DataSet, Ending, Server
from pe_infer.node.watch import Watch

# PS3.4 table B.2-1, PS3.7 annex C.
SUCCESS: Final = 0x0000
NO_SUCH_CLASS: Final = 0x0122
NO_RESOURCES: Final = 0xA700  # try again later
DOES_NOT_MATCH: Final = 0xA900  # not what is taken here
NOT_UNDERSTOOD: Final = 0xC000
NO_UID: Final = 0xC001
FAILED: Final = 0xC002
_UNRECOGNISED_OPERATION: Final = 0x0211

_POLL_S: Final = 0.1  # how soon the accepting thread notices that it is to stop
_LIBRARY: Final = logging.getLogger("pynetdicom")
_REJECT = {  # result, source, reason of PS3.8 section 9.3.4
    "called_ae_title": (1, 1, 7),
    "calling_ae_title": (1, 1, 3),
    "associations": (2, 3, 2),
}


class Intake(Protocol):
    """What takes slices that are on disk."""

    def room(self) -> bool:
        """Whether there is room for a slice; without, senders are asked to try again later."""

    def owed_bytes(self) -> int:
        """What has to be left on the disk for results of slices that were taken."""

    def offer(self, instance: Instance) -> None:
        """Take note of a slice that was kept; returns at once."""


class _Refused(Exception):  # noqa: N818  # an answer
    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status
        self.comment = comment


@dataclass(frozen=True, slots=True)
class _File:
    """A data set that came, as a file."""

    head: bytes
    data_set: DataSet

    @property
    def size(self) -> int:
        return len(self.head) + self.data_set.size

    def pieces(self) -> Iterator[bytes]:
        yield self.head
        yield from self.data_set.pieces()


class Receiver:
    """Listens for associations. Every connection has a thread, which ends with it."""

    def __init__(
        self,
        settings: NodeSettings,
        inbox: Inbox,
        intake: Intake,
        watch: Watch,
        on_commitment: Callable[[CommitmentReport], None],
    ) -> None:
        """Set up; `start` listens.

        Args:
            settings: Of the node.
            inbox: Where slices are kept.
            intake: Who is told of them.
            watch: Logs and metrics.
            on_commitment: Notes a storage commitment report; it is on disk when this returns.
        """
        self._listen = settings.listen
        self._limits = settings.limits
        self._inbox = inbox
        self._intake = intake
        self._watch = watch
        self._on_commitment = on_commitment
        self._contexts = storage_contexts()
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._library = _LibraryLog(watch)

    def start(self) -> None:
        """Listen.

        Raises:
            NodeError: ``node.network``: the address or a certificate cannot be used.
        """
        listen = self._listen
        tls = None if listen.tls is None else server_context(listen.tls)
        entity = ApplicationEntity(listen.ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = IMPLEMENTATION_NAME
        entity.maximum_pdu_size = listen.max_pdu_bytes
        entity.add_supported_context(Verification)
        for storage_class, syntaxes in self._contexts.items():
            entity.add_supported_context(storage_class, list(syntaxes))
        # Reports of storage commitment: the other side connects, and is the SCP nevertheless.
        entity.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        try:
            server = entity.make_server(
                (listen.host, listen.port),
                ssl_context=tls,
                evt_handlers=[
                    (evt.EVT_REQUESTED, self._on_requested),
                    (evt.EVT_C_STORE, self._on_store),
                    (evt.EVT_N_EVENT_REPORT, self._on_report),
                    (evt.EVT_N_ACTION, lambda _event: (_UNRECOGNISED_OPERATION, None)),
                ],
                server_class=Server,
                bounds=Bounds(
                    associations=listen.associations,
                    connections_per_address=listen.connections_per_address,
                    pdu_bytes=listen.max_pdu_bytes,
                    object_bytes=self._limits.object_bytes,
                    free_disk_bytes=self._limits.free_disk_bytes,
                    idle_s=listen.idle_s,
                    scratch=self._inbox.scratch,
                ),
                door=self,
            )
        except OSError as exc:
            raise NodeError(
                f"{listen.host}:{listen.port}: cannot be listened on: {exc.strerror or exc}. Set "
                "listen.host and listen.port to an address of this machine that is free.",
                code=Code.NODE_NETWORK,
            ) from exc
        self._library.attach()
        self._server = cast("Server", server)
        self._thread = threading.Thread(target=self._accept, args=(server,), name="receiver")
        self._thread.start()
        self._watch.log.info(
            "receiver_started",
            ae_title=listen.ae_title,
            host=listen.host,
            port=listen.port,
            tls=tls is not None,
        )

    def stop(self, timeout_s: float) -> None:
        """Accept nothing more; associations may end, and are aborted after ``timeout_s``."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        server.close(timeout_s)
        thread.join()
        self._library.detach()
        self._watch.log.info("receiver_stopped")

    def room(self) -> bool:
        """Whether slices are taken: the disk and the queue have room.

        Raises:
            OSError: The disk cannot be asked.
        """
        return self._intake.room() and self._free_bytes() >= self._reserve_bytes()

    def _accept(self, server: Server) -> None:
        while True:
            try:
                server.serve_forever(_POLL_S)
            except Exception as exc:  # noqa: BLE001  # it goes on accepting
                self._watch.failed("accepting_failed", exc)
                time.sleep(_POLL_S)
            else:
                return

    # What the server asks and tells.

    def admits(self, address: str) -> bool:
        """Whether a connection from this address is let in."""
        peer = ip_address(address.partition("%")[0])
        if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
            peer = peer.ipv4_mapped
        allowed = self._listen.allowed_addresses
        return not allowed or any(peer in network for network in allowed)

    def turned_away(self, address: str, reason: str) -> None:
        """A connection was closed without a word."""
        self._watch.associations.labels(outcome="turned_away").inc()
        self._watch.log.warning("connection_turned_away", peer=address, reason=reason)

    def ended(self, address: str, ending: Ending) -> None:
        """A connection has ended."""
        self._watch.associations.labels(outcome=ending).inc()
        self._watch.log.info("association_ended", peer=address, ending=ending)

    def failed(self, event: str, exc: BaseException) -> None:
        """Something was raised that nobody expected."""
        self._watch.failed(event, exc)

    # What peers ask for.

    def _on_requested(self, event: evt.Event) -> None:
        association = event.assoc
        try:
            reason = self._objection(association)
            if reason is not None:
                association.acse.send_reject(*_REJECT[reason])
                association.kill()
        except Exception as exc:  # noqa: BLE001  # pynetdicom would go on and negotiate
            association.is_aborted = True
            self._watch.failed("association_request_failed", exc)

    def _objection(self, association: Association) -> str | None:
        request = cast("A_ASSOCIATE", association.requestor.primitive)
        called, calling = request.called_ae_title.strip(), request.calling_ae_title.strip()
        allowed = {title.strip() for title in self._listen.allowed_ae_titles}
        reason = None
        if called != self._listen.ae_title.strip():
            reason = "called_ae_title"
        elif allowed and calling not in allowed:
            reason = "calling_ae_title"
        elif self._server is None or not self._server.enter(association):
            reason = "associations"
        names = {"peer": association.requestor.address, "calling": calling, "called": called}
        if reason is None:
            self._watch.log.info("association_requested", **names)
        else:
            self._watch.log.warning("association_rejected", reason=reason, **names)
        return reason

    def _on_report(self, event: evt.Event) -> tuple[int, None]:
        return take_report(event, self._on_commitment, self._watch)

    def _on_store(self, event: evt.Event) -> Any:
        started = time.perf_counter()
        request = cast("C_STORE", event.request)
        calling = event.assoc.requestor.ae_title
        status, comment = FAILED, "internal error"
        try:
            self._take(request, event.context, calling)
            status, comment = SUCCESS, ""
        except _Refused as exc:
            status, comment = exc.status, exc.comment
        except Exception as exc:  # noqa: BLE001  # the sender is told, whatever it is
            self._watch.failed("store_failed", exc)
        finally:
            if request.DataSet is not None:
                request.DataSet.close()
        if status != SUCCESS:
            self._watch.log.warning(
                "slice_refused",
                status=f"0x{status:04X}",
                reason=comment,
                calling=calling,
                instance=self._watch.alias(str(request.AffectedSOPInstanceUID)),
            )
        self._watch.slices.labels(status=f"0x{status:04X}").inc()
        self._watch.store_seconds.observe(time.perf_counter() - started)
        return store_response(status, comment)

    def _take(self, request: C_STORE, context: Any, calling: str) -> None:
        """Keep a slice and offer it.

        Raises:
            _Refused: It is not taken.
        """
        data_set = cast("DataSet", request.DataSet)
        sop_class = str(request.AffectedSOPClassUID)
        if sop_class != str(context.abstract_syntax) or sop_class not in self._contexts:
            raise _Refused(NO_SUCH_CLASS, "SOP class is not that of the presentation context")
        self._check_room(data_set)
        syntax = str(context.transfer_syntax)
        data_set.file.seek(0)
        try:
            header = read_data_set_header(
                cast("Any", data_set.file), syntax, "the data set that was sent"
            )
        except DicomError as exc:
            raise _Refused(NOT_UNDERSTOOD, f"header cannot be used ({exc.code})") from exc
        _check_identity(header, request)
        _check_limits(header, self._limits)
        try:
            instance = self._inbox.keep(
                _header(header),
                _File(file_head(header.sop_class_uid, header.sop_instance_uid, syntax), data_set),
                calling_ae_title=calling,
                most=self._limits.slices_per_series,
            )
        except NodeError as exc:
            full = exc.code is Code.NODE_FULL
            if not full:
                self._watch.failed("slice_not_kept", exc)
            comment = "disk is full, or limits.slices_per_series is reached"
            raise _Refused(NO_RESOURCES, comment if full else "cannot be kept now") from exc
        if instance is None:
            return
        self._watch.slice_bytes.inc(data_set.size)
        try:
            self._intake.offer(instance)
        except Exception as exc:  # noqa: BLE001  # it is kept: the sender is done with it
            self._watch.failed("slice_not_offered", exc)

    def _free_bytes(self) -> int:
        free = shutil.disk_usage(self._inbox.scratch).free
        self._watch.free_disk_bytes.set(free)
        return free

    def _reserve_bytes(self) -> int:
        return self._limits.free_disk_bytes + self._intake.owed_bytes()

    def _check_room(self, data_set: DataSet) -> None:
        limits = self._limits
        if data_set.problem == "large":
            raise _Refused(
                DOES_NOT_MATCH, f"larger than limits.object_bytes ({limits.object_bytes})"
            )
        reserve = self._reserve_bytes()
        if data_set.problem == "full" or self._free_bytes() < reserve + data_set.size:
            owed = reserve - limits.free_disk_bytes
            raise _Refused(NO_RESOURCES, f"disk below limits.free_disk_bytes + {owed} for results")
        if not self._intake.room():
            raise _Refused(NO_RESOURCES, f"limits.waiting_slices ({limits.waiting_slices})")


class _LibraryLog(logging.Handler):
    """Where pynetdicom complains: its messages quote what peers send, so only the place is logged.

    Attached as often as there are receivers in the process.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def attach(self) -> None:
        _LIBRARY.addHandler(self)
        _LIBRARY.propagate = False

    def detach(self) -> None:
        _LIBRARY.removeHandler(self)
        _LIBRARY.propagate = not any(isinstance(other, _LibraryLog) for other in _LIBRARY.handlers)

    def emit(self, record: logging.LogRecord) -> None:
        self._watch.log.warning(
            "dicom_library", level=record.levelname, place=f"{record.module}:{record.lineno}"
        )


def read_kept(path: Path) -> Header | None:
    """Read the header of a file of the inbox, for `Inbox.recover`; ``None`` if that cannot be."""
    try:
        return _header(read_intake_header(path, "a slice of the inbox"))
    except DicomError:
        return None


def _header(header: IntakeHeader) -> Header:
    return Header(
        study_instance_uid=header.study_instance_uid,
        series_instance_uid=header.series_instance_uid,
        sop_instance_uid=header.sop_instance_uid,
        sop_class_uid=header.sop_class_uid,
        transfer_syntax_uid=header.transfer_syntax_uid,
        expected=header.expected,
    )


def _check_identity(header: IntakeHeader, request: C_STORE) -> None:
    try:
        for keyword, uid in (
            ("StudyInstanceUID", header.study_instance_uid),
            ("SeriesInstanceUID", header.series_instance_uid),
            ("SOPInstanceUID", header.sop_instance_uid),
        ):
            checked_uid(uid, keyword)
    except NodeError as exc:
        raise _Refused(NO_UID, f"{keyword} is no valid UID") from exc
    if header.sop_class_uid != request.AffectedSOPClassUID:
        raise _Refused(DOES_NOT_MATCH, "SOPClassUID is not that of the request")
    if header.sop_instance_uid != request.AffectedSOPInstanceUID:
        raise _Refused(DOES_NOT_MATCH, "SOPInstanceUID is not that of the request")
    if header.modality != "CT":
        raise _Refused(DOES_NOT_MATCH, "Modality is not CT")


def _check_limits(header: IntakeHeader, limits: Limits) -> None:
    for name, found, most in (
        ("rows", header.rows, limits.rows),
        ("columns", header.columns, limits.columns),
        ("frames", header.frames, limits.frames),
        ("decoded_bytes", header.decoded_bytes, limits.decoded_bytes),
        ("object_bytes", header.inflated_bytes or 0, limits.object_bytes),
    ):
        if found > most:
            raise _Refused(DOES_NOT_MATCH, f"more than limits.{name} ({most})")
