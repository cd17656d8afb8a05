"""``pe-infer detect``: judge one study."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pe_infer.cli.options import (
    BundleOption,
    EngineOption,
    Precision,
    PrecisionOption,
    ThreadsOption,
)
from pe_infer.cli.verdict import NOT_PROCESSED, Meter, print_result, slice_meter
from pe_infer.detector import Detector
from pe_infer.dicom import open_series
from pe_infer.engines.base import AUTO
from pe_infer.result import StudyResult

STDOUT = "-"


def detect_command(
    paths: Annotated[list[Path], typer.Argument(help="The study's folder, or its DICOM files.")],
    *,
    bundle: BundleOption = "pe",
    series: Annotated[
        str | None,
        typer.Option(
            "--series", help="SeriesNumber or SeriesInstanceUID, where there are several."
        ),
    ] = None,
    engine: EngineOption = AUTO,
    precision: PrecisionOption = Precision.default,
    threads: ThreadsOption = None,
    operating_point: Annotated[
        str | None, typer.Option("--operating-point", help="One of the bundle's.")
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is standard output.")
    ] = None,
    stream_rate: Annotated[
        float | None,
        typer.Option("--stream-rate", help="Push slices at this many per second.", min=0.01),
    ] = None,
) -> None:
    """Judge one study.

    The exit status is 0 for a verdict of either kind, 10 if it was not processed.
    """
    messages = Console(highlight=False, stderr=json == STDOUT)
    with Detector(
        bundle,
        engine=engine,
        precision=precision.value,
        threads=threads,
        operating_point=operating_point,
    ) as detector:
        with slice_meter(messages, "reading" if stream_rate is None else "streaming") as meter:
            source = paths[0] if len(paths) == 1 else paths
            if stream_rate is None:
                result = detector.detect(
                    source, series=series, on_slice=meter.advance, on_update=meter.update
                )
            else:
                result = _stream(detector, source, series, stream_rate, meter)
        if json == STDOUT:
            typer.echo(result.to_json(indent=1))
        else:
            if json is not None:
                Path(json).write_text(result.to_json(indent=1) + "\n", encoding="utf-8")
            print_result(result, messages)
    if result.status == "not_processed":
        raise typer.Exit(NOT_PROCESSED)


def _stream(
    detector: Detector,
    source: Path | list[Path],
    series: str | None,
    slices_per_s: float,
    meter: Meter,
) -> StudyResult:
    """Push the slices of a study at a scanner's pace, head to feet."""
    wants_contrast = detector.bundle.manifest.scope.contrast != "forbidden"
    found = open_series(source, series, prefer_contrast=wants_contrast)
    with detector.open() as stream:
        due = time.perf_counter()
        flags = found.flags
        for done, image in enumerate(found.slices(descending=True), start=1):
            time.sleep(max(0.0, due - time.perf_counter()))
            due += 1.0 / slices_per_s
            for update in stream.push_slices([image], flags):
                meter.update(update)
            flags = []
            meter.advance(done, len(found))
        return stream.finish()
