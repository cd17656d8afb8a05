"""``pe-infer demo``: a synthetic patient at a scanner's pace, and the verdict beside the truth."""

import time
from dataclasses import replace
from typing import Annotated, Final

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_infer.cli.options import BundleOption, EngineOption
from pe_infer.cli.verdict import print_result, slice_meter
from pe_infer.detector import Detector
from pe_infer.engines.base import AUTO
from pe_infer.phantom import DEFAULT, PhantomStudy, generate
from pe_infer.phantom.truth import distance_mm, embolus_voxels_mm
from pe_infer.result import StudyResult

SLICE_SPACING_MM: Final = 1.0
NEAR_MM: Final = 10.0
_SHOWN: Final = 5


def demo_command(
    *,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same patient.", min=0)] = 7,
    positive: Annotated[
        bool | None,
        typer.Option(
            "--positive/--negative", help="With or without emboli; by the seed if not given."
        ),
    ] = None,
    bundle: BundleOption = "pe",
    engine: EngineOption = AUTO,
    rate: Annotated[float, typer.Option("--rate", help="Slices per second.", min=0.1)] = 30.0,
) -> None:
    """Stream a phantom study at scanner pace; print the verdict beside the truth, and the latency.

    The exit status is 0 whether the verdict is right or wrong: it is printed.
    """
    console = Console(highlight=False)
    if positive is None:
        positive = bool(np.random.default_rng(seed).integers(2))
    config = replace(DEFAULT, slice_spacing_mm=(SLICE_SPACING_MM, SLICE_SPACING_MM))
    with console.status("making a synthetic patient ..."):
        study = generate(seed, positive=positive, config=config)
    console.print(
        f"synthetic patient {seed}: {len(study.slices)} slices {SLICE_SPACING_MM:g} mm apart, "
        f"{len(study.emboli)} emboli",
        soft_wrap=True,
    )
    with console.status("loading the bundle and compiling it for this processor ..."):
        detector = Detector(bundle, engine=engine)
    with detector:
        pushes_ms, result = _stream(detector, study, rate, console)
    print_result(result, console)
    _print_truth(study, result, console)
    console.print(
        f"push: median {np.median(pushes_ms):.1f} ms, longest {max(pushes_ms):.1f} ms per slice; "
        f"last slice to result: {1000 * result.timings.last_slice_to_result_s:.0f} ms",
        soft_wrap=True,
    )


def _stream(
    detector: Detector, study: PhantomStudy, slices_per_s: float, console: Console
) -> tuple[list[float], StudyResult]:
    pushes_ms = []
    slices = study.slices[::-1]
    with detector.open() as stream, slice_meter(console, "scanning") as meter:
        due = time.perf_counter()
        for done, image in enumerate(slices, start=1):
            time.sleep(max(0.0, due - time.perf_counter()))
            due += 1.0 / slices_per_s
            started = time.perf_counter()
            updates = stream.push(image)
            pushes_ms.append(1000 * (time.perf_counter() - started))
            for update in updates:
                meter.update(update)
            meter.advance(done, len(slices))
        return pushes_ms, stream.finish()


def _print_truth(study: PhantomStudy, result: StudyResult, console: Console) -> None:
    right = result.positive == study.positive
    truth = "emboli" if study.positive else "no emboli"
    line = Text(f"truth: {truth}; the verdict is ")
    line.append("right" if right else "WRONG", style="bold green" if right else "bold red")
    console.print(line)
    if not study.positive:
        return
    voxels = embolus_voxels_mm(study)
    slabs = sorted(result.evidence, key=lambda slab: -(slab.probability or 0.0))
    slabs = [slab for slab in slabs if slab.attention is not None]
    table = Table(title="where the network looked", title_justify="left", box=box.SIMPLE)
    for column in ("slab", "probability", "attention peak to nearest embolus"):
        table.add_column(column)
    for slab in slabs[:_SHOWN]:
        if slab.attention is None:
            continue
        away = distance_mm(voxels, slab.attention.peak_mm)
        style = "green" if away <= NEAR_MM else "yellow"
        table.add_row(
            f"{slab.position_mm:.1f} mm",
            "-" if slab.probability is None else f"{slab.probability:.3f}",
            Text(f"{away:.1f} mm", style),
        )
    console.print(table)
    emboli = Table(title="emboli, largest first", title_justify="left", box=box.SIMPLE)
    for column in ("place", "kind", "volume", "centre (L, P, H)"):
        emboli.add_column(column)
    for embolus in study.emboli[:_SHOWN]:
        centre = "({:.0f}, {:.0f}, {:.0f}) mm".format(*embolus.centre_mm)
        emboli.add_row(embolus.place, embolus.kind, f"{embolus.volume_mm3:.0f} mm3", centre)
    console.print(emboli)
