"""``pe-infer inspect``: what DICOM files hold, whether they can be read, and what to do if not."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_infer.choice import match, shipped_scopes
from pe_infer.cli.layout import printable
from pe_infer.dicom import InspectReport, SeriesReport, inspect
from pe_infer.errors import InputError, ScopeError
from pe_infer.manifest import Scope

_NAME_WIDTH = 24
_TOLERATED = "yellow"
_REFUSED = "red"


def inspect_command(
    paths: Annotated[list[Path], typer.Argument(help="Folders or DICOM files.")],
    series: Annotated[
        str | None, typer.Option("--series", help="Only this SeriesNumber or SeriesInstanceUID.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,  # noqa: FBT002
) -> None:
    """Report the series in folders and files: geometry, encoding, digests, and what is in the way.

    The exit status is 0 if there is an axial CT series and every CT image can be read, otherwise 3.
    """
    report = inspect(paths, series=series)
    if json:
        typer.echo(report.to_json())
    else:
        print_report(report, Console(highlight=False))
    if not report.usable:
        raise typer.Exit(InputError.exit_code)


def print_report(report: InspectReport, console: Console) -> None:
    """Print a report: tables in a terminal, one line per fact elsewhere."""
    scopes = shipped_scopes()
    for found in report.series:
        rows = [*_rows(found), *_bundle(found, scopes), *_remarks(found)]
        if console.is_terminal:
            console.print(_table(found.summary.label, rows))
            continue
        _print_line(console, found.summary.label)
        for name, value, style in rows:
            _print_line(console, f"  {name:<{_NAME_WIDTH}}{value}", style)
    for refusal in report.refusals:
        _print_line(console, f"refused [{refusal.code}] {refusal.message}", _REFUSED)
    if report.skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items()))
        _print_line(console, f"skipped: {counts}", _TOLERATED)
    if not report.series and not report.refusals:
        _print_line(console, "no DICOM image was found. Give a folder of CT images.", _REFUSED)


def _print_line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(printable(text), style=style), soft_wrap=True)


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(
        title=Text(printable(title)), title_justify="left", show_header=False, box=box.ROUNDED
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, style in rows:
        table.add_row(name, Text(printable(value), style=style))
    return table


def _remarks(report: SeriesReport) -> list[tuple[str, str, str]]:
    rows = [("flag", f"{flag.flag}: {flag.message}", _TOLERATED) for flag in report.flags]
    if report.summary.refusal is not None:
        refusal = report.summary.refusal
        rows.append(("not usable", f"[{refusal.code}] {refusal.message}", _REFUSED))
    rows += [("refused", f"[{r.code}] {r.message}", _REFUSED) for r in report.refusals]
    return rows


def _bundle(report: SeriesReport, scopes: dict[str, Scope]) -> list[tuple[str, str, str]]:
    """Which shipped bundle the series asks for, and why."""
    if report.info is None or report.summary.refusal is not None:
        return []
    try:
        found = match(report.info, scopes)
    except ScopeError as exc:
        return [("bundle", f"none: {exc}", _TOLERATED)]
    return [("bundle", f"{found.bundle}: {found.reason}", "")]


def _rows(report: SeriesReport) -> list[tuple[str, str, str]]:
    return [(name, value, "") for name, value in _facts(report)]


def _facts(report: SeriesReport) -> list[tuple[str, str]]:
    summary = report.summary
    image_type = "\\".join(summary.image_type)
    sizes = report.sizes or [(summary.rows or "?", summary.cols or "?")]
    size = " / ".join(f"{rows} x {cols}" for rows, cols in sizes)
    rows = [
        ("series", summary.series_instance_uid),
        ("kind", f"{summary.modality or '?'}, {summary.sop_class}, {image_type}"),
        ("encoding", ", ".join(summary.transfer_syntaxes)),
        (
            "images",
            f"{summary.slices} in {summary.instances} instances, {size}",
        ),
    ]
    if report.geometry is None:
        return rows
    geometry = report.geometry
    rows += [
        ("pixel", f"{_mm(report.row_spacing_mm)} x {_mm(report.col_spacing_mm)}"),
        ("thickness", _mm(report.thicknesses_mm) if report.thicknesses_mm else "unknown"),
        ("rows run", _direction(report.row_direction)),
        ("columns run", _direction(report.col_direction)),
        ("position (to the head)", _range_mm(geometry.positions_um)),
    ]
    if geometry.nominal_step_um is not None:
        low, high = min(geometry.steps_um) / 1000, max(geometry.steps_um) / 1000
        rows.append(
            (
                "step",
                f"min {low:.3f}, median {geometry.nominal_step_um / 1000:.3f}, max {high:.3f} mm",
            )
        )
    rows += [
        (
            "gaps",
            "; ".join(
                f"{g.lower_um / 1000:.1f} to {g.upper_um / 1000:.1f} mm" for g in geometry.gaps
            )
            or "none",
        ),
        ("shared positions", str(len(geometry.shared_positions_um))),
        ("frames of reference", str(report.frames_of_reference)),
        ("gantry tilt", f"{geometry.tilt_deg:.1f} degrees"),
        (
            "rescale",
            "; ".join(
                f"{slope:g} * value + {intercept:g} HU" for slope, intercept in report.rescales
            ),
        ),
        (
            "padding",
            "; ".join(f"{low} to {high}" for low, high in report.paddings) or "none declared",
        ),
    ]
    pixels = report.pixels
    if pixels is not None:
        rows.append(("pixel sha256", pixels.sha256 or "not all images could be decoded"))
        if pixels.low_hu is not None and pixels.high_hu is not None:
            values = f"{pixels.low_hu:.0f} to {pixels.high_hu:.0f} HU"
            rows.append(("values", f"{values}, {pixels.padded_fraction:.1%} padding"))
        if pixels.padding_ignored:
            rows.append(("padding not believed", f"in {pixels.padding_ignored} images"))
    return rows


def _range_mm(positions_um: tuple[int, ...]) -> str:
    return f"{positions_um[0] / 1000:.2f} to {positions_um[-1] / 1000:.2f} mm"


def _mm(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:g}" for value in values) + " mm"


def _direction(direction: tuple[float, float, float] | None) -> str:
    return "" if direction is None else "(" + ", ".join(f"{c:+.4f}" for c in direction) + ")"
