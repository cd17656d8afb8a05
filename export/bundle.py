"""Checkpoints to a bundle: ``python -m export.bundle STAGE1.pt STAGE2.pt --out DIR``.

Everything that the bundle needs follows from the checkpoints (system, grid, sizes, calibration,
thresholds) and from a short description (``export/configs/*-bundle.toml``). The graphs are compared
with PyTorch before the bundle is written.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import nn

from export.calibration import choose_points, fit_calibration
from export.command_line import reported
from export.datasets.collections.registry import COLLECTIONS
from export.evaluate import checkpoint_hashes
from export.golden import golden_positions_um
from export.model_card import model_card
from export.models.base import SlabNetwork
from export.onnx_export import GraphNode, StudyGraphs, export_graphs, round_weights
from export.parity import (
    LENGTHS,
    ParityReport,
    assembly_differences,
    check_parity,
    sequences_of_modules,
)
from export.systems.base import System
from export.systems.registry import refuse_other_system, system_of
from export.training.checkpoint import load_checkpoint, unfinished
from export.training.config import DataSettings, Settings, Stage1Settings, load_settings
from export.training.features import CACHE_FILE
from export.training.stage2 import FEATURES_FOLDER
from export.training.start import seen_in_all
from export.training_curve import CURVE_FILE, TABLE_FILE, TrainingLog, read_training_log
from pe_infer.bundle import Bundle, GoldenData, write_bundle
from pe_infer.certificate import CERTIFICATE_FILE
from pe_infer.errors import Code, InputError
from pe_infer.manifest import (
    FORMAT_VERSION,
    PREPROCESSING_VERSION,
    Check,
    ConsecutiveRule,
    Rule,
    ThresholdRule,
)

GOLDEN_FILE, CARD_FILE = "golden.npz", "MODEL_CARD.md"
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "pe-bundle.toml"


class CodeSettings(Settings):
    """A code: value, coding scheme, meaning."""

    value: str
    scheme: str
    meaning: str


class FindingSettings(Settings):
    """What is looked for, and where."""

    code: CodeSettings
    site: CodeSettings


class AlertSettings(Settings):
    """When a stream may alert before its last slice."""

    slab_probability: float = Field(ge=0, le=1)
    consecutive: int = Field(ge=1)


class BundleSettings(Settings):
    """What a bundle says of itself."""

    name: str
    version: str
    intended_use: str
    min_slabs: int = Field(ge=1)
    max_batch: int = Field(ge=1)
    finding: FindingSettings
    scope: dict[str, str | list[str]]
    rule: Rule = ThresholdRule(kind="threshold")
    provisional_alert: AlertSettings | None = None
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Trained:
    """Both networks with the mean weights of their checkpoints, and where they come from.

    Attributes:
        system: What they are.
        stage1: In evaluation mode.
        stage2: In evaluation mode.
        data: What stage 1 was trained on.
        validation: ``logits`` and ``labels`` (1 = positive) of stage 2's validation studies; empty
            before its first epoch.
        consecutive: Neighbouring slabs whose smallest logit is the score of a study in
            ``validation``; ``None`` where the study has a logit of its own.
        provenance: ``training`` of the manifest, without the evaluation.
        log: Of both trainings, where it lies beside the checkpoints.
        unfinished: A line for each checkpoint from before the end of its run.
    """

    system: System
    stage1: SlabNetwork
    stage2: nn.Module
    data: DataSettings
    validation: dict[str, list[float]]
    consecutive: int | None
    provenance: dict[str, Any]
    log: TrainingLog | None = None
    unfinished: tuple[str, ...] = ()


def load_trained(paths: Sequence[Path]) -> Trained:
    """Read one checkpoint of each stage, in any order.

    Where stage 2 still lies in the folder of its run, with the features it was trained on, it is
    checked that this stage 1 made them.

    Raises:
        InputError: They are not one checkpoint of each stage, or do not fit together.
        ConfigurationError: They are of different systems, were trained on different grids, or one
            on the patients that the other was validated on.
    """
    contents = [(path, load_checkpoint(path)) for path in paths]
    stages = sorted(content["stage"] for _, content in contents)
    if stages != [1, 2]:
        raise InputError(
            f"{[str(p) for p in paths]} are checkpoints of stages {stages}, "
            "expected one of each stage",
            code=Code.INVALID_ARGUMENT,
        )
    (path1, one), (path2, two) = sorted(contents, key=lambda entry: int(entry[1]["stage"]))
    data, data2 = (DataSettings.model_validate(content["data"]) for content in (one, two))
    every, every2 = seen_in_all(one), seen_in_all(two)
    data2.refuse_mixing(every, str(path1))
    _refuse_other_features(path1, path2)
    system = system_of(one["settings"])
    refuse_other_system(two, system, path2)
    stage1 = system.slab_network(data.grid.channels, one["width"])
    stage1.load_state_dict(one["mean"])
    if two["in_channels"] != stage1.feature_channels:
        raise InputError(
            f"{path2} reads {two['in_channels']} features, {path1} makes {stage1.feature_channels}",
            code=Code.INVALID_ARGUMENT,
        )
    stage2 = system.study_network(two["settings"], stage1, data.grid)
    stage2.load_state_dict(two["mean"])
    phase = Stage1Settings.model_validate(one["settings"]).phase[one["progression"]["phase"]]
    collections = {**every.collections, **every2.collections}
    provenance = {
        "data": data.name,
        "seeds": {
            **{
                f"{split} of {stage}": [seeds.first_seed, seeds.pairs]
                for stage, settings in (("stage 1", data), ("stage 2", data2))
                for split, seeds in (
                    ("training", settings.train),
                    ("validation", settings.validation),
                )
            },
            **{
                f"training of {stage}, {source.store}": [
                    source.train.first_seed,
                    source.train.pairs,
                ]
                for stage, settings in (("stage 1", data), ("stage 2", data2))
                for source in settings.source
                if source.train
            },
            **{
                f"{purpose} {number} before stage 1": [seeds.start, len(seeds)]
                for purpose, before in (
                    ("training", every.seeds[len(data.seen.seeds) :]),
                    ("validation", every.validated[len(data.seen.validated) :]),
                )
                for number, seeds in enumerate(before, start=1)
            },
        },
        "collections": {
            name: {"validation": validation, "test": test}
            for name, (validation, test) in collections.items()
        },
        "terms": {
            name: COLLECTIONS[name].terms for name in sorted(collections) if name in COLLECTIONS
        },
        "validated_on": "real studies" if data2.unpaired else "pairs",
        "backgrounds": dict(sorted({**every.backgrounds, **every2.backgrounds}.items())),
        "all_backgrounds": every.all_backgrounds and every2.all_backgrounds,
        "stage1": {
            "sha256": _sha256(path1),
            "progression": one["progression"],
            "width": one["width"],
            "loss": phase.loss.model_dump(),
        },
        "stage2": {"sha256": _sha256(path2), "progression": two["progression"]},
        "stage1_start": one.get("start"),
        "torch": torch.__version__,
    }
    return Trained(
        system=system,
        stage1=stage1.eval(),
        stage2=stage2.eval(),
        data=data,
        validation=two.get("validation", {}),
        consecutive=two["settings"].get("consecutive"),
        provenance=provenance,
        log=read_training_log(
            path1, path2, steps=(one["progression"]["step"], two["progression"]["step"])
        ),
        unfinished=tuple(filter(None, (unfinished(path, content) for path, content in contents))),
    )


def manifest_of(
    settings: BundleSettings,
    trained: Trained,
    graphs: StudyGraphs,
    shapes: Mapping[str, Sequence[int]],
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The document of ``bundle.json`` without its ``files``.

    Args:
        settings: What the bundle says of itself.
        trained: Networks and their origin.
        graphs: The study program.
        shapes: Sequence to the shape of one value.
        evaluation: What ``export.evaluate`` wrote for these weights, if anything.
    """
    grid = trained.data.grid
    sequences = {
        name: {
            "shape": list(shape),
            "axes": ["channels", "rows", "cols"] if len(shape) == 3 else ["values"],
            "per": "study" if name in graphs.means else "slab",
        }
        for name, shape in shapes.items()
    }
    calibration, points = {"scale": 1.0, "offset": 0.0}, [{"name": "balanced", "threshold": 0.5}]
    if trained.validation:
        logits, labels = trained.validation["logits"], trained.validation["labels"]
        scaling = fit_calibration(logits, labels)
        calibration = asdict(scaling)
        points = [
            {
                "name": point.name,
                "threshold": point.threshold,
                "description": point.description,
                "measured": {
                    "data": f"{len(labels)} validation studies",
                    "sensitivity": point.sensitivity,
                    "specificity": point.specificity,
                },
            }
            for point in choose_points(scaling(np.asarray(logits, dtype=np.float64)), labels)
        ]
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "version": settings.version,
        "finding": settings.finding.model_dump(),
        "scope": settings.scope,
        "intended_use": settings.intended_use,
        "preprocessing_version": PREPROCESSING_VERSION,
        "grid": grid.model_dump(),
        "min_slabs": settings.min_slabs,
        "batch": {"max": settings.max_batch},
        "sequences": sequences,
        "nodes": [
            *(_node_document(node, settings.max_batch) for node in graphs.nodes),
            *(_mean_node(result, source) for result, source in graphs.means.items()),
        ],
        "outputs": graphs.outputs,
        "calibration": calibration,
        "operating_points": points,
        "default_operating_point": "balanced",
        "rule": settings.rule.model_dump(),
        "checks": [check.model_dump(mode="json") for check in settings.checks],
        "golden": {"file": GOLDEN_FILE},
        "training": {**trained.provenance, "evaluation": dict(evaluation) if evaluation else None},
    }
    if settings.provisional_alert:
        document["provisional_alert"] = settings.provisional_alert.model_dump()
    return document


def make_bundle(
    settings: BundleSettings,
    trained: Trained,
    folder: Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    shifted: Mapping[str, Any] | None = None,
    sections: Sequence[str] = (),
) -> tuple[Bundle, ParityReport]:
    """Export, check and write.

    Args:
        settings: What the bundle says of itself.
        trained: Networks and their origin.
        folder: Of the bundle.
        evaluation: What ``export.evaluate`` wrote for these weights, if anything; it goes into the
            model card.
        shifted: The same on studies of another phantom configuration.
        sections: Further ones for the model card, as Markdown with a heading of their own.

    Raises:
        InputError: The graphs do not compute what PyTorch computes, the evaluation is of other
            weights, or the rule is not the one that studies were scored by in training.
        BundleError: The bundle would not be valid.
    """
    _refuse_other_rule(settings.rule, trained)
    weights = checkpoint_hashes(trained.provenance)
    for measured in (evaluation, shifted):
        if measured is not None and measured.get("checkpoints") != weights:
            raise InputError(
                f"the evaluation is of the checkpoints {measured.get('checkpoints')}, the bundle "
                f"has {weights}. Evaluate these weights with 'python -m export.evaluate'.",
                code=Code.INVALID_ARGUMENT,
            )
    for measured, wanted in ((evaluation, False), (shifted, True)):
        if measured is not None and measured.get("shifted", wanted) is not wanted:
            raise InputError(
                f"the evaluation is of phantom configuration {measured['phantom_configuration']}, "
                "expected the default one as 'evaluation' and another one as 'shifted'",
                code=Code.INVALID_ARGUMENT,
            )
    grid = trained.data.grid
    graphs = trained.system.graphs(trained.stage1, trained.stage2, grid)
    codes = trained.system.golden(grid)
    slabs = codes.astype(np.float32) / np.float32(255)
    study = np.concatenate([slabs] * (max(LENGTHS) // len(slabs) + 1))[: max(LENGTHS)]
    assembly = assembly_differences(graphs, study)
    round_weights(graphs.nodes)
    sequences = sequences_of_modules(graphs, slabs)
    golden = GoldenData(
        slabs=codes,
        positions_um=golden_positions_um(grid.pitch_um * grid.slab_step),
        outputs={
            output: sequences[name][0] if name in graphs.means else sequences[name]
            for output, name in graphs.outputs.items()
        },
    )
    shapes = {name: values.shape[1:] for name, values in sequences.items()}
    document = manifest_of(settings, trained, graphs, shapes, evaluation)
    if shifted:
        document["training"]["shifted"] = dict(shifted)
    if trained.log:
        document["training"]["log"] = {"table": TABLE_FILE, "curve": CURVE_FILE}
    with tempfile.TemporaryDirectory() as scratch:
        files = export_graphs(graphs.nodes, Path(scratch))
        report = check_parity(graphs, files, study, assembly=assembly)
        if not report.passed:
            raise InputError(
                f"the exported graphs differ from PyTorch: {report}", code=Code.INVALID_ARGUMENT
            )
        document["training"]["parity"] = json.loads(json.dumps(asdict(report)))
        contents: dict[str, bytes | Path] = {path.name: path for path in files.values()}
        contents[GOLDEN_FILE] = golden.to_bytes()
        if trained.log:
            contents |= trained.log.files()
        contents[CARD_FILE] = model_card(document, trained.system.card, sections).encode()
        return write_bundle(folder, document, contents), report


def _node_document(node: GraphNode, max_batch: int) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": node.name,
        "kind": node.kind,
        "graph": node.file,
        "inputs": node.inputs,
        "outputs": node.outputs,
        "precision": node.precision,
    }
    if node.kind == "map":
        return {**document, "max_batch": max_batch}
    states = [
        {"input": i, "output": o, "shape": list(node.shapes[i]), "initial": 0.0}
        for i, o in node.states.items()
    ]
    return {**document, "direction": node.direction, "states": states}


def _mean_node(result: str, source: str) -> dict[str, Any]:
    return {
        "name": result,
        "kind": "reduce",
        "reducer": "mean",
        "inputs": {"x": source},
        "outputs": {"y": result},
    }


def _refuse_other_features(stage1: Path, stage2: Path) -> None:
    """Two encoders of one shape fit every stage 2, but only one made what it was trained on."""
    cache = stage2.parent / FEATURES_FOLDER / CACHE_FILE
    if cache.exists():
        made_by, given = json.loads(cache.read_text())["stage1_sha256"], _sha256(stage1)
        if made_by != given:
            raise InputError(
                f"{stage2} was trained on the features of stage 1 {made_by[:12]}, {stage1} is "
                f"{given[:12]}",
                code=Code.INVALID_ARGUMENT,
            )


def _refuse_other_rule(rule: Rule, trained: Trained) -> None:
    """Calibration and thresholds are for the scores of training, and mean nothing for others."""
    count = rule.count if isinstance(rule, ConsecutiveRule) else None
    if count != trained.consecutive:
        raise InputError(
            f"the rule of the bundle counts {count} neighbouring slabs, stage 2 was trained and "
            f"calibrated for {trained.consecutive} (None: a logit of the study)",
            code=Code.INVALID_ARGUMENT,
        )


def read_section(path: Path) -> str:
    """A section of a model card.

    Raises:
        InputError: It does not begin with a heading of the second level.
    """
    text = path.read_text().strip()
    if not text.startswith("## "):
        raise InputError(
            f"{path}: the first line is {text[:40].splitlines()[:1]}, expected a heading such as "
            "'## Ablation', under which the model card can show the rest",
            code=Code.INVALID_ARGUMENT,
        )
    return text


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="One checkpoint of each stage.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    config: Annotated[Path, typer.Option(help="What the bundle says of itself.")] = DEFAULT_CONFIG,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="evaluation.json of these weights, for the model card.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    shifted: Annotated[
        Path | None,
        typer.Option(
            help="The same of shifted studies, for the model card.", exists=True, dir_okay=False
        ),
    ] = None,
    section: Annotated[
        list[Path] | None,
        typer.Option(
            help="Markdown with a '## ' heading, for the end of the model card; may be repeated.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Make a bundle of two checkpoints."""
    console = Console()
    with reported(console):
        settings = load_settings(config, BundleSettings)
        trained = load_trained(checkpoints)
        for line in trained.unfinished:
            console.print(line, markup=False, soft_wrap=True)
        certified = (out / CERTIFICATE_FILE).exists()
        bundle, report = make_bundle(
            settings,
            trained,
            out,
            json.loads(evaluation.read_text()) if evaluation else None,
            shifted=json.loads(shifted.read_text()) if shifted else None,
            sections=[read_section(path) for path in section or ()],
        )
    if certified:
        console.print(
            f"{out / CERTIFICATE_FILE}: removed, it was of the bundle that lay there before. Make "
            "another with 'python -m export.certify --store'.",
            markup=False,
            soft_wrap=True,
        )
    table = Table("graph", "kB", "difference from PyTorch", title=f"{bundle.folder}")
    for name, difference in report.nodes.items():
        table.add_row(name, f"{len(bundle.files[f'{name}.onnx']) / 1024:.0f}", f"{difference:.1e}")
    for length, difference in report.studies.items():
        rounding = report.rounding[length]
        table.add_row(
            f"study of {length} slabs", "", f"{difference:.1e} (float16 weights: {rounding:.1e})"
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
