"""The receiver towards peers that are broken or mean harm: they end, everybody else goes on."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from dicom_files import ct_dataset
from pynetdicom import AE
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, MaximumLengthNotification
from pynetdicom.pdu_primitives import ImplementationClassUIDNotification as ClassUID
from pynetdicom.sop_class import CTImageStorage, Verification  # type: ignore[attr-defined]
from receiving import CALLED, DEADLINE_S, Running, associated, eventually, receiving, store

from pe_infer.node.settings import NodeSettings
from pe_infer.node.upper_layer import Bounds, DataSet, Server

P_DATA = 0x04
COMMAND, LAST = 0x01, 0x02


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Running]:
    with receiving(tmp_path, listen={"idle_s": 3.0, "associations": 3}) as running:
        yield running


@pytest.fixture(autouse=True)
def no_thread_dies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    yield
    assert died == []


def pdu(kind: int, content: bytes, *, length: int | None = None) -> bytes:
    return struct.pack(">BBL", kind, 0, len(content) if length is None else length) + content


def pdv(flags: int, content: bytes, context: int = 1) -> bytes:
    return struct.pack(">LBB", len(content) + 2, context, flags) + content


def request(uid: str = Verification, called: str = CALLED) -> bytes:
    """An association request as a peer sends it."""
    entity = AE("SCANNER")
    entity.add_requested_context(uid)
    entity.requested_contexts[0].context_id = 1
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "SCANNER", called
    length, implementation = MaximumLengthNotification(), ClassUID()
    length.maximum_length_received = 16384
    implementation.implementation_class_uid = "2.25.1"
    primitive.user_information = [length, implementation]
    contexts = entity.requested_contexts
    contexts[0].context_id = 1
    primitive.presentation_context_definition_list = contexts
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def command(**elements: int | str) -> bytes:
    """A command set: implicit VR little endian."""
    tags = {
        "AffectedSOPClassUID": 0x0002,
        "CommandField": 0x0100,
        "MessageID": 0x0110,
        "Priority": 0x0700,
        "CommandDataSetType": 0x0800,
        "AffectedSOPInstanceUID": 0x1000,
    }
    content = b""
    for name, value in sorted(elements.items(), key=lambda item: tags[item[0]]):
        data = struct.pack("<H", value) if isinstance(value, int) else value.encode()
        data += b"\0" * (len(data) % 2)
        content += struct.pack("<HHL", 0, tags[name], len(data)) + data
    return struct.pack("<HHLL", 0, 0, 4, len(content)) + content


STORE = command(
    AffectedSOPClassUID=CTImageStorage,
    CommandField=1,
    MessageID=1,
    Priority=0,
    CommandDataSetType=1,
    AffectedSOPInstanceUID="2.25.9",
)
GIGABYTES = struct.pack(">L", 0xFFFFFFF0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x01",
        request()[:4],
        request()[:60],
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,  # TLS
        b"\xff" * 4096,
        b"\x01\x00" + GIGABYTES + b"\0" * 1000,
        b"\x04\x00" + GIGABYTES + b"\0" * 1000,
        pdu(0x01, b"\0" * 68),
        pdu(0x01, b"\xff" * 500),
        pdu(0x04, pdv(COMMAND | LAST, STORE)),
        pdu(0x05, b"\0" * 4),
        pdu(0x06, b"\0" * 4),
        pdu(0x07, b"\0" * 4),
        pdu(0x02, b"\0" * 68),
        request() + request(),
        request() + pdu(0x03, b"\0" * 4),
        request(called="SOMEONE ELSE") + pdu(P_DATA, pdv(COMMAND | LAST, STORE)),
    ],
    ids=range(19),
)
def test_a_peer_that_sends_anything_is_cut_off_and_others_are_served(
    node: Running, sent: bytes
) -> None:
    """Including one that connects and says nothing, or stops in the middle of a PDU."""
    with node.connect() as connection:
        connection.sendall(sent)
        assert node.echoes()
        assert ends(connection)
    eventually(lambda: not node.threads())
    assert node.files() == node.arriving() == []
    assert store(node.port, ct_dataset())[0].Status == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x04\x00",
        request(),
        pdu(0x03, b"\0" * 4),
        b"\x04\x00" + GIGABYTES + b"\0" * 1000,
        pdu(P_DATA, b""),
        pdu(P_DATA, b"\0" * 4),
        pdu(P_DATA, GIGABYTES + b"\1\3"),
        pdu(P_DATA, struct.pack(">LB", 1, 1)),  # no message control header
        pdu(P_DATA, pdv(COMMAND | LAST, b"")),
        pdu(P_DATA, pdv(COMMAND | LAST, b"\xff" * 100)),
        pdu(P_DATA, pdv(COMMAND | LAST, STORE, context=7)),
        pdu(P_DATA, pdv(COMMAND | LAST, command(CommandField=0x4242))),
        pdu(P_DATA, pdv(COMMAND | LAST, command(CommandField=0x0FFF, MessageID=1))),
        pdu(P_DATA, pdv(LAST, b"data before any command")),
        pdu(P_DATA, pdv(COMMAND, b"\0" * 60000)) * 4,
        pdu(P_DATA, pdv(COMMAND | LAST, STORE))[:30],
        pdu(P_DATA, pdv(COMMAND | LAST, STORE) + pdv(0, b"x" * 5000)),
        pdu(P_DATA, pdv(COMMAND | LAST, STORE) + pdv(LAST, b"")),
        pdu(P_DATA, pdv(COMMAND | LAST, STORE) + pdv(LAST, b"\xff" * 5000)),
    ],
    ids=range(20),
)
def test_a_peer_that_sends_anything_on_an_association_is_cut_off(
    node: Running, sent: bytes
) -> None:
    with node.connect() as connection:
        accepted(connection, CTImageStorage)
        connection.sendall(sent)
        assert node.echoes()
        assert ends(connection)
    eventually(lambda: not node.threads())
    assert node.files() == node.arriving() == []
    assert store(node.port, ct_dataset())[0].Status == 0


def test_an_association_that_cannot_be_judged_is_not_let_in(
    node: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: object, _association: object) -> bool:
        raise RuntimeError("unexpected")

    with monkeypatch.context() as patched:
        patched.setattr(Server, "enter", fail)
        assert not associated(node.port, Verification).is_established
    eventually(lambda: not node.threads())
    assert node.events("association_request_failed")
    assert node.echoes()


def test_a_peer_that_never_comes_to_an_end_of_its_pdu_is_cut_off(node: Running) -> None:
    with node.connect() as connection:
        connection.sendall(request()[:20])
        cut = threading.Event()

        def trickle() -> None:
            try:
                while not cut.wait(0.05):
                    connection.sendall(b"\0")
            except OSError:
                pass

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert ends(connection)
        finally:
            cut.set()
            thread.join()
    eventually(lambda: not node.threads())


def test_connections_that_were_closed_hold_no_place(node: Running) -> None:
    """As a probe of the port makes them."""
    for _ in range(40):
        node.connect().close()
    eventually(lambda: not node.threads())
    assert node.echoes()
    assert node.count("associations_total", outcome="silent") > 0


def test_mute_connections_take_no_association_away(tmp_path: Path) -> None:
    listen = {"idle_s": 30.0, "associations": 1, "connections_per_address": 11}
    with receiving(tmp_path, listen=listen) as node:
        mute = [node.connect() for _ in range(10)]
        assert node.echoes()
        for connection in mute:
            connection.close()
        eventually(lambda: not node.threads())


def test_connections_beyond_any_use_are_turned_away(tmp_path: Path) -> None:
    listen = {"idle_s": 30.0, "associations": 1, "connections_per_address": 40}
    with receiving(tmp_path, listen=listen) as node:
        many = [node.connect() for _ in range(40)]
        eventually(lambda: len(node.events("connection_turned_away")) == 40 - 17)
        for connection in many:
            connection.close()
        eventually(lambda: not node.threads())
        assert node.echoes()


def test_one_address_cannot_keep_the_others_out(tmp_path: Path) -> None:
    """By default, with as many connections as there is room for in all."""
    with receiving(tmp_path, listen={"idle_s": 30.0}) as node:
        listen = NodeSettings(state_dir=tmp_path).listen
        most = listen.connections_per_address
        assert most < listen.associations
        many = [node.connect() for _ in range(40)]
        eventually(lambda: len(node.events("connection_turned_away")) == 40 - most)
        assert {line["reason"] for line in node.events("connection_turned_away")} == {
            "connections_per_address"
        }
        assert node.count("associations_total", outcome="turned_away") == 40 - most
        scanner = associated(node.port, Verification, bind_address=("127.0.0.2", 0))
        assert scanner.send_c_echo().Status == 0
        scanner.release()
        for connection in many:
            connection.close()
        eventually(lambda: not node.threads())
        assert node.echoes()  # its places are free again


def test_a_connection_that_got_no_thread_holds_no_place_of_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("association-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with receiving(tmp_path, listen={"connections_per_address": 1}) as node:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            with node.connect() as connection:
                assert ends(connection)
        assert node.events("connection_failed")
        assert node.echoes()


def test_requests_that_do_not_wait_for_answers_are_bounded(node: Running) -> None:
    """Nobody negotiated more than one at a time."""
    echo = command(
        AffectedSOPClassUID=Verification, CommandField=0x30, MessageID=1, CommandDataSetType=0x101
    )
    with node.connect() as connection:
        accepted(connection, Verification)
        send_into_the_void(connection, pdu(P_DATA, pdv(COMMAND | LAST, echo)) * 2000)
        assert ends(connection)
    eventually(lambda: not node.threads())
    assert node.echoes()


def test_a_peer_that_aborts_in_mid_slice_leaves_nothing(node: Running) -> None:
    part = pdu(P_DATA, pdv(COMMAND | LAST, STORE) + pdv(0, b"\0" * 100_000))
    with node.connect() as connection:
        accepted(connection, CTImageStorage)
        connection.sendall(part)
        connection.sendall(pdu(P_DATA, pdv(0, b"\0" * 100_000)) * 100)
        connection.sendall(pdu(0x07, b"\0" * 4))
        assert ends(connection)
    eventually(lambda: not node.threads())
    assert node.files() == node.arriving() == []
    assert store(node.port, ct_dataset())[0].Status == 0


def test_an_association_that_falls_silent_is_aborted(node: Running) -> None:
    association = associated(node.port, Verification)
    eventually(lambda: association.is_aborted)
    eventually(lambda: not node.threads())
    assert node.count("associations_total", outcome="aborted") == 1


def test_a_data_set_is_only_in_memory_while_it_is_small(tmp_path: Path) -> None:
    bounds = Bounds(
        associations=1,
        connections_per_address=1,
        pdu_bytes=1 << 16,
        object_bytes=20 << 20,
        free_disk_bytes=0,
        idle_s=1,
        scratch=tmp_path,
    )
    data_set = DataSet(bounds)
    piece = b"\0" * (1 << 20)
    for _ in range(8):
        data_set.write(piece)
    assert not data_set.file._rolled
    for _ in range(8):
        data_set.write(piece)
    assert data_set.file._rolled
    assert list(tmp_path.iterdir()) == []  # it has no name: nothing can be left over
    assert sum(map(len, data_set.pieces())) == data_set.size == 16 << 20
    for _ in range(8):
        data_set.write(piece)
    assert data_set.problem == "large"
    assert data_set.file.closed
    data_set.close()


def test_nothing_of_a_patient_or_a_peer_s_data_is_logged(node: Running) -> None:
    with node.connect() as connection:
        accepted(connection, Verification)
        connection.sendall(pdu(P_DATA, pdv(COMMAND | LAST, b"SECRET" * 9)))
        assert ends(connection)
    dataset = ct_dataset(Modality="MR")
    store(node.port, dataset)
    store(node.port, ct_dataset())
    eventually(lambda: not node.threads())
    logged = node.output.getvalue()
    assert node.events("slice_refused")[0]["instance"] == node.watch.alias(dataset.SOPInstanceUID)
    for secret in ("SECRET", dataset.SOPInstanceUID, "2.25.1000", "2.25.2000"):
        assert secret not in logged


def accepted(connection: socket.socket, uid: str) -> None:
    """Have an association with one presentation context, its number 1."""
    connection.sendall(request(uid))
    kind, _, length = struct.unpack(">BBL", exactly(connection, 6))
    assert kind == 0x02
    exactly(connection, length)


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        assert piece
        data += piece
    return data


def send_into_the_void(connection: socket.socket, data: bytes) -> None:
    """Send to a side that may close the connection meanwhile."""
    with suppress(ConnectionError):
        connection.sendall(data)


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes a connection, whatever it says before."""
    connection.settimeout(DEADLINE_S)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return True
