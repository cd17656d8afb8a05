"""Evaluations on semi-synthetic studies as a section: rows, differences, what is not compared."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from export import semisynthetic_table as command
from export.measures import StudyCase, auc
from export.semisynthetic_table import markdown, read_row
from pe_infer.errors import InputError

PAIRS, FIRST_SEED = 40, 700


def scores(seed: int, gain: float) -> dict[tuple[int, bool], float]:
    """Probabilities of both studies of every pair, further apart with a larger gain."""
    rng = np.random.default_rng(seed)
    return {
        (number, positive): float(np.clip(rng.normal(0.4 + gain * positive, 0.2), 0, 1))
        for number in range(FIRST_SEED, FIRST_SEED + PAIRS)
        for positive in (True, False)
    }


BY_SIZE = [
    {"from_px": 12, "to_px": 50, "slabs": 7, "auc_against_twins": 0.611, "hit": 0.4},
    {"from_px": 50, "to_px": 150, "slabs": 0, "auc_against_twins": None, "hit": None},
]


def evaluation(
    folder: Path, said: dict[tuple[int, bool], float], background: str = "one", **changes: Any
) -> Path:
    """What ``export.evaluate`` would have written."""
    folder.mkdir()
    studies = [
        StudyCase(
            seed=seed,
            positive=positive,
            probability=probability,
            called=probability > 0.5,
            threshold=0.5,
            alerted=False,
            largest_mm3=1.0,
            largest_place="right main",
            largest_kind="central",
            kinds=["central"],
            seconds_after_last_slice=0.1,
            gated_positives=0,
        )
        for (seed, positive), probability in said.items()
    ]
    (folder / "studies.jsonl").write_text("".join(json.dumps(asdict(s)) + "\n" for s in studies))
    document = {
        "semi_synthetic": background,
        "phantom_configuration": f"digest of {background}",
        "first_seed": FIRST_SEED,
        "pairs": PAIRS,
        "cases": "studies.jsonl",
        "not_processed": {"patients": 2, "positive": 2, "negative": 2, "by_code": {}},
        "study_auc": {"value": 0.812, "interval": [0.701, 0.923]},
        "slab_auc": {"value": 0.634, "interval": [0.6, 0.7]},
        "peak_hit": {"value": 0.5, "interval": [0.4, 0.6]},
        **changes,
    }
    (folder / "evaluation.json").write_text(json.dumps(document))
    return folder


def study_auc(said: dict[tuple[int, bool], float]) -> float:
    return auc([positive for _, positive in said], list(said.values()))


def test_a_row_per_background_and_training_and_the_difference_of_two(tmp_path: Path) -> None:
    weak, strong = scores(1, 0.1), scores(2, 0.5)
    rows = [
        ("phantoms only", evaluation(tmp_path / "a", weak)),
        ("phantoms only", evaluation(tmp_path / "b", weak, "two|half", peak_hit=None)),
        ("both", evaluation(tmp_path / "c", strong, held_out=True, by_slab_size=BY_SIZE)),
    ]
    app = Typer()
    app.command()(command.main)
    asked = [part for name, folder in rows for part in ("--row", f"{name}={folder}")]
    asked += ["--note", "One is a crop.", "--out", str(tmp_path / "new" / "table.md")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "new" / "table.md").read_text()
    assert text.startswith("## Findings painted into real studies\n")
    assert "all pairs of a background are of one patient" in text
    numbers = "0.812 (0.701 to 0.923) | 0.634 (0.600 to 0.700)"
    hits = "0.500 (0.400 to 0.600)"
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert table == [
        f"| one | phantoms only | not known, or seen | 38 | {numbers} | {hits} | - | - |",
        f"| one | both | yes | 38 | {numbers} | {hits} | - | from 12: 0.61 (7) |",
        f"| two\\|half | phantoms only | not known, or seen | 38 | {numbers} | - | - | - |",
    ]
    assert text.endswith("\n\nOne is a crop.\n")
    (difference,) = [line for line in text.splitlines() if line.startswith("- ")]
    expected = study_auc(strong) - study_auc(weak)
    assert f"- one, 'both' over 'phantoms only': study AUC {expected:+.3f} (+0." in difference
    assert difference.endswith(f"{PAIRS} pairs.")


def test_pairs_are_drawn_for_both_trainings_alike(tmp_path: Path) -> None:
    said = scores(3, 0.3)
    rows = [evaluation(tmp_path / name, said) for name in ("a", "b")]
    text = markdown([read_row(f"{folder.name}={folder}") for folder in rows])
    assert "study AUC +0.000 (+0.000 to +0.000)" in text


def test_only_pairs_that_both_have_measured_are_compared(tmp_path: Path) -> None:
    said = scores(4, 0.3)
    fewer = {key: value for key, value in said.items() if key[0] >= FIRST_SEED + 10}
    rows = [evaluation(tmp_path / "a", said), evaluation(tmp_path / "b", fewer)]
    text = markdown([read_row(f"{folder.name}={folder}") for folder in rows])
    assert f"{PAIRS - 10} pairs." in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"first_seed": FIRST_SEED + 1}, "shown different pairs"),
        ({"phantom_configuration": "another"}, "shown different pairs"),
        ({"cases": "elsewhere/studies.jsonl"}, "no longer beside the evaluations"),
    ],
)
def test_what_cannot_be_compared_is_said_to_be_so(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    rows = [
        evaluation(tmp_path / "a", scores(5, 0.3)),
        evaluation(tmp_path / "b", scores(6, 0.3), **changes),
    ]
    text = markdown([read_row(f"{folder.name}={folder}") for folder in rows])
    assert reason in text
    assert "study AUC +" not in text


def test_rows_that_say_too_little_are_refused(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", scores(7, 0.3))
    for wrong in (str(folder), f"={folder}", "name="):
        with pytest.raises(InputError, match="expected TRAINING=FOLDER"):
            read_row(wrong)
    with pytest.raises(InputError, match="is not there"):
        read_row(f"name={tmp_path}")
    twice = [read_row(f"name={folder}")] * 2
    with pytest.raises(InputError, match="more than once"):
        markdown(twice)
    phantoms = evaluation(tmp_path / "b", scores(7, 0.3), semi_synthetic=None)
    with pytest.raises(InputError, match="expected one of semi-synthetic studies"):
        read_row(f"name={phantoms}")
