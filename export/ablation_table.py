"""The table of an ablation, and whether the effects of its paper are there: numbers to words.

A row of the table is a system with or without one of its parts, trained once or with several seeds.
Thresholds are chosen on validation studies, everything is measured on test studies.

Whether an effect reproduces is decided by a rule that was fixed before any number was known: the
mean over the trainings of the difference in AUC has a 95 % bootstrap interval over patients; the
whole interval and every single training must have the paper's sign. One training each can
contradict the paper, not confirm it: it says nothing of chance between trainings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from export.calibration import choose_points
from export.measures import BOOTSTRAPS, auc

Level = Literal["slab", "study"]
Verdict = Literal["reproduced", "not reproduced", "reversed", "one training"]

COLUMNS: Final[Mapping[Level, tuple[str, ...]]] = {
    "slab": ("accuracy", "recall", "precision", "f1", "auc", "hit", "control"),
    "study": ("accuracy", "recall", "precision", "f1", "auc"),
}
TITLES: Final[Mapping[Level, str]] = {"slab": "Slabs", "study": "Studies"}


@dataclass(frozen=True)
class Scored:
    """What was said of many slabs, or of many studies.

    Attributes:
        probabilities: That they are positive.
        truth: Whether they are.
        patients: Whose they are: seeds of the pairs.
    """

    probabilities: list[float] = field(default_factory=list)
    truth: list[bool] = field(default_factory=list)
    patients: list[int] = field(default_factory=list)

    def add(self, probability: float, patient: int, *, truth: bool) -> None:
        """One more."""
        self.probabilities.append(probability)
        self.truth.append(truth)
        self.patients.append(patient)


@dataclass(frozen=True)
class Scores:
    """What one training says of a set of pairs.

    Attributes:
        slab: Slabs that have a label; none where the last stage says nothing of them.
        study: Studies.
        hits: Whether the attention peak lies near the finding, for positive slabs.
        controls: The same at the same places of the patients without it.
    """

    slab: Scored = field(default_factory=Scored)
    study: Scored = field(default_factory=Scored)
    hits: list[bool] = field(default_factory=list)
    controls: list[bool] = field(default_factory=list)

    def level(self, level: Level) -> Scored:
        """Slabs or studies."""
        return self.slab if level == "slab" else self.study

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Scores":
        """Read what `dataclasses.asdict` gave."""
        return cls(
            Scored(**values["slab"]), Scored(**values["study"]), values["hits"], values["controls"]
        )


@dataclass(frozen=True)
class Training:
    """One training of a row.

    Attributes:
        label: Its seed, or a number: trainings of two rows with one label are compared.
        validation: What chooses thresholds.
        test: What is measured.
    """

    label: int
    validation: Scores
    test: Scores


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


def measured(training: Training) -> dict[str, dict[str, float]]:
    """Level to its numbers of the test, at thresholds of the validation."""
    result: dict[str, dict[str, float]] = {}
    for level in TITLES:
        chosen = training.validation.level(level)
        if not chosen.truth:
            continue
        points = choose_points(np.asarray(chosen.probabilities), [float(t) for t in chosen.truth])
        balanced = next(point for point in points if point.name == "balanced")
        result[level] = at_threshold(training.test.level(level), balanced.threshold)
        for name in ("hit", "control"):
            values: list[bool] = getattr(training.test, f"{name}s")
            if level == "slab" and values:
                result[level][name] = float(np.mean(values))
    return result


def row_summary(
    name: str, trainings: Sequence[Training], paper: Mapping[Level, Mapping[str, float]]
) -> dict[str, Any]:
    """A row of the table, for JSON.

    Args:
        name: Of the row.
        trainings: At least one.
        paper: Level to measure to the paper's own number.

    Returns:
        ``trainings`` (the numbers of each), and by level and measure their mean, the lowest and the
        highest.
    """
    found = [measured(training) for training in trainings]
    result: dict[str, Any] = {
        "name": name,
        "paper": {level: dict(values) for level, values in paper.items()},
        "trainings": [
            {"label": training.label, **levels}
            for training, levels in zip(trainings, found, strict=True)
        ],
    }
    for level in found[0]:
        result[level] = {
            measure: _range([levels[level][measure] for levels in found])
            for measure in found[0][level]
        }
    return result


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


@dataclass(frozen=True)
class Effect:
    """What a part contributes, by the difference in AUC of the rows with and without it.

    Attributes:
        name: What the part is.
        level: Slabs or studies.
        row: With it: the paper finds this one better.
        over: Without it.
        by_training: Difference of every pair of trainings.
        interval: 95 % of the mean difference, over patients.
        paper: The paper's difference, where it has both numbers.
        verdict: By the rule of this module.
    """

    name: str
    level: Level
    row: str
    over: str
    by_training: list[float]
    interval: tuple[float, float]
    paper: float | None
    verdict: Verdict

    @property
    def words(self) -> str:
        """All of it in a line or two."""
        mean, (low, high) = float(np.mean(self.by_training)), self.interval
        count = len(self.by_training)
        paper = "no figure known" if self.paper is None else f"{self.paper:+.3f}"
        text = (
            f"{self.name} ({TITLES[self.level].lower()}, {self.row!r} over {self.over!r}): AUC "
            f"{mean:+.3f} (95 % {low:+.3f} to {high:+.3f}"
        )
        if count > 1:
            text += f"; trainings {min(self.by_training):+.3f} to {max(self.by_training):+.3f}"
        return f"{text}); paper: {paper}. {self._conclusion()}"

    def _conclusion(self) -> str:
        low, high = self.interval
        against = sum(difference <= 0 for difference in self.by_training)
        count = len(self.by_training)
        verb, sign = (
            ("show", "the expected") if self.paper is None else ("reproduce", "the paper's")
        )
        if self.verdict == "reproduced":
            return f"{verb.title()}s: the interval and all {count} trainings have {sign} sign."
        if self.verdict == "one training":
            return (
                f"Has {sign} sign, but there is one training each: what another seed would change "
                "is not known."
            )
        if self.verdict == "reversed":
            return f"Does not {verb}: the sign is reversed, and the interval excludes zero."
        reasons = ["the interval includes zero"] if low <= 0 <= high else []
        if against:
            reasons.append(f"{against} of {count} trainings do not have {sign} sign")
        return f"Does not {verb}: {' and '.join(reasons)}."


def effect_of(
    name: str,
    level: Level,
    row: tuple[str, Sequence[Training]],
    over: tuple[str, Sequence[Training]],
    paper: float | None,
    *,
    seed: int = 0,
) -> Effect | None:
    """What a part contributes, from trainings of two rows that have the same labels.

    Args:
        name: What the part is.
        level: Slabs or studies.
        row: Name and trainings of the row with it.
        over: The same without it.
        paper: The paper's difference.
        seed: Of the bootstrap.

    Returns:
        ``None`` where no two trainings have one label, or a row says nothing at that level.
    """
    others = {training.label: training for training in over[1]}
    couples = [
        (training.test.level(level), others[training.label].test.level(level))
        for training in row[1]
        if training.label in others
    ]
    if not couples or not all(one.truth and other.truth for one, other in couples):
        return None
    patients = np.unique(np.concatenate([one.patients for couple in couples for one in couple]))
    drawn = [(_Drawn(one, patients), _Drawn(other, patients)) for one, other in couples]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(patients), size=len(patients))
        means.append(np.mean([one.auc(chosen) - other.auc(chosen) for one, other in drawn]))
    everybody = np.arange(len(patients))
    differences = [one.auc(everybody) - other.auc(everybody) for one, other in drawn]
    low, high = (float(q) for q in np.nanquantile(means, [0.025, 0.975]))
    return Effect(
        name=name,
        level=level,
        row=row[0],
        over=over[0],
        by_training=differences,
        interval=(low, high),
        paper=paper,
        verdict=verdict_of(differences, (low, high)),
    )


def verdict_of(differences: Sequence[float], interval: tuple[float, float]) -> Verdict:
    """The rule of this module: see above."""
    low, high = interval
    if high < 0:
        return "reversed"
    if low <= 0 or any(difference <= 0 for difference in differences):
        return "not reproduced"
    return "reproduced" if len(differences) > 1 else "one training"


class _Drawn:
    """Scores that patients can be drawn from."""

    def __init__(self, scored: Scored, patients: NDArray[np.int64]) -> None:
        owners = np.asarray(scored.patients)
        self._places = [np.flatnonzero(owners == patient) for patient in patients]
        self._truth = np.asarray(scored.truth)
        self._scores = np.asarray(scored.probabilities)

    def auc(self, chosen: NDArray[np.int64]) -> float:
        """Of some patients, who may be there more than once."""
        places = np.concatenate([self._places[int(patient)] for patient in chosen])
        return auc(self._truth[places].tolist(), self._scores[places].tolist())


def paper_difference(
    row: Mapping[Level, Mapping[str, float]],
    over: Mapping[Level, Mapping[str, float]],
    level: Level,
) -> float | None:
    """Of the AUC, from the paper's numbers of both rows; ``None`` where it has not both."""
    values = [one.get(level, {}).get("auc") for one in (row, over)]
    return None if None in values else float(values[0] or 0) - float(values[1] or 0)


def markdown(document: Mapping[str, Any]) -> str:
    """A section with the table, the paper's figures in it, and the effects in words.

    Args:
        document: ``rows`` as of `row_summary`; ``effects`` with their ``words``; ``pairs`` and
            ``first_seed`` of the test; ``source`` of the paper's figures; ``note``.
    """
    counts = sorted({len(row["trainings"]) for row in document["rows"]})
    trained = " or ".join(map(str, counts))
    lines = [
        "## Ablation",
        "",
        f"On {document['pairs']} held-out pairs of synthetic studies (seeds from",
        f"{document['first_seed']}), at thresholds chosen on validation pairs. Trainings of a row:",
        f"{trained}; where there are several, a number is their mean, with the lowest and the",
        "highest. Lines in italics are the paper's own figures, of patients",
        f"({document['source']}): what can be compared is which line is above which.",
    ]
    if note := document["note"].strip():
        lines += ["", *note.splitlines()]
    for level, title in TITLES.items():
        columns = COLUMNS[level]
        body: list[str] = []
        for row in document["rows"]:
            if level in row:
                values = [_shown(row[level].get(column)) for column in columns]
                body.append(f"| {row['name']} | " + " | ".join(values) + " |")
            if level in row["paper"]:
                own = row["paper"][level]
                values = [f"*{own[c]:.3f}*" if c in own else "-" for c in columns]
                body.append(f"| *paper: {row['name']}* | " + " | ".join(values) + " |")
        if body:
            lines += ["", f"| {title} | " + " | ".join(columns) + " |"]
            lines += ["|---" * (len(columns) + 1) + "|", *body]
    if document["effects"]:
        lines += ["", *(f"- {effect['words']}" for effect in document["effects"])]
    return "\n".join([*lines, ""])


def _shown(value: Mapping[str, float] | None) -> str:
    if value is None or math.isnan(value["mean"]):
        return "-"
    if value["low"] == value["high"]:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
