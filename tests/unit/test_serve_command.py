"""``pe-infer serve``: its options, its checks, how it starts and how it ends."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from deliveries import eventually
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification
from typer.testing import CliRunner

from pe_infer.cli import app as command_line
from pe_infer.cli import node_extra
from pe_infer.errors import ConfigurationError, NodeError
from pe_infer.node import node as node_module
from pe_infer.node.configuration import default_file
from pe_infer.node.node import Node, _Threads, bundles_of
from pe_infer.node.operations import Operations
from pe_infer.node.service import notify
from pe_infer.node.settings import NodeSettings, Routing
from pe_infer.node.watch import Watch

NOTHING_TO_JUDGE = {"otherwise": "ignore"}


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def flags(tmp_path: Path, **more: object) -> list[str]:
    told = {
        "state_dir": tmp_path / "state",
        "listen.port": free_port(),
        "operations.port": 0,
        "routing.otherwise": "ignore",
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [f"--{name}={value}" for name, value in told.items()]


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        command_line.app, ["serve", *arguments], catch_exceptions=False, env={"COLUMNS": "400"}
    )
    return done.exit_code, done.output


def test_print_config_prints_the_defaults() -> None:
    assert invoke("--print-config") == (0, default_file())
    with pytest.raises(ConfigurationError, match="leave out everything else"):
        invoke("--print-config", "--listen.port", "3")


def test_an_unknown_option_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pe_infer", "serve", "--listen.prot", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Did you mean --listen.port" in done.stderr


def test_options_come_from_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PE_INFER_NODE__LISTEN__PORT", "none")
    with pytest.raises(ConfigurationError, match="PE_INFER_NODE__LISTEN__PORT = 'none'"):
        invoke("--state-dir", str(tmp_path))


@pytest.mark.parametrize("command", [["serve"], ["node", "status"]], ids="-".join)
def test_a_missing_extra_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_extra, "_LIBRARIES", ("pydantic_settings", "no_such_library"))
    with pytest.raises(ConfigurationError, match=r"no_such_library: pip install 'pe-infer\[node\]"):
        CliRunner().invoke(command_line.app, command, catch_exceptions=False)


# --check


@pytest.fixture
def peer() -> Iterator[int]:
    """A port that answers C-ECHO."""
    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    ae.require_called_aet = True
    handlers = [(evt.EVT_C_ECHO, lambda _event: 0x0000)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    yield server.socket.getsockname()[1]
    server.shutdown()


def test_check_finds_everything_in_order(tmp_path: Path, peer: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as hook:
        destinations = [
            {"kind": "dicom", "name": "a", "host": "127.0.0.1", "port": peer, "ae_title": "PACS"},
            {"kind": "folder", "name": "b", "path": str(tmp_path / "b" / "c")},
            {"kind": "webhook", "name": "c", "url": f"http://127.0.0.1:{hook.getsockname()[1]}/x"},
        ]
        code, said = invoke("--check", *flags(tmp_path, destinations=json.dumps(destinations)))
    assert code == 0, said
    for expected in (
        "it will be made",
        "is free",
        f"PACS at 127.0.0.1:{peer} answers C-ECHO",
        "c can be written",
        "can be connected to",
    ):
        assert expected in said
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "b").exists()


def test_check_names_what_is_wrong_and_ends_with_8(tmp_path: Path, peer: int) -> None:
    (tmp_path / "file").write_text("")
    nothing = tmp_path / "no.pem"
    tls = {"certificate": str(nothing), "key": str(nothing), "authority": str(nothing)}
    echo = {"kind": "dicom", "host": "127.0.0.1", "port": peer}
    destinations = [
        {**echo, "name": "wrong_title", "ae_title": "OTHER"},
        {**echo, "name": "wrong_port", "port": free_port(), "ae_title": "PACS"},
        {**echo, "name": "wrong_files", "ae_title": "PACS", "tls": tls},
        {"kind": "folder", "name": "no_folder", "path": str(tmp_path / "file" / "x")},
        {"kind": "webhook", "name": "no_hook", "url": f"http://127.0.0.1:{free_port()}"},
    ]
    code, said = invoke(
        "--check",
        *flags(
            tmp_path,
            destinations=json.dumps(destinations),
            listen__port=peer,
            retry__timeout_s=5,
            routing__rules=json.dumps([{"bundle": "no-such-bundle"}]),
            **{f"listen__tls__{name}": value for name, value in tls.items()},
        ),
    )
    assert code == NodeError.exit_code
    failed = [line for line in said.splitlines() if "FAILED" in line]
    for what in (
        "listen ",
        "listen.tls",
        "bundle no-such-bundle",
        "wrong_title",
        "wrong_port",
        "wrong_files",
        "no_folder",
        "no_hook",
    ):
        assert any(what in line for line in failed), what
    assert "state_dir" not in "".join(failed)


def test_check_says_which_process_uses_the_folder(tmp_path: Path) -> None:
    with Node(settings(tmp_path)):
        code, said = invoke("--check", *flags(tmp_path))
    assert code == NodeError.exit_code
    assert f"process {os.getpid()} uses this state_dir" in said


# running


def settings(tmp_path: Path, **more: object) -> NodeSettings:
    return NodeSettings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "listen": {"port": free_port()},
            "operations": {"port": 0},
            "routing": NOTHING_TO_JUDGE,
            **more,
        }
    )


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=20).close()
    except ConnectionRefusedError:
        return False
    return True


def answers(port: int) -> bool:
    ae = AE()
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", port, ae_title="PE_INFER")
    if not association.is_established:
        return False
    status = association.send_c_echo().get("Status")
    association.release()
    return bool(status == 0x0000)


def test_a_node_is_not_ready_while_it_refuses_slices_for_lack_of_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings(tmp_path)
    disk = SimpleNamespace(free=told.limits.free_disk_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with Node(told) as node:
        assert node.ready()
        disk.free -= 1
        assert not node.ready()


def test_a_node_listens_and_ends_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    told = settings(tmp_path)
    node = Node(told)
    assert not node.ready()
    with node:
        assert node.ready()
        assert node.problems() == []
        assert answers(told.listen.port)
    assert not node.ready()
    assert not listens(told.listen.port)
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before
    with Node(told):  # the folder is free again
        assert answers(told.listen.port)


def test_a_node_that_cannot_start_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with closing(socket.create_server(("127.0.0.1", 0))) as used:
        told = settings(tmp_path, listen={"port": used.getsockname()[1]})
        with pytest.raises(NodeError, match="cannot be listened on"):
            Node(told).start()
    assert set(threading.enumerate()) == before
    with Node(settings(tmp_path)):
        pass


def test_health_and_readiness_are_pages(tmp_path: Path) -> None:
    port = free_port()
    with Node(settings(tmp_path, operations={"port": port})):
        for page in ("healthz", "readyz", "metrics"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=20) as answer:
                assert answer.status == 200
                body = answer.read().decode()
        assert "pe_infer_node_slices" in body


def test_a_thread_that_has_ended_is_a_problem() -> None:
    threads = _Threads()
    go_on = threading.Event()
    with threads.of("studies"):
        thread = threading.Thread(target=go_on.wait, name="studies 1")
        thread.start()
    assert threads.ended() == []
    go_on.set()
    thread.join()
    assert threads.ended() == ["studies: thread 'studies 1' has ended; restart the node"]
    threads.forget()
    assert threads.ended() == []


def test_studies_that_do_not_get_on_are_a_problem_that_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "_HOUSEKEEPING_S", 0.01)
    logged = io.StringIO()
    node = Node(settings(tmp_path, studies={"stuck_s": 0.001}), output=logged)
    with node:
        assert node._studies is not None
        node._studies._progress.begin(1)
        eventually(node.problems)
        eventually(lambda: "not healthy" in logged.getvalue())
        time.sleep(0.1)
    assert logged.getvalue().count("not healthy") == 1
    assert "studies.stuck_s" in logged.getvalue()


@pytest.mark.parametrize("name", ["association-3", "association-3-pdus", "operations-client"])
def test_a_connection_that_comes_while_a_part_starts_may_end(name: str) -> None:
    threads = _Threads()
    go_on = threading.Event()
    with threads.of("detectors"):
        thread = threading.Thread(target=go_on.wait, name=name)
        thread.start()
    go_on.set()
    thread.join()
    assert threads.ended() == []


def test_a_client_that_asks_while_the_bundles_load_is_no_part_of_the_node(tmp_path: Path) -> None:
    threads = _Threads()
    told = settings(tmp_path, operations={"port": free_port()}).operations
    pages = Operations(told, Watch(b"key"), ready=lambda: True, problems=list)
    pages.start()
    try:
        before = set(threading.enumerate())
        with (
            socket.create_connection((told.host, told.port)) as client,
            threads.of("detectors"),
        ):
            client.sendall(b"GET /healthz HTTP/1.0\r\n")  # the rest never comes
            eventually(lambda: set(threading.enumerate()) - before)
        eventually(lambda: not set(threading.enumerate()) - before)
    finally:
        pages.stop(20.0)
    assert threads.ended() == []


def test_a_service_manager_that_does_not_listen_does_not_end_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("WATCHDOG=1")


def test_the_bundles_that_routing_may_choose_are_loaded() -> None:
    rules = [{"bundle": "ignore"}, {"bundle": "a"}, {"bundle": "b"}, {"bundle": "a"}]
    assert bundles_of(Routing()) == ["ich", "pe"]
    assert bundles_of(Routing(otherwise="ignore")) == []
    assert bundles_of(Routing.model_validate({"rules": rules, "bundles": ["c"]})) == ["c", "a", "b"]
    assert bundles_of(Routing.model_validate({"rules": rules, "otherwise": "ignore"})) == ["a", "b"]


def started(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pe_infer", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            return process
    raise AssertionError(f"ended with {process.wait()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        process = started(
            tmp_path,
            *flags(tmp_path),
            NOTIFY_SOCKET=str(tmp_path / "notify"),
            WATCHDOG_USEC="200000",
        )
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "stopping" in said
        assert "Traceback" not in said
        told = [manager.recv(100)]
        while told[-1] == b"WATCHDOG=1":
            told.append(manager.recv(100))
        assert told[-1] == b"STOPPING=1"


def test_a_second_process_and_a_taken_port_end_with_8(tmp_path: Path) -> None:
    arguments = flags(tmp_path)
    process = started(tmp_path, *arguments)
    try:
        again = subprocess.run(
            [sys.executable, "-m", "pe_infer", "serve", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert again.returncode == 8
    assert f"process {process.pid} uses this state_dir" in again.stderr
    assert "Traceback" not in again.stderr
