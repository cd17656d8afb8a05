"""Latency of a 300-slice study on this machine, and of the obvious alternatives in the same run.

    python benchmarks/latency.py [--bundle pe] [--engine auto] [--repeats 5] [--json FILE]

A phantom study of 300 slices is written as DICOM; that it has them, and every result the slabs that
the bundle's grid gives, is checked. Then it is:

- pushed at scanner pace (30 slices/s), head to feet and feet to head: latency of every push, last
  slice to result;
- the same with everything left until the last slice, as a script would do it (the alternative to
  streaming);
- read from its folder with `Detector.detect`, on every engine installed, or on the one named.

Besides: the kernel alone, beside scipy.ndimage.zoom (the alternative to the kernel); and cold start
in a new process, with an empty and with a filled cache, and the peak memory of that process.

Figures are medians over the repeats. Nothing here asserts a time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from pe_infer import Detector, Slice, StudyResult
from pe_infer.conclusion import package_versions
from pe_infer.dicom import open_series, write_series
from pe_infer.engines.base import AUTO, cpu_name, installed
from pe_infer.lattice import lattice_for
from pe_infer.phantom.chest import DEFAULT, generate
from pe_infer.preprocess import SliceResampler

SLICES: Final = 300
SLICES_PER_S: Final = 30.0
SEED: Final = 20_001

COLD_START = """
import json, resource, sys, time
started = time.perf_counter()
from pathlib import Path
from pe_infer import Detector
with Detector(sys.argv[1], engine=sys.argv[2], cache_dir=Path(sys.argv[3])) as detector:
    ready = time.perf_counter()
    result = detector.detect(sys.argv[4])
    done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"ready_s": ready - started, "study_s": done - ready, "peak_bytes": peak}))
"""


def main(
    *,
    bundle: Annotated[str, typer.Option(help="A shipped bundle's name, or a folder.")] = "pe",
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Studies per figure.", min=1)] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
) -> None:
    """Measure and print."""
    if (
        json_file is not None and not json_file.parent.is_dir()
    ):  # known before the long work, not after
        raise SystemExit(f"--json {json_file}: there is no folder {json_file.parent}; make it")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="pe_infer-bench-") as scratch:
        folder = Path(scratch) / "study"
        images = _study(folder)
        figures: dict[str, Any] = {"machine": _machine(bundle, engine), "slices": len(images)}
        with Detector(bundle, engine=engine) as detector:
            figures["machine"]["bundle_hash"] = detector.bundle.sha256
            figures["machine"]["engine"] = detector.compiled.info.name
            figures["machine"]["precision"] = sorted(set(detector.compiled.info.precision.values()))
            slabs = expected_slabs(detector, images)
            check_slabs(detector.detect(images), slabs)  # everything is warm from here on
            figures["slabs"] = slabs
            for name, order in (("down", images[::-1]), ("up", images)):
                figures[f"streamed_{name}"] = _paced(detector, order, repeats, console, name, slabs)
            figures["all_at_the_end"] = _at_the_end(detector, images, repeats)
            figures["kernel"] = _kernel(detector, images)
        figures["folder"] = {
            name: _folder(bundle, name, folder, repeats, slabs) for name in engines(engine)
        }
        figures["cold_start"] = _cold_start(bundle, engine, folder, Path(scratch) / "cache")
    _print(figures, console)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _study(folder: Path) -> list[Slice]:
    """300 slices of a positive phantom, 1 mm apart, written to ``folder``; as read back."""
    config = replace(DEFAULT, slice_spacing_mm=(1.0, 1.0))
    study = generate(SEED, positive=True, config=config)
    middle = max(0, len(study.slices) - SLICES) // 2
    write_series(study.slices[middle : middle + SLICES], folder)
    images = list(open_series(folder).slices())
    check_slices(len(images))
    return images


def check_slices(found: int) -> None:
    """End the program where the study is not the one that the figures are said to be of."""
    if found != SLICES:
        raise SystemExit(
            f"the phantom of seed {SEED} gave {found} slices, the figures are for {SLICES}: choose "
            "another SEED in benchmarks/latency.py"
        )


def engines(asked: str) -> tuple[str, ...]:
    """The engines that read the whole folder: the one asked for, or all that are installed."""
    return installed() if asked == AUTO else (asked,)


def expected_slabs(detector: Detector, images: Sequence[Slice]) -> int:
    """How many slabs the bundle's grid makes of the study, those without the organ among them."""
    grid = detector.bundle.manifest.grid
    lattice = lattice_for(grid, [image.geometry.thickness_mm for image in images])
    return len(lattice.centres(sorted(image.position_um for image in images)))


def check_slabs(result: StudyResult, expected: int) -> None:
    """End the program where a result is not of the whole study: its time would say nothing."""
    coverage = result.coverage
    found = coverage.slabs + coverage.gated_slabs
    if result.status != "processed" or found != expected or coverage.slices != SLICES:
        raise SystemExit(
            f"the result is {result.status!r}, of {coverage.slices} slices and {found} slabs, "
            f"expected 'processed', {SLICES} and {expected}: the figures would say nothing"
        )


def _paced(
    detector: Detector,
    order: Sequence[Slice],
    repeats: int,
    console: Console,
    name: str,
    slabs: int,
) -> dict[str, float]:
    pushes_ms, last_ms = [], []
    for _ in range(repeats):
        with (
            console.status(f"streaming {name} at {SLICES_PER_S:g} slices/s ..."),
            detector.open() as stream,
        ):
            due = time.perf_counter()
            for image in order:
                time.sleep(max(0.0, due - time.perf_counter()))
                due += 1.0 / SLICES_PER_S
                started = time.perf_counter()
                stream.push(image)
                pushes_ms.append(1000 * (time.perf_counter() - started))
            last = time.perf_counter()
            result = stream.finish()
            last_ms.append(1000 * (time.perf_counter() - last))
        check_slabs(result, slabs)
    p50, p95, p99 = np.percentile(pushes_ms, [50, 95, 99])
    return {
        "push_p50_ms": p50,
        "push_p95_ms": p95,
        "push_p99_ms": p99,
        "push_max_ms": max(pushes_ms),
        "last_slice_to_result_ms": float(np.median(last_ms)),
        "last_slice_to_result_max_ms": max(last_ms),
    }


def _at_the_end(detector: Detector, images: Sequence[Slice], repeats: int) -> dict[str, float]:
    """The whole study handed over at once after the last slice."""
    return {"last_slice_to_result_ms": 1000 * _median(repeats, lambda: detector.detect(images))}


def _folder(bundle: str, engine: str, folder: Path, repeats: int, slabs: int) -> dict[str, float]:
    with Detector(bundle, engine=engine) as detector:
        check_slabs(detector.detect(folder), slabs)
        return {"seconds": _median(repeats, lambda: detector.detect(folder))}


def _kernel(detector: Detector, images: Sequence[Slice]) -> dict[str, float]:
    grid = detector.bundle.manifest.grid
    resample, some = SliceResampler(grid), images[:40]
    out = np.empty((grid.rows, grid.cols), np.int16)

    def ours() -> None:
        for image in some:
            resample(image, out)

    def scipys() -> None:
        for image in some:
            hu = np.clip(
                image.host_pixels * np.float32(image.rescale_slope) + image.rescale_intercept,
                -1024,
                4095,
            )
            geometry = image.geometry
            factors = (
                geometry.row_spacing_mm / grid.spacing_mm,
                geometry.col_spacing_mm / grid.spacing_mm,
            )
            ndimage.zoom(hu, factors, order=1)

    return {
        "resample_ms": 1000 * _median(5, ours) / len(some),
        "scipy_zoom_ms": 1000 * _median(3, scipys) / len(some),
    }


def _cold_start(bundle: str, engine: str, folder: Path, cache: Path) -> dict[str, dict[str, float]]:
    figures = {}
    cache.mkdir()
    for name in ("empty_cache", "filled_cache"):  # the first fills it for the second
        command = [sys.executable, "-c", COLD_START, bundle, engine, str(cache), str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
        if done.returncode:  # why is on standard error, which is ours
            raise SystemExit(f"cold start, {name}: the new process ended with {done.returncode}")
        figures[name] = json.loads(done.stdout)
    return figures


def _median(repeats: int, action: Callable[[], StudyResult | None]) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _machine(bundle: str, engine: str) -> dict[str, Any]:
    return {
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "bundle": bundle,
        "asked_engine": engine,
        "packages": package_versions(),
    }


def _print(figures: dict[str, Any], console: Console) -> None:
    machine = figures["machine"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, load before "
        f"{machine['load_before']:.1f}; "
        f"{machine['engine']} {'/'.join(machine['precision'])}; "
        f"bundle {machine['bundle']} {machine['bundle_hash'][:12]}; {figures['slices']} slices, "
        f"{figures['slabs']} slabs",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE)
    for column in ("what", "figure", "alternative, same run", "ratio"):
        table.add_column(column)
    late = figures["all_at_the_end"]["last_slice_to_result_ms"]
    for name in ("down", "up"):
        found = figures[f"streamed_{name}"]
        table.add_row(
            f"push, arriving {name}: p50 / p95 / p99 / max",
            " / ".join(f"{found[f'push_{p}_ms']:.1f}" for p in ("p50", "p95", "p99", "max"))
            + " ms",
        )
        ours = found["last_slice_to_result_ms"]
        table.add_row(
            f"last slice to result, arriving {name}",
            f"{ours:.0f} ms",
            f"{late:.0f} ms, all at the end",
            f"{late / ours:.1f}",
        )
    kernel = figures["kernel"]
    table.add_row(
        "kernel, one slice in its plane",
        f"{kernel['resample_ms']:.2f} ms",
        f"{kernel['scipy_zoom_ms']:.2f} ms, scipy.ndimage.zoom",
        f"{kernel['scipy_zoom_ms'] / kernel['resample_ms']:.1f}",
    )
    for name, found in figures["folder"].items():
        table.add_row(f"whole folder, {name}", f"{found['seconds']:.2f} s")
    for name, found in figures["cold_start"].items():
        table.add_row(
            f"new process, {name.replace('_', ' ')}: ready / study / peak memory",
            f"{found['ready_s']:.2f} s / {found['study_s']:.2f} s / "
            f"{found['peak_bytes'] / (1 << 20):.0f} MiB",
        )
    console.print(table)


if __name__ == "__main__":
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(main)
    program()
