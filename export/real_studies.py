"""What a bundle says of real studies, beside what it says of phantoms without the finding.

``python -m export.real_studies --bundle DIR --negatives EVALUATION --dicom FOLDER --out FILE.md``

``--negatives`` is the ``--out`` of ``export.evaluate`` for the same weights, ``--dicom`` a folder
with one series that has no finding as far as is known; both may be repeated. Writes a section for
the model card (``export.bundle --section``) and the same as JSON beside it.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from export.command_line import reported
from export.evaluate import checkpoint_hashes, evaluated_cases, read_evaluation
from export.held_out import painted_into
from pe_infer import Detector
from pe_infer.errors import Code, ConfigurationError, InputError, ScopeError
from pe_infer.result import QualityFlag, StudyResult, probability_text


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """What a bundle says of the negative studies of one evaluation.

    Attributes:
        label: What the studies are.
        configuration: Digest of what they were made with.
        first_seed: Of the evaluation.
        engine: That it was made with.
        probabilities: Ascending, at least one.
    """

    label: str
    configuration: str
    first_seed: int
    engine: str
    probabilities: list[float]

    def percentile(self, probability: float) -> float:
        """Share in percent that has a lower probability; those with the same count half."""
        low, high = (find(self.probabilities, probability) for find in (bisect_left, bisect_right))
        return 50.0 * (low + high) / len(self.probabilities)


@dataclass(frozen=True, kw_only=True)
class RealStudy:
    """What a bundle said of one real study.

    Attributes:
        name: Of its folder.
        seen: Whether training painted findings into a scan of that folder; ``None``: not known.
        not_processed: Code of the reason, if nothing was said.
        probability: Calibrated; ``None`` if nothing was said, as all that follows.
        positive: Whether it reaches the threshold.
        percentiles: Label of the negatives to `Negatives.percentile`.
        flags: What was tolerated; checks of the images by their names.
        peak: Highest value of the raw attention maps.
        peak_mm: Patient coordinates of it.
    """

    name: str
    seen: bool | None = None
    not_processed: str | None = None
    probability: float | None = None
    positive: bool | None = None
    percentiles: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    peak: float | None = None
    peak_mm: tuple[float, float, float] | None = None


def read_negatives(folder: Path, bundle_hash: str, training: Mapping[str, Any]) -> Negatives:
    """The negative studies of an evaluation of a bundle's weights.

    Args:
        folder: ``--out`` of ``export.evaluate``.
        bundle_hash: Of the bundle; one that was made again with another model card has another.
        training: ``training`` of its manifest, which says what weights it has.

    Raises:
        InputError: The evaluation is not there, is of other weights, or its studies are not beside
            it any more.
    """
    evaluation = read_evaluation(folder)
    weights, known = checkpoint_hashes(training), evaluation.get("checkpoints")
    if evaluation["bundle_hash"] != bundle_hash and not (weights and known == weights):
        raise InputError(
            f"{folder}: the evaluation is of bundle {evaluation['bundle_hash']} with the "
            f"checkpoints {known}, the bundle is {bundle_hash} with {weights}. Evaluate these "
            "weights with 'python -m export.evaluate'.",
            code=Code.INVALID_ARGUMENT,
        )
    cases = evaluated_cases(folder, evaluation)
    negatives = [case.probability for case in cases.studies if not case.positive] if cases else []
    if not negatives:
        raise InputError(
            f"{folder}: the studies of the evaluation ({evaluation.get('cases')}) are not there. "
            "Evaluate again with 'python -m export.evaluate'.",
            code=Code.INVALID_ARGUMENT,
        )
    real = evaluation.get("semi_synthetic")
    phantoms = "shifted phantoms" if evaluation.get("shifted") else "phantoms"
    return Negatives(
        label=f"semi-synthetic studies made of {real}" if real else phantoms,
        configuration=evaluation["phantom_configuration"],
        first_seed=evaluation["first_seed"],
        engine=evaluation["engine"],
        probabilities=sorted(negatives),
    )


def told_apart(negatives: Iterable[Negatives]) -> dict[str, Negatives]:
    """Negatives by labels of which there is one each.

    Raises:
        ConfigurationError: An evaluation is given twice.
    """
    given = list(negatives)
    labels = [each.label for each in given]
    found: dict[str, Negatives] = {}
    for each in given:
        label = each.label
        if labels.count(label) > 1:
            label += f" {each.configuration[:8]} from seed {each.first_seed}"
        if label in found:
            raise ConfigurationError(f"--negatives: the evaluation of {label} is given twice")
        found[label] = each
    return found


def judged(detector: Detector, folder: Path, negatives: Mapping[str, Negatives]) -> RealStudy:
    """One folder through the detector; a refusal is a result."""
    name = folder.resolve().name
    seen = painted_into(detector.bundle.manifest.training, folder)
    try:
        result = detector.detect(folder)
    except (InputError, ScopeError) as exc:
        return RealStudy(name=name, seen=seen, not_processed=str(exc.code))
    return replace(real_study(name, result, negatives), seen=seen)


def real_study(name: str, result: StudyResult, negatives: Mapping[str, Negatives]) -> RealStudy:
    """What there is to report of a result.

    Args:
        name: Of the study.
        result: Of a study that was processed, or was not.
        negatives: By their labels.
    """
    flags = sorted({_flag_text(flag) for flag in result.quality})
    if result.not_processed or result.probability is None:
        code = result.not_processed.code if result.not_processed else None
        return RealStudy(name=name, not_processed=code, flags=flags)
    maps = [slab.attention for slab in result.evidence if slab.attention is not None]
    highest = max(maps, key=lambda attention: attention.peak, default=None)
    return RealStudy(
        name=name,
        probability=result.probability,
        positive=result.positive,
        percentiles={
            label: each.percentile(result.probability) for label, each in negatives.items()
        },
        flags=flags,
        peak=highest.peak if highest else None,
        peak_mm=highest.peak_mm if highest else None,
    )


def _flag_text(flag: QualityFlag) -> str:
    check = flag.values.get("check")
    return f"{flag.flag} ({check})" if check else str(flag.flag)


def markdown(document: Mapping[str, Any]) -> str:
    """A section with a row per study.

    Args:
        document: As `main` writes it: ``studies`` are those of `RealStudy`.
    """
    point, labels = document["operating_point"], list(document["negatives"])
    lines = [
        "## Real studies without the finding",
        "",
        "As far as is known; nobody has labelled them. Through the public API with",
        f"{document['engine']}. Verdicts at the operating point `{point['name']}`, the bundle's",
        "default, which validation studies chose before: positive from",
        f"{point['threshold']:.4f}. A percentile says how unusual a probability is for studies",
        "that are known to be negative: the share of negative studies of an evaluation that have a",
        "lower one, those with the same one counted half. The peak is the highest value of the",
        "attention, a raw map with values below zero too, in the whole study, in patient",
        "coordinates: mm to the left, to the back, and to the head. Painted into: whether training",
        "painted findings into that study.",
        "",
    ]
    for label, each in document["negatives"].items():
        lines.append(
            f"- {label}: {each['studies']} negative studies, seeds from {each['first_seed']}, with "
            f"{each['engine']}"
        )
    columns = [f"percentile among {label}" for label in labels]
    columns = [
        "study",
        "painted into",
        "status",
        "probability",
        "verdict",
        *columns,
        "flags",
        "attention peak",
    ]
    lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for study in document["studies"]:
        lines.append("| " + " | ".join(_cells(study, labels)) + " |")
    return "\n".join([*lines, ""])


def _cells(study: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    name, flags = study["name"].replace("|", "\\|"), ", ".join(study["flags"]) or "-"
    seen = {True: "yes", False: "no", None: "not known"}[study["seen"]]
    if study["probability"] is None:
        status = f"not processed: {study['not_processed']}"
        return [name, seen, status, "-", "-", *("-" for _ in labels), flags, "-"]
    peak = "-"
    if study["peak"] is not None:
        left, back, up = study["peak_mm"]
        peak = f"{study['peak']:.3f} at ({left:.0f}, {back:.0f}, {up:.0f})"
    return [
        name,
        seen,
        "processed",
        probability_text(study["probability"]),
        "positive" if study["positive"] else "negative",
        *(f"{study['percentiles'][label]:.1f}" for label in labels),
        flags,
        peak,
    ]


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    negatives: Annotated[
        list[Path], typer.Option(help="Folder of an evaluation; may be repeated.")
    ],
    dicom: Annotated[
        list[Path],
        typer.Option(help="Folder of a series; may be repeated.", exists=True, file_okay=False),
    ],
    out: Annotated[Path, typer.Option(help="Markdown file; JSON is written beside it.")],
    engine: Annotated[str, typer.Option(help="Inference engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
) -> None:
    """Show a bundle real studies without the finding."""
    console = Console()
    with reported(console):
        if out.suffix != ".md":
            raise ConfigurationError(f"--out {out}: expected a name that ends in .md")
        with Detector(bundle, engine=engine, threads=threads) as detector:
            info, manifest = detector.compiled.info, detector.bundle.manifest
            sha256 = detector.bundle.sha256
            compared = told_apart(
                read_negatives(folder, sha256, manifest.training) for folder in negatives
            )
            studies = [
                judged(detector, folder, compared)
                for folder in track(dicom, "studies", console=console)
            ]
    point = manifest.operating_point(None)
    document = {
        "bundle": manifest.name,
        "bundle_hash": sha256,
        "checkpoints": checkpoint_hashes(manifest.training),
        "engine": f"{info.name} {info.version}",
        "precision": dict(info.precision),
        "operating_point": point.model_dump(include={"name", "threshold"}) if point else None,
        "negatives": {
            label: {
                "studies": len(each.probabilities),
                "first_seed": each.first_seed,
                "configuration": each.configuration,
                "engine": each.engine,
            }
            for label, each in compared.items()
        },
        "studies": [asdict(study) for study in studies],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(document)
    out.write_text(text)
    out.with_suffix(".json").write_text(json.dumps(document, indent=1, allow_nan=False))
    console.print(text, markup=False)


if __name__ == "__main__":
    typer.run(main)
