"""The log of a bundle's training, from the logs that lie beside its checkpoints: a table, a figure.

Both stages go into one CSV, a row per validation; what a stage does not measure is left empty. A
log that does not know the step of the checkpoint is of another run, and is not taken.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from export.training.stage1 import LOG_COLUMNS, VALIDATION_COLUMNS
from export.training.stage2 import LOG_COLUMNS as STUDY_COLUMNS

TABLE_FILE: Final = "training.csv"
CURVE_FILE: Final = "training.png"
COLUMNS: Final = (
    "stage",
    "step",
    "epoch",
    "phase",
    "minutes",
    "training_loss",
    "training_auc",
    "validation_loss",
    "validation_auc",
    "validation_peak_auc",
    "hit",
    "control",
)
MEASURES: Final = {  # of stage 1
    "validation_auc": "slab",
    "validation_peak_auc": "attention peak",
    "hit": "peak within 10 mm",
    "control": "the same without finding",
}
# Okabe and Ito's colours, which readers with any colour vision tell apart; lines differ in form too
BLACK, ORANGE, BLUE, GREEN, RED = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
STYLES: Final = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (RED, ":", "v"))

Entry = Mapping[str, str]


@dataclass(frozen=True)
class TrainingLog:
    """Logs of both stages.

    Attributes:
        losses: Of stage 1: ``step`` and ``total`` of single steps.
        validations: Of stage 1, as in `COLUMNS`.
        epochs: Of stage 2, the same.
        steps: Of stage 1 and of stage 2, at which the weights are those of the checkpoints.
    """

    losses: list[Entry]
    validations: list[Entry]
    epochs: list[Entry]
    steps: tuple[int, int]

    def files(self) -> dict[str, bytes]:
        """Name to contents of the table and the figure."""
        return {TABLE_FILE: self._table(), CURVE_FILE: self._figure()}

    def _table(self) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.validations, *self.epochs])
        return text.getvalue().encode()

    def _figure(self) -> bytes:
        figure = Figure(figsize=(8.8, 6.2), layout="constrained")
        panels = figure.subplots(2, 2)
        one, two = panels
        steps = _numbers(self.losses, "step")
        one[0].plot(steps, _numbers(self.losses, "total"), color=BLUE, alpha=0.3, linewidth=0.8)
        _curve(one[0], self.validations, "step", "training_loss", 0, "mean since last validation")
        for number, (name, label) in enumerate(MEASURES.items()):
            _curve(one[1], self.validations, "step", name, number, label)
        _curve(two[0], self.epochs, "epoch", "training_loss", 0, "training")
        _curve(two[0], self.epochs, "epoch", "validation_loss", 1, "validation")
        _curve(two[1], self.epochs, "epoch", "training_auc", 0, "training")
        _curve(two[1], self.epochs, "epoch", "validation_auc", 1, "validation")
        for axes in one:
            axes.axvline(self.steps[0], color=BLACK, linewidth=0.8, label="weights of the bundle")
            _phases(axes, self.validations)
        chosen = [row["epoch"] for row in self.epochs if int(row["step"]) == self.steps[1]]
        for axes in two:
            for epoch in chosen:
                axes.axvline(
                    float(epoch), color=BLACK, linewidth=0.8, label="weights of the bundle"
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        one[0].set(title="stage 1: loss", xlabel="optimiser steps", ylabel="loss (nats, weighted)")
        one[1].set(title="stage 1: validation slabs", xlabel="optimiser steps")
        two[0].set(title="stage 2: loss", xlabel="epochs", ylabel="loss (nats)")
        two[1].set(title="stage 2: studies", xlabel="epochs", ylabel="AUC")
        one[1].set_ylabel("AUC, or share of positive slabs")
        for axes in panels.flat:
            axes.legend(fontsize=7)
            axes.grid(alpha=0.25)
        drawn, contents = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        Image.open(drawn).convert("RGB").quantize(256).save(contents, format="png", optimize=True)
        return contents.getvalue()


def read_training_log(stage1: Path, stage2: Path, *, steps: tuple[int, int]) -> TrainingLog | None:
    """The logs that lie beside two checkpoints.

    Args:
        stage1: Checkpoint in the folder of its run.
        stage2: The same.
        steps: Optimiser steps of both checkpoints.

    Returns:
        ``None`` where a log is missing, or does not know the step of its checkpoint.
    """
    losses = _rows(stage1.parent / "log.csv", LOG_COLUMNS)
    scores = _rows(stage1.parent / "validation.csv", VALIDATION_COLUMNS)
    epochs = _rows(stage2.parent / "log.csv", STUDY_COLUMNS)
    if not _knows(scores, steps[0]) or not _knows(epochs, steps[1]):
        return None
    validations: list[Entry] = []
    before = 0
    for row in scores:
        step = int(row["step"])
        since = [float(entry["total"]) for entry in losses if before < int(entry["step"]) <= step]
        validations.append(
            {
                "stage": "1",
                "step": row["step"],
                "phase": row["phase"],
                "minutes": row["minutes"],
                "training_loss": f"{sum(since) / len(since):.5g}" if since else "",
                "validation_auc": row["auc"],
                "validation_peak_auc": row["peak_auc"],
                "hit": row["hit"],
                "control": row["control"],
            }
        )
        before = step
    of_stage2: list[Entry] = [
        {
            "stage": "2",
            "training_loss": row["loss"],
            "training_auc": row["auc"],
            **{
                name: row[name]
                for name in ("step", "epoch", "minutes", "validation_loss", "validation_auc")
            },
        }
        for row in epochs
    ]
    return TrainingLog(losses, validations, of_stage2, steps)


def _rows(path: Path, columns: tuple[str, ...]) -> list[Entry]:
    """Complete rows of a log; none where the file is not there, or is another log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if tuple(row) == columns and None not in row.values()]


def _knows(rows: Sequence[Entry], step: int) -> bool:
    """Whether a log may be of the run of a checkpoint: one in between is later than all of it."""
    steps = [int(row["step"]) for row in rows]
    return bool(steps) and (step in steps or step > steps[-1])


def _numbers(rows: Sequence[Entry], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _curve(
    axes: Axes, rows: Sequence[Entry], along: str, name: str, number: int, label: str
) -> None:
    """One measure, where it was measured."""
    there = [row for row in rows if row.get(name)]
    color, line, marker = STYLES[number]
    axes.plot(
        _numbers(there, along),
        _numbers(there, name),
        color=color,
        linestyle=line,
        marker=marker,
        markersize=4,
        label=label,
    )


def _phases(axes: Axes, validations: Sequence[Entry]) -> None:
    """Where phases end."""
    for row, following in pairwise(validations):
        if row["phase"] != following["phase"]:
            axes.axvline(float(row["step"]), color=BLACK, linewidth=0.4, linestyle=":")
