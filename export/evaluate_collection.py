"""Measures a bundle on the real studies of an index, through the public API.

``python -m export.evaluate_collection --bundle NAME --index index.jsonl --out DIR``

Writes ``studies.jsonl`` (a line per study; the command goes on from there when it is given again
for the same bundle, engine and index) and ``evaluation.json``. By default patients of the split
``test`` are measured on; ``held_out`` says whether the bundle never saw them. A study that is
refused or not processed counts as neither positive nor negative: it is listed with its reason.

Intervals are 95 % bootstrap intervals over patients.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.command_line import reported
from export.datasets.collections.gridded import GriddedStudy, to_grid
from export.datasets.collections.index import Entry, Index, read_index
from export.datasets.collections.reading import read_study
from export.datasets.collections.registry import open_collection
from export.measures import auc
from export.training.validation import near_share, peak_hits
from pe_infer import Detector
from pe_infer.errors import ConfigurationError, PeInferError
from pe_infer.result import StudyResult

BOOTSTRAPS = 1000
MIN_MASK_PIXELS = 10  # of a plane, for its peak to be looked for [ours]


@dataclass(frozen=True, kw_only=True)
class PlaneCase:
    """One slab whose middle plane has a label, and which passed the gate.

    Attributes:
        position_mm: Of the middle plane.
        positive: Whether the finding is there.
        probability: Of the slab.
        hit: Whether the attention peak lies within 10 mm of the mask; ``None`` without a mask.
        chance: Share of the patient in the plane that does; ``None`` without a mask.
    """

    position_mm: float
    positive: bool
    probability: float
    hit: bool | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class CollectionCase:
    """What the bundle said of one study.

    Attributes:
        study: Its identifier.
        patient: Whose it is.
        positive: What the collection says.
        types: Kinds of finding that the collection says are there.
        probability: What the bundle said; ``None`` if it said nothing.
        called: Whether that reaches the threshold.
        threshold: Of the operating point.
        refused: Code of the reason why there is no verdict.
        message: The reason in words.
        flags: What was tolerated.
        gated_positives: Positive planes that the gate kept from the network.
        planes: Labelled slabs.
    """

    study: str
    patient: str
    positive: bool
    types: list[str]
    probability: float | None = None
    called: bool | None = None
    threshold: float | None = None
    refused: str | None = None
    message: str | None = None
    flags: list[str] = field(default_factory=list)
    gated_positives: int = 0
    planes: list[PlaneCase] = field(default_factory=list)


def evaluate_study(detector: Detector, index: Index, entry: Entry) -> CollectionCase:
    """One study through the detector; a refusal is a result."""
    study = entry.study
    kinds = [kind for kind, there in study.types.items() if there]
    known: dict[str, Any] = {
        "study": study.study,
        "patient": study.patient,
        "positive": study.positive,
        "types": kinds,
    }
    manifest = detector.bundle.manifest
    try:
        real = read_study(
            open_collection(index.collection),
            study,
            index.root,
            prefer_contrast=manifest.scope.contrast != "forbidden",
        )
        result = detector.detect(real.slices)
        gridded = to_grid(real, study, manifest.grid)
    except PeInferError as exc:
        return CollectionCase(**known, refused=str(exc.code), message=str(exc))
    flags = sorted({str(flag.flag) for flag in (*real.flags, *result.quality)})
    if result.not_processed is not None:
        reason = result.not_processed
        return CollectionCase(**known, refused=reason.code, message=reason.message, flags=flags)
    planes, gated = plane_cases(result, gridded, manifest.grid.spacing_mm)
    return CollectionCase(
        **known,
        probability=result.probability,
        called=result.positive,
        threshold=result.operating_point.threshold,
        flags=flags,
        gated_positives=gated,
        planes=planes,
    )


def plane_cases(
    result: StudyResult, gridded: GriddedStudy, spacing_mm: float
) -> tuple[list[PlaneCase], int]:
    """Labelled slabs of a result, and how many positive ones were gated.

    Where slices have no labels, the planes of a mask have: those without a voxel are clean, those
    with a few are left out.
    """
    labels = gridded.labels
    place = {int(p): i for i, p in enumerate(gridded.positions_um)}
    cases: list[PlaneCase] = []
    gated = 0
    for evidence in result.evidence:
        plane = place[round(evidence.position_mm * 1000)]
        mask = None if gridded.mask is None else gridded.mask[plane]
        if labels is not None:
            positive = None if labels[plane] < 0 else bool(labels[plane])
        else:
            positive = _by_mask(mask)
        gated += evidence.gated and bool(positive)
        if positive is None or evidence.probability is None:
            continue
        hit = chance = None
        if evidence.attention is not None and mask is not None and _by_mask(mask):
            hit = peak_hits(evidence.attention.values, mask, spacing_mm)
            chance = near_share(mask, gridded.hu[plane], spacing_mm)
        cases.append(
            PlaneCase(
                position_mm=evidence.position_mm,
                positive=positive,
                probability=evidence.probability,
                hit=hit,
                chance=chance,
            )
        )
    return cases, gated


def _by_mask(mask: NDArray[np.bool_] | None) -> bool | None:
    if mask is None:
        return None
    pixels = int(mask.sum())
    if pixels >= MIN_MASK_PIXELS:
        return True
    return None if pixels else False


def measures(cases: Sequence[CollectionCase]) -> dict[str, float]:
    """All numbers that get an interval; one that the cases do not define is not a number.

    Args:
        cases: A patient may be there more than once. Those without a verdict are not counted.
    """
    said = [(c.positive, c.probability, c.called) for c in cases if c.probability is not None]
    planes = [plane for case in cases for plane in case.planes]
    hits = [float(plane.hit) for plane in planes if plane.hit is not None]
    chances = [plane.chance for plane in planes if plane.chance is not None]
    positives = [bool(called) for positive, _, called in said if positive]
    negatives = [bool(called) for positive, _, called in said if not positive]
    return {
        "study_auc": auc([p for p, _, _ in said], [s for _, s, _ in said if s is not None]),
        "sensitivity": _mean(positives),
        "specificity": 1.0 - _mean(negatives),
        "slice_auc": auc([p.positive for p in planes], [p.probability for p in planes]),
        "peak_hit": _mean(hits),
        "peak_chance": _mean(chances),
    }


def summary(cases: Sequence[CollectionCase], *, seed: int = 0) -> dict[str, Any]:
    """Measures with intervals, by type, and what got no verdict.

    Args:
        cases: Of any number of patients.
        seed: Of the bootstrap.

    Returns:
        Values for JSON. Measures that the cases do not define are left out.
    """
    by_patient: dict[str, list[CollectionCase]] = {}
    for case in cases:
        by_patient.setdefault(case.patient, []).append(case)
    patients = list(by_patient.values())
    values = measures(cases)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(patients), size=len(patients))
        for name, value in measures([c for i in chosen for c in patients[int(i)]]).items():
            drawn[name].append(value)
    result: dict[str, Any] = {
        name: {
            "value": value,
            "interval": [float(q) for q in np.nanquantile(drawn[name], [0.025, 0.975])],
        }
        for name, value in values.items()
        if not math.isnan(value)
    }
    verdicts = [case for case in cases if case.probability is not None]
    result["patients"] = len(patients)
    result["studies"] = len(cases)
    result["with_verdict"] = len(verdicts)
    result["positive_with_verdict"] = sum(case.positive for case in verdicts)
    result["positive_without_verdict"] = sum(
        case.positive for case in cases if case.probability is None
    )
    result["refused"] = dict(Counter(c.refused for c in cases if c.refused).most_common())
    result["flags"] = dict(Counter(flag for c in cases for flag in c.flags).most_common())
    result["labelled_slices"] = sum(len(case.planes) for case in cases)
    result["gated_positive_slices"] = sum(case.gated_positives for case in cases)
    result["by_type"] = _by_type(verdicts)
    return result


def _by_type(verdicts: Sequence[CollectionCase]) -> list[dict[str, float | int | str]]:
    """Studies with each kind of finding, whatever else they have, against all negative ones."""
    negatives = [case for case in verdicts if not case.positive]
    rows: list[dict[str, float | int | str]] = []
    for kind in sorted({kind for case in verdicts for kind in case.types}):
        positives = [case for case in verdicts if case.positive and kind in case.types]
        values = measures([*positives, *negatives])
        row: dict[str, float | int | str] = {
            "type": kind,
            "studies": len(positives),
            "sensitivity": values["sensitivity"],
        }
        if not math.isnan(values["study_auc"]):
            row["auc"] = values["study_auc"]
        if positives:
            rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def read_cases(path: Path) -> list[CollectionCase]:
    """What an earlier run of the command wrote, without a last line that was cut short."""
    cases: list[CollectionCase] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            values = json.loads(line)
            values["planes"] = [PlaneCase(**plane) for plane in values["planes"]]
            cases.append(CollectionCase(**values))
    return cases


def run(
    detector: Detector,
    index: Index,
    entries: Sequence[Entry],
    out: Path,
    follow: Callable[[Sequence[Entry]], Iterable[Entry]],
    *,
    threshold: str,
) -> list[CollectionCase]:
    """Evaluate every study that is not there yet.

    Args:
        detector: The bundle on an engine.
        index: Of the collection.
        entries: Studies of it.
        out: Folder; cases are kept in one of its own for every bundle, engine, threshold and index.
        follow: Passes the studies that are left through, e.g. to show progress.
        threshold: Name of the operating point.

    Returns:
        The cases of ``entries``, in their order.
    """
    folder = out / case_folder(detector, index, threshold)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "studies.jsonl"
    cases = {case.study: case for case in read_cases(path)}
    path.write_text("".join(map(_line, cases.values())))  # without what was cut short
    for entry in follow([entry for entry in entries if entry.study.study not in cases]):
        case = evaluate_study(detector, index, entry)
        with path.open("a") as file:
            file.write(_line(case))
        cases[case.study] = case
    return [cases[entry.study.study] for entry in entries]


def case_folder(detector: Detector, index: Index, threshold: str) -> str:
    """Name of the folder of what one bundle says of the studies of one index."""
    info, bundle = detector.compiled.info, detector.bundle.sha256
    precision = "-".join(sorted(set(info.precision.values())))
    studies = hashlib.sha256(repr([entry.study for entry in index.entries]).encode()).hexdigest()
    parts = (index.collection, studies[:8], bundle[:12], threshold, info.name, precision)
    return "-".join(parts)


def _line(case: CollectionCase) -> str:
    return json.dumps(asdict(case)) + "\n"


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    index: Annotated[Path, typer.Option(help="Made by export.datasets.index.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    split: Annotated[str, typer.Option(help="train, validation, test, or all.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Stop after this many studies.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the collection lies now.")] = None,
    operating_point: Annotated[str | None, typer.Option(help="One of the bundle's.")] = None,
    engine: Annotated[str, typer.Option(help="Inference engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
) -> None:
    """Evaluate a bundle on an indexed collection of real studies."""
    console = Console()
    with reported(console):
        indexed = read_index(index, root=root)
        entries = indexed.chosen(split)[:limit]
        with Detector(
            bundle, engine=engine, threads=threads, operating_point=operating_point
        ) as detector:
            info, manifest = detector.compiled.info, detector.bundle.manifest
            unseen = held_out(manifest.training, indexed, split)
            point = operating_point or manifest.default_operating_point
            cases = run(
                detector,
                indexed,
                entries,
                out,
                lambda left: track(left, "studies", console=console),
                threshold=point,
            )
            sha256 = detector.bundle.sha256
    result = {
        "bundle": manifest.name,
        "bundle_hash": sha256,
        "operating_point": point,
        "engine": f"{info.name} {info.version}",
        "precision": dict(info.precision),
        "collection": indexed.collection,
        "split": split,
        "held_out": unseen,
        **summary(cases),
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    console.print(table_of(result))


def held_out(training: Mapping[str, Any], index: Index, split: str) -> bool | None:
    """Whether a bundle never saw the patients of a split.

    Args:
        training: ``training`` of the manifest.
        index: Of the collection.
        split: To be measured on.

    Returns:
        ``None`` if the bundle does not say what it was trained on.

    Raises:
        ConfigurationError: It was trained on this collection, split otherwise: any patient may be
            known.
    """
    known: Mapping[str, Mapping[str, float]] | None = training.get("collections")
    if known is None:
        return None
    fractions = known.get(index.collection)
    if fractions is None:
        return True
    if dict(fractions) != asdict(index.fractions):
        raise ConfigurationError(
            f"the bundle was trained on {index.collection} split with {dict(fractions)}, the index "
            f"was made with {asdict(index.fractions)}: its patients may be known. Make the index "
            "with the bundle's fractions."
        )
    return split == "test"


def table_of(result: Mapping[str, Any]) -> Table:
    """The numbers of an evaluation."""
    table = Table(
        "measure",
        "value",
        "95 % interval",
        title=f"{result['with_verdict']} of {result['studies']} studies, "
        f"{result['patients']} patients, {result['collection']} {result['split']}",
    )
    for name, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            table.add_row(name, f"{value['value']:.3f}", f"{low:.3f} to {high:.3f}")
    for row in result["by_type"]:
        number = f"AUC {row['auc']:.3f}" if "auc" in row else ""
        table.add_row(
            f"{row['type']} ({row['studies']} studies)",
            number,
            f"sensitivity {row['sensitivity']:.3f}",
        )
    for reason, count in result["refused"].items():
        table.add_row("no verdict", str(count), reason)
    return table


if __name__ == "__main__":
    typer.run(main)
