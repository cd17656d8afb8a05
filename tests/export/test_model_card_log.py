"""The log of a training in a bundle: which logs are taken, the table, the curve, the model card."""

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from export.bundle import load_trained
from export.model_card import model_card
from export.training.stage1 import LOG_COLUMNS, VALIDATION_COLUMNS
from export.training.stage2 import LOG_COLUMNS as STUDY_COLUMNS
from export.training_curve import COLUMNS, CURVE_FILE, TABLE_FILE, read_training_log
from pe_infer.bundle import Bundle

SMALL_BYTES = 100_000


def write(path: Path, columns: tuple[str, ...], rows: list[dict[str, float | str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="0.5")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints, of which only the folders matter, with logs of long runs."""
    one, two = tmp_path / "one" / "best.pt", tmp_path / "two" / "best.pt"
    write(
        one.parent / "log.csv",
        LOG_COLUMNS,
        [{"step": 25 * i, "total": 2.0 + (i % 7) / 10} for i in range(1, 401)],
    )
    write(
        one.parent / "validation.csv",
        VALIDATION_COLUMNS,
        [
            {"step": 100 * i, "phase": "a" if i < 50 else "b", "auc": 0.5 + i / 250, "hit": "nan"}
            for i in range(1, 101)
        ],
    )
    write(
        two.parent / "log.csv",
        STUDY_COLUMNS,
        [{"step": 10 * i, "epoch": i, "validation_loss": 1 / i} for i in range(1, 31)],
    )
    return one, two


def test_both_logs_become_one_table_and_a_small_figure(runs: tuple[Path, Path]) -> None:
    log = read_training_log(*runs, steps=(10_000, 120))
    assert log is not None
    files = log.files()
    rows = list(csv.DictReader(io.StringIO(files[TABLE_FILE].decode())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["stage"] for row in rows] == ["1"] * 100 + ["2"] * 30
    assert float(rows[0]["training_loss"]) == pytest.approx(2.25)  # mean of steps 25 to 100
    assert rows[1]["validation_auc"] == "0.508"
    assert (rows[1]["validation_loss"], rows[-1]["hit"]) == ("", "")
    assert float(rows[-1]["validation_loss"]) == pytest.approx(1 / 30, rel=1e-4)
    assert sum(map(len, files.values())) < SMALL_BYTES
    with Image.open(io.BytesIO(files[CURVE_FILE])) as image:
        assert image.format == "PNG"


def test_logs_of_other_runs_are_not_taken(runs: tuple[Path, Path]) -> None:
    assert read_training_log(*runs, steps=(10_010, 125)) is None  # 125 lies between two epochs
    assert read_training_log(*runs, steps=(150, 120)) is None
    assert read_training_log(*runs, steps=(10_010, 305)) is not None  # stopped after the last rows
    with (runs[1].parent / "log.csv").open("a") as file:
        file.write("310,3")  # cut short
    log = read_training_log(*runs, steps=(10_000, 120))
    assert log is not None
    assert len(log.epochs) == 30
    other = (runs[0].parent / "log.csv").read_bytes()
    (runs[1].parent / "log.csv").write_bytes(other)
    assert read_training_log(*runs, steps=(10_000, 125)) is None
    (runs[1].parent / "log.csv").unlink()
    assert read_training_log(*runs, steps=(10_000, 120)) is None


def test_a_bundle_has_the_log_of_its_training(checkpoints: list[Path], bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert loaded.manifest.training["log"] == {"table": TABLE_FILE, "curve": CURVE_FILE}
    rows = list(csv.DictReader(io.StringIO(loaded.files[TABLE_FILE].decode())))
    assert [row["stage"] for row in rows] == ["1", "2", "2", "2", "2"]  # epoch 0 is validated too
    assert loaded.files[CURVE_FILE].startswith(b"\x89PNG")
    assert (
        f"![Loss and validation of both stages]({CURVE_FILE})"
        in loaded.files["MODEL_CARD.md"].decode()
    )


def test_without_logs_the_card_says_so(
    checkpoints: list[Path], bundle: Path, tmp_path: Path
) -> None:
    copies = []
    for number, path in enumerate(checkpoints):
        (tmp_path / str(number)).mkdir()
        copies.append(tmp_path / str(number) / path.name)
        copies[-1].write_bytes(path.read_bytes())
    assert load_trained(checkpoints).log is not None
    assert load_trained(copies).log is None
    document = Bundle.load(bundle).manifest.model_dump(mode="json")
    del document["training"]["log"]
    card = model_card(document, [])
    assert "none lay beside the checkpoints" in card
    width = document["training"]["stage1"]["width"]
    assert width < 1
    assert f", {width:g} of the width above." in card
    assert CURVE_FILE not in card
