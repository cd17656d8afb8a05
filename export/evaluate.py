"""Measures a bundle on synthetic studies that training never saw, through the public API.

``python -m export.evaluate --bundle DIR --pairs 100 --first-seed 3000000 --out DIR``

Writes ``studies.jsonl`` (a line per study; the command goes on from there when it is given again
for the same bundle, engine and phantom), ``evaluation.json`` and plots. Seeds that the bundle was
trained or validated on are refused.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.command_line import PhantomOption, reported
from export.datasets.generate import GriddedStudy, to_grid
from export.datasets.labels import slab_label
from export.evaluation_plots import write_plots
from export.held_out import held_out
from export.measures import SlabCase, StudyCase, summary
from export.training.validation import peak_hits
from export.trivial import trivial_scores
from pe_infer import Detector
from pe_infer.errors import Code, InputError
from pe_infer.geometry import PatientGrid
from pe_infer.phantom.chest import DEFAULT, Embolus, PhantomConfig, PhantomStudy, generate_pair
from pe_infer.result import StudyResult


def study_case(
    result: StudyResult,
    study: PhantomStudy,
    gridded: GriddedStudy,
    truth: GriddedStudy,
    largest: Embolus,
    grid: PatientGrid,
) -> StudyCase:
    """Compare a result with the truth.

    Args:
        result: Of ``study``.
        study: The phantom.
        gridded: The phantom on the patient grid.
        truth: The positive study of the pair on the grid; its mask is the control for the negative
            one.
        largest: The largest embolus of the pair.
        grid: The patient grid.

    Raises:
        InputError: The study was not processed.
    """
    if result.probability is None or result.positive is None:
        raise InputError(
            f"phantom {study.seed} was not processed: {result.not_processed}",
            code=Code.INVALID_ARGUMENT,
        )
    clot = truth.mask.sum(axis=(1, 2))
    place = {int(p): i for i, p in enumerate(truth.positions_um)}
    slabs: list[SlabCase] = []
    gated_positives = 0
    for evidence in result.evidence:
        middle = place[round(evidence.position_mm * 1000)]
        label = slab_label(clot, middle, grid.planes_per_slab)
        at_clot = label == "positive"
        gated_positives += evidence.gated and at_clot and study.positive
        if evidence.probability is None or evidence.attention is None or label == "dropped":
            continue
        values = evidence.attention.values
        slabs.append(
            SlabCase(
                position_mm=evidence.position_mm,
                positive=at_clot and study.positive,
                at_clot=at_clot,
                clot_pixels=int(clot[middle]),
                probability=evidence.probability,
                peak=float(values.max()),
                hit=peak_hits(values, truth.mask[middle], grid.spacing_mm) if at_clot else None,
            )
        )
    return StudyCase(
        seed=study.seed,
        positive=study.positive,
        probability=result.probability,
        called=result.positive,
        threshold=result.operating_point.threshold,
        largest_mm3=largest.volume_mm3,
        largest_place=largest.place,
        seconds_after_last_slice=result.timings.last_slice_to_result_s,
        gated_positives=gated_positives,
        slabs=slabs,
        trivial=trivial_scores(gridded.hu),
    )


def evaluate_pair(detector: Detector, seed: int, config: PhantomConfig) -> list[StudyCase]:
    """Both studies of one patient through the detector: with emboli, then without."""
    grid = detector.bundle.manifest.grid
    negative, positive = generate_pair(seed, config)
    truth = to_grid(positive, grid)
    return [
        study_case(
            detector.detect(study.slices),
            study,
            truth if study.positive else to_grid(study, grid),
            truth,
            positive.emboli[0],
            grid,
        )
        for study in (positive, negative)
    ]


def read_cases(path: Path) -> list[StudyCase]:
    """What an earlier run of the command wrote: complete pairs, in the order of the file.

    A last line that an interruption cut short is left out.
    """
    cases: list[StudyCase] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            values = json.loads(line)
            values["slabs"] = [SlabCase(**slab) for slab in values["slabs"]]
            cases.append(StudyCase(**values))
    seeds = [case.seed for case in cases]
    return [case for case in cases if seeds.count(case.seed) == 2]


def run(
    detector: Detector,
    seeds: Sequence[int],
    out: Path,
    config: PhantomConfig,
    follow: Callable[[Sequence[int]], Iterable[int]],
) -> list[StudyCase]:
    """Evaluate every pair that is not there yet.

    Args:
        detector: The bundle on an engine.
        seeds: Of the phantom.
        out: Folder; cases are kept in one of its own for every bundle, engine and phantom.
        config: Of the phantom.
        follow: Passes the seeds that are left through, e.g. to show progress.

    Returns:
        Both studies of every pair of ``seeds`` that is done.
    """
    folder = out / case_folder(detector, config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "studies.jsonl"
    cases = read_cases(path)
    path.write_text("".join(map(_line, cases)))  # without what was cut short
    done = {case.seed for case in cases}
    for seed in follow([s for s in seeds if s not in done]):
        pair = evaluate_pair(detector, seed, config)
        with path.open("a") as file:
            file.writelines(map(_line, pair))
        cases += pair
    wanted = set(seeds)
    return [case for case in cases if case.seed in wanted]


def case_folder(detector: Detector, config: PhantomConfig) -> str:
    """Name of the folder of what one bundle, engine and arithmetic says of one kind of phantom."""
    info, bundle = detector.compiled.info, detector.bundle.sha256
    precision = "-".join(sorted(set(info.precision.values())))
    return f"{bundle[:12]}-{info.name}-{precision}-{config.digest()[:8]}"


def _line(case: StudyCase) -> str:
    return json.dumps(asdict(case)) + "\n"


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    pairs: Annotated[int, typer.Option(help="Pairs of studies.", min=1)] = 100,
    first_seed: Annotated[int, typer.Option(help="Of the phantom.")] = 3_000_000,
    phantom: PhantomOption = None,
    engine: Annotated[str, typer.Option(help="Inference engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
) -> None:
    """Evaluate a bundle on pairs of synthetic studies."""
    console = Console()
    seeds = range(first_seed, first_seed + pairs)
    with reported(console):
        config = PhantomConfig.load(phantom) if phantom else DEFAULT
        with Detector(bundle, engine=engine, threads=threads) as detector:
            training = detector.bundle.manifest.training
            unseen = held_out(training, seeds)
            cases = run(
                detector, seeds, out, config, lambda left: track(left, "pairs", console=console)
            )
    info = detector.compiled.info
    result = {
        "bundle_hash": detector.bundle.sha256,
        "checkpoints": checkpoint_hashes(training),
        "engine": f"{info.name} {info.version}",
        "precision": dict(info.precision),
        "pairs": pairs,
        "first_seed": first_seed,
        "held_out": unseen,
        "phantom_configuration": config.digest(),
        **summary(cases),
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    write_plots(cases, out)
    console.print(_table(result))


def checkpoint_hashes(training: Mapping[str, Any]) -> dict[str, str]:
    """Stage to the sha256 of its checkpoint: which weights a bundle has."""
    return {stage: training[stage]["sha256"] for stage in ("stage1", "stage2") if stage in training}


def _table(result: Mapping[str, Any]) -> Table:
    table = Table("measure", "value", "95 % interval", title=f"{result['pairs']} pairs")
    for name, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            table.add_row(name, f"{value['value']:.3f}", f"{low:.3f} to {high:.3f}")
    for name, number in result["trivial_auc"].items():
        order = result["trivial_paired_order"][name]
        table.add_row(f"AUC of {name} (no network)", f"{number:.3f}", f"paired order {order:.3f}")
    slabs = result["positive_slabs"]
    table.add_row("positive slabs", str(slabs["scored"]), f"{slabs['gated']} more were gated")
    for row in result["by_place"]:
        table.add_row(
            f"largest embolus {row['place']} ({row['studies']} studies)",
            f"AUC {row['auc']:.3f}",
            f"{row['verdicts_right']} verdicts right",
        )
    for row in result["by_clot_size"]:
        table.add_row(
            f"clots from {row['from_px']} px ({row['slabs']} slabs)",
            f"AUC {row['auc_against_twins']:.3f}",
            f"hit {row['hit']:.2f}, control {row['control']:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
