"""Measures a bundle on synthetic studies that training never saw, through the public API.

``python -m export.evaluate --bundle DIR --pairs 100 --first-seed 3000000 --out DIR``

Writes ``studies.jsonl`` (a line per study; the command goes on from there when it is given again),
``evaluation.json`` and plots. Intervals are 95 % bootstrap intervals over patients: both studies of
a pair are drawn together.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from export.datasets.generate import GriddedStudy, to_grid
from export.datasets.labels import slab_label
from export.evaluation_plots import write_plots
from export.training.validation import peak_hits
from export.trivial import NAMES, trivial_scores
from pe_infer import Detector
from pe_infer.errors import Code, InputError, PeInferError
from pe_infer.phantom import DEFAULT, Embolus, PhantomConfig, PhantomStudy, generate_pair
from pe_infer.result import StudyResult

BOOTSTRAPS = 1000
SIZES_PX = (12, 50, 150, 500, 10**9)


@dataclass(frozen=True, kw_only=True)
class SlabCase:
    """One slab: positive, or the same place in the patient without emboli, or negative.

    Attributes:
        position_mm: Of the middle plane.
        positive: Whether the middle plane shows enough clot.
        at_clot: Whether it is positive, or the twin of a positive slab.
        clot_pixels: Clot pixels of the middle plane (of the positive twin).
        probability: Stage-1 probability.
        peak: Highest value of the raw attention map.
        hit: Whether the attention peak lies within 10 mm of the clot (of the positive twin);
            ``None`` elsewhere.
    """

    position_mm: float
    positive: bool
    at_clot: bool
    clot_pixels: int
    probability: float
    peak: float
    hit: bool | None


@dataclass(frozen=True, kw_only=True)
class StudyCase:
    """What the bundle said of one study, and what network-free scores say of it.

    Attributes:
        seed: Of the phantom.
        positive: Whether the study has emboli.
        probability: What the bundle said.
        called: Whether that reaches the threshold.
        threshold: Of the operating point.
        largest_mm3: Volume of the largest embolus of the patient, in both studies of the pair.
        largest_place: Its artery.
        seconds_after_last_slice: From the last slice to the result.
        slabs: Slabs with a label.
        trivial: Score name to score.
    """

    seed: int
    positive: bool
    probability: float
    called: bool
    threshold: float
    largest_mm3: float
    largest_place: str
    seconds_after_last_slice: float
    slabs: list[SlabCase] = field(default_factory=list)
    trivial: dict[str, float] = field(default_factory=dict)


def study_case(
    result: StudyResult,
    study: PhantomStudy,
    gridded: GriddedStudy,
    truth: GriddedStudy,
    largest: Embolus,
    planes: int,
) -> StudyCase:
    """Compare a result with the truth.

    Args:
        result: Of ``study``.
        study: The phantom.
        gridded: The phantom on the patient grid.
        truth: The positive study of the pair on the grid; its mask is the control for the negative
            one.
        largest: The largest embolus of the pair.
        planes: Planes per slab.
    """
    if result.probability is None or result.positive is None:
        raise InputError(
            f"phantom {study.seed} was not processed: {result.not_processed}",
            code=Code.INVALID_ARGUMENT,
        )
    clot = truth.mask.sum(axis=(1, 2))
    place = {int(p): i for i, p in enumerate(truth.positions_um)}
    spacing_mm = 0.0
    slabs: list[SlabCase] = []
    for evidence in result.evidence:
        middle = place[round(evidence.position_mm * 1000)]
        label = slab_label(clot, middle, planes)
        if evidence.probability is None or evidence.attention is None or label == "dropped":
            continue
        values = evidence.attention.values
        spacing_mm = spacing_mm or _cell_mm(evidence.attention.patient_affine) / 16
        at_clot = label == "positive"
        hit = peak_hits(values, truth.mask[middle], spacing_mm) if at_clot else None
        slabs.append(
            SlabCase(
                position_mm=evidence.position_mm,
                positive=at_clot and study.positive,
                at_clot=at_clot,
                clot_pixels=int(clot[middle]),
                probability=evidence.probability,
                peak=float(values.max()),
                hit=hit,
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
        slabs=slabs,
        trivial=trivial_scores(gridded.hu),
    )


def _cell_mm(affine: Sequence[Sequence[float]]) -> float:
    return float(np.linalg.norm([row[0] for row in affine][:3]))


def auc(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """ROC AUC; 0.5 where only one class is there."""
    return float(roc_auc_score(truth, scores)) if len(set(truth)) > 1 else 0.5


def measures(studies: Sequence[StudyCase]) -> dict[str, float]:
    """All numbers that get an interval; both studies of every pair are there, in one order."""
    slabs = [slab for study in studies for slab in study.slabs]
    hits = [s.hit for s in slabs if s.positive and s.hit is not None]
    controls = [s.hit for s in slabs if not s.positive and s.hit is not None]
    positives = [s.called for s in studies if s.positive]
    negatives = [s.called for s in studies if not s.positive]
    return {
        "study_auc": auc([s.positive for s in studies], [s.probability for s in studies]),
        "sensitivity": float(np.mean(positives)),
        "specificity": 1.0 - float(np.mean(negatives)),
        "slab_auc": auc([s.positive for s in slabs], [s.probability for s in slabs]),
        "slab_peak_auc": auc([s.positive for s in slabs], [s.peak for s in slabs]),
        "peak_hit": float(np.mean(hits)),
        "peak_control": float(np.mean(controls)),
        "paired_order": float(np.mean(_paired(studies))),
    }


def _paired(studies: Sequence[StudyCase]) -> list[float]:
    """For every patient: 1 if the study with emboli has the higher probability, 0.5 if equal."""
    positives = [s for s in studies if s.positive]
    negatives = [s for s in studies if not s.positive]
    return [
        float(p.probability > n.probability) + 0.5 * (p.probability == n.probability)
        for p, n in zip(positives, negatives, strict=True)
    ]


def summary(studies: Sequence[StudyCase], *, seed: int = 0) -> dict[str, Any]:
    """Measures with intervals, by clot size, and of the trivial scores.

    Args:
        studies: Both studies of every pair.
        seed: Of the bootstrap.
    """
    by_seed: dict[int, list[StudyCase]] = {}
    for study in studies:
        by_seed.setdefault(study.seed, []).append(study)
    seeds = list(by_seed)
    values = measures(studies)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(seeds), size=len(seeds))
        sample = [study for i in chosen for study in by_seed[seeds[int(i)]]]
        for name, value in measures(sample).items():
            drawn[name].append(value)
    result: dict[str, Any] = {
        name: {
            "value": value,
            "interval": [float(q) for q in np.nanquantile(drawn[name], [0.025, 0.975])],
        }
        for name, value in values.items()
    }
    truth = [s.positive for s in studies]
    result["trivial_auc"] = {name: auc(truth, [s.trivial[name] for s in studies]) for name in NAMES}
    result["by_clot_size"] = _by_size(studies)
    result["by_place"] = _by_place(studies)
    return result


def _by_place(studies: Sequence[StudyCase]) -> list[dict[str, float | int | str]]:
    """Verdicts by the artery of the largest embolus of the patient."""
    rows: list[dict[str, float | int | str]] = []
    for name, wanted in (("lobar or larger", False), ("segmental or smaller", True)):
        chosen = [s for s in studies if ("segmental" in s.largest_place) is wanted]
        if chosen:
            rows.append(
                {
                    "place": name,
                    "studies": len(chosen),
                    "verdicts_right": sum(s.called is s.positive for s in chosen),
                    "auc": auc([s.positive for s in chosen], [s.probability for s in chosen]),
                    "sensitivity": float(np.mean([s.called for s in chosen if s.positive])),
                }
            )
    return rows


def _by_size(studies: Sequence[StudyCase]) -> list[dict[str, float | int]]:
    rows: list[dict[str, float | int]] = []
    at_clot = [slab for study in studies for slab in study.slabs if slab.at_clot]
    for low, high in pairwise(SIZES_PX):
        slabs = [s for s in at_clot if low <= s.clot_pixels < high]
        positives = [s for s in slabs if s.positive]
        twins = [s for s in slabs if not s.positive]
        if positives and twins:
            rows.append(
                {
                    "from_px": low,
                    "to_px": high,
                    "slabs": len(positives),
                    "auc_against_twins": auc(
                        [s.positive for s in slabs], [s.probability for s in slabs]
                    ),
                    "hit": float(np.mean([bool(s.hit) for s in positives])),
                    "control": float(np.mean([bool(s.hit) for s in twins])),
                }
            )
    return rows


def evaluate_pair(detector: Detector, seed: int, config: PhantomConfig) -> list[StudyCase]:
    """Both studies of one patient through the detector."""
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
            grid.planes_per_slab,
        )
        for study in (positive, negative)
    ]


def read_cases(path: Path) -> list[StudyCase]:
    """What an earlier run of the command wrote."""
    cases: list[StudyCase] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line)
        values["slabs"] = [SlabCase(**slab) for slab in values["slabs"]]
        cases.append(StudyCase(**values))
    return cases


def run(
    detector: Detector,
    seeds: Sequence[int],
    out: Path,
    config: PhantomConfig,
    follow: Callable[[Sequence[int]], Sequence[int]],
) -> list[StudyCase]:
    """Evaluate every pair that ``out/studies.jsonl`` does not have yet."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "studies.jsonl"
    cases = read_cases(path)
    done = {case.seed for case in cases}
    for seed in follow([s for s in seeds if s not in done]):
        pair = evaluate_pair(detector, seed, config)
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(case)) + "\n" for case in pair)
        cases += pair
    return [case for case in cases if case.seed in set(seeds)]


def main(
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    pairs: Annotated[int, typer.Option(help="Pairs of studies.")] = 100,
    first_seed: Annotated[int, typer.Option(help="Of the phantom.")] = 3_000_000,
    phantom: Annotated[Path | None, typer.Option(help="Phantom configuration.")] = None,
    engine: Annotated[str, typer.Option(help="Inference engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
) -> None:
    """Evaluate a bundle on pairs of synthetic studies."""
    console = Console()
    config = PhantomConfig.load(phantom) if phantom else DEFAULT
    seeds = range(first_seed, first_seed + pairs)
    try:
        with Detector(bundle, engine=engine, threads=threads) as detector:
            identity = detector.bundle.sha256
            cases = run(
                detector,
                seeds,
                out / identity[:12],
                config,
                lambda left: track(left, "pairs", console=console),  # type: ignore[arg-type, return-value]
            )
    except PeInferError as exc:
        console.print(f"[red]error:[/] {exc}")
        raise typer.Exit(exc.exit_code) from exc
    result = {
        "bundle_hash": identity,
        "pairs": pairs,
        "first_seed": first_seed,
        "phantom_configuration": config.digest(),
        **summary(cases),
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=1))
    write_plots(cases, out)
    console.print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    table = Table("measure", "value", "95 % interval", title=f"{result['pairs']} pairs")
    for name, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            table.add_row(name, f"{value['value']:.3f}", f"{low:.3f} to {high:.3f}")
    for name, number in result["trivial_auc"].items():
        table.add_row(f"AUC of {name} (no network)", f"{number:.3f}", "")
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
