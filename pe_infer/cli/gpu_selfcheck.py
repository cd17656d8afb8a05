"""``pe-infer doctor --gpu-selfcheck``: whether this machine's GPU does what the CPU does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.text import Text

from pe_infer.bundle import shipped
from pe_infer.cli.layout import open_console, print_facts, print_table
from pe_infer.errors import Code, ConfigurationError, EngineError
from pe_infer.gpu_selfcheck.report import Outcome, Report, unavailable_json
from pe_infer.gpu_selfcheck.run import run_selfcheck

_UNKNOWN: Final = "-"


def selfcheck(bundles: Sequence[str], *, as_json: bool, file: Path | None) -> None:
    """Check, print and write; the exit status is 6 if a check fails or there is no GPU.

    Args:
        bundles: Names or folders; none: all that are shipped.
        as_json: Print JSON on standard output, and all else on standard error; with ``file``, write
            it there instead.
        file: Where to write JSON.

    Raises:
        ConfigurationError: ``file`` cannot be written.
        PeInferError: There is no GPU (``engine.unavailable``), or a bundle cannot be read.
    """
    if file is not None and not file.parent.is_dir():  # known before the long work, not after
        raise ConfigurationError(f"--json {file}: there is no folder {file.parent}: make it")
    console = open_console(stderr=as_json and file is None)
    try:
        report = run_selfcheck(
            bundles or shipped(), tell=lambda outcome: console.print(_line(outcome))
        )
    except EngineError as error:
        if error.code == Code.ENGINE_UNAVAILABLE:
            _write(unavailable_json(str(error)), as_json=as_json, file=file)
        raise
    _print(console, report)
    _write(report.to_json(), as_json=as_json, file=file)
    if not report.passed:
        raise typer.Exit(EngineError.exit_code)


def _write(text: str, *, as_json: bool, file: Path | None) -> None:
    if file is not None:
        file.write_text(text, encoding="utf-8")
    elif as_json:
        typer.echo(text, nl=False)


def _line(outcome: Outcome) -> Text:
    verdict = ("pass", "green") if outcome.passed else ("FAIL", "red")
    line = Text.assemble(verdict, f"  {outcome.bundle}: {outcome.check}: ")
    if (measured := outcome.measured) is None:
        line.append(outcome.problem)
    else:
        line.append(f"{measured.value:.4g} {measured.unit} (at most {measured.limit:g})")
    line.append(f"  {outcome.seconds:.1f} s", "dim")
    return line


def _print(console: Console, report: Report) -> None:
    print_table(
        console,
        ("bundle", "stage", "runs", "p50 ms", "p95 ms", "p99 ms", "computed at peak rates, ms"),
        [
            (
                row.bundle,
                row.stage,
                str(row.runs),
                f"{row.p50_ms:.3f}",
                f"{row.p95_ms:.3f}",
                f"{row.p99_ms:.3f}",
                _UNKNOWN if row.computed_ms is None else f"{row.computed_ms:.3f}",
            )
            for row in report.latencies
        ],
        title="Latency: from the call until the result is there",
    )
    print_facts(console, report.facts.items())
    failed = [outcome for outcome in report.outcomes if not outcome.passed]
    console.print(
        Text(f"{len(failed)} of {len(report.outcomes)} checks failed", style="red")
        if failed
        else Text(f"all {len(report.outcomes)} checks passed", style="green")
    )
