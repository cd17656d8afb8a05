"""Metrics and health over HTTP, for those who look after a node."""

import io
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pe_infer.errors import Code, NodeError
from pe_infer.node import settings
from pe_infer.node.watch import Watch

PATIENCE_S: Final = 5.0  # for a request to come, and again for its answer to be taken
MAX_REQUEST_BYTES: Final = 8192
MAX_CLIENTS: Final = 8  # at once; more are hung up on
CLIENT: Final = "operations-client"  # name of their threads
_POLL_S: Final = 0.1
_JSON: Final = "application/json"

Page = Callable[[], tuple[HTTPStatus, str, bytes]]


class Operations:
    """Serves ``/metrics``, ``/healthz`` (does it work?) and ``/readyz`` (does it take slices?).

    The latter two are 200 or 503 with ``{"status": "ok" | "failed", "problems": [text, ...]}``.
    """

    def __init__(
        self,
        operations: settings.Operations,
        watch: Watch,
        *,
        ready: Callable[[], bool],
        problems: Callable[[], Sequence[str]],
    ) -> None:
        """Prepare; nothing listens before `start`.

        Args:
            operations: Address and port; port 0: nothing is served.
            watch: Its metrics are served.
            ready: Whether slices are taken. Called, as ``problems``, by several threads.
            problems: What has to be mended; empty: nothing. No patient data.
        """
        self._address = (operations.host, operations.port)
        self._watch = watch
        self._pages: dict[str, Page] = {
            "/metrics": lambda: (
                HTTPStatus.OK,
                CONTENT_TYPE_LATEST,
                generate_latest(watch.registry),
            ),
            "/healthz": lambda: _report(problems()),
            "/readyz": lambda: _report(() if ready() else ("slices are not taken",)),
        }
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            NodeError: ``node.network``: the address cannot be used.
        """
        host, port = self._address
        if port == 0:
            return
        try:
            self._server = _Server(host, port, self._pages, self._watch)
        except OSError as exc:
            raise NodeError(
                f"operations: {host}:{port}: {exc.strerror}. Name another host or port, or port 0.",
                code=Code.NODE_NETWORK,
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="operations", daemon=True
        )
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Listen no more; what is being answered goes on without being waited for.

        Args:
            timeout_s: How long to wait for the thread that listens.
        """
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join(timeout_s)
        self._server.server_close()
        self._server = self._thread = None


def _report(problems: Sequence[str]) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    report = {"status": "failed" if problems else "ok", "problems": list(problems)}
    return status, _JSON, json.dumps(report).encode()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each of a few clients; none holds anything that has to be waited for."""

    allow_reuse_address = True

    def __init__(self, host: str, port: int, pages: Mapping[str, Page], watch: Watch) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self.watch = watch
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_POLL_S)  # no descriptors left: the connection is still there
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name=CLIENT,
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address
        if not isinstance(exc := sys.exception(), OSError | None):  # a client has hung up
            self.watch.failed("operations_failed", exc)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; what is asked for is read as a whole, within time and size."""

    server: _Server
    timeout = PATIENCE_S

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BytesIO(_request_head(self.connection))

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics /healthz /readyz\n")
            return
        try:
            answer = page()
        except Exception as exc:  # noqa: BLE001 (whatever it is, it is told here and there)
            self.server.watch.failed("operations_failed", exc)
            answer = _report(["the page cannot be made; see the log"])
        self._answer(*answer)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "pe-infer"

    def log_message(self, *_: object) -> None:
        """Say nothing: requests come every few seconds."""


def _request_head(connection: socket.socket) -> bytes:
    """Request line and headers; nothing if they do not come in time or are too long."""
    deadline = time.monotonic() + PATIENCE_S
    head = b""
    while b"\r\n\r\n" not in head:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or len(head) > MAX_REQUEST_BYTES:
            return b""
        connection.settimeout(left_s)
        try:
            received = connection.recv(MAX_REQUEST_BYTES)
        except TimeoutError:
            return b""
        if not received:
            return b""
        head += received
    connection.settimeout(PATIENCE_S)
    return head
