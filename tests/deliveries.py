"""Parcels in a ledger, and the peers that they go to, for tests of the outbox."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from pe_infer.node.durable import make_private_folder
from pe_infer.node.entries import NewInstance, Parcel, ParcelKind, Withdrawal
from pe_infer.node.ledger import Ledger
from pe_infer.node.outbox import Outbox
from pe_infer.node.parcels import StoredObject, write_contents
from pe_infer.node.settings import NodeSettings
from pe_infer.node.watch import Watch

CLASSES = (
    ComprehensiveSRStorage,
    SecondaryCaptureImageStorage,
    KeyObjectSelectionDocumentStorage,
)
GROUP_LENGTH = b"\x08\x00\x00\x00UL\x04\x00\x00\x01\x00\x00"
DEADLINE_S = 60.0


def eventually(condition: Callable[[], object], what: str = "") -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what or condition}"
        time.sleep(0.005)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself, and its key."""
    certificate, key = folder / "localhost.pem", folder / "localhost.key"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    key_kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    subprocess.run(
        ["openssl", "req", "-x509", *key_kind, *subject, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Sending:
    """A state folder with a ledger, parcels and logs."""

    folder: Path
    destinations: tuple[Mapping[str, Any], ...]
    timeout_s: float = 5.0
    clock: Clock = field(default_factory=Clock)
    logged: StringIO = field(default_factory=StringIO)

    def __post_init__(self) -> None:
        self.parcels = self.folder / "parcels"
        make_private_folder(self.parcels)
        self.ledger = Ledger(self.folder / "ledger.db")
        self.watch = Watch(b"key", output=self.logged)
        self.settings = NodeSettings.model_validate(
            {
                "state_dir": self.folder,
                "retry": {"first_s": 10.0, "most_s": 60.0, "timeout_s": self.timeout_s},
                "destinations": self.destinations,
            }
        )
        self.names = [str(destination["name"]) for destination in self.destinations]

    def series(self) -> int:
        """Enter a series of one slice."""
        new = self.ledger.add(
            NewInstance(
                study_instance_uid=generate_uid(),
                series_instance_uid=generate_uid(),
                sop_instance_uid=generate_uid(),
                sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
                transfer_syntax_uid=ExplicitVRLittleEndian,
                sha256="0" * 64,
                bytes=1,
                file=generate_uid(),
                calling_ae_title="CT",
            )
        )
        assert new is not None
        return new.series_id

    def result(self, series_id: int, version: int = 1, objects: int = 3) -> Parcel:
        folder = self._write(series_id, "result", version, objects)
        return self.ledger.conclude(
            series_id,
            version=version,
            verdict="positive",
            folder=folder,
            last_instance=1 << 40,
            destinations=self.names,
        )

    def alert(self, series_id: int, objects: int = 1) -> Parcel:
        folder = self._write(series_id, "alert", 1, objects)
        return self.ledger.alert(series_id, version=1, folder=folder, destinations=self.names)

    def withdrawn_result(self, series_id: int) -> None:
        self.ledger.conclude(
            series_id,
            version=1,
            verdict="negative",
            folder=self._write(series_id, "result", 1, 1),
            last_instance=1 << 40,
            destinations=self.names,
            withdrawal=Withdrawal(
                version=1,
                folder=self._write(series_id, "withdrawal", 1, 1),
                destinations=self.names,
            ),
        )

    def _write(self, series_id: int, kind: ParcelKind, version: int, objects: int) -> str:
        name = f"{series_id}-{kind}-{version}"
        folder = self.parcels / name
        folder.mkdir()
        series = self.ledger.series_entry(series_id)
        assert series is not None
        document = {
            "event": kind,
            "event_id": name,
            "study_instance_uid": series.study_instance_uid,
            "series_instance_uid": series.series_instance_uid,
            "version": version,
            "result": {
                "probability": 0.9,
                "evidence": [
                    {"attention": {"values": [[1.0, 2.0]], "peak": 2.0}},
                    {"attention": None},
                ],
            },
        }
        written = [write_object(folder / f"{i}.dcm", CLASSES[i % 3]) for i in range(objects)]
        write_contents(folder, json.dumps(document), written)
        return name

    def states(self) -> list[str]:
        """States of the deliveries, in order of the parcels."""
        return [delivery.state for delivery in self.ledger.deliveries()]

    def all_done(self) -> bool:
        return set(self.states()) == {"done"}

    def done_as_time_passes(self, outbox: Outbox) -> bool:
        """`all_done`; a minute passes with every call."""
        self.clock.now += 60.0
        outbox.wake()
        return self.all_done()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.logged.getvalue().splitlines()]


@contextmanager
def running(sending: Sending, chance: float = 0.0) -> Iterator[Outbox]:
    outbox = Outbox(
        sending.settings,
        sending.ledger,
        sending.parcels,
        sending.watch,
        clock=sending.clock,
        chance=lambda: chance,
    )
    outbox.start()
    try:
        yield outbox
    finally:
        outbox.stop(20.0)
        assert not [t for t in threading.enumerate() if t.name.startswith("outbox-")]


def write_object(path: Path, sop_class_uid: str) -> StoredObject:
    """A small object with a group length, which pydicom drops from what it decodes and writes."""
    dataset = Dataset()
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName = "Family^Given"
    dataset.PatientID = "1"
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = "1.2.3.4"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = content.index(b"\x08\x00\x16\x00UI")
    path.write_bytes(content[:start] + GROUP_LENGTH + content[start:])
    return StoredObject(
        path=path,
        sop_class_uid=sop_class_uid,
        sop_instance_uid=dataset.SOPInstanceUID,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


class Pacs:
    """A C-STORE SCP with storage commitment, on a port of its own that stays the same.

    Attributes:
        status: Of a C-STORE, by SOP class UID or SOP instance UID; otherwise success.
        stored: Data sets as they came, by SOP instance UID.
        order: SOP instance UIDs as they came, also those that were not stored.
        requests: Requests for storage commitment.
        contexts: Of the last association: what was proposed.
        on_request: Called with a request, after it was answered with ``action_status``.
        hold: As long as it is not set, C-STORE is not answered.
        aborts: Whether a C-STORE is answered by an abort.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...] = CLASSES,
        commits: bool = False,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._context = context
        self.status: dict[str, int] = {}
        self.stored: dict[str, bytes] = {}
        self.order: list[str] = []
        self.requests: list[Dataset] = []
        self.contexts: list[tuple[str, tuple[str, ...]]] = []
        self.action_status = 0x0000
        self.on_request: Callable[[Any, Dataset], None] = lambda _event, _request: None
        self.hold = threading.Event()
        self.hold.set()
        self.aborts = False
        self.entity = AE("PACS")
        self.entity.acse_timeout = self.entity.dimse_timeout = DEADLINE_S
        for sop_class in classes:
            self.entity.add_supported_context(sop_class, ExplicitVRLittleEndian)
        if commits:
            self.entity.add_supported_context(StorageCommitmentPushModel)
        self._server: Any = None
        self._threads: list[threading.Thread] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = self.entity.start_server(
            ("127.0.0.1", self.port),
            block=False,
            ssl_context=self._context,
            evt_handlers=[
                (evt.EVT_REQUESTED, self._on_association),
                (evt.EVT_C_STORE, self._on_store),
                (evt.EVT_N_ACTION, self._on_action),
            ],
        )
        self.port = self._server.socket.getsockname()[1]

    def stop(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._server.shutdown()

    def destination(self, **changes: Any) -> dict[str, Any]:
        return {
            "kind": "dicom",
            "name": "pacs",
            "host": "127.0.0.1",
            "port": self.port,
            "ae_title": "PACS",
            **changes,
        }

    def _on_association(self, event: evt.Event) -> None:
        self.contexts = [
            (str(context.abstract_syntax), tuple(map(str, context.transfer_syntax)))
            for context in event.assoc.requestor.requested_contexts
        ]

    def _on_store(self, event: evt.Event) -> int:
        request = event.request
        uid = str(request.AffectedSOPInstanceUID)
        self.hold.wait(DEADLINE_S)
        if self.aborts:
            event.assoc.abort()
            return 0x0110
        self.order.append(uid)
        status = self.status.get(uid, self.status.get(str(request.AffectedSOPClassUID), 0x0000))
        if status == 0x0000 or status >> 12 == 0xB:
            self.stored[uid] = request.DataSet.getvalue()
        return status

    def _on_action(self, event: evt.Event) -> tuple[int, None]:
        request = event.action_information
        thread = threading.Thread(target=self.on_request, args=(event, request))
        thread.start()
        self._threads.append(thread)
        self.requests.append(request)
        return self.action_status, None


@contextmanager
def pacs(**arguments: Any) -> Iterator[Pacs]:
    peer = Pacs(**arguments)
    try:
        yield peer
    finally:
        peer.stop()


def report_on(request: Dataset, *, failed: Mapping[str, int] | None = None) -> Dataset:
    """The report that answers a request for storage commitment."""
    failed = failed or {}
    report = Dataset()
    report.TransactionUID = request.TransactionUID
    report.ReferencedSOPSequence = []
    report.FailedSOPSequence = []
    for item in request.ReferencedSOPSequence:
        answered = Dataset()
        answered.ReferencedSOPClassUID = item.ReferencedSOPClassUID
        answered.ReferencedSOPInstanceUID = item.ReferencedSOPInstanceUID
        if item.ReferencedSOPInstanceUID in failed:
            answered.FailureReason = failed[item.ReferencedSOPInstanceUID]
            report.FailedSOPSequence.append(answered)
        else:
            report.ReferencedSOPSequence.append(answered)
    if not failed:
        del report.FailedSOPSequence
    return report


def send_report(association: Any, report: Dataset) -> int:
    """Send a report; returns the status of the response."""
    status, _ = association.send_n_event_report(
        report,
        2 if "FailedSOPSequence" in report else 1,
        StorageCommitmentPushModel,
        StorageCommitmentPushModelInstance,
    )
    return int(status.Status)


class Console:
    """A webhook: records what is posted; answers with ``statuses``, one after the other."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.posted: list[tuple[dict[str, str], bytes]] = []
        self.paths: list[str] = []
        self.location = ""
        self.silent = threading.Event()
        self._release = threading.Event()
        console = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                console.paths.append(self.path)
                console.posted.append((dict(self.headers), body))
                if console.silent.is_set():
                    console._release.wait(DEADLINE_S)
                    return
                status = console.statuses.pop(0) if console.statuses else 204
                self.send_response(status)
                if console.location:
                    self.send_header("Location", console.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._release.set()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def destination(self, **changes: Any) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/hooks?site=1"
        return {"kind": "webhook", "name": "console", "url": url, **changes}


@contextmanager
def console() -> Iterator[Console]:
    peer = Console()
    try:
        yield peer
    finally:
        peer.stop()
