"""Parcels' documents to an URL, by POST."""

import hashlib
import hmac
import http.client
import json
import socket
import ssl
import threading
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from pe_infer.node.destinations.base import DONE, Errand, Outcome, read_document, reason
from pe_infer.node.settings import WebhookDestination

_LATER: Final = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}  # of those that otherwise say that it makes no sense to try again


class WebhookSender:
    """POSTs the document of a parcel as JSON.

    ``X-PE-Infer-Event`` says what happened, ``X-PE-Infer-Event-Id`` is the same for every try, and
    with a secret ``X-PE-Infer-Signature`` is ``sha256=`` and the HMAC-SHA256 of the body. It goes
    straight to the host of the URL: no proxy is used whatever the environment says, and no
    redirect is followed. Certificates are checked against the system's authorities.
    """

    def __init__(self, destination: WebhookDestination, *, timeout_s: float) -> None:
        """Use an URL; ``timeout_s`` is how long it may say nothing."""
        self._settings = destination
        self._timeout_s = timeout_s

    def send(self, errand: Errand) -> Outcome:
        """POST the document of a parcel."""
        document = read_document(errand.contents)
        if not self._settings.attention_maps:
            _strip_attention_maps(document)
        body = json.dumps(document, ensure_ascii=False).encode()
        try:
            return _outcome(self._post(body, self._headers(document, body)))
        except OSError as exc:
            return Outcome(state="waiting", error=reason(exc))
        except http.client.HTTPException as exc:
            return Outcome(state="waiting", error=f"no HTTP response: {type(exc).__name__}")

    def _headers(self, document: dict[str, Any], body: bytes) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "pe-infer",
            "X-PE-Infer-Event": document["event"],
            "X-PE-Infer-Event-Id": document["event_id"],
        }
        if (secret := self._settings.secret) is not None:
            key = secret.get_secret_value().encode()
            digest = hmac.new(key, body, hashlib.sha256).hexdigest()
            headers["X-PE-Infer-Signature"] = f"sha256={digest}"
        return headers

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        url = urlsplit(self._settings.url)
        connection = self._connection(url.scheme, url.hostname or "", url.port)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        try:
            connection.request("POST", target, body, headers)
            # The limit of the socket is for each piece of the answer, this one for all of them.
            late = threading.Timer(2 * self._timeout_s, _hang_up, (connection.sock,))
            late.start()
            try:
                return connection.getresponse().status
            finally:
                late.cancel()
        finally:
            connection.close()

    def _connection(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=self._timeout_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # past TLS, which another thread uses


def _strip_attention_maps(document: dict[str, Any]) -> None:
    """Empty the maps as `StudyResult.to_json` does without them."""
    for slab in (document.get("result") or {}).get("evidence", ()):
        if slab.get("attention") is not None:
            slab["attention"]["values"] = []


def _outcome(status: int) -> Outcome:
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return DONE
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _LATER:
        return Outcome(state="waiting", error=f"HTTP status {status}")
    redirected = status < HTTPStatus.BAD_REQUEST
    return Outcome(
        state="refused",
        error=f"HTTP status {status}" + (": redirects are not followed" if redirected else ""),
    )
