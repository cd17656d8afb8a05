"""Checkpoints to a bundle: ``python -m export.bundle STAGE1.pt STAGE2.pt --out DIR``.

Everything that the bundle needs follows from the checkpoints (grid, sizes, calibration, thresholds)
and from a short description (``export/configs/pe-bundle.toml``). The graphs are compared with
PyTorch before the bundle is written.
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

from export.calibration import choose_points, fit_calibration
from export.golden import golden_positions_um, golden_slabs
from export.model_card import model_card
from export.models.stage1 import SlabClassifier
from export.models.stage2 import StudyNet
from export.onnx_export import SLAB, GraphNode, export_graphs, graph_nodes, round_weights
from export.parity import LENGTHS, ParityReport, check_parity, sequences_of_modules
from export.training.checkpoint import load_checkpoint
from export.training.config import DataSettings, Settings, load_settings
from pe_infer.bundle import Bundle, GoldenData, write_bundle
from pe_infer.errors import Code, InputError, PeInferError
from pe_infer.manifest import FORMAT_VERSION, PREPROCESSING_VERSION

OUTPUTS = {"study_logit": "study_logit", "slab_logit": "stage1_logit", "attention": "attention"}
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
    provisional_alert: AlertSettings | None = None


@dataclass(frozen=True)
class Trained:
    """Both networks with the mean weights of their checkpoints, and where they come from."""

    stage1: SlabClassifier
    stage2: StudyNet
    data: DataSettings
    validation: dict[str, list[float]]
    provenance: dict[str, Any]


def load_trained(paths: Sequence[Path]) -> Trained:
    """Read one checkpoint of each stage, in any order.

    Raises:
        InputError: They are not one checkpoint of each stage, or do not fit together.
    """
    contents: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        stage = _stage_of(path)
        contents[stage] = (path, load_checkpoint(path, stage=stage))
    if sorted(contents) != [1, 2]:
        raise InputError(
            f"{[str(p) for p in paths]} are checkpoints of stages {sorted(contents)}, "
            "expected one of each stage",
            code=Code.INVALID_ARGUMENT,
        )
    (path1, one), (path2, two) = contents[1], contents[2]
    data = DataSettings.model_validate(one["data"])
    stage1 = SlabClassifier(data.grid.planes_per_slab, one["width"])
    stage1.load_state_dict(one["mean"])
    if two["in_channels"] != stage1.feature_channels:
        raise InputError(
            f"{path2} reads {two['in_channels']} features, {path1} makes {stage1.feature_channels}",
            code=Code.INVALID_ARGUMENT,
        )
    stage2 = StudyNet(two["in_channels"], two["settings"]["filters"], data.grid.rows // 16)
    stage2.load_state_dict(two["mean"])
    provenance = {
        "data": data.name,
        "stage1": {
            "sha256": _sha256(path1),
            "progression": one["progression"],
            "width": one["width"],
        },
        "stage2": {"sha256": _sha256(path2), "progression": two["progression"]},
        "stage1_start": one.get("start"),
        "torch": torch.__version__,
    }
    return Trained(stage1.eval(), stage2.eval(), data, two.get("validation", {}), provenance)


def manifest_of(
    settings: BundleSettings,
    trained: Trained,
    nodes: Sequence[GraphNode],
    shapes: Mapping[str, Sequence[int]],
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The document of ``bundle.json`` without its ``files``.

    Args:
        settings: What the bundle says of itself.
        trained: Networks and their origin.
        nodes: Map and scan nodes.
        shapes: Sequence to the shape of one value.
        evaluation: What ``export.evaluate`` wrote for these weights, if anything.
    """
    grid = trained.data.grid
    sequences = {
        name: {
            "shape": list(shape),
            "axes": ["channels", "rows", "cols"] if len(shape) == 3 else ["values"],
            "per": "study" if name == "study_logit" else "slab",
        }
        for name, shape in shapes.items()
    }
    sequences[SLAB]["axes"] = ["planes", "rows", "cols"]
    grid_document = grid.model_dump(exclude={"window"})
    grid_document["windows"] = [grid.window.model_dump()]
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
        "grid": grid_document,
        "min_slabs": settings.min_slabs,
        "batch": {"max": settings.max_batch},
        "sequences": sequences,
        "nodes": [*(_node_document(node, settings.max_batch) for node in nodes), _mean_node()],
        "outputs": OUTPUTS,
        "calibration": calibration,
        "operating_points": points,
        "default_operating_point": "balanced",
        "rule": {"kind": "threshold"},
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
) -> tuple[Bundle, ParityReport]:
    """Export, check and write.

    Args:
        settings: What the bundle says of itself.
        trained: Networks and their origin.
        folder: Of the bundle.
        evaluation: What ``export.evaluate`` wrote for these weights, if anything; it goes into the
            model card.

    Raises:
        InputError: The graphs do not compute what PyTorch computes.
        BundleError: The bundle would not be valid.
    """
    grid = trained.data.grid
    nodes = graph_nodes(trained.stage1, trained.stage2, grid.rows)
    round_weights(nodes)
    codes = golden_slabs(grid.planes_per_slab, grid.rows, grid.cols)
    slabs = codes.astype(np.float32) / np.float32(255)
    sequences = sequences_of_modules(nodes, slabs)
    sequences["study_logit"] = sequences["score"].mean(axis=0, keepdims=True)
    golden = GoldenData(
        slabs=codes,
        positions_um=golden_positions_um(),
        outputs={
            name: values[0] if name == "study_logit" else values
            for name, values in ((o, sequences[s]) for o, s in OUTPUTS.items())
        },
    )
    shapes = {name: values.shape[1:] for name, values in sequences.items()}
    document = manifest_of(settings, trained, nodes, shapes, evaluation)
    with tempfile.TemporaryDirectory() as scratch:
        files = export_graphs(nodes, Path(scratch))
        study = np.concatenate([slabs] * (max(LENGTHS) // len(slabs) + 1))[: max(LENGTHS)]
        report = check_parity(nodes, files, trained.stage1, trained.stage2, study)
        if not report.passed:
            raise InputError(
                f"the exported graphs differ from PyTorch: {report}", code=Code.INVALID_ARGUMENT
            )
        document["training"]["parity"] = json.loads(json.dumps(asdict(report)))
        contents: dict[str, bytes | Path] = {path.name: path for path in files.values()}
        contents[GOLDEN_FILE] = golden.to_bytes()
        contents[CARD_FILE] = model_card(document).encode()
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


def _mean_node() -> dict[str, Any]:
    return {
        "name": "study_logit",
        "kind": "reduce",
        "reducer": "mean",
        "inputs": {"x": "score"},
        "outputs": {"y": "study_logit"},
    }


def _stage_of(path: Path) -> int:
    for stage in (1, 2):
        try:
            load_checkpoint(path, stage=stage)
        except InputError:
            if stage == 2:
                raise
        else:
            return stage
    raise AssertionError(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="One checkpoint of each stage.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    config: Annotated[Path, typer.Option(help="What the bundle says of itself.")] = DEFAULT_CONFIG,
    evaluation: Annotated[
        Path | None, typer.Option(help="evaluation.json of these weights, for the model card.")
    ] = None,
) -> None:
    """Make a bundle of two checkpoints."""
    console = Console()
    try:
        settings = load_settings(config, BundleSettings)
        measured = json.loads(evaluation.read_text()) if evaluation else None
        bundle, report = make_bundle(settings, load_trained(checkpoints), out, measured)
    except PeInferError as exc:
        console.print(f"[red]error:[/] {exc}")
        raise typer.Exit(exc.exit_code) from exc
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
