"""Whether a node could start with its settings, and reach what it delivers to."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from pe_infer.errors import Code, NodeError, PeInferError
from pe_infer.node.node import bundles_of, load_detector
from pe_infer.node.settings import (
    DicomDestination,
    FolderDestination,
    NodeSettings,
    WebhookDestination,
)
from pe_infer.node.state import StateFolder
from pe_infer.node.tls import client_context, server_context

_SUCCESS = 0x0000
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        what: What was checked.
        good: Whether it is as it should be.
        detail: What was found; where it is not good, with the remedy.
    """

    what: str
    good: bool
    detail: str


def examine(settings: NodeSettings) -> Iterator[Finding]:
    """Check everything that the settings name, one after the other.

    Nothing is kept or sent; destinations are asked by C-ECHO, or only connected to.
    """
    for what, check in _checks(settings):
        try:
            yield Finding(what=what, good=True, detail=check())
        except PeInferError as exc:
            yield Finding(what=what, good=False, detail=str(exc))
        except OSError as exc:
            yield Finding(what=what, good=False, detail=exc.strerror or str(exc))


def _checks(settings: NodeSettings) -> Iterator[tuple[str, Callable[[], str]]]:
    listen = settings.listen
    yield "state_dir", lambda: _state(settings.state_dir)
    yield "listen", lambda: _port(listen.host, listen.port)
    if listen.tls is not None:
        tls = listen.tls
        yield "listen.tls", lambda: _made(server_context(tls), tls.certificate)
    if settings.operations.port:
        yield "operations", lambda: _port(settings.operations.host, settings.operations.port)
    for name in bundles_of(settings.routing):
        yield f"bundle {name}", lambda name=name: _bundle(settings, name)  # type: ignore[misc]
    for destination in settings.destinations:
        what = f"destination {destination.name}"
        match destination:
            case DicomDestination():
                yield what, lambda to=destination: _echo(settings, to)  # type: ignore[misc]
            case FolderDestination():
                yield what, lambda to=destination: _folder(to.path)  # type: ignore[misc]
            case WebhookDestination():
                yield what, lambda to=destination: _connection(settings, to)  # type: ignore[misc]


def _state(state_dir: Path) -> str:
    if not state_dir.exists():
        return f"{_folder(state_dir)}; it will be made"
    with StateFolder(state_dir).claimed():
        return f"{state_dir} is private and free"


def _folder(folder: Path) -> str:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise NodeError(f"{there}: this user cannot write there. Name another folder.")
    return f"{folder} can be written"


def _port(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as exc:
        raise NodeError(
            f"{host}:{port}: {exc.strerror}. Stop what listens there, or name another address.",
            code=Code.NODE_NETWORK,
        ) from exc
    return f"{host}:{port} is free"


def _made(_context: object, certificate: Path) -> str:
    return f"{certificate} and its key fit"


def _bundle(settings: NodeSettings, name: str) -> str:
    with load_detector(name, settings.engine) as detector:
        version = detector.bundle.manifest.version
        return f"version {version} on {detector.compiled.info.name}"


def _echo(settings: NodeSettings, to: DicomDestination) -> str:
    seconds = settings.retry.timeout_s
    _connect(to.host, to.port, seconds)
    ae = AE(ae_title=settings.listen.ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = seconds
    ae.add_requested_context(Verification)
    tls = None if to.tls is None else (client_context(to.tls), to.host)
    association = ae.associate(to.host, to.port, ae_title=to.ae_title, tls_args=tls)
    address = f"{to.ae_title} at {to.host}:{to.port}"
    if not association.is_established:
        raise NodeError(
            f"{address}: no association. Check the AE titles, and the certificates, of both.",
            code=Code.NODE_NETWORK,
        )
    status = association.send_c_echo().get("Status")
    association.release()
    if status != _SUCCESS:
        raise NodeError(f"{address}: C-ECHO was answered {status!r}", code=Code.NODE_NETWORK)
    return f"{address} answers C-ECHO"


def _connection(settings: NodeSettings, to: WebhookDestination) -> str:
    url = urlsplit(to.url)
    host, port = url.hostname or "", url.port or _PORTS[url.scheme]
    _connect(host, port, settings.retry.timeout_s)
    return f"{host}:{port} can be connected to"


def _connect(host: str, port: int, timeout_s: float) -> None:
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as exc:
        raise NodeError(
            f"{host}:{port}: {exc.strerror or exc}. Check address and port, and what lies between.",
            code=Code.NODE_NETWORK,
        ) from exc
