"""The table of several evaluations on semi-synthetic studies: backgrounds by trainings.

``python -m export.semisynthetic_table --row "phantoms only=DIR" --row "also the other chests=DIR2"
--out FILE.md``

``DIR`` is the ``--out`` of ``export.evaluate --semi-synthetic``, which knows its background: a row
is named by what the bundle was trained on, and a name may be there once for every background.
Writes a section for the model card (``export.bundle --section``). ``--note`` adds sentences of
one's own: what a background shows and what it does not, where it is from and under which terms.

Two trainings on one background are compared by the difference of their study AUC, with a 95 %
bootstrap interval over the pairs that both have measured, drawn for both alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from export.command_line import reported
from export.evaluate import evaluated_cases, read_evaluation
from export.measures import Cases, StudyCase, auc, with_intervals
from export.model_card import interval_text
from pe_infer.errors import Code, InputError

COLUMNS = {
    "study_auc": "study AUC",
    "slab_auc": "slab AUC",
    "peak_hit": "peak hits",
    "peak_control": "control",
}

TWINS = "slab AUC against twins, by pixels"

LIMITS = (
    "Findings are painted into a real study without one, and the same study without them is the",
    "negative one of the pair. Peak hits are positive slabs whose attention peak lies within 10 mm",
    "of the finding, control is the same at the same places of the study without it. The slab AUC",
    "is against all clean slabs, also at levels where nothing can be painted; that against twins",
    "is against the same slabs without the finding, by its pixels in the middle plane (and slabs).",
    "In brackets are 95 % bootstrap intervals over pairs.",
    "",
    "What limits this: all pairs of a background are of one patient, taken by one scanner. The",
    "intervals say what other painted findings would change, and nothing of other patients, nor of",
    "findings that are unlike those that are painted.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training on one background.

    Attributes:
        training: What the bundle was trained on.
        evaluation: What ``export.evaluate`` wrote.
        cases: Its studies, if they are still there.
    """

    training: str
    evaluation: Mapping[str, Any]
    cases: Cases | None

    @property
    def background(self) -> str:
        """Name of the real study."""
        return str(self.evaluation["semi_synthetic"])

    @property
    def pairs(self) -> int:
        """How many were measured."""
        refused = self.evaluation.get("not_processed", {}).get("patients", 0)
        return int(self.evaluation["pairs"] - refused)

    @property
    def against_twins(self) -> str:
        """AUC of positive slabs against the same ones without the finding, by its size."""
        sizes = [
            f"from {each['from_px']}: {each['auc_against_twins']:.2f} ({each['slabs']})"
            for each in self.evaluation.get("by_slab_size", ())
            if each["auc_against_twins"] is not None
        ]
        return ", ".join(sizes) or "-"

    @property
    def shown(self) -> tuple[Any, ...]:
        """What makes two rows comparable: the same pairs."""
        names = ("first_seed", "pairs", "phantom_configuration")
        return tuple(self.evaluation[name] for name in names)


def read_row(text: str) -> Row:
    """Read ``TRAINING=FOLDER``.

    Raises:
        InputError: It is something else, or the folder has no evaluation on semi-synthetic studies.
    """
    training, _, folder = (part.strip() for part in text.partition("="))
    if not training or not folder:
        raise InputError(f"--row {text!r}: expected TRAINING=FOLDER", code=Code.INVALID_ARGUMENT)
    evaluation = read_evaluation(Path(folder))
    if not evaluation.get("semi_synthetic"):
        raise InputError(
            f"--row {text!r}: the evaluation is of phantom configuration "
            f"{evaluation['phantom_configuration']}, expected one of semi-synthetic studies "
            "(export.evaluate --semi-synthetic)",
            code=Code.INVALID_ARGUMENT,
        )
    cases = evaluated_cases(Path(folder), evaluation)
    return Row(training=training, evaluation=evaluation, cases=cases)


def by_background(rows: Sequence[Row]) -> list[Row]:
    """Rows of a background together, otherwise in their order.

    Raises:
        InputError: Two are of one training and one background.
    """
    names = [(row.background, row.training) for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"--row: {twice} (background, training) are there more than once: give every training "
            "a name of its own",
            code=Code.INVALID_ARGUMENT,
        )
    backgrounds = [background for background, _ in names]
    return sorted(rows, key=lambda row: backgrounds.index(row.background))


def difference_text(first: Row, second: Row) -> str:
    """How much larger the study AUC of the second is, or why that is not known."""
    name = f"{first.background}, {second.training!r} over {first.training!r}"
    if first.shown != second.shown:
        return f"{name}: not compared, since they were shown different pairs."
    if first.cases is None or second.cases is None:
        return f"{name}: not compared, since the studies are no longer beside the evaluations."
    other = {(case.seed, case.positive): case.probability for case in second.cases.studies}
    common = [case for case in first.cases.studies if (case.seed, case.positive) in other]
    if not common:
        return f"{name}: not compared, since no pair was processed by both."

    def difference(chosen: Sequence[StudyCase]) -> dict[str, float]:
        truth = [case.positive for case in chosen]
        before = auc(truth, [case.probability for case in chosen])
        return {"auc": auc(truth, [other[case.seed, case.positive] for case in chosen]) - before}

    found = with_intervals(common, difference, np.random.default_rng(0))["auc"]
    low, high = found["interval"]
    return (
        f"{name}: study AUC {found['value']:+.3f} ({low:+.3f} to {high:+.3f}), "
        f"{len(common) // 2} pairs."
    )


def markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The section, with differences of every two trainings of a background, and notes."""
    ordered = by_background(rows)
    columns = ["background", "training", "not seen in it", "pairs", *COLUMNS.values(), TWINS]
    lines = ["## Findings painted into real studies", "", *LIMITS, ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in ordered:
        values = [interval_text(row.evaluation.get(name), 3) for name in COLUMNS]
        unseen = "yes" if row.evaluation.get("held_out") else "not known, or seen"
        cells = [row.background, row.training, unseen, str(row.pairs), *values, row.against_twins]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    differences = [
        f"- {difference_text(first, second)}"
        for _, group in groupby(ordered, key=lambda row: row.background)
        for first, second in combinations(group, 2)
    ]
    lines += ["", *differences] if differences else []
    lines += [line for note in notes for line in ("", note)]
    return "\n".join([*lines, ""])


def main(
    *,
    row: Annotated[list[str], typer.Option(help="TRAINING=FOLDER; may be repeated.")],
    note: Annotated[
        list[str] | None, typer.Option(help="Sentences for the end; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Markdown file.")],
) -> None:
    """Write the table of evaluations on semi-synthetic studies."""
    console = Console()
    with reported(console):
        text = markdown([read_row(each) for each in row], note or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    typer.run(main)
