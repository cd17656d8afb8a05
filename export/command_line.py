"""What the commands of this package share: options, how they stop, how they report errors."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pe_infer.errors import PeInferError

ConfigOption = Annotated[Path, typer.Option(help="Settings (TOML).")]
StoreOption = Annotated[Path, typer.Option(help="Store made by export.datasets.generate.")]
RunOption = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and what is cached.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")]
MinutesOption = Annotated[float | None, typer.Option(help="Stop training after this long.")]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option("--without", help="Source of the data settings to leave out; may be repeated."),
]
ThreadsOption = Annotated[int, typer.Option(help="Threads of PyTorch.", min=1)]
PhantomOption = Annotated[Path | None, typer.Option(help="Phantom configuration (TOML or JSON).")]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """A function that says when to stop: after some minutes, or once SIGINT or SIGTERM arrived.

    The first signal asks for an end, so that a checkpoint can be written; a second one is treated
    as if this were not there. The handlers that were there before are put back at the end.

    Args:
        minutes: From now on; ``None`` is no limit.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    before = {number: signal.getsignal(number) for number in SIGNALS}
    asked: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked) or time.monotonic() > deadline
    finally:
        restore()


@contextmanager
def reported(console: Console) -> Iterator[None]:
    """Print our own errors, and end the command with their exit code."""
    try:
        yield
    except PeInferError as exc:
        console.print(f"[red]error:[/] {escape(str(exc))}")
        raise typer.Exit(exc.exit_code) from exc
