"""Metrics and health over HTTP, for those who look after a node."""

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pe_infer.errors import Code, NodeError
from pe_infer.node import settings
from pe_infer.node.watch import Watch

_TEXT: Final = "text/plain; charset=utf-8"
_PATIENCE_S: Final = 2.0  # one client is served at a time
_POLL_S: Final = 0.1


class Operations:
    """Serves ``/metrics``, ``/healthz`` (does it work?) and ``/readyz`` (does it take slices?)."""

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
            ready: Whether slices are taken.
            problems: What has to be mended; empty: nothing. No patient data.
        """
        self._address = (operations.host, operations.port)
        self._pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]] = {
            "/metrics": lambda: (
                HTTPStatus.OK,
                CONTENT_TYPE_LATEST,
                generate_latest(watch.registry),
            ),
            "/healthz": lambda: _page(list(problems())),
            "/readyz": lambda: _page([] if ready() else ["not ready"]),
        }
        self._server: HTTPServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            NodeError: ``node.network``: the address cannot be used.
        """
        if self._address[1] == 0:
            return
        try:
            self._server = HTTPServer(self._address, _handler(self._pages))
        except OSError as exc:
            host, port = self._address
            raise NodeError(
                f"operations: {host}:{port}: {exc.strerror}. Name another host or port, or port 0.",
                code=Code.NODE_NETWORK,
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="operations", daemon=True
        )
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End.

        Args:
            timeout_s: How long to wait for the page that is being served.
        """
        if self._server is None or self._thread is None:
            return
        # Shutting down waits for the page, however slowly it is asked for.
        threading.Thread(target=self._server.shutdown, name="operations end", daemon=True).start()
        self._thread.join(timeout_s)
        self._server.server_close()


def _page(problems: Sequence[str]) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    return status, _TEXT, ("\n".join(problems) or "ok").encode() + b"\n"


def _handler(
    pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]],
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE_S

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                status, kind, body = HTTPStatus.NOT_FOUND, _TEXT, b"/metrics /healthz /readyz\n"
            else:
                status, kind, body = page()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def version_string(self) -> str:
            return "pe-infer"

        def log_message(self, *_: object) -> None:
            """Say nothing: requests come every few seconds."""

    return Handler
