"""How results and progress look on a terminal, and as plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from pe_infer.cli.layout import print_facts, print_table
from pe_infer.result import CheckResult, StudyResult, Update, probability_text

NOT_PROCESSED: Final = 10  # exit code
_SHOWN_SLABS: Final = 5
_PLAIN_EVERY: Final = 100  # slices per line where there is no terminal


class Meter(Protocol):
    """Shows how far the slices of a study have got."""

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` slices have been taken."""

    def update(self, update: Update) -> None:
        """A slab was completed."""


class _Bar:
    def __init__(self, progress: Progress, action: str) -> None:
        self._progress = progress
        self._task = progress.add_task(action, total=None, state="")

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def update(self, update: Update) -> None:
        self._progress.update(self._task, state=describe_update(update))


class _Lines:
    def __init__(self, console: Console, action: str) -> None:
        self._console, self._action, self._state = console, action, ""

    def advance(self, done: int, total: int) -> None:
        if done == total or done % _PLAIN_EVERY == 0:
            line = f"{self._action}: {done}/{total} slices  {self._state}"
            self._console.print(line.rstrip())

    def update(self, update: Update) -> None:
        self._state = describe_update(update)


@contextmanager
def slice_meter(console: Console, action: str) -> Iterator[Meter]:
    """A live bar on a terminal, a line every ``_PLAIN_EVERY`` slices elsewhere."""
    if not console.is_terminal:
        yield _Lines(console, action)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("slices"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, action)


def describe_update(update: Update) -> str:
    """One line: how much was seen, and the highest slab probability so far."""
    highest = "-" if update.running_maximum is None else probability_text(update.running_maximum, 2)
    alert = "  PROVISIONAL ALERT" if update.provisional_alert else ""
    seen = f"{update.slabs} slabs, {update.covered_mm:.0f} mm"
    return f"{seen}, highest slab probability {highest}{alert}"


def print_result(result: StudyResult, console: Console) -> None:
    """Print a study result for a person."""
    meaning = result.finding.code.meaning
    if result.not_processed is not None:
        console.print(Text(f"{meaning}: NOT PROCESSED", style="bold yellow"))
        console.print(Text(f"[{result.not_processed.code}] {result.not_processed.message}"))
    else:
        verdict, style = ("POSITIVE", "bold red") if result.positive else ("negative", "bold green")
        assert result.probability is not None  # noqa: S101  as it was processed
        line = Text(f"{meaning}: ")
        line.append(verdict, style=style)
        line.append(
            f"   probability {probability_text(result.probability)}, threshold "
            f"{probability_text(result.operating_point.threshold)} "
            f"({result.operating_point.name})"
        )
        console.print(line)
    coverage, timings, made = result.coverage, result.timings, result.provenance
    after_ms = 1000 * timings.last_slice_to_result_s
    facts = [
        ("slices", f"{coverage.slices}, {coverage.lower_mm:.1f} to {coverage.upper_mm:.1f} mm"),
        ("slabs", f"{coverage.slabs}, {coverage.gated_slabs} more without the organ"),
        ("time", f"{timings.total_s:.2f} s, {after_ms:.0f} ms of it after the last slice"),
        ("bundle", f"{made.bundle} {made.bundle_version} ({made.bundle_hash[:12]})"),
        ("engine", f"{made.engine}, {', '.join(sorted(set(made.precision.values())))}"),
        *((f"check {check.name}", _describe_check(check)) for check in result.checks),
        *((f"flag {q.flag}", q.message) for q in result.quality),
    ]
    print_facts(console, facts)
    _print_slabs(result, console)
    console.print(Text(result.intended_use, style="italic"))


def _describe_check(check: CheckResult) -> str:
    value = "not measured" if check.value is None else f"{check.value:.4g} {check.unit}"
    return f"{value}, {check.outcome}"


def _print_slabs(result: StudyResult, console: Console) -> None:
    known = [slab for slab in result.evidence if slab.probability is not None]
    if not known:
        return
    known.sort(key=lambda slab: -(slab.probability or 0.0))
    print_table(
        console,
        ("position", "probability", "peak (L, P, H)", "SOPInstanceUID"),
        [
            (
                f"{slab.position_mm:.1f} mm",
                probability_text(slab.probability or 0.0),
                "-"
                if slab.attention is None
                else "{:.0f}, {:.0f}, {:.0f} mm".format(*slab.attention.peak_mm),
                slab.sop_instance_uid
                + (f" frame {slab.frame_number}" if slab.frame_number is not None else ""),
            )
            for slab in known[:_SHOWN_SLABS]
        ],
        title="slabs with the highest probability, and where the network looked",
    )
