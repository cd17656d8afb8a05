"""Metrics, health and readiness over HTTP."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from deliveries import eventually

from pe_infer.errors import Code, NodeError
from pe_infer.node import operations, settings
from pe_infer.node.operations import CLIENT, MAX_CLIENTS, Operations
from pe_infer.node.watch import Watch


class Served:
    """A running server, and what it is told."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.problems: list[str] = []
        self.ready = True
        self.logged = StringIO()
        self.watch = Watch(b"key", output=self.logged)
        with socket.create_server((host, 0), family=family_of(host)) as free:
            self.address = (host, free.getsockname()[1])
        self.pages = Operations(
            settings.Operations(host=host, port=self.address[1]),
            self.watch,
            ready=lambda: self.ready,
            problems=lambda: self.problems,
        )

    def get(self, path: str, method: str = "GET") -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=20.0)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.headers["Content-Type"], response.read()
        finally:
            connection.close()


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[Served]:
    served = Served(host)
    served.pages.start()
    try:
        yield served
    finally:
        served.pages.stop(20.0)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


def raw(served: Served, request: bytes) -> bytes:
    with socket.create_connection(served.address, timeout=20.0) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_metrics_are_those_of_the_node(served: Served) -> None:
    served.watch.slices.labels("0x0000").inc(3)
    status, kind, body = served.get("/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert b'pe_infer_node_slices_total{status="0x0000"} 3.0' in body


def test_a_node_without_problems_is_healthy(served: Served) -> None:
    status, kind, body = served.get("/healthz")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {"status": "ok", "problems": []}


def test_problems_are_told(served: Served) -> None:
    served.problems = ["outbox: a thread has ended"]
    status, _, body = served.get("/healthz?verbose=1")
    assert status == 503
    assert json.loads(body) == {"status": "failed", "problems": ["outbox: a thread has ended"]}


def test_readiness_is_not_health(served: Served) -> None:
    assert served.get("/readyz")[0] == 200
    served.ready = False
    assert served.get("/readyz")[0] == 503
    assert served.get("/healthz")[0] == 200


def test_only_headers_are_sent_where_only_they_are_asked_for(served: Served) -> None:
    assert served.get("/metrics", "HEAD")[::2] == (200, b"")


@pytest.mark.parametrize("path", ["/", "/metricsx", "/../metrics", "/%2e"])
def test_other_pages_do_not_exist(served: Served, path: str) -> None:
    assert served.get(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(served: Served, method: str) -> None:
    assert served.get("/metrics", method)[0] == 501


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"\r\n\r\n"])
def test_nonsense_is_answered_or_hung_up_on_without_a_word_in_the_log(
    served: Served, request_: bytes
) -> None:
    raw(served, request_)
    assert served.get("/healthz")[0] == 200
    assert served.logged.getvalue() == ""


def test_a_request_without_end_is_hung_up_on(served: Served) -> None:
    assert raw(served, b"GET /metrics HTTP/1.0\r\nX: " + b"x" * 9000) == b""


def test_a_client_that_dribbles_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PATIENCE_S", 0.3)
    with socket.create_connection(served.address, timeout=0.05) as client:

        def hung_up() -> bool:
            try:
                client.sendall(b"x")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        eventually(hung_up)


def test_clients_that_say_nothing_keep_no_other_waiting(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PATIENCE_S", 20.0)
    silent = [socket.create_connection(served.address) for _ in range(MAX_CLIENTS - 1)]
    try:
        assert served.get("/healthz")[0] == 200
    finally:
        for client in silent:
            client.close()


def test_more_clients_than_there_is_room_for_are_hung_up_on(served: Served) -> None:
    silent = [socket.create_connection(served.address) for _ in range(MAX_CLIENTS)]
    try:

        def threads() -> int:
            return sum(t.name == CLIENT for t in threading.enumerate())

        eventually(lambda: threads() >= MAX_CLIENTS)
        assert raw(served, b"") == b""
    finally:
        for client in silent:
            client.close()
    eventually(lambda: served_or_none(served) == 200)


def served_or_none(served: Served) -> int | None:
    try:
        return served.get("/healthz")[0]
    except (OSError, http.client.HTTPException):
        return None


def test_a_page_that_cannot_be_made_says_so_and_the_log_why(served: Served) -> None:
    served.problems = None  # type: ignore[assignment]
    served.ready = True
    status, _, body = served.get("/healthz")
    assert status == 503
    assert "see the log" in json.loads(body)["problems"][0]
    eventually(served.logged.getvalue)
    assert json.loads(served.logged.getvalue())["error"] == "TypeError"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = settings.Operations(port=port)
        pages = Operations(where, Watch(b"key"), ready=lambda: True, problems=list)
        with pytest.raises(NodeError, match=rf"127\.0\.0\.1:{port}: .*port 0") as caught:
            pages.start()
    assert caught.value.code is Code.NODE_NETWORK
    pages.stop(1.0)


def test_port_0_is_none() -> None:
    pages = Operations(settings.Operations(port=0), Watch(b"key"), ready=bool, problems=list)
    before = threading.active_count()
    pages.start()
    assert threading.active_count() == before
    pages.stop(1.0)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_it_listens_on_ipv6_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serving("::1") as served:
        assert served.get("/readyz")[0] == 200


def test_after_the_end_nobody_listens() -> None:
    with serving() as served:
        pass
    refused: Any = pytest.raises(ConnectionRefusedError)
    with refused:
        socket.create_connection(served.address)


def test_a_client_for_whom_there_is_no_thread_leaves_its_place(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(MAX_CLIENTS + 1):
            assert raw(served, b"") == b""
    assert served.get("/healthz")[0] == 200
