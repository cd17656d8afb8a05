"""Objects to a C-STORE SCP, one association per try; pynetdicom and DCMTK as peers."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from deliveries import (
    CLASSES,
    GROUP_LENGTH,
    Pacs,
    Sending,
    eventually,
    pacs,
    running,
    self_signed,
)
from peers import dcmtk
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from pe_infer.errors import Code, NodeError
from pe_infer.node.outbox import Outbox
from pe_infer.node.settings import Tls
from pe_infer.node.tls import server_context

SR, SECONDARY_CAPTURE, KEY_OBJECTS = CLASSES


@pytest.fixture
def archive() -> Iterator[Pacs]:
    with pacs() as peer:
        yield peer


def sent_files(sending: Sending) -> list[bytes]:
    return [path.read_bytes() for path in sorted(sending.parcels.glob("*/*.dcm"))]


def error(sending: Sending) -> str:
    return str(sending.ledger.deliveries()[0].error)


def tried(sending: Sending, tries: int = 1) -> None:
    eventually(lambda: sending.ledger.deliveries()[0].attempts == tries)


def test_files_are_sent_byte_for_byte(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    with running(sending):
        eventually(sending.all_done)
    assert len(archive.stored) == 3
    for content, (uid, data_set) in zip(sent_files(sending), archive.stored.items(), strict=True):
        assert data_set.startswith(GROUP_LENGTH)
        assert content.endswith(data_set)
        assert uid.encode() in data_set


def test_only_the_classes_and_transfer_syntaxes_of_the_objects_are_proposed(
    tmp_path: Path, archive: Pacs
) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series(), objects=5)
    with running(sending):
        eventually(sending.all_done)
    assert archive.contexts == sorted((str(c), (str(ExplicitVRLittleEndian),)) for c in CLASSES)


def test_nothing_to_store_needs_no_association(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(commitment=True),))
    sending.result(sending.series(), objects=0)
    with running(sending):
        eventually(sending.all_done)
    assert archive.contexts == []


def test_a_warning_counts_as_stored(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    archive.status = {SR: 0xB000, KEY_OBJECTS: 0xB007}
    with running(sending):
        eventually(sending.all_done)
    assert len(archive.order) == 3


@pytest.mark.parametrize("status", [0x0122, 0xA900, 0xA9FF, 0xC000, 0xCFFF])
def test_an_object_that_is_refused_for_good_keeps_no_other_from_being_stored(
    tmp_path: Path, archive: Pacs, status: int
) -> None:
    sending = Sending(tmp_path, (archive.destination(commitment=True),))
    sending.result(sending.series())
    archive.status = {SR: status}
    with running(sending):
        eventually(lambda: sending.states() == ["refused"])
    assert error(sending) == f"Comprehensive SR Storage: status 0x{status:04X}"
    assert len(archive.stored) == 2


@pytest.mark.parametrize("accepted", [(SR, KEY_OBJECTS), ("1.2.840.10008.1.1",)])
def test_a_class_that_is_not_accepted_is_refused(tmp_path: Path, accepted: tuple[str, ...]) -> None:
    with pacs(classes=accepted) as archive:
        sending = Sending(tmp_path, (archive.destination(),))
        sending.result(sending.series(), objects=2)
        with running(sending):
            eventually(lambda: sending.states() == ["refused"])
        assert (
            "Secondary Capture Image Storage in Explicit VR Little Endian is not accepted"
            in error(sending)
        )
        assert len(archive.stored) == (SR in accepted)


def test_only_what_is_missing_is_sent_again(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    archive.status = {SECONDARY_CAPTURE: 0x0110}
    with running(sending) as outbox:
        tried(sending)
        assert error(sending) == "Secondary Capture Image Storage: status 0x0110"
        assert len(archive.stored) == 2
        archive.status.clear()
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    assert len(archive.order) == 4
    assert archive.order[3] == archive.order[1]


def test_a_destination_without_room_is_not_offered_more(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    archive.status = {SECONDARY_CAPTURE: 0xA700}
    with running(sending):
        tried(sending)
    assert len(archive.order) == 2


def test_an_association_that_is_rejected_is_tried_again(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(ae_title="OTHER"),))
    archive.entity.require_called_aet = True
    sending.result(sending.series())
    with running(sending):
        tried(sending)
    assert error(sending) == "association rejected: Called AE title not recognised"
    assert sending.states() == ["waiting"]


def test_an_unknown_host_is_tried_again(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(host="host.invalid"),))
    sending.result(sending.series())
    with running(sending):
        tried(sending)
    assert sending.states() == ["waiting"]


def test_a_peer_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        destination = {
            "kind": "dicom",
            "name": "mute",
            "host": "127.0.0.1",
            "port": server.getsockname()[1],
            "ae_title": "MUTE",
        }
        sending = Sending(tmp_path, (destination,), timeout_s=0.2)
        sending.result(sending.series())
        with running(sending):
            tried(sending)
        assert error(sending) == "no connection, or it was closed or not answered"


def test_a_peer_that_does_not_answer_a_store_is_given_up(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),), timeout_s=1.5)
    sending.result(sending.series())
    archive.hold.clear()
    with running(sending):
        tried(sending)
        archive.hold.set()
    assert error(sending) == "Comprehensive SR Storage: no answer"


@contextmanager
def stalling(port: int, after_bytes: int) -> Iterator[int]:
    """A way to a peer on which nothing more is read after so many bytes; its port."""
    ended = threading.Event()

    def forward(source: socket.socket, target: socket.socket, most: float) -> None:
        with suppress(OSError):
            passed = 0
            while passed < most and (data := source.recv(4096)):
                target.sendall(data)
                passed += len(data)
            ended.wait(20.0)

    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            near, _ = server.accept()
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                back = threading.Thread(target=forward, args=(far, near, float("inf")))
                back.start()
                forward(near, far, after_bytes)
                far.shutdown(socket.SHUT_RDWR)
                back.join()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def test_a_peer_that_stops_reading_is_given_up(tmp_path: Path, archive: Pacs) -> None:
    with stalling(archive.port, 100_000) as port:
        sending = Sending(tmp_path, (archive.destination(port=port),), timeout_s=1.5)
        parcel = sending.result(sending.series(), objects=1)
        with (sending.parcels / parcel.folder / "0.dcm").open("ab") as file:
            file.write(b"\xe1\x7f\x01\x10OB\x00\x00\x00\x00\x00\x02" + bytes(0x0200_0000))
        with running(sending):
            tried(sending)
        assert error(sending) == "Comprehensive SR Storage: no answer"


def test_an_association_that_the_peer_aborts_is_made_again(tmp_path: Path, archive: Pacs) -> None:
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    archive.aborts = True
    with running(sending) as outbox:
        tried(sending)
        assert error(sending) == "Comprehensive SR Storage: no answer"
        archive.aborts = False
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    assert len(archive.stored) == 3


def test_no_thread_of_an_association_is_left(tmp_path: Path, archive: Pacs) -> None:
    before = set(threading.enumerate())
    sending = Sending(tmp_path, (archive.destination(),))
    for _ in range(5):
        sending.result(sending.series())
    with running(sending):
        eventually(sending.all_done)
    eventually(lambda: not set(threading.enumerate()) - before)


def certified(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    certificate, key = self_signed(folder)
    return {"certificate": certificate, "key": key, "authority": certificate}


def test_objects_go_over_mutual_tls(tmp_path: Path) -> None:
    tls = certified(tmp_path / "certificates")
    with pacs(context=server_context(Tls.model_validate(tls))) as archive:
        sending = Sending(tmp_path / "state", (archive.destination(host="localhost", tls=tls),))
        sending.result(sending.series())
        with running(sending):
            eventually(sending.all_done)
        assert len(archive.stored) == 3


@pytest.mark.parametrize("told", ["other authority", "other host", "no TLS"])
def test_nothing_is_sent_to_a_peer_that_nobody_vouches_for(tmp_path: Path, told: str) -> None:
    tls = certified(tmp_path / "certificates")
    host = "127.0.0.1" if told == "other host" else "localhost"
    ours = certified(tmp_path / "others") if told == "other authority" else tls
    context = None if told == "no TLS" else server_context(Tls.model_validate(tls))
    with pacs(context=context) as archive:
        destination = archive.destination(host=host, tls=ours)
        sending = Sending(tmp_path / "state", (destination,), timeout_s=1.0)
        sending.result(sending.series())
        with running(sending):
            tried(sending)
        assert error(sending) == "no connection, or it was closed or not answered"
        assert archive.order == []


def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_sent(
    tmp_path: Path, archive: Pacs
) -> None:
    missing = dict.fromkeys(("certificate", "key", "authority"), tmp_path / "missing.pem")
    sending = Sending(tmp_path / "state", (archive.destination(tls=missing),))
    with pytest.raises(NodeError, match=r"missing\.pem") as caught:
        Outbox(sending.settings, sending.ledger, sending.parcels, sending.watch)
    assert caught.value.code is Code.NODE_NETWORK


@pytest.mark.skipif(dcmtk("storescp") is None, reason="needs DCMTK's storescp")
def test_dcmtk_receives_what_is_on_the_disk(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    received = tmp_path / "received"
    received.mkdir()
    peer = subprocess.Popen(
        [str(dcmtk("storescp")), "--bit-preserving", "-aet", "DCMTK", "-od", received, str(port)]
    )
    try:
        destination = {
            "kind": "dicom",
            "name": "dcmtk",
            "host": "127.0.0.1",
            "port": port,
            "ae_title": "DCMTK",
            "commitment": True,
        }
        sending = Sending(tmp_path / "state", (destination,))
        sending.result(sending.series())
        with running(sending) as outbox:
            eventually(lambda: sending.done_as_time_passes(outbox))
    finally:
        peer.terminate()
        peer.wait()
    contents = [path.read_bytes() for path in received.iterdir()]
    assert len(contents) == 3
    for sent in sent_files(sending):
        data_set = sent[sent.index(GROUP_LENGTH) :]
        assert any(content.endswith(data_set) for content in contents)
    assert "commitment_not_offered" in sending.logged.getvalue()


def test_the_implicit_transfer_syntax_is_not_used_in_place_of_a_files_own(
    tmp_path: Path, archive: Pacs
) -> None:
    for sop_class in CLASSES:
        archive.entity.remove_supported_context(sop_class, ExplicitVRLittleEndian)
        archive.entity.add_supported_context(sop_class, ImplicitVRLittleEndian)
    sending = Sending(tmp_path, (archive.destination(),))
    sending.result(sending.series())
    with running(sending):
        eventually(lambda: sending.states() == ["refused"])
    assert archive.stored == {}
