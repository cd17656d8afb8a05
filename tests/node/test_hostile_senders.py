"""Senders that send what nobody should: refused, and the node works on."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from node_peers import Node, Study, checked, echo, need, renamed, store, wait_for
from pynetdicom import AE, _config

from pe_infer.dicom import file_head

JPEG_2000 = "1.2.840.10008.1.2.4.90"
CT = "1.2.840.10008.5.1.4.1.1.2"
IDLE_S = 3
ASSOCIATIONS = 4


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Node]:
    """One node for all: what one sender does must not harm the next."""
    need("storescu")
    node = Node(
        tmp_path_factory.mktemp("hostile") / "node",
        cache,
        listen__idle_s=IDLE_S,
        listen__associations=ASSOCIATIONS,
        listen__connections_per_address=4 * ASSOCIATIONS,  # all here have one
        studies__quiet_s=2,
    )
    node.start()
    yield node
    node.close()
    print(node.log.read_text()[-20_000:])  # noqa: T201  pytest shows it if a test fails


@pytest.fixture
def spoilt(negative: Study, tmp_path: Path) -> Callable[..., Path]:
    """A slice with some attributes changed."""

    def make(*changes: str) -> Path:
        path = tmp_path / "spoilt.dcm"
        shutil.copy(negative.files[0], path)
        checked("dcmodify", "-nb", "-nmu", *changes, path)
        return path

    return make


def outside(node: Node) -> set[Path]:
    """Files around the node that it has no business with."""
    found: set[Path] = set()
    for folder, folders, files in os.walk(node.folder.parent):
        folders[:] = [
            name for name in folders if Path(folder, name) not in {node.state, node.results}
        ]
        found |= {Path(folder, name) for name in (*folders, *files)}
    return found


@pytest.mark.parametrize(
    "changes",
    [
        ["-m", "Rows=65535", "-m", "Columns=65535"],
        ["-i", "NumberOfFrames=2000000000"],
        ["-m", "Rows=0"],
        ["-m", "StudyInstanceUID=../../../../../../tmp/escaped"],
        ["-m", "SeriesInstanceUID=1.2/../../../escaped"],
        ["-m", "SeriesInstanceUID=.."],
        ["-m", "StudyInstanceUID=1.02.3"],
        ["-m", "StudyInstanceUID=" + ".".join(["1"] * 40)],
        ["-m", "StudyInstanceUID="],
        ["-e", "SeriesInstanceUID"],
    ],
    ids=" ".join,
)
def test_a_header_that_makes_no_sense_is_refused(
    node: Node, spoilt: Callable[..., Path], changes: list[str]
) -> None:
    before = outside(node), set(node.state.rglob("*.dcm"))
    sent = store(node.port, [spoilt(*changes)])
    assert not sent.acknowledged, sent.output
    assert (outside(node), set(node.state.rglob("*.dcm"))) == before
    assert not Path("/tmp/escaped").exists()  # noqa: S108  what the UID asks for
    node.assert_works()


def test_a_data_set_in_another_encoding_than_agreed_gives_no_verdict(
    node: Node, negative: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = renamed(negative, tmp_path / "lying", 1)
    first, *others = study.files
    content = first.read_bytes()
    end_of_meta = 144 + int.from_bytes(content[140:144], "little")
    lie = tmp_path / "lie.dcm"
    lie.write_bytes(file_head(CT, study.instances[first], JPEG_2000) + content[end_of_meta:])
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # the bytes as they are
    ae = AE(ae_title="CT_1")
    ae.add_requested_context(CT, JPEG_2000)
    association = ae.associate("127.0.0.1", node.port, ae_title="PE_INFER")
    assert association.is_established
    taken = association.send_c_store(lie).get("Status") == 0x0000
    association.release()
    store(node.port, others)
    document = node.result(study)
    assert not taken or document["not_processed"]["code"].startswith("dicom.")
    node.assert_works()


def test_truncated_pixels_give_no_verdict(node: Node, negative: Study, tmp_path: Path) -> None:
    study = renamed(negative, tmp_path / "truncated", 2)
    pixels = tmp_path / "pixels"
    pixels.write_bytes(bytes(1000))
    checked("dcmodify", "-nb", "-nmu", "-mf", f"PixelData={pixels}", study.files[10])
    assert store(node.port, study.files).acknowledged == study.files  # its header is right
    document = node.result(study)
    assert document["not_processed"]["code"].startswith("dicom.")
    assert "result" not in document
    node.assert_works()


def test_clients_that_say_nothing_are_cut_off(node: Node) -> None:
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", node.port)))
            for _ in range(3 * ASSOCIATIONS)
        ]
        wait_for("C-ECHO beside silent clients", lambda: echo(node.port), timeout_s=60)
        for sock in silent:
            sock.settimeout(10 * IDLE_S)
            with suppress(ConnectionResetError):  # which is an end too
                while sock.recv(100):  # an A-ABORT may come before the end
                    pass
    node.assert_works()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes(range(256)) * 40,
        b"\x01\x00\xff\xff\xff\xff" + bytes(100),  # a PDU of 4 GB
        b"\x01\x00\x00\x00\x00\xcd" + bytes(10),  # and one that ends early
        b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x03",  # data before any association
    ],
    ids=["http", "noise", "huge", "short", "early data"],
)
def test_what_is_no_dicom_ends_nothing_but_its_connection(node: Node, said: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", node.port))) as sock:
        sock.sendall(said)
        assert echo(node.port)
    node.assert_works()


def test_a_study_after_all_this_is_judged(node: Node, positive: Study) -> None:
    assert store(node.port, positive.files).acknowledged == positive.files
    assert node.result(positive)["result"]["positive"]
    memory_kb = int(
        next(
            line.split()[1]
            for line in Path(f"/proc/{node.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    )
    assert memory_kb < 2_000_000
    node.assert_works()
