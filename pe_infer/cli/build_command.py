"""``pe-infer build``: a bundle's graphs as TensorRT engines."""

import sys
import threading
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pe_infer.bundle import Bundle
from pe_infer.cli.layout import open_console, print_facts, print_table, printable
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engine_folder import EngineFolder

_MEBIBYTE: Final = 1 << 20


class TargetName(StrEnum):
    """Which library will run the engines."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class ComputeName(StrEnum):
    """What engines compute in."""

    fp16 = "fp16"
    fp32 = "fp32"


def build_command(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A shipped bundle's name, or a folder.")
    ],
    *,
    target: Annotated[
        TargetName,
        typer.Option(
            "--target",
            help="tensorrt: version 10 or 11, for the GPU of this machine. tensorrt-rtx: needs no "
            "GPU.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="A folder that is only for these engines.")
    ],
    precision: Annotated[
        ComputeName,
        typer.Option(
            "--precision", help="fp16: as the bundle's nodes allow. fp32: everything in float32."
        ),
    ] = ComputeName.fp16,
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            metavar="CAPABILITY",
            help="With tensorrt-rtx: compute capabilities to build for, such as 8.6; may be given "
            "several times, or as 8.6,8.9. Without it: 8.0, 8.6, 8.9, 12.0 and later.",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", help="Slabs per run; what the bundle allows if not given.", min=1
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print the builder's log on standard error.")
    ] = False,
) -> None:
    """Build TensorRT engines for a bundle.

    TensorRT builds for the GPU that it runs on: build on the target, the engines of a Jetson on
    that Jetson. TensorRT for RTX builds without a GPU, for GPUs of PCs and workstations. Engines
    run only on the version that built them: check with pe-infer doctor --engines DIR.

    The exit status is 0, 2 for options that make no sense, 5 for the bundle, and 6 if the library
    is missing or refuses a graph.
    """
    options = BuildOptions(
        target=target.value,
        precision=precision.value,
        capabilities=tuple(part for text in sm or [] for part in text.split(",")),
        max_batch=max_batch,
    )
    loaded = Bundle.load(bundle)
    errors = open_console(stderr=True)
    with _Meter(errors) as meter:
        log = _log if verbose else None
        engines = build_engines(loaded, options, out, progress=meter.update, log=log)
    _print(open_console(), engines)


class _Meter:
    """A bar over all engines, and a line with what the builder is doing."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._lock = threading.Lock()
        self._engines = self._progress.add_task("engines", total=None)
        self._phase = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, node: str, done: int, total: int, phase: str, step: int, steps: int) -> None:
        """See `pe_infer.engine_build.NodeProgress`."""
        with self._lock:
            self._progress.update(self._engines, completed=done, total=total)
            self._progress.update(
                self._phase,
                description=f"{node}: {phase.lower()}",
                completed=step,
                total=max(steps, 1),
            )


def _log(line: str) -> None:
    print(printable(line), file=sys.stderr)  # noqa: T201


def _print(console: Console, engines: EngineFolder) -> None:
    manifest = engines.manifest
    later = " and later" if manifest.later_capabilities else ""
    print_facts(
        console,
        [
            ("bundle", f"{manifest.bundle.name} {manifest.bundle.version}"),
            ("built with", f"{manifest.target} {manifest.version}"),
            ("compute capability", ", ".join(manifest.compute_capabilities) + later),
            ("precision", manifest.precision),
            ("folder", str(engines.folder)),
        ],
    )
    print_table(
        console,
        ("node", "precision", "batch", "size", "file"),
        [
            (
                node,
                entry.precision if manifest.precision == "fp16" else "float32",
                f"1 to {entry.max_batch}" if entry.max_batch > 1 else "1",
                f"{entry.bytes / _MEBIBYTE:.2f} MiB",
                entry.file,
            )
            for node, entry in manifest.engines.items()
        ],
    )
