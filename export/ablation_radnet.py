"""What the parts of RADnet contribute, in the shape of the paper: slices and whole studies.

``python -m export.ablation_radnet --data STORE --held-out DIR --out DIR``
``--row "DenseNet=A.pt" --row "+ attention=B.pt" --row "+ recurrence=B.pt,C.pt"``

A row is a checkpoint of stage 1, or one of each stage. Without the second one a slice's probability
is that of the first stage by itself; a study's score is in both cases that of the bundle's rule:
the best run of neighbours, by its weakest. Thresholds are chosen on the validation pairs of the
store (the largest sum of sensitivity and specificity), everything is measured on test pairs, which
are made in ``--held-out`` where they are not there yet. Writes ``ablation.json`` and
``ablation.md``, which ``export.bundle --ablation`` puts into the model card.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from export.bundle import load_trained
from export.calibration import choose_points
from export.command_line import StoreOption, reported
from export.datasets.augment import slab_of
from export.datasets.generate import store_pair
from export.datasets.labels import UNSURE
from export.datasets.store import StoredStudy, StudyPair, open_pairs
from export.measures import auc
from export.models.radnet import SliceClassifier, SliceContext, consecutive_score
from export.systems.radnet_graphs import encoder_node
from export.training.config import DataSettings, load_settings
from export.training.encoder import SlabEncoder
from export.training.radnet_studies import slice_labels
from export.training.stage2 import load_stage1
from pe_infer.errors import Code, InputError
from pe_infer.phantom import open_phantom

CONSECUTIVE: Final = 3
DATA: Final = Path(__file__).parent / "configs" / "ich-data.toml"
PAPER: Final = {  # of 77 CTs, 44 of them with hemorrhage
    "name": "Grewal et al. 2017, 77 CTs",
    "study": {"accuracy": 0.8182, "recall": 0.8864, "precision": 0.8125, "f1": 0.8478},
}
COLUMNS: Final = ("accuracy", "recall", "precision", "f1", "auc")


@dataclass(frozen=True)
class Row:
    """One line of the table: its networks, of which the second may be missing."""

    name: str
    stage1: Path
    stage2: Path | None

    @classmethod
    def parse(cls, text: str) -> "Row":
        """``NAME=STAGE1`` or ``NAME=STAGE1,STAGE2``.

        Raises:
            InputError: It is neither.
        """
        name, _, files = text.partition("=")
        paths = [Path(part) for part in files.split(",") if part]
        if not name or len(paths) not in {1, 2}:
            raise InputError(
                f"--row {text!r}: expected NAME=STAGE1 or NAME=STAGE1,STAGE2",
                code=Code.INVALID_ARGUMENT,
            )
        return cls(name, paths[0], paths[1] if len(paths) == 2 else None)


@dataclass(frozen=True)
class Scored:
    """Probabilities and truth of many slices, or of many studies."""

    probabilities: list[float]
    truth: list[bool]


class Scorer:
    """Slices and studies through the networks of some rows; equal first stages run once."""

    def __init__(self, rows: Sequence[Row], data: DataSettings, threads: int) -> None:
        """Load.

        Raises:
            InputError: A file is no checkpoint of its stage, or two do not belong together.
            ConfigurationError: They are of another system, another grid, or know the test patients.
        """
        self.rows, self._data = rows, data
        self._encoders: dict[Path, SlabEncoder] = {}
        self._contexts: dict[str, SliceContext] = {}
        for row in rows:
            if row.stage1 not in self._encoders:
                stage1 = load_stage1(row.stage1, data)
                if not isinstance(stage1, SliceClassifier):
                    raise InputError(f"{row.stage1} is not of RADnet", code=Code.INVALID_ARGUMENT)
                node = encoder_node(stage1, data.grid.rows)
                self._encoders[row.stage1] = SlabEncoder(node, threads=threads)
            if row.stage2:
                stage2 = load_trained([row.stage1, row.stage2]).stage2
                if not isinstance(stage2, SliceContext):
                    raise InputError(f"{row.stage2} is not of RADnet", code=Code.INVALID_ARGUMENT)
                self._contexts[row.name] = stage2

    @torch.inference_mode()
    def logits(self, study: StoredStudy, middles: Sequence[int]) -> dict[str, Tensor]:
        """Row to the logits (1, T) of a study's slices, in ascending position."""
        encoded = {}
        for path, encoder in self._encoders.items():
            slices = [encoder(self._slab(study, middle)) for middle in middles]
            encoded[path] = (
                torch.from_numpy(np.concatenate([s["features"] for s in slices])),
                torch.from_numpy(np.concatenate([s["logit"] for s in slices])[:, 0]),
            )
        found: dict[str, Tensor] = {}
        for row in self.rows:
            features, own = encoded[row.stage1]
            context = self._contexts.get(row.name)
            found[row.name] = own[None] if context is None else context(features[None], own[None])
        return found

    def _slab(self, study: StoredStudy, middle: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        grid = self._data.grid
        hu = torch.from_numpy(study.slab_hu(middle, grid.planes_per_slab).astype(np.float32))
        slab: np.ndarray[Any, np.dtype[np.float32]] = slab_of(hu, grid.window_bounds).numpy()[None]
        return slab


def score(
    scorer: Scorer, pairs: Sequence[StudyPair], data: DataSettings, console: Console
) -> dict[str, dict[str, Scored]]:
    """Row to ``slice`` and ``study``: everything that the networks say of some pairs."""
    found = {row.name: {"slice": Scored([], []), "study": Scored([], [])} for row in scorer.rows}
    for pair in track(pairs, "studies", console=console):
        middles = pair.positive.record.slab_planes
        for study in (pair.positive, pair.negative):
            labels = slice_labels(study, middles, data)
            known = [i for i, label in enumerate(labels) if label != UNSURE]
            for name, logits in scorer.logits(study, middles).items():
                slices, studies = found[name]["slice"], found[name]["study"]
                slices.probabilities.extend(torch.sigmoid(logits[0, known]).tolist())
                slices.truth.extend(labels[i] == 1 for i in known)
                said = float(torch.sigmoid(consecutive_score(logits, CONSECUTIVE)))
                studies.probabilities.append(said)
                studies.truth.append(study.record.positive)
    return found


def at_threshold(scored: Scored, threshold: float) -> dict[str, float]:
    """Accuracy, recall, precision and F1 at a threshold, and the AUC without one."""
    called = np.asarray(scored.probabilities) >= threshold
    truth = np.asarray(scored.truth)
    hits = int((called & truth).sum())
    recall = hits / max(1, int(truth.sum()))
    precision = hits / max(1, int(called.sum()))
    return {
        "accuracy": float((called == truth).mean()),
        "recall": recall,
        "precision": precision,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "auc": auc(scored.truth, scored.probabilities),
        "threshold": threshold,
    }


def measured(validation: Mapping[str, Scored], test: Mapping[str, Scored]) -> dict[str, Any]:
    """``slice`` and ``study``: numbers of the test, at thresholds of the validation."""
    result: dict[str, Any] = {}
    for level, chosen in validation.items():
        points = choose_points(np.asarray(chosen.probabilities), [float(t) for t in chosen.truth])
        balanced = next(point for point in points if point.name == "balanced")
        result[level] = at_threshold(test[level], balanced.threshold)
    return result


def markdown(rows: Sequence[Mapping[str, Any]], *, pairs: int, first_seed: int) -> str:
    """The table, with the paper's figures below ours."""
    lines = [
        f"On {pairs} held-out pairs of synthetic studies (seeds from {first_seed}), at thresholds",
        "chosen on the validation pairs. The paper's figures are of patients: the lines can be",
        "compared among ours only.",
    ]
    for level, title in (("slice", "Slices"), ("study", f"Studies: {CONSECUTIVE} neighbours")):
        lines += ["", f"| {title} | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
        for row in rows:
            if level in row:
                values = [f"{row[level][c]:.4f}" if c in row[level] else "-" for c in COLUMNS]
                lines.append(f"| {row['name']} | " + " | ".join(values) + " |")
    return "\n".join([*lines, ""])


def main(
    *,
    row: Annotated[list[str], typer.Option(help="NAME=STAGE1 or NAME=STAGE1,STAGE2.")],
    data: StoreOption,
    held_out: Annotated[Path, typer.Option(help="Folder of the test pairs; made as needed.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    config: Annotated[Path, typer.Option(help="Data settings (TOML).")] = DATA,
    pairs: Annotated[int, typer.Option(help="Test pairs.", min=1)] = 100,
    threads: Annotated[int, typer.Option(help="Threads of the engine.", min=1)] = 1,
) -> None:
    """Compare DenseNet, attention and recurrence."""
    console = Console()
    with reported(console):
        settings = load_settings(config, DataSettings)
        scorer = Scorer([Row.parse(text) for text in row], settings, threads)
        phantom, grid = open_phantom(settings.phantom), settings.grid.to_grid()
        seeds = list(settings.test.seeds)[:pairs]
        for seed in track(seeds, "test pairs", console=console):
            store_pair(held_out, seed, grid, phantom)
        sets = [
            score(
                scorer,
                open_pairs(store, first_seed=split.first_seed, pairs=count),
                settings,
                console,
            )
            for store, split, count in (
                (data, settings.validation, settings.validation.pairs),
                (held_out, settings.test, len(seeds)),
            )
        ]
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "stage1": str(entry.stage1),
            "stage2": str(entry.stage2) if entry.stage2 else None,
            **measured(sets[0][entry.name], sets[1][entry.name]),
        }
        for entry in scorer.rows
    ]
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "pairs": len(seeds),
        "first_seed": seeds[0],
        "rows": rows,
        "scores": [{name: _plain(levels) for name, levels in one.items()} for one in sets],
    }
    (out / "ablation.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    text = markdown([*rows, PAPER], pairs=len(seeds), first_seed=seeds[0])
    (out / "ablation.md").write_text(text)
    console.print(text, markup=False)


def _plain(levels: Mapping[str, Scored]) -> dict[str, Any]:
    return {level: asdict(scored) for level, scored in levels.items()}


if __name__ == "__main__":
    typer.run(main)
