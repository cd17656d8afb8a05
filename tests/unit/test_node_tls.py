"""Mutual TLS: whom each side lets in, and peers that do not come to an end with shaking hands."""

import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from certificate_files import Authority
from dicom_files import ct_dataset
from peers import dcmtk
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from receiving import DEADLINE_S, Running, associated, eventually, receiving, store

from pe_infer.errors import Code, NodeError
from pe_infer.node.settings import Tls
from pe_infer.node.tls import client_context, server_context

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def node_tls(authority: Authority) -> Tls:
    return authority.tls("node")


def turned_away(node: Running, count: int = 1) -> None:
    eventually(lambda: len(node.events("connection_turned_away")) >= count)
    assert node.events("connection_turned_away")[-1]["reason"].startswith("tls ")


def test_both_sides_with_certificates_of_the_authority_talk(
    tmp_path: Path, authority: Authority, node_tls: Tls
) -> None:
    tls = (client_context(authority.tls("scanner")), HOST)
    with receiving(tmp_path, listen={"tls": node_tls}) as node:
        (response,) = store(node.port, ct_dataset(), tls_args=tls)
        assert response.Status == 0x0000
        assert len(node.files()) == 1


def test_a_certificate_of_another_authority_is_refused_and_counted(
    tmp_path: Path, node_tls: Tls
) -> None:
    stranger = Authority(tmp_path, "theirs").tls("stranger")
    mixed = stranger.model_copy(update={"authority": node_tls.authority})
    (tmp_path / "state").mkdir()
    with receiving(tmp_path / "state", listen={"tls": node_tls}) as node:
        association = associated(node.port, Verification, tls_args=(client_context(mixed), HOST))
        eventually(lambda: not association.is_established)
        turned_away(node)
        assert node.count("associations_total", outcome="turned_away") == 1


def test_a_peer_without_a_certificate_or_without_tls_is_refused(
    tmp_path: Path, node_tls: Tls
) -> None:
    with receiving(tmp_path, listen={"tls": node_tls}) as node:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(node_tls.authority)
        with (
            pytest.raises(OSError),  # noqa: PT011  # of TLS, or of the closed connection
            node.connect() as raw,
            context.wrap_socket(raw, server_hostname=HOST) as secured,
        ):
            secured.sendall(b"x")
            if secured.recv(1) == b"":
                raise ConnectionResetError
        turned_away(node)
        assert not associated(node.port, Verification).is_established
        turned_away(node, 2)


def test_old_versions_are_not_spoken(tmp_path: Path, authority: Authority, node_tls: Tls) -> None:
    assert server_context(node_tls).minimum_version == ssl.TLSVersion.TLSv1_2
    old = client_context(authority.tls("old"))
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLS"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with receiving(tmp_path, listen={"tls": node_tls}) as node:
        with pytest.raises(OSError), node.connect() as raw:  # noqa: PT011
            old.wrap_socket(raw, server_hostname=HOST)
        turned_away(node)


def test_a_client_does_not_talk_to_another_host_of_the_authority(
    tmp_path: Path, authority: Authority
) -> None:
    elsewhere = authority.tls("elsewhere", names="DNS:pacs.example")
    tls = (client_context(authority.tls("caller")), HOST)
    with receiving(tmp_path, listen={"tls": elsewhere}) as node:
        assert not associated(node.port, Verification, tls_args=tls).is_established


def test_peers_that_never_shake_hands_hold_up_nobody_and_are_cut_off(
    tmp_path: Path, authority: Authority, node_tls: Tls
) -> None:
    tls = (client_context(authority.tls("patient")), HOST)
    with receiving(tmp_path, listen={"tls": node_tls, "idle_s": 3.0}) as node:
        mute = [node.connect() for _ in range(4)]
        association = associated(node.port, Verification, tls_args=tls)
        assert association.send_c_echo().Status == 0
        association.release()
        for connection in mute:
            connection.settimeout(DEADLINE_S)
            assert _is_closed(connection)
            connection.close()
        eventually(lambda: not node.threads())


@pytest.mark.parametrize("spoilt", ["certificate", "key", "authority"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, node_tls: Tls, spoilt: str) -> None:
    bad = tmp_path / "bad.pem"
    for content in (None, "no PEM"):
        if content is not None:
            bad.write_text(content)
        for make in (server_context, client_context):
            with pytest.raises(NodeError, match=r"bad\.pem") as caught:
                make(node_tls.model_copy(update={spoilt: bad}))
            assert caught.value.code is Code.NODE_NETWORK


def test_an_encrypted_key_is_refused_and_not_asked_about(tmp_path: Path, node_tls: Tls) -> None:
    locked = tmp_path / "locked.key"
    call = ["openssl", "ec", "-in", str(node_tls.key), "-aes256", "-passout", "pass:secret"]
    subprocess.run([*call, "-out", str(locked)], check=True, capture_output=True, timeout=60)
    with pytest.raises(NodeError, match="not encrypted"):
        server_context(node_tls.model_copy(update={"key": locked}))


@pytest.mark.skipif(dcmtk("echoscu") is None, reason="DCMTK is not installed")
def test_dcmtk_echoes_over_tls(tmp_path: Path, authority: Authority, node_tls: Tls) -> None:
    peer = authority.tls("dcmtk")
    with receiving(tmp_path, listen={"tls": node_tls}) as node:
        call = [str(dcmtk("echoscu")), "+tls", str(peer.key), str(peer.certificate)]
        call += ["+cf", str(peer.authority), "-aec", "PE_INFER", HOST, str(node.port)]
        subprocess.run(call, check=True, capture_output=True, timeout=60)


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
