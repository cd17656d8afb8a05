"""A node as a program: signals, and what a service manager is told."""

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from types import FrameType
from typing import Final

from pe_infer.node.node import Node
from pe_infer.node.settings import NodeSettings

_ENDING: Final = (signal.SIGTERM, signal.SIGINT)
_PRIVATE: Final = 0o077
_US_PER_S: Final = 1e6


def serve(settings: NodeSettings) -> None:
    """Run a node until SIGTERM or SIGINT; a second one ends the process at once.

    A service manager (``NOTIFY_SOCKET``) is told when the node listens and when it stops, and
    before every half of ``WATCHDOG_USEC`` that it is healthy.

    Args:
        settings: What it is told.

    Raises:
        PeInferError: As `Node.start`.
    """
    os.umask(_PRIVATE)
    # Of all ways to wake a thread, this one may be used by a signal handler.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def handle(number: int, _frame: FrameType | None) -> None:
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_DFL)
        signals.put(number)

    for ending in _ENDING:
        signal.signal(ending, handle)
    node = Node(settings)
    threading.excepthook = lambda raised: _report(node, raised)
    with node:
        notify("READY=1")
        beat_s = int(os.environ.get("WATCHDOG_USEC") or 0) / _US_PER_S / 2 or None
        while not _signalled(signals, beat_s):
            if not node.problems():
                notify("WATCHDOG=1")
        notify("STOPPING=1")


def _signalled(signals: "queue.SimpleQueue[int]", timeout_s: float | None) -> bool:
    try:
        signals.get(timeout=timeout_s)
    except queue.Empty:
        return False
    return True


def notify(state: str) -> None:
    """Tell the service manager, if there is one that asked for it and listens (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)


def _report(node: Node, raised: threading.ExceptHookArgs) -> None:
    """Log that a thread has ended by an error: where, not with which values."""
    name = raised.thread.name if raised.thread is not None else None
    frames = traceback.extract_tb(raised.exc_traceback)
    if not hasattr(node, "watch"):
        print(f"thread {name} has ended: {raised.exc_type.__name__}", file=sys.stderr)  # noqa: T201
        return
    node.watch.log.error(
        "a thread has ended",
        thread=name,
        error=raised.exc_type.__name__,
        at=[f"{frame.filename}:{frame.lineno}" for frame in frames],
    )
