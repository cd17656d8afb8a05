"""``pe-infer detect``: judge one study."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.text import Text

from pe_infer.choice import choose_bundle
from pe_infer.cli.layout import open_console
from pe_infer.cli.options import (
    ChosenBundleOption,
    EngineOption,
    Precision,
    PrecisionOption,
    ThreadsOption,
)
from pe_infer.cli.pacing import paced
from pe_infer.cli.verdict import NOT_PROCESSED, Meter, print_result, slice_meter
from pe_infer.detector import Detector
from pe_infer.dicom import Series, open_series
from pe_infer.engines.base import AUTO
from pe_infer.errors import ConfigurationError, PeInferError, ScopeError
from pe_infer.result import StudyResult

STDOUT = "-"
Files: TypeAlias = Path | list[Path]
Study: TypeAlias = Files | Series


def detect_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="The study's folder, or its DICOM files."),
    ],
    *,
    bundle: ChosenBundleOption = None,
    series: Annotated[
        str | None,
        typer.Option(
            "--series", help="SeriesNumber or SeriesInstanceUID, where there are several."
        ),
    ] = None,
    engine: EngineOption = AUTO,
    precision: PrecisionOption = Precision.default,
    threads: ThreadsOption = None,
    engines: Annotated[
        Path | None,
        typer.Option(
            "--engines",
            metavar="DIR",
            help="With --engine tensorrt or tensorrt-rtx: engines of pe-infer build. Without it "
            "they are built and kept in the cache, which takes minutes the first time.",
        ),
    ] = None,
    operating_point: Annotated[
        str | None, typer.Option("--operating-point", help="One of the bundle's.")
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is standard output.")
    ] = None,
    dicom_out: Annotated[
        Path | None,
        typer.Option(
            "--dicom-out",
            metavar="DIR",
            help="Write DICOM objects to this folder, new or empty: a structured report, for a "
            "processed study the attention, for a positive one key images. A study that is "
            "refused has none, only its exit status.",
        ),
    ] = None,
    stream_rate: Annotated[
        float | None,
        typer.Option("--stream-rate", help="Push slices at this many per second.", min=0.01),
    ] = None,
) -> None:
    """Judge one study.

    The exit status is 0 for a verdict of either kind, 10 if it was not processed, 6 if the engine,
    or the GPU that it needs, is not there.
    """
    messages = open_console(stderr=json == STDOUT)
    if json not in {None, STDOUT}:
        _check_target(Path(json))
    if dicom_out is not None:
        _check_empty(dicom_out)
    files = paths[0] if len(paths) == 1 else paths
    source: Study = files
    naming = nullcontext() if bundle is None else _naming_the_right_one(bundle, files, series)
    if bundle is None:
        choice = choose_bundle(files, series)
        bundle, source = str(choice.bundle), choice.series
        messages.print(Text(f"bundle {bundle} {choice.version}: {choice.reason}"))
    with Detector(
        bundle,
        engine=engine,
        precision=precision.value,
        threads=threads,
        operating_point=operating_point,
        engines=engines,
    ) as detector:
        reading = "reading" if stream_rate is None else "streaming"
        with naming, slice_meter(messages, reading) as meter:
            study = _opened(detector, source, series)
            if stream_rate is None:
                result = detector.detect(study, on_slice=meter.advance, on_update=meter.update)
            else:
                result = _stream(detector, study, stream_rate, meter)
        if json == STDOUT:
            typer.echo(result.to_json(indent=1))
        else:
            try:
                if json is not None:
                    _write(result, Path(json))
            finally:
                print_result(result, messages)
        if dicom_out is not None:
            _write_objects(result, study, dicom_out, messages)
    if result.status == "not_processed":
        raise typer.Exit(NOT_PROCESSED)


@contextmanager
def _naming_the_right_one(bundle: str, source: Files, series: str | None) -> Iterator[None]:
    """Say which shipped bundle a study asks for, where the one that was named refuses it."""
    try:
        yield
    except ScopeError as error:
        try:
            choice = choose_bundle(source, series)
        except PeInferError:
            raise error from None
        if choice.bundle == bundle:
            raise
        raise ScopeError(
            f"{error}. Bundle {choice.bundle!r} is for it ({choice.reason}): --bundle "
            f"{choice.bundle}, or leave --bundle out.",
            code=error.code,
        ) from error


def _opened(detector: Detector, source: Study, series: str | None) -> Series:
    """Open the series that the detector would choose."""
    if isinstance(source, Series):
        return source
    wants_contrast = detector.bundle.manifest.scope.contrast != "forbidden"
    return open_series(source, series, prefer_contrast=wants_contrast)


def _stream(detector: Detector, found: Series, slices_per_s: float, meter: Meter) -> StudyResult:
    """Push the slices of a study at a scanner's pace, head to feet."""
    with detector.open() as stream:
        flags = found.flags
        images = paced(found.slices(descending=True), slices_per_s)
        for done, image in enumerate(images, start=1):
            for update in stream.push_slices([image], flags):
                meter.update(update)
            flags = []
            meter.advance(done, len(found))
        return stream.finish()


def _check_target(path: Path) -> None:
    """Refuse where no file can be written, before a study is read for it."""
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigurationError(
            f"--json {path}: {problem}. Name a file in a folder that is there."
        )


def _check_empty(folder: Path) -> None:
    """Refuse a folder that objects cannot go to, before a study is read for them."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "holds files already" if folder.is_dir() else "is no folder"
        raise ConfigurationError(f"--dicom-out {folder}: {problem}. Name a new or an empty folder.")


def _write_objects(result: StudyResult, study: Series, folder: Path, messages: Console) -> None:
    from pe_infer.dicom.results import write_results  # noqa: PLC0415  imports highdicom

    written = write_results(result, study.source_files(), folder, made_at=datetime.now(UTC))
    names = ", ".join(item.path.name for item in written)
    messages.print(Text(f"DICOM objects in {folder}: {names}"))


def _write(result: StudyResult, path: Path) -> None:
    try:
        path.write_text(result.to_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"--json {path}: the result cannot be written there: {error.strerror}"
        ) from error
