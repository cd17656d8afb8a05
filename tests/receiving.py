"""A receiver on a port of this machine, with what it is given to, for tests."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from pe_infer.node.commitment import CommitmentReport
from pe_infer.node.entries import Instance
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.receiver import Receiver
from pe_infer.node.settings import NodeSettings
from pe_infer.node.watch import Watch

DEADLINE_S = 60.0
CALLING = "SCANNER"
CALLED = "PE_INFER"


@dataclass
class Taken:
    """An intake that only remembers."""

    offered: list[Instance] = field(default_factory=list)
    has_room: bool = True
    owed: int = 0
    failure: Exception | None = None

    def room(self) -> bool:
        return self.has_room

    def owed_bytes(self) -> int:
        return self.owed

    def offer(self, instance: Instance) -> None:
        if self.failure is not None:
            raise self.failure
        self.offered.append(instance)


@dataclass
class Running:
    """A receiver that listens, and all around it."""

    port: int
    folder: Path
    receiver: Receiver
    inbox: Inbox
    ledger: Ledger
    intake: Taken
    watch: Watch
    output: io.StringIO
    reports: list[CommitmentReport]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]

    def count(self, metric: str, **labels: str) -> float:
        return self.watch.registry.get_sample_value(f"pe_infer_node_{metric}", labels) or 0.0

    def threads(self) -> list[str]:
        """Names of the threads of connections."""
        return [t.name for t in threading.enumerate() if t.name.startswith("association-")]

    def files(self) -> list[Path]:
        return sorted(path for path in (self.folder / "slices").rglob("*") if path.is_file())

    def arriving(self) -> list[Path]:
        return list((self.folder / "arriving").iterdir())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def echoes(self) -> bool:
        association = associated(self.port, "1.2.840.10008.1.1")
        try:
            return association.is_established and association.send_c_echo().Status == 0
        finally:
            association.release()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def receiving(folder: Path, **changes: Any) -> Iterator[Running]:
    """Run a receiver; ``changes`` are sections of the settings."""
    port = free_port()
    listen = {"host": "127.0.0.1", "port": port, **changes.pop("listen", {})}
    limits = {"free_disk_bytes": 0, **changes.pop("limits", {})}
    settings = NodeSettings(state_dir=folder, listen=listen, limits=limits, **changes)
    output = io.StringIO()
    watch = Watch(b"key", level="debug", output=output)
    reports: list[CommitmentReport] = []
    with Ledger(folder / "ledger.db") as ledger:
        inbox, intake = Inbox(folder, ledger), Taken()
        receiver = Receiver(settings, inbox, intake, watch, reports.append)
        receiver.start()
        try:
            yield Running(port, folder, receiver, inbox, ledger, intake, watch, output, reports)
        finally:
            receiver.stop(1.0)


def forget(ledger: Ledger, series_id: int) -> None:
    """Have the ledger as if a series had never been entered."""
    with ledger._transaction("forget") as run:
        run("DELETE FROM series WHERE id = ?", (series_id,))


def eventually(condition: Callable[[], bool], what: str = "") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come"
        time.sleep(0.01)


def associated(
    port: int,
    *classes: str,
    syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian,),
    calling: str = CALLING,
    called: str = CALLED,
    **named: Any,
) -> Association:
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = DEADLINE_S
    for uid in classes:
        entity.add_requested_context(uid, list(syntaxes))
    return entity.associate("127.0.0.1", port, ae_title=called, **named)


def store(port: int, *datasets: Dataset, **named: Any) -> list[Dataset]:
    """Send on one association; the responses."""
    classes = sorted({str(dataset.SOPClassUID) for dataset in datasets})
    syntaxes = tuple({dataset.file_meta.TransferSyntaxUID for dataset in datasets})
    association = associated(port, *classes, syntaxes=syntaxes, **named)
    assert association.is_established
    try:
        return [association.send_c_store(dataset) for dataset in datasets]
    finally:
        association.release()


def send_as(association: Association, claimed: Dataset, sent: Dataset) -> Dataset:
    """Send a data set in a request that says it is another."""
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = claimed.SOPClassUID
    request.AffectedSOPInstanceUID = claimed.SOPInstanceUID
    request.Priority = 0
    request.DataSet = io.BytesIO(encode(sent, is_implicit_vr=False, is_little_endian=True) or b"")
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return response


def cut_after(association: Association, pdus: int) -> None:
    """Have the connection closed after so many PDUs."""
    connection = association.dul.socket
    send, sent = connection.send, []

    def count(data: bytes) -> None:
        sent.append(len(data))
        if len(sent) > pdus:
            connection.socket.close()
        send(data)

    connection.send = count


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    except OSError:
        return True
    return False
