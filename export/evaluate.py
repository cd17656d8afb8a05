"""Measures a bundle on synthetic studies that training never saw, through the public API.

``python -m export.evaluate --bundle DIR --pairs 100 --first-seed 3000000 --out DIR``

Writes ``studies.jsonl`` (a line per study; the command goes on from there when it is given again
for the same bundle, engine and phantom), ``evaluation.json`` and plots. Seeds that the bundle was
trained or validated on are refused. ``--phantom`` names a configuration of the bundle's anatomy,
e.g. ``export/configs/ich-shifted.toml``: studies unlike those it was trained on.
``--semi-synthetic`` names a folder with a real series instead, into which findings are painted;
``held_out`` is true of it only where the bundle names all scans that its training painted into, and
none of them lies in a folder of that name.

A patient of whom either study is not processed is in no measure: ``not_processed`` counts them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.anatomies import ANATOMIES, ARRIVAL, FEET_FIRST, HEAD_FIRST
from export.calibration import PlattScaling, calibration_report
from export.command_line import PhantomOption, reported
from export.datasets.generate import GriddedStudy, to_grid
from export.datasets.labels import slab_label
from export.datasets.semisynthetic.painted import RealPairs
from export.evaluation_plots import write_plots, write_reliability
from export.held_out import held_out, unseen_background
from export.measures import (
    PEAKS,
    Cases,
    RefusedPair,
    SlabCase,
    StudyCase,
    not_processed,
    reasons_text,
    summary,
)
from export.phantoms import (
    AnatomyOption,
    ArteriesOption,
    RealSource,
    SemiSyntheticOption,
    VolumeOption,
    chosen_phantom,
)
from export.training.validation import peak_hits
from pe_infer import Detector
from pe_infer.errors import Code, ConfigurationError, InputError
from pe_infer.geometry import PatientGrid
from pe_infer.phantom import Lesion, SyntheticStudy, open_phantom
from pe_infer.result import StudyResult, Update

CASE_VERSION: Final = 6  # of the lines in studies.jsonl
CASES_FILE, RESULT_FILE = "studies.jsonl", "evaluation.json"

Pair: TypeAlias = Sequence[StudyCase] | RefusedPair
"""Both studies of a patient, the positive one first, or why there is nothing to compare."""


def study_case(
    result: StudyResult,
    study: SyntheticStudy,
    gridded: GriddedStudy,
    truth: GriddedStudy,
    lesions: Sequence[Lesion],
    *,
    alerted: bool,
    anatomy: str,
    grid: PatientGrid,
) -> StudyCase:
    """Compare a result with the truth.

    Args:
        result: Of ``study``, which was processed.
        study: The phantom.
        gridded: The phantom on the patient grid.
        truth: The positive study of the pair on the grid; its mask is the control for the negative
            one.
        lesions: Of the positive study of the pair, largest first.
        alerted: Whether a provisional alert was on at any time.
        anatomy: Of the phantom.
        grid: The patient grid.

    Raises:
        ValueError: The study was not processed.
    """
    if result.probability is None or result.positive is None:
        raise ValueError(f"phantom {study.seed} was not processed: {result.not_processed}")
    knows = ANATOMIES[anatomy]
    pixels = truth.mask.sum(axis=(1, 2))
    place = {int(p): i for i, p in enumerate(truth.positions_um)}
    slabs: list[SlabCase] = []
    gated_positives = 0
    for evidence in result.evidence:
        middle = place[round(evidence.position_mm * 1000)]
        label = slab_label(pixels, middle, grid.planes_per_slab, knows.lesion_pixels)
        at_lesion = label == "positive"
        gated_positives += evidence.gated and at_lesion and study.positive
        if evidence.probability is None or evidence.attention is None or label == "dropped":
            continue
        values = evidence.attention.values
        slabs.append(
            SlabCase(
                position_mm=evidence.position_mm,
                positive=at_lesion and study.positive,
                at_lesion=at_lesion,
                lesion_pixels=int(pixels[middle]),
                probability=evidence.probability,
                peak=float(values.max()),
                hit=peak_hits(values, truth.mask[middle], grid.spacing_mm) if at_lesion else None,
            )
        )
    peaks = [float(e.attention.values.max()) for e in result.evidence if e.attention is not None]
    return StudyCase(
        seed=study.seed,
        positive=study.positive,
        probability=result.probability,
        called=result.positive,
        threshold=result.operating_point.threshold,
        alerted=alerted,
        largest_mm3=lesions[0].volume_mm3,
        largest_place=lesions[0].place,
        largest_kind=lesions[0].kind,
        kinds=sorted({lesion.kind for lesion in lesions}),
        seconds_after_last_slice=result.timings.last_slice_to_result_s,
        gated_positives=gated_positives,
        slabs=slabs,
        trivial=knows.scores(gridded.hu, gridded.positions_um, grid),
        conditions={ARRIVAL: HEAD_FIRST if head_first(study.seed) else FEET_FIRST}
        | {
            name: group
            for name, each in knows.conditions.items()
            if (group := each.group_of(study))
        },
        peaks=sorted(peaks, reverse=True)[:PEAKS],
    )


def head_first(seed: int) -> bool:
    """Whether the slices of a patient arrive from the head down: half of the patients."""
    return seed % 2 == 1


def evaluate_pair(detector: Detector, seed: int, phantom: RealPairs) -> Pair:
    """Both studies of one patient through the detector: with lesions, then without.

    Slices arrive one after the other, from the feet up or from the head down.
    """
    grid = detector.bundle.manifest.grid
    negative, positive = phantom.pair(seed)
    said: list[tuple[StudyResult, bool]] = []
    codes: list[str | None] = []
    for study in (positive, negative):
        updates: list[Update] = []
        try:
            with detector.open() as stream:
                for image in study.slices[:: -1 if head_first(seed) else 1]:
                    updates += stream.push(image)
                result = stream.finish()
                updates += stream.updates()
        except InputError as exc:
            codes.append(str(exc.code))
            continue
        codes.append(result.not_processed.code if result.not_processed else None)
        said.append((result, any(update.provisional_alert for update in updates)))
    if any(codes):
        return RefusedPair(seed=seed, positive=codes[0], negative=codes[1])
    truth = to_grid(positive, grid)
    return [
        study_case(
            result,
            study,
            truth if study.positive else to_grid(study, grid),
            truth,
            positive.lesions,
            alerted=alerted,
            anatomy=phantom.anatomy,
            grid=grid,
        )
        for study, (result, alerted) in zip((positive, negative), said, strict=True)
    ]


def read_cases(path: Path) -> Cases:
    """What an earlier run of the command wrote: complete pairs, in the order of the file.

    A last line that an interruption cut short is left out.
    """
    cases = Cases()
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            continue
        values = json.loads(line)
        if "slabs" in values:
            values["slabs"] = [SlabCase(**slab) for slab in values["slabs"]]
            cases.studies.append(StudyCase(**values))
        else:
            cases.refused.append(RefusedPair(**values))
    both = Counter(case.seed for case in cases.studies)
    return Cases(studies=[c for c in cases.studies if both[c.seed] == 2], refused=cases.refused)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a process needs to evaluate pairs on its own."""

    bundle: str
    engine: str
    threads: int | None
    anatomy: str
    configuration: Path | None
    real: RealSource | None = None


_own: dict[str, Any] = {}  # of a worker process: its detector and its phantom


def _open_worker(settings: WorkerSettings) -> None:
    _own["stack"] = ExitStack()
    _own["detector"] = _own["stack"].enter_context(
        Detector(settings.bundle, engine=settings.engine, threads=settings.threads)
    )
    _own["phantom"] = (
        settings.real.open(settings.anatomy)
        if settings.real
        else open_phantom(settings.anatomy, settings.configuration)
    )


def _pair_in_worker(seed: int) -> Pair:
    return evaluate_pair(_own["detector"], seed, _own["phantom"])


def evaluated(seeds: Sequence[int], settings: WorkerSettings, workers: int) -> Iterator[Pair]:
    """Pairs in the order in which processes are done with them."""
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_open_worker, initargs=(settings,)
    ) as pool:
        jobs = [pool.submit(_pair_in_worker, seed) for seed in seeds]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run(
    detector: Detector,
    seeds: Sequence[int],
    out: Path,
    phantom: RealPairs,
    pairs_of: Callable[[Sequence[int]], Iterable[Pair]],
) -> Cases:
    """Evaluate every pair that is not there yet.

    Args:
        detector: The bundle on an engine.
        seeds: Of the phantom.
        out: Folder; cases are kept in one of its own for every bundle, engine and phantom.
        phantom: What the bundle is shown.
        pairs_of: Evaluates the pairs of the seeds that are left, in any order.

    Returns:
        Every pair of ``seeds``, by seed.

    Raises:
        InputError: No patient is left to measure: of each, a study was not processed.
    """
    folder = out / case_folder(detector, phantom)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CASES_FILE
    cases = read_cases(path)
    known: list[StudyCase | RefusedPair] = [*cases.studies, *cases.refused]
    path.write_text("".join(map(_line, known)))  # without what was cut short
    done = {case.seed for case in known}
    if left := [seed for seed in seeds if seed not in done]:
        for pair in pairs_of(left):
            lines = [_line(pair)] if isinstance(pair, RefusedPair) else map(_line, pair)
            with path.open("a") as file:
                file.writelines(lines)
    found = of_seeds(read_cases(path), seeds)
    if not found.studies:
        raise InputError(
            f"none of {len(seeds)} patients has two studies that were processed, so there is "
            f"nothing to measure: {reasons_text(not_processed(found.refused))}. Show bundle "
            f"{detector.bundle.manifest.name!r} studies that it is made for.",
            code=Code.INVALID_ARGUMENT,
        )
    return found


def of_seeds(cases: Cases, seeds: Sequence[int]) -> Cases:
    """Those of some patients, by seed, positive studies first."""
    wanted = set(seeds)
    studies = (case for case in cases.studies if case.seed in wanted)
    refused = (pair for pair in cases.refused if pair.seed in wanted)
    return Cases(
        studies=sorted(studies, key=lambda case: (case.seed, not case.positive)),
        refused=sorted(refused, key=lambda pair: pair.seed),
    )


def case_folder(detector: Detector, phantom: RealPairs) -> str:
    """Name of the folder of what one bundle, engine and arithmetic says of one kind of phantom."""
    info, bundle = detector.compiled.info, detector.bundle.sha256
    precision = "-".join(sorted(set(info.precision.values())))
    return f"{bundle[:12]}-{info.name}-{precision}-{phantom.digest()[:8]}-{CASE_VERSION}"


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What the command wrote.

    Raises:
        InputError: It wrote nothing there.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: is not there. Give the --out of 'python -m export.evaluate'.",
            code=Code.INVALID_ARGUMENT,
        )
    evaluation: dict[str, Any] = json.loads(path.read_text())
    return evaluation


def evaluated_cases(folder: Path, evaluation: Mapping[str, Any]) -> Cases | None:
    """The patients of an evaluation, by seed; ``None`` if they are not beside it any more."""
    path = folder / evaluation.get("cases", "")
    if not path.is_file():
        return None
    first = evaluation["first_seed"]
    return of_seeds(read_cases(path), range(first, first + evaluation["pairs"]))


def _line(case: StudyCase | RefusedPair) -> str:
    return json.dumps(asdict(case)) + "\n"


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    pairs: Annotated[int, typer.Option(help="Pairs of studies.", min=1)] = 100,
    first_seed: Annotated[int, typer.Option(help="Of the phantom.")] = 3_000_000,
    anatomy: AnatomyOption = None,
    phantom: PhantomOption = None,
    semi_synthetic: SemiSyntheticOption = None,
    volume: VolumeOption = None,
    arteries: ArteriesOption = None,
    engine: Annotated[str, typer.Option(help="Inference engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    workers: Annotated[
        int, typer.Option(help="Processes; with more than one, each has one engine thread.", min=1)
    ] = 1,
) -> None:
    """Evaluate a bundle on pairs of synthetic studies."""
    console = Console()
    seeds = range(first_seed, first_seed + pairs)
    threads = threads or (1 if workers > 1 else None)
    with reported(console), Detector(bundle, engine=engine, threads=threads) as detector:
        if semi_synthetic and phantom:
            raise ConfigurationError(
                f"--phantom {phantom} and --semi-synthetic {semi_synthetic}: findings are painted "
                "into the real series as they always are, no phantom is made. Give one of them."
            )
        manifest = detector.bundle.manifest
        synthetic = chosen_phantom(manifest, anatomy, phantom)
        real = (
            RealSource(folder=semi_synthetic, volume=volume, arteries=arteries)
            if semi_synthetic
            else None
        )
        shown = real.open(synthetic.anatomy) if real else synthetic
        unseen = held_out(manifest.training, seeds)
        if real:
            unseen = unseen and unseen_background(manifest.training, real.folder)
        settings = WorkerSettings(
            bundle=bundle,
            engine=engine,
            threads=threads,
            anatomy=shown.anatomy,
            configuration=phantom,
            real=real,
        )

        def pairs_of(left: Sequence[int]) -> Iterable[Pair]:
            found = (
                (evaluate_pair(detector, seed, shown) for seed in left)
                if workers == 1
                else evaluated(left, settings, workers)
            )
            return track(found, "pairs", total=len(left), console=console)

        cases = run(detector, seeds, out, shown, pairs_of)
    info = detector.compiled.info
    result = {
        "bundle_hash": detector.bundle.sha256,
        "checkpoints": checkpoint_hashes(manifest.training),
        "engine": f"{info.name} {info.version}",
        "precision": dict(info.precision),
        "pairs": pairs,
        "first_seed": first_seed,
        "held_out": unseen,
        "anatomy": shown.anatomy,
        "lesions": shown.lesion_name,
        "cases": f"{case_folder(detector, shown)}/{CASES_FILE}",
        "phantom_configuration": shown.digest(),
        "shifted": real is None and shown.digest() != open_phantom(shown.anatomy).digest(),
        "semi_synthetic": str(real.folder.name) if real else None,
        "not_processed": not_processed(cases.refused),
        **summary(cases.studies, ANATOMIES[shown.anatomy]),
        "calibration": calibration_report(
            cases.studies,
            PlattScaling(scale=manifest.calibration.scale, offset=manifest.calibration.offset),
        ),
    }
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1, allow_nan=False))
    write_plots(cases.studies, out, lesion_name=shown.lesion_name)
    write_reliability(result["calibration"], out)
    console.print(_table(result))


def checkpoint_hashes(training: Mapping[str, Any]) -> dict[str, str]:
    """Stage to the sha256 of its checkpoint: which weights a bundle has."""
    return {stage: training[stage]["sha256"] for stage in ("stage1", "stage2") if stage in training}


def _table(result: Mapping[str, Any]) -> Table:
    table = Table("measure", "value", "95 % interval", title=f"{result['pairs']} pairs")
    for code, counts in result["not_processed"]["by_code"].items():
        table.add_row(
            f"not processed, hence in no measure: {code}",
            f"{counts['patients']} patients",
            f"positive studies {counts['positive']}, negative {counts['negative']}",
        )
    for name, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            table.add_row(name, f"{value['value']:.3f}", f"{low:.3f} to {high:.3f}")
    for when in ("before", "after"):
        for name in ("ece", "brier"):
            error = result["calibration"][when][name]
            low, high = error["interval"]
            table.add_row(
                f"{name} {when} calibration", f"{error['value']:.3f}", f"{low:.3f} to {high:.3f}"
            )
    for name, number in result["trivial_auc"].items():
        order = result["trivial_paired_order"][name]
        table.add_row(f"AUC of {name} (no network)", f"{number:.3f}", f"paired order {order:.3f}")
    slabs = result["positive_slabs"]
    table.add_row("positive slabs", str(slabs["scored"]), f"{slabs['gated']} more were gated")
    groups = {f"{name} of the largest": rows for name, rows in result["by_largest"].items()}
    for grouping, rows in (groups | result["by_condition"]).items():
        for row in rows:
            low, high = row["auc"]["interval"]
            table.add_row(
                f"AUC by {grouping}: {row['group']} ({row['studies']} studies, "
                f"{row['verdicts_right']} verdicts right)",
                f"{row['auc']['value']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
    for row in result["by_slab_size"]:
        table.add_row(
            f"slabs from {row['from_px']} px ({row['slabs']} slabs)",
            f"AUC {row['auc_against_twins']:.3f}",
            f"hit {row['hit']:.2f}, control {row['control']:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
