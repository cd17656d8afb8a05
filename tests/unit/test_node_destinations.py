"""Folders and webhooks as destinations."""

import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deliveries import Console, Sending, console, eventually, running, self_signed

from pe_infer.node.destinations import folder as folder_module
from pe_infer.node.destinations import sender_to


@pytest.fixture
def hook() -> Iterator[Console]:
    with console() as peer:
        yield peer


def to_folder(tmp_path: Path) -> Sending:
    destination = {"kind": "folder", "name": "results", "path": tmp_path / "results"}
    return Sending(tmp_path / "state", (destination,))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def delivered(sending: Sending, state: str = "done") -> None:
    with running(sending):
        eventually(lambda: set(sending.states()) == {state})


def error(sending: Sending) -> str:
    return str(sending.ledger.deliveries()[0].error)


# Folder.


def test_a_folder_gets_document_and_objects_of_each_parcel(tmp_path: Path) -> None:
    sending = to_folder(tmp_path)
    series_id = sending.series()
    sending.alert(series_id)
    sending.withdrawn_result(series_id)
    sending.result(series_id, version=2)
    delivered(sending)
    series = sending.ledger.series_entry(series_id)
    assert series is not None
    place = tmp_path / "results" / series.study_instance_uid / series.series_instance_uid
    assert {path.name for path in place.iterdir()} == {
        "alert-v1",
        "withdrawal-v1",
        "result-v1",
        "result-v2",
    }
    assert set(tree(place / "result-v2")) == {"document.json", "0.dcm", "1.dcm", "2.dcm"}
    sent = sending.parcels / f"{series_id}-result-2"
    assert tree(place / "result-v2").items() <= tree(sent).items()


def test_what_is_in_the_folder_already_is_left_as_it_is(tmp_path: Path) -> None:
    sending = to_folder(tmp_path)
    series_id = sending.series()
    sending.result(series_id)
    delivered(sending)
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    before = {path: path.stat().st_ino for path in files}
    sending.ledger.send_again(series_id)
    delivered(sending)
    assert {path: path.stat().st_ino for path in files} == before


@pytest.mark.parametrize("change", ["other bytes", "one more", "one less"])
def test_something_else_in_its_place_is_not_overwritten(tmp_path: Path, change: str) -> None:
    sending = to_folder(tmp_path)
    series_id = sending.series()
    sending.result(series_id)
    delivered(sending)
    (place,) = (tmp_path / "results").glob("*/*/result-v1")
    if change == "other bytes":
        (place / "0.dcm").write_bytes(b"other")
    elif change == "one more":
        (place / "more.dcm").write_bytes(b"")
    else:
        (place / "0.dcm").unlink()
    before = tree(place)
    sending.ledger.send_again(series_id)
    delivered(sending, "refused")
    assert tree(place) == before
    assert "move it away" in error(sending)


def test_a_folder_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = to_folder(tmp_path)
    sending.result(sending.series())
    copied: list[str] = []

    def fails_at_the_second(source: Path, target: Path) -> None:
        if copied:
            raise OSError(5, "Input/output error")
        copied.append(target.name)
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.shutil, "copyfile", fails_at_the_second)
        with running(sending):
            eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
    assert copied
    assert tree(tmp_path / "results") == {}
    assert error(sending) == f"{tmp_path / 'results'}: Input/output error"
    sending.clock.now += 10.0
    delivered(sending)
    assert len(tree(tmp_path / "results")) == 4


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    sending = to_folder(tmp_path)
    left = tmp_path / "results" / ".arriving-results" / "x.part"
    left.mkdir(parents=True)
    (left / "0.dcm").write_bytes(b"half")
    sending.result(sending.series())
    delivered(sending)
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_tried_again_and_names_no_study(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file is in the way")
    sending = to_folder(tmp_path)
    sending.result(sending.series())
    with running(sending):
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
    assert sending.states() == ["waiting"]
    assert error(sending) == f"{tmp_path / 'results'}: Not a directory"


def test_folders_are_private(tmp_path: Path) -> None:
    sending = to_folder(tmp_path)
    sending.result(sending.series())
    delivered(sending)
    folders = [p for p in (tmp_path / "results").rglob("*") if p.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


@pytest.mark.parametrize("uid", ["../../etc", "1.2.3/4", "", "1" * 65, "1.02"])
def test_a_uid_that_is_none_does_not_become_a_path(tmp_path: Path, uid: str) -> None:
    sending = to_folder(tmp_path)
    parcel = sending.result(sending.series())
    path = sending.parcels / parcel.folder / "document.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "study_instance_uid": uid}))
    delivered(sending, "refused")
    assert tree(tmp_path / "results") == {}


# Webhook.


def test_a_webhook_gets_the_document_without_attention_maps(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    parcel = sending.result(sending.series())
    delivered(sending)
    ((headers, body),) = hook.posted
    assert headers["Content-Type"] == "application/json"
    assert headers["X-PE-Infer-Event"] == "result"
    assert headers["X-PE-Infer-Event-Id"] == "1-result-1"
    assert "X-PE-Infer-Signature" not in headers
    expected = json.loads((sending.parcels / parcel.folder / "document.json").read_text())
    expected["result"]["evidence"][0]["attention"]["values"] = []
    assert json.loads(body) == expected
    assert hook.paths == ["/hooks?site=1"]


def test_attention_maps_are_sent_where_they_are_asked_for(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(attention_maps=True),))
    sending.result(sending.series())
    delivered(sending)
    evidence = json.loads(hook.posted[0][1])["result"]["evidence"]
    assert evidence[0]["attention"]["values"] == [[1.0, 2.0]]


def test_a_document_without_result_is_sent(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    parcel = sending.result(sending.series())
    path = sending.parcels / parcel.folder / "document.json"
    document = json.loads(path.read_text())
    del document["result"]
    document["not_processed"] = {"code": "scope.mismatch", "message": "not a chest"}
    path.write_text(json.dumps(document))
    delivered(sending)
    assert json.loads(hook.posted[0][1]) == document


def test_with_a_secret_the_body_is_signed(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(secret="s3cret"),))  # noqa: S106
    sending.result(sending.series())
    delivered(sending)
    ((headers, body),) = hook.posted
    digest = hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert headers["X-PE-Infer-Signature"] == f"sha256={digest}"
    assert "s3cret" not in sending.logged.getvalue()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again_with_the_same_event(
    tmp_path: Path, hook: Console, status: int
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    hook.statuses = [status]
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        assert sending.states() == ["waiting"]
        sending.clock.now += 10.0
        outbox.wake()
        eventually(sending.all_done)
    (first, first_body), (second, second_body) = hook.posted
    assert first["X-PE-Infer-Event-Id"] == second["X-PE-Infer-Event-Id"]
    assert first_body == second_body


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
def test_a_status_that_will_not_pass_is_a_refusal(
    tmp_path: Path, hook: Console, status: int
) -> None:
    sending = Sending(tmp_path, (hook.destination(),))
    sending.result(sending.series())
    hook.statuses = [status]
    delivered(sending, "refused")
    assert error(sending) == f"HTTP status {status}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_refusal_and_not_followed(
    tmp_path: Path, hook: Console, status: int
) -> None:
    with console() as elsewhere:
        hook.location = f"http://127.0.0.1:{elsewhere.port}/"
        hook.statuses = [status]
        sending = Sending(tmp_path, (hook.destination(),))
        sending.result(sending.series())
        delivered(sending, "refused")
        assert elsewhere.posted == []
    assert error(sending) == f"HTTP status {status}: redirects are not followed"


def test_a_webhook_that_says_nothing_is_tried_again(tmp_path: Path, hook: Console) -> None:
    sending = Sending(tmp_path, (hook.destination(),), timeout_s=0.2)
    sending.result(sending.series())
    hook.silent.set()
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        assert error(sending) == "timed out"
        hook.silent.clear()
        eventually(lambda: sending.done_as_time_passes(outbox))


def test_a_webhook_that_dribbles_is_given_up(tmp_path: Path) -> None:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def dribble() -> None:
            client, _ = server.accept()
            with client, suppress(OSError):
                while not ended.wait(0.02):
                    client.sendall(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        destination = {"kind": "webhook", "name": "console", "url": url}
        sending = Sending(tmp_path, (destination,), timeout_s=0.2)
        sending.result(sending.series())
        try:
            with running(sending):
                eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
        finally:
            ended.set()
            thread.join()
    assert sending.states() == ["waiting"]


def test_proxies_of_the_environment_get_nothing(
    tmp_path: Path, hook: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with console() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        sending = Sending(tmp_path, (hook.destination(),))
        sending.result(sending.series())
        delivered(sending)
        assert proxy.posted == []
    assert len(hook.posted) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that vouches for itself, and its key in the same file."""
    certificate, key = self_signed(tmp_path_factory.mktemp("certificates"))
    both = certificate.with_name("both.pem")
    both.write_text(certificate.read_text() + key.read_text())
    return both


def over_tls(hook: Console, certificate: Path) -> dict[str, Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    hook.server.socket = context.wrap_socket(hook.server.socket, server_side=True)
    return hook.destination(url=f"https://localhost:{hook.port}/hooks")


def test_a_certificate_of_an_authority_of_the_system_is_accepted(
    tmp_path: Path, hook: Console, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sending = Sending(tmp_path, (over_tls(hook, certificate),))
    sending.result(sending.series())
    delivered(sending)
    assert len(hook.posted) == 1


def test_a_certificate_that_nobody_vouches_for_gets_nothing(
    tmp_path: Path, hook: Console, certificate: Path
) -> None:
    sending = Sending(tmp_path, (over_tls(hook, certificate),))
    sending.result(sending.series())
    with running(sending):
        eventually(lambda: sending.ledger.deliveries()[0].attempts == 1)
    assert "CERTIFICATE_VERIFY_FAILED" in error(sending)
    assert hook.posted == []


def test_a_sender_is_made_for_every_kind(tmp_path: Path, hook: Console) -> None:
    sending = Sending(
        tmp_path,
        (
            hook.destination(),
            {"kind": "folder", "name": "results", "path": tmp_path},
            {"kind": "dicom", "name": "pacs", "host": "pacs", "port": 104, "ae_title": "PACS"},
        ),
    )
    kinds = [
        type(sender_to(told, sending.settings, sending.watch, print)).__name__
        for told in sending.settings.destinations
    ]
    assert kinds == ["WebhookSender", "FolderSender", "DicomSender"]
