"""pynetdicom's acceptor with bounds on what a peer can make this process hold or wait for.

By itself it reads a PDU of any declared length without a deadline, shakes hands for TLS where it
accepts connections, keeps a data set of any length and any number of requests in memory, waits on
for an association on a connection that was closed, and lets threads die of what peers send.
"""

import io
import select
import shutil
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

from pynetdicom import _config
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_CANCEL
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

_config.LOG_HANDLER_LEVEL = "none"  # it would log every PDU and data set

ASSOCIATION: Final = "association"  # how the names of threads of connections begin
IN_MEMORY_BYTES: Final = 8 << 20  # of a data set; what is longer arrives on disk
_CHECKED_BYTES: Final = 16 << 20  # how often the room on the disk is looked at meanwhile
_PIECE_BYTES: Final = 1 << 20
_MOST_COMMAND_BYTES: Final = 1 << 16
_MOST_INFORMATION_BYTES: Final = 16 << 20  # data sets of messages other than C-STORE requests
_MOST_REQUEST_PDU_BYTES: Final = 1 << 18  # of an association, which no negotiated length bounds
_MOST_WAITING: Final = 2  # messages that came before the last one was answered
_SPARE_CONNECTIONS: Final = 16  # beyond the associations: to be told that there are too many
_ACCEPT_PAUSE_S: Final = 0.1  # when the system has no descriptors left
_END_S: Final = 5.0  # how long a thread of a connection that is closed may take to notice

Ending = Literal["released", "aborted", "rejected", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a peer may use.

    Attributes:
        associations: At once.
        connections_per_address: At once, whatever they are used for.
        pdu_bytes: Of one PDU.
        object_bytes: Of a C-STORE request's data set.
        free_disk_bytes: What has to be left on the disk.
        idle_s: How long it may say nothing, or take for one PDU or one handshake.
        scratch: Folder for data sets that arrive.
    """

    associations: int
    connections_per_address: int
    pdu_bytes: int
    object_bytes: int
    free_disk_bytes: int
    idle_s: float
    scratch: Path


class Door(Protocol):
    """Who is let in, and who is told of what happens. Called by several threads."""

    def admits(self, address: str) -> bool:
        """Whether a connection from this address is let in."""

    def turned_away(self, address: str, reason: str) -> None:
        """A connection was closed without a word."""

    def ended(self, address: str, ending: Ending) -> None:
        """A connection has ended."""

    def failed(self, event: str, exc: BaseException) -> None:
        """Something was raised that nobody expected."""


class DataSet(io.BytesIO):
    """A data set that arrives: in memory, then in a file without a name; what is too much is lost.

    It is a BytesIO because pynetdicom insists; nothing is in the base class.

    Attributes:
        size: Bytes that came.
        problem: Why it is not whole: larger than allowed, or no room on the disk.
    """

    def __init__(self, bounds: Bounds) -> None:
        """Begin an empty one."""
        super().__init__()
        self._bounds = bounds
        self._checked = IN_MEMORY_BYTES
        self.size = 0
        self.problem: Literal["large", "full"] | None = None
        self.file = tempfile.SpooledTemporaryFile(  # noqa: SIM115  # closed with this
            IN_MEMORY_BYTES, dir=str(bounds.scratch)
        )

    def write(self, piece: Any) -> int:
        """Take a piece."""
        self.size += len(piece)
        if self.problem is None and self.size > self._bounds.object_bytes:
            self._lose("large")
        if self.problem is None and self.size > self._checked:
            self._checked += _CHECKED_BYTES
            free = shutil.disk_usage(self._bounds.scratch).free
            if free < self._bounds.free_disk_bytes + _CHECKED_BYTES:
                self._lose("full")
        if self.problem is None:
            try:
                self.file.write(piece)
            except OSError:
                self._lose("full")
        return len(piece)

    def pieces(self) -> Iterator[bytes]:
        """What came, in order."""
        self.file.seek(0)
        while piece := self.file.read(_PIECE_BYTES):
            yield piece

    def close(self) -> None:
        """Let it go."""
        if hasattr(self, "file"):
            self.file.close()
        super().close()

    def _lose(self, problem: Literal["large", "full"]) -> None:
        self.problem = problem
        self.file.close()


class _Socket(AssociationSocket):
    """A connection on which every PDU has a longest length and a deadline."""

    def __init__(self, association: Association, connection: socket.socket, bounds: Bounds) -> None:
        super().__init__(association, client_socket=connection)
        self._most = max(bounds.pdu_bytes, _MOST_REQUEST_PDU_BYTES)
        self._idle_s = bounds.idle_s
        self._poll = select.poll()  # select() takes no descriptors above 1023
        self._poll.register(connection, select.POLLIN)

    @property
    def ready(self) -> bool:
        if self.socket is None or not self._is_connected:
            return False
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return True
        return bool(self._poll.poll(0))

    def recv(self, nr_bytes: int) -> bytearray:
        if nr_bytes > self._most:
            raise OSError(f"a PDU of {nr_bytes} bytes")
        connection = cast("socket.socket", self.socket)
        data = bytearray(nr_bytes)
        rest = memoryview(data)
        deadline = time.monotonic() + self._idle_s
        while rest:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("a PDU takes too long")
            connection.settimeout(left_s)
            count = connection.recv_into(rest)
            if count == 0:
                break
            rest = rest[count:]
        count = nr_bytes - len(rest)
        rest.release()
        return data[:count]

    def send(self, bytestream: bytes) -> None:
        if self.socket is not None:
            self.socket.settimeout(self._idle_s)
        super().send(bytestream)


class _UpperLayer(DULServiceProvider):
    """The thread that reads and writes PDUs: when it ends, the association gets to know."""

    def __init__(self, association: Association, door: Door) -> None:
        super().__init__(association)
        self._door = door

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as exc:  # noqa: BLE001  # PDUs out of order, and whatever else peers send
            self._door.failed("upper_layer_failed", exc)
        finally:
            self.to_user_queue.put(cast("Any", None))  # nothing will come any more


class _Messages(DIMSEServiceProvider):
    """Messages of bounded number and size; all are served by the association's thread."""

    def __init__(self, association: Association, bounds: Bounds, door: Door) -> None:
        super().__init__(association)
        self._bounds = bounds
        self._door = door

    def receive_primitive(self, primitive: P_DATA) -> None:
        try:
            self._receive(primitive)
        except Exception as exc:  # noqa: BLE001  # of pydicom and pynetdicom, of what peers send
            self._door.failed("message_refused", exc)
            self.dul.event_queue.put("Evt19")  # invalid PDU: the association is aborted

    def _receive(self, primitive: P_DATA) -> None:
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = DataSet(self._bounds)
        message = self.message
        whole = message.decode_msg(primitive, self.assoc)
        if message.encoded_command_set.tell() > _MOST_COMMAND_BYTES:
            raise ValueError("a command set is too long")
        if not whole:
            return
        data_set = cast("DataSet", message.data_set)
        if not isinstance(message, C_STORE_RQ):
            if data_set.problem or data_set.size > _MOST_INFORMATION_BYTES:
                raise ValueError("the data set of a message is too long")
            message.data_set = io.BytesIO(b"".join(data_set.pieces()))
            data_set.close()
        request = message.message_to_primitive()
        if isinstance(request, C_CANCEL):  # nothing here can be cancelled
            self.message = None
            return
        if self.msg_queue.qsize() >= _MOST_WAITING:
            raise ValueError("more requests than were negotiated")
        self.message = None
        self.msg_queue.put((cast("int", message.context_id), cast("Any", request)))

    def close(self) -> None:
        """Let go of what has not been served."""
        left = [self.message.data_set] if self.message is not None else []
        while not self.msg_queue.empty():
            _, request = self.msg_queue.get_nowait()
            left.append(getattr(request, "DataSet", None))
        for data_set in left:
            if data_set is not None:
                data_set.close()


class _Connection(RequestHandler):
    """Runs an association in the thread of its connection."""

    server: "Server"

    def handle(self) -> None:
        association = self._create_association()
        server = self.server
        upper_layer = _UpperLayer(association, server.door)
        messages = _Messages(association, server.bounds, server.door)
        upper_layer.name = f"{threading.current_thread().name}-pdus"
        association.dul = upper_layer
        association.dimse = messages
        association.set_socket(_Socket(association, self.request, server.bounds))
        association.acse_timeout = association.network_timeout = server.bounds.idle_s
        try:
            association.run_reactor()
        finally:
            server.leave(association)
            upper_layer.kill_dul()
            _shut(self.request)
            if upper_layer.is_alive():
                upper_layer.join(_END_S)
            messages.close()
            server.door.ended(self.client_address[0], _ending(association))


class Server(AssociationServer):
    """Accepts connections, each of which has a thread; `serve_forever` never waits for a peer."""

    request_queue_size = 64

    def __init__(
        self,
        entity: ApplicationEntity,
        address: tuple[str, int],
        ae_title: str,
        contexts: list[PresentationContext],
        ssl_context: ssl.SSLContext | None,
        *,
        evt_handlers: list[Any],
        bounds: Bounds,
        door: Door,
    ) -> None:
        """Bind and listen, as `AE.make_server` asks.

        Raises:
            OSError: The address cannot be used.
        """
        self.bounds = bounds
        self.door = door
        self._changed = threading.Condition()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._addresses: dict[threading.Thread, str] = {}  # of their peers
        self._associations: set[Association] = set()
        self._count = 0
        super().__init__(
            entity, address, ae_title, contexts, ssl_context, evt_handlers, _Connection
        )

    def enter(self, association: Association) -> bool:
        """Count an association; false if there are too many."""
        with self._changed:
            if len(self._associations) >= self.bounds.associations:
                return False
            self._associations.add(association)
            return True

    def leave(self, association: Association) -> None:
        """Count it no more."""
        with self._changed:
            self._associations.discard(association)
            self._changed.notify_all()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its own thread shakes hands."""
        try:
            return cast("socket.socket", self.socket).accept()
        except OSError:
            time.sleep(_ACCEPT_PAUSE_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Decide on a connection by its address and by how many there are."""
        del request
        reason = self._objection(client_address[0])
        if reason is not None:
            self.door.turned_away(client_address[0], reason)
        return reason is None

    def _objection(self, address: str) -> str | None:
        if not self.door.admits(address):
            return "address"
        with self._changed:
            if len(self._connections) >= self.bounds.associations + _SPARE_CONNECTIONS:
                return "connections"
            own = sum(other == address for other in self._addresses.values())
        return "connections_per_address" if own >= self.bounds.connections_per_address else None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        self._count += 1
        thread = threading.Thread(
            target=self._run, args=(request, client_address), name=f"{ASSOCIATION}-{self._count}"
        )
        with self._changed:
            self._connections[thread] = request
            self._addresses[thread] = client_address[0]
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._forget(thread)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log why a connection has no thread; it is closed."""
        del request, client_address
        self.door.failed("connection_failed", cast("Exception", sys.exception()))

    def close(self, timeout_s: float) -> None:
        """Accept nothing more; let associations end, then abort them."""
        socketserver.BaseServer.shutdown(self)
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: not self._associations, timeout_s)
            left = list(self._associations)
        for association in left:
            association.abort(block=False)
        with self._changed:
            self._changed.wait_for(lambda: not self._associations, _END_S)
            connections = dict(self._connections)
        for thread, connection in connections.items():
            _shut(connection)
            thread.join(_END_S)

    def _run(self, connection: socket.socket, address: Any) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self.bounds.idle_s)
            if self.ssl_context is not None:
                secured = self.ssl_context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                connection = secured
                with self._changed:
                    self._connections[threading.current_thread()] = connection
                try:
                    secured.do_handshake()  # the timeout is that of the whole of it
                except OSError as exc:
                    why = getattr(exc, "reason", None) or type(exc).__name__
                    self.door.turned_away(address[0], f"tls {why}")
                    return
            self.finish_request(connection, address)
        except Exception as exc:  # noqa: BLE001  # of pynetdicom, of what peers send
            self.door.failed("association_failed", exc)
        finally:
            _shut(connection)
            connection.close()
            self._forget(threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        with self._changed:
            self._connections.pop(thread, None)
            self._addresses.pop(thread, None)
            self._changed.notify_all()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _ending(association: Association) -> Ending:
    if association.requestor.primitive is None:
        return "silent"
    if association.is_rejected:
        return "rejected"
    return "released" if association.is_released else "aborted"
