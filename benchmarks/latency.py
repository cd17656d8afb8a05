"""Latency of whole studies on this machine, and of the obvious alternatives in the same run.

    python benchmarks/latency.py [--bundle NAME ...] [--engine auto] [--repeats 5] [--json FILE]

For every shipped bundle, or those named, a phantom study of the anatomy that the bundle accepts is
written as DICOM: 300 slices of 1 mm for a chest, 40 of 5 mm for a head. That it is this study is
checked, and that every result has the slabs that the bundle's grid gives. Then it is:

- pushed at scanner pace (a table moving 30 mm/s: 30 slices/s of a chest, 6 of a head), head to feet
  and feet to head: latency of every push, last slice to result;
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from pe_infer import Detector, Slice, StudyResult
from pe_infer.bundle import Bundle, shipped
from pe_infer.conclusion import package_versions
from pe_infer.dicom import open_series, write_series
from pe_infer.engines.base import AUTO, installed
from pe_infer.engines.processor import processor
from pe_infer.lattice import lattice_for
from pe_infer.manifest import Manifest
from pe_infer.preprocess import SliceResampler
from pe_infer.roofline.study import STUDIES
from pe_infer.synthetic import phantom_for

TABLE_MM_PER_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a phantom study with a fixed number of slices is made.

    Attributes:
        anatomy: Of the phantom.
        slices: How many.
        spacing_mm: From one to the next, which is also their thickness.
        seed: Of the patient, whose gantry is not tilted.
        cut_every_mm: Where it is less than ``spacing_mm``, the patient is too short for so many
            slices: they are cut closer and then laid ``spacing_mm`` apart, so that all of them show
            what a bundle looks for, and the last one is not spared by the gate.
    """

    anatomy: str
    slices: int
    spacing_mm: float
    seed: int
    cut_every_mm: float

    @classmethod
    def of(cls, manifest: Manifest) -> "Recipe":
        """The study for a bundle.

        Raises:
            ConfigurationError: No phantom is what the bundle was made for.
        """
        anatomy = phantom_for(manifest).anatomy
        shape, (seed, cut_every_mm) = STUDIES[anatomy], PATIENTS[anatomy]
        return cls(
            anatomy=anatomy,
            slices=shape.slices,
            spacing_mm=shape.spacing_um / 1000,
            seed=seed,
            cut_every_mm=cut_every_mm,
        )

    @property
    def slices_per_s(self) -> float:
        """The pace at which they arrive."""
        return TABLE_MM_PER_S / self.spacing_mm


PATIENTS: Final[Mapping[str, tuple[int, float]]] = {  # seed, cut_every_mm
    "chest": (20_001, 1.0),
    "head": (20_004, 3.2),
}

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
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="A shipped bundle's name, or a folder; once per bundle. All shipped."),
    ] = None,
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
    machine = _machine(engine)
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, load before "
        f"{machine['load_before']:.1f}",
        soft_wrap=True,
    )
    bundles = {}
    for name in bundle or shipped():
        with tempfile.TemporaryDirectory(prefix="pe_infer-bench-") as scratch:
            bundles[name] = _figures(name, engine, repeats, Path(scratch), console)
        _print(name, bundles[name], console)
    if json_file is not None:
        figures = {"machine": machine, "bundles": bundles}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _figures(
    bundle: str, engine: str, repeats: int, scratch: Path, console: Console
) -> dict[str, Any]:
    """Everything that is measured of one bundle."""
    manifest = Bundle.load(bundle).manifest
    recipe, folder = Recipe.of(manifest), scratch / "study"
    with console.status(f"making a {recipe.anatomy} ..."):
        images = written(recipe, manifest, folder)
    with Detector(bundle, engine=engine) as detector:
        slabs = expected_slabs(detector, images)
        study = Study(images=images, slabs=slabs, slices_per_s=recipe.slices_per_s)
        warm = detector.detect(images)  # everything is warm from here on
        study.check(warm)
        info = detector.compiled.info
        figures: dict[str, Any] = {
            "bundle_hash": detector.bundle.sha256,
            "engine": info.name,
            "precision": sorted(set(info.precision.values())),
            "anatomy": recipe.anatomy,
            "slices": len(images),
            "spacing_mm": recipe.spacing_mm,
            "slabs": slabs,
            "gated_slabs": warm.coverage.gated_slabs,
            "slices_per_s": recipe.slices_per_s,
        }
        for arriving, order in (("down", images[::-1]), ("up", images)):
            with console.status(f"streaming {arriving} at {recipe.slices_per_s:g} slices/s ..."):
                figures[f"streamed_{arriving}"] = _paced(detector, study, order, repeats)
        figures["all_at_the_end"] = _at_the_end(detector, images, repeats)
        figures["kernel"] = _kernel(detector, images)
    figures["folder"] = {
        name: _folder(bundle, name, folder, repeats, study) for name in engines(engine)
    }
    figures["cold_start"] = _cold_start(bundle, engine, folder, scratch / "cache")
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is measured with.

    Attributes:
        images: In ascending position.
        slabs: That the bundle's grid makes of them.
        slices_per_s: The pace at which they arrive.
    """

    images: Sequence[Slice]
    slabs: int
    slices_per_s: float

    def check(self, result: StudyResult) -> None:
        """End the program where a result is not of the whole study: its time would say nothing."""
        coverage, slices = result.coverage, len(self.images)
        found = coverage.slabs + coverage.gated_slabs
        if result.status != "processed" or found != self.slabs or coverage.slices != slices:
            raise SystemExit(
                f"the result is {result.status!r}, of {coverage.slices} slices and {found} slabs, "
                f"expected 'processed', {slices} and {self.slabs}: the figures would say nothing"
            )


def written(recipe: Recipe, manifest: Manifest, folder: Path) -> list[Slice]:
    """The middle slices of a positive phantom, written to ``folder``; as read back."""
    phantom = phantom_for(manifest).with_spacing(recipe.cut_every_mm)
    made = phantom.generate(recipe.seed, positive=True).slices
    middle = max(0, len(made) - recipe.slices) // 2
    write_series(laid(made[middle : middle + recipe.slices], recipe.spacing_mm), folder)
    images = list(open_series(folder).slices())
    check_study(images, recipe)
    return images


def laid(images: Sequence[Slice], spacing_mm: float) -> list[Slice]:
    """The same slices with so much from one to the next, along the table, and as thick."""
    x, y, z = images[0].geometry.image_position_mm
    return [
        replace(
            image,
            geometry=replace(
                image.geometry,
                image_position_mm=(x, y, z + index * spacing_mm),
                thickness_mm=spacing_mm,
            ),
        )
        for index, image in enumerate(images)
    ]


def check_study(images: Sequence[Slice], recipe: Recipe) -> None:
    """End the program where the study is not the one that the figures are said to be of."""
    positions = [image.position_um for image in images]
    steps_mm = {round(step / 1000, 3) for step in np.diff(positions).tolist()}
    if len(images) != recipe.slices or steps_mm != {recipe.spacing_mm}:
        raise SystemExit(
            f"the {recipe.anatomy} of seed {recipe.seed} gave {len(images)} slices, "
            f"{sorted(steps_mm)} mm apart, the figures are for {recipe.slices}, "
            f"{recipe.spacing_mm:g} mm apart: choose another seed in PATIENTS, "
            "benchmarks/latency.py"
        )


def engines(asked: str) -> tuple[str, ...]:
    """The engines that read the whole folder: the one asked for, or all that are installed."""
    return installed() if asked == AUTO else (asked,)


def expected_slabs(detector: Detector, images: Sequence[Slice]) -> int:
    """How many slabs the bundle's grid makes of the study, those without the organ among them."""
    grid = detector.bundle.manifest.grid
    lattice = lattice_for(grid, [image.geometry.thickness_mm for image in images])
    return len(lattice.centres(sorted(image.position_um for image in images)))


def _paced(
    detector: Detector, study: Study, order: Sequence[Slice], repeats: int
) -> dict[str, float]:
    pushes_ms, last_ms = [], []
    for _ in range(repeats):
        with detector.open() as stream:
            due = time.perf_counter()
            for image in order:
                time.sleep(max(0.0, due - time.perf_counter()))
                due += 1.0 / study.slices_per_s
                started = time.perf_counter()
                stream.push(image)
                pushes_ms.append(1000 * (time.perf_counter() - started))
            last = time.perf_counter()
            result = stream.finish()
            last_ms.append(1000 * (time.perf_counter() - last))
        study.check(result)
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


def _folder(bundle: str, engine: str, folder: Path, repeats: int, study: Study) -> dict[str, float]:
    with Detector(bundle, engine=engine) as detector:
        study.check(detector.detect(folder))
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


def _machine(engine: str) -> dict[str, Any]:
    return {
        "processor": processor().name,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "asked_engine": engine,
        "packages": package_versions(),
    }


def _print(bundle: str, figures: dict[str, Any], console: Console) -> None:
    console.print(
        f"bundle {bundle} {figures['bundle_hash'][:12]}; "
        f"{figures['engine']} {'/'.join(figures['precision'])}; {figures['anatomy']}, "
        f"{figures['slices']} slices of {figures['spacing_mm']:g} mm at "
        f"{figures['slices_per_s']:g} slices/s, {figures['slabs']} slabs, "
        f"{figures['gated_slabs']} of them gated",
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
