"""What the networks of an ablation say of pairs of studies: slabs, studies, where they looked.

A row is a checkpoint of stage 1, or one of each stage. Without the second one a study's score is
what the first stage can say by itself: the largest logit of its slabs (Shi), or the best run of
neighbours by its weakest (RADnet, whose bundle has that rule in both cases); a row of peaks has the
highest value of a slab's activation map in the place of its logit. Stage 2 of Shi says nothing of
slabs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from export.ablation_table import Scores
from export.bundle import load_trained
from export.datasets.augment import slab_of
from export.datasets.labels import slab_labels
from export.datasets.store import StoredStudy, StudyPair
from export.models.radnet import consecutive_score
from export.onnx_export import Array, GraphNode
from export.systems import radnet_graphs, shi_graphs
from export.systems.registry import system_of
from export.training.checkpoint import load_checkpoint
from export.training.config import DataSettings
from export.training.encoder import SlabEncoder
from export.training.stage2 import load_stage1
from export.training.validation import peak_hits
from pe_infer.errors import Code, InputError

CONSECUTIVE: Final = 3


@dataclass(frozen=True)
class Row:
    """A line of the table, of one training: its networks, of which the second may be missing.

    Attributes:
        name: Of the line.
        stage1: Checkpoint.
        stage2: Checkpoint; ``None``: stage 1 by itself.
        peak: Stage 1 by itself is read by its highest attention, not by its logit.
    """

    name: str
    stage1: Path
    stage2: Path | None
    peak: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: A peak is asked for beside a stage 2.
        """
        if self.peak and self.stage2 is not None:
            raise InputError(
                f"row {self.name!r} is of the highest attention of stage 1 by itself, and stage 2 "
                f"{str(self.stage2)!r} was given: leave it out",
                code=Code.INVALID_ARGUMENT,
            )

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
class Reading:
    """How a system is read.

    Attributes:
        encoder: Its first stage, for slabs of so many rows and columns, as a graph.
        logit: The graph's output that is a slab's logit.
        alone: Logits (1, T) of the first stage to that of the study (1,).
        both: Second stage, features (1, T, ...) and logits (1, T) of the first one to the logits of
            slabs (1, T), or ``None``, and of the study (1,).
    """

    encoder: Callable[[Any, int], GraphNode]
    logit: str
    alone: Callable[[Tensor], Tensor]
    both: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor | None, Tensor]]


def _best_run(logits: Tensor) -> Tensor:
    return consecutive_score(logits, CONSECUTIVE)


def _of_study(stage2: nn.Module, features: Tensor, logits: Tensor) -> tuple[None, Tensor]:
    del logits
    return None, stage2(features).flatten()


def _in_context(stage2: nn.Module, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    slabs: Tensor = stage2(features, logits)
    return slabs, _best_run(slabs)


READINGS: Final = {
    "shi": Reading(
        encoder=shi_graphs.encoder_node,
        logit="stage1_logit",
        alone=lambda logits: logits.amax(dim=1),
        both=_of_study,
    ),
    "radnet": Reading(
        encoder=radnet_graphs.encoder_node, logit="logit", alone=_best_run, both=_in_context
    ),
}


@dataclass(frozen=True)
class Encoded:
    """What the first stage says of the T slabs of a study.

    Attributes:
        features: (1, T, ...).
        logits: (1, T).
        attention: (T, h, w) raw maps.
    """

    features: Tensor
    logits: Tensor
    attention: Array

    @property
    def peaks(self) -> Tensor:
        """(1, T): the highest attention of every slab."""
        return torch.from_numpy(self.attention.max(axis=(1, 2)))[None]


class Scorer:
    """Slabs and studies through the networks of some rows; equal first stages run once."""

    def __init__(self, rows: Sequence[Row], data: DataSettings, threads: int) -> None:
        """Load.

        Raises:
            InputError: A file is no checkpoint of its stage, or two do not belong together.
            ConfigurationError: They are of another grid, or know the test patients.
        """
        self.rows, self._data = rows, data
        self._encoders: dict[Path, tuple[Reading, SlabEncoder]] = {}
        self._second: dict[Path, nn.Module] = {}
        for row in rows:
            if row.stage1 not in self._encoders:
                system = system_of(load_checkpoint(row.stage1, stage=1)["settings"])
                reading = READINGS[system.name]
                node = reading.encoder(load_stage1(row.stage1, data, system), data.grid.rows)
                self._encoders[row.stage1] = reading, SlabEncoder(node, threads=threads)
            if row.stage2:
                self._second[row.stage2] = load_trained([row.stage1, row.stage2]).stage2

    @torch.inference_mode()
    def add(self, pair: StudyPair, found: Sequence[Scores]) -> None:
        """Score both studies of a pair.

        Args:
            pair: The pair.
            found: A value per row, which what is said is added to.
        """
        record = pair.positive.record
        middles = record.slab_planes  # of both, so that they are of one length
        for study in (pair.positive, pair.negative):
            said = {path: self._encoded(path, study, middles) for path in self._encoders}
            labels = slab_labels(
                study.record.clot_pixels,
                study.record.plane_labels,
                middles,
                self._data.grid.planes_per_slab,
                self._data.min_pixels,
            )
            for row, scores in zip(self.rows, found, strict=True):
                reading, _ = self._encoders[row.stage1]
                encoded = said[row.stage1]
                slabs: Tensor | None = encoded.logits
                if row.stage2:
                    slabs, whole = reading.both(
                        self._second[row.stage2], encoded.features, encoded.logits
                    )
                else:
                    slabs = encoded.peaks if row.peak else encoded.logits
                    whole = reading.alone(slabs)
                    self._look(pair, study, encoded.attention, scores)
                scores.study.add(
                    float(torch.sigmoid(whole)), pair.seed, truth=study.record.positive
                )
                for place, label in enumerate(labels if slabs is not None else []):
                    if slabs is not None and label != "dropped":
                        probability = float(torch.sigmoid(slabs[0, place]))
                        scores.slab.add(probability, pair.seed, truth=label == "positive")

    def _look(self, pair: StudyPair, study: StoredStudy, attention: Array, scores: Scores) -> None:
        """Whether the attention peaks lie near the finding of the pair's positive study."""
        grid, record = self._data.grid, pair.positive.record
        for place, middle in enumerate(record.slab_planes):
            if record.clot_pixels[middle] >= self._data.min_pixels:
                mask = pair.positive.slab_mask(middle, 1)[0]
                hit = peak_hits(attention[place], mask, grid.spacing_mm)
                (scores.hits if study.record.positive else scores.controls).append(hit)

    def _encoded(self, path: Path, study: StoredStudy, middles: Sequence[int]) -> Encoded:
        reading, encoder = self._encoders[path]
        slabs = [encoder(self._slab(study, middle)) for middle in middles]
        joined = {name: np.concatenate([slab[name] for slab in slabs]) for name in slabs[0]}
        return Encoded(
            features=torch.from_numpy(joined["features"])[None],
            logits=torch.from_numpy(joined[reading.logit])[None, :, 0],
            attention=joined["attention"][:, 0],
        )

    def _slab(self, study: StoredStudy, middle: int) -> Array:
        grid = self._data.grid
        hu = torch.from_numpy(study.slab_hu(middle, grid.planes_per_slab).astype(np.float32))
        slab: Array = slab_of(hu, grid.window_bounds).numpy()[None]
        return slab


def score(
    scorer: Scorer,
    pairs: Mapping[str, Sequence[StudyPair]],
    console: Console,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Scores]] | None:
    """Everything that the networks say of some pairs.

    Args:
        scorer: Of the rows.
        pairs: Name of a set to its pairs.
        console: Shows progress.
        stop: Asked before every pair.

    Returns:
        Set to scores, a mapping per row; ``None`` if it was stopped.
    """
    found = [{name: Scores() for name in pairs} for _ in scorer.rows]
    for name, chosen in pairs.items():
        for pair in track(chosen, f"{name} pairs", console=console):
            if stop():
                return None
            scorer.add(pair, [sets[name] for sets in found])
    return found
