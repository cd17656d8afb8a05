"""``pe-infer demo``: a synthetic patient at a scanner's pace, and the verdict beside the truth."""

import time
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from pe_infer.cli.layout import open_console, print_table
from pe_infer.cli.options import BundleOption, EngineOption
from pe_infer.cli.pacing import paced
from pe_infer.cli.phantom_command import usual_spacing
from pe_infer.cli.verdict import NOT_PROCESSED, print_result, slice_meter
from pe_infer.detector import Detector
from pe_infer.engines.base import AUTO
from pe_infer.result import StudyResult, probability_text
from pe_infer.synthetic import phantom_for

if TYPE_CHECKING:  # the phantom brings SciPy, which the other commands need not wait for
    from pe_infer.phantom import Phantom, SyntheticStudy

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

    The patient is what the bundle was made for, a chest or a head. The exit status is 0 whether the
    verdict is right or wrong, 10 if the study was not processed.
    """
    console = open_console()
    if positive is None:
        positive = bool(np.random.default_rng(seed).integers(2))
    with console.status("loading the bundle and compiling it for this processor ..."):
        detector = Detector(bundle, engine=engine)
    with detector:
        manifest = detector.bundle.manifest
        with console.status("making a synthetic patient ..."):
            phantom = usual_spacing(phantom_for(manifest))
            study = phantom.generate(seed, positive=positive)
        low, high = study.slices[0].position_um, study.slices[-1].position_um
        console.print(
            f"synthetic {phantom.anatomy} {seed}: {len(study.slices)} slices over "
            f"{(high - low) / 1000:.0f} mm, {len(study.lesions)} {phantom.lesion_name}"
        )
        pushes_ms, result = _stream(detector, study, rate, console)
    print_result(result, console)
    _print_truth(phantom, study, result, console)
    console.print(
        f"push: median {np.median(pushes_ms):.1f} ms, longest {max(pushes_ms):.1f} ms per slice; "
        f"last slice to result: {1000 * result.timings.last_slice_to_result_s:.0f} ms"
    )
    if result.status == "not_processed":
        raise typer.Exit(NOT_PROCESSED)


def _stream(
    detector: Detector, study: "SyntheticStudy", slices_per_s: float, console: Console
) -> tuple[list[float], StudyResult]:
    """Push a study head to feet; how long each push took, and the result."""
    pushes_ms = []
    slices = study.slices[::-1]
    with detector.open() as stream, slice_meter(console, "scanning") as meter:
        for done, image in enumerate(paced(slices, slices_per_s), start=1):
            started = time.perf_counter()
            updates = stream.push(image)
            pushes_ms.append(1000 * (time.perf_counter() - started))
            for update in updates:
                meter.update(update)
            meter.advance(done, len(slices))
        return pushes_ms, stream.finish()


def _print_truth(
    phantom: "Phantom", study: "SyntheticStudy", result: StudyResult, console: Console
) -> None:
    from pe_infer.phantom.truth import distance_mm, mask_voxels_mm  # noqa: PLC0415  imports SciPy

    line = Text(f"truth: {'' if study.positive else 'no '}{phantom.lesion_name}; ")
    if result.positive is None:
        line.append("there is no verdict", style="bold yellow")
    elif result.positive == study.positive:
        line.append("the verdict is ").append("right", style="bold green")
    else:
        line.append("the verdict is ").append("WRONG", style="bold red")
    console.print(line)
    if not study.positive:
        return
    voxels = mask_voxels_mm(study.slices, study.lesion_mask)
    looked = [
        (slab.probability, slab.position_mm, distance_mm(voxels, slab.attention.peak_mm))
        for slab in result.evidence
        if slab.attention is not None and slab.probability is not None
    ]
    looked.sort(reverse=True)
    if looked:
        print_table(
            console,
            ("slab", "probability", f"attention peak to the nearest of the {phantom.lesion_name}"),
            [
                (
                    f"{position_mm:.1f} mm",
                    probability_text(probability),
                    Text(f"{away_mm:.1f} mm", "green" if away_mm <= NEAR_MM else "yellow"),
                )
                for probability, position_mm, away_mm in looked[:_SHOWN]
            ],
            title="where the network looked",
        )
    print_table(
        console,
        ("place", "kind", "volume", "centre (L, P, H)"),
        [
            (
                lesion.place,
                lesion.kind,
                f"{lesion.volume_mm3:.0f} mm3",
                "({:.0f}, {:.0f}, {:.0f}) mm".format(*lesion.centre_mm),
            )
            for lesion in study.lesions[:_SHOWN]
        ],
        title=f"{phantom.lesion_name}, largest first",
    )
