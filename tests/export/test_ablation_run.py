"""A whole ablation of tiny networks: killed, stopped, taken up, and the same table in the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from export.ablation import app, chosen_rows, document_of
from export.ablation_table import markdown
from export.ablation_training import Ablation, Yardstick
from export.datasets.store import StudyRecord, write_study
from export.training import stage1, stage2
from export.training.checkpoint import load_checkpoint
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.phantom import open_phantom

QUIET = Console(quiet=True)
SIZE, PLANES = 64, 16

# Who is killed closes no file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DATA = f"""
name = "tiny"
[grid]
rows = {SIZE}
cols = {SIZE}
spacing_mm = 4.0
pitch_um = 2500
planes_per_slab = 5
slab_step = 2
windows = [{{ low_hu = -1024, high_hu = 500 }}]
gate = {{ low_hu = -950, high_hu = -500, min_fraction = 0.04 }}
[train]
first_seed = 0
pairs = 2
[validation]
first_seed = 10
pairs = 2
[test]
first_seed = 20
pairs = 2
"""
STAGE1 = """
seed = 5
data = "data.toml"
validation_pairs = 2
checkpoint_minutes = 0.0
[[phase]]
name = "a"
width = 0.0625
crop = 64
batch = 4
steps = 4
lr = 1e-3
validate_steps = 2
"""
STAGE2 = """
seed = 6
data = "data.toml"
train_pairs = 2
validation_pairs = 2
epochs = 3
pairs_per_step = 1
filters = [4, 6]
window_slabs = 3
attention_gain = 0.5
checkpoint_minutes = 0.0
"""
ABLATION = """
data = "data.toml"
source = "A 2020"
pairs = 2
seeds = [1, 2]
[[row]]
name = "maximum"
stage1 = "one.toml"
[[row]]
name = "stage 2"
stage1 = "one.toml"
stage2 = "two.toml"
paper = { study = { auc = 0.8 } }
[[effect]]
name = "stage 2"
level = "study"
row = "stage 2"
over = "maximum"
"""


class KilledError(Exception):
    """The process ends here."""


def write_pair(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planes = rng.normal(-700.0, 30.0, (PLANES, SIZE, SIZE))
    mask = np.zeros(planes.shape, dtype=np.bool_)
    row, col = rng.integers(10, SIZE - 10, 2)
    planes[:, row - 6 : row + 6, col - 6 : col + 6] = 300.0
    mask[5:11, row - 4 : row + 4, col - 4 : col + 4] = True
    for positive in (True, False):
        hu = np.where(mask & positive, 50.0, planes).round().astype(np.int16)
        record = StudyRecord(
            seed=seed,
            positive=positive,
            positions_um=[2500 * k for k in range(PLANES)],
            slab_planes=list(range(2, PLANES - 2, 2)),
            clot_pixels=[int(c) * positive for c in mask.sum(axis=(1, 2))],
            preprocessing_version=1,
            phantom={"configuration": open_phantom("chest").digest()},
        )
        write_study(folder, record, hu, mask if positive else None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, a store and test pairs."""
    folder = tmp_path_factory.mktemp("ablation")
    for name, text in (
        ("data", DATA),
        ("one", STAGE1),
        ("two", STAGE2),
        ("ablation", ABLATION),
    ):
        (folder / f"{name}.toml").write_text(text)
    for seed in (0, 1, 10, 11):
        write_pair(folder / "store", seed)
    for seed in (20, 21):
        write_pair(folder / "held-out", seed)
    return folder


def opened(place: Path, out: Path) -> tuple[Ablation, Yardstick]:
    ablation = Ablation(place / "ablation.toml", place / "store", out, threads=1, console=QUIET)
    ablation.check_store(ablation.settings.row)
    yardstick = Yardstick.prepare(
        ablation.data,
        ablation.phantom,
        ablation.settings.pairs,
        place / "store",
        place / "held-out",
        workers=1,
        console=QUIET,
    )
    return ablation, yardstick


def go_on(place: Path, out: Path, stop: Callable[[], bool] = lambda: False) -> bool:
    ablation, yardstick = opened(place, out)
    return ablation.run(ablation.settings.row, yardstick, stop)


def table(place: Path, out: Path) -> dict[str, Any]:
    ablation, yardstick = opened(place, out)
    settings = ablation.settings
    trained = {row.name: ablation.trainings(row, yardstick) for row in settings.row}
    return document_of(settings, trained, yardstick)


def after(calls: int, *, kill: bool = False) -> Callable[[], bool]:
    """Says that it is time to stop after so many questions, or ends the process."""
    left = iter(range(calls))

    def stop() -> bool:
        if next(left, None) is not None:
            return False
        if kill:
            raise KilledError
        return True

    return stop


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An ablation that nothing interrupted, by its command."""
    out = place / "whole"
    options = {"config": "ablation.toml", "data": "store", "held-out": "held-out"}
    given = [text for name, path in options.items() for text in (f"--{name}", str(place / path))]
    result = CliRunner().invoke(app, ["run", *given, "--out", str(out), "--threads", "1"])
    assert result.exit_code == 0, result.output
    return out


def test_the_command_trains_every_row_with_every_seed(place: Path, whole: Path) -> None:
    document = json.loads((whole / "ablation.json").read_text())
    assert document == json.loads(json.dumps(table(place, whole)))
    assert [row["name"] for row in document["rows"]] == ["maximum", "stage 2"]
    for row in document["rows"]:
        assert [training["label"] for training in row["trainings"]] == [1, 2]
    assert len(document["effects"][0]["by_training"]) == 2
    assert (whole / "ablation.md").read_text() == markdown(document)
    for seed in (1, 2):
        for run in ("one", "one+two"):
            content = load_checkpoint(whole / f"seed{seed}" / run / "checkpoint.pt")
            assert content["settings"]["seed"] == seed
    first, second = (
        json.loads((whole / f"seed{seed}" / "one.json").read_text()) for seed in (1, 2)
    )
    assert first["sha256"] != second["sha256"]
    assert first["test"]["slab"]["probabilities"] != second["test"]["slab"]["probabilities"]
    assert not list(whole.glob("seed*/features-*"))  # gigabytes in earnest


def test_killed_and_stopped_it_goes_on_to_the_same_table(place: Path, whole: Path) -> None:
    out = place / "resumed"
    with pytest.raises(KilledError):
        go_on(place, out, after(3, kill=True))  # in stage 1
    assert load_checkpoint(out / "seed1" / "one" / "checkpoint.pt")["progression"]["step"] == 3
    assert not go_on(place, out, after(6))  # in stage 2
    assert load_checkpoint(out / "seed1" / "one+two" / "checkpoint.pt")["progression"]["step"] == 4
    with pytest.raises(InputError, match="no row is trained"):
        table(place, out)
    assert go_on(place, out)
    assert table(place, out) == table(place, whole)


def test_what_is_done_is_not_done_again(place: Path, whole: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in whole.glob("seed*/**/*") if path.is_file()}
    assert go_on(place, whole, after(0, kill=True))
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_folder_of_other_settings_is_refused(place: Path, whole: Path) -> None:
    settings = place / "one.toml"
    settings.write_text(STAGE1.replace("lr = 1e-3", "lr = 2e-3"))
    try:
        with pytest.raises(ConfigurationError, match="other settings than those"):
            go_on(place, whole)
    finally:
        settings.write_text(STAGE1)


def test_a_store_that_trainings_would_see_differently_is_refused(
    place: Path, tmp_path: Path
) -> None:
    for seed in (0, 10, 11):
        write_pair(tmp_path / "store", seed)
    ablation = Ablation(
        place / "ablation.toml", tmp_path / "store", tmp_path, threads=1, console=QUIET
    )
    with pytest.raises(ConfigurationError, match="1 pairs from seed 0 on"):
        ablation.check_store(ablation.settings.row)
    write_pair(tmp_path / "store", 1)
    ablation.check_store(ablation.settings.row)
    ablation.phantom = open_phantom("head")
    with pytest.raises(ConfigurationError, match="the ablation is tested on"):
        ablation.check_store(ablation.settings.row)


def test_rows_are_chosen_by_name(place: Path, tmp_path: Path) -> None:
    settings = Ablation(
        place / "ablation.toml", place / "store", tmp_path, threads=1, console=QUIET
    ).settings
    assert [row.name for row in chosen_rows(settings, ["stage 2"])] == ["stage 2"]
    assert len(chosen_rows(settings, [])) == 2
    with pytest.raises(InputError, match="no such rows, there are"):
        chosen_rows(settings, ["stage 3"])


def test_a_seed_replaces_that_of_the_settings_and_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(*, seed: int | None, resume: bool) -> None:
        stage1.main(
            config=place / "one.toml",
            data=place / "store",
            run=tmp_path / "1",
            resume=resume,
            seed=seed,
            minutes=0.0,
            threads=1,
        )

    def second(*, seed: int | None, resume: bool) -> None:
        stage2.main(
            config=place / "two.toml",
            data=place / "store",
            stage1=tmp_path / "1" / "checkpoint.pt",
            run=tmp_path / "2",
            resume=resume,
            seed=seed,
            minutes=0.0,
            threads=1,
        )

    for number, train in ((1, first), (2, second)):
        train(seed=7, resume=False)
        content = load_checkpoint(tmp_path / str(number) / "checkpoint.pt")
        assert content["settings"]["seed"] == 7
        with pytest.raises(typer.Exit):
            train(seed=None, resume=True)
        shown = " ".join(capsys.readouterr().out.split())
        assert "a run of seed 7" in shown
        assert "pass --seed 7" in shown


def test_checkpoints_are_scored_as_the_run_scores_them(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    folder = whole / "seed1"
    one, two = folder / "one" / "best.pt", folder / "one+two" / "best.pt"
    given = ["--row", f"maximum={one}", "--row", f"stage 2={one},{two}"]
    for name, path in (("config", "ablation.toml"), ("data", "store"), ("held-out", "held-out")):
        given += [f"--{name}", str(place / path)]
    result = CliRunner().invoke(app, ["score", *given, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "ablation.json").read_text())
    for row, expected in zip(found["rows"], table(place, whole)["rows"], strict=True):
        assert {**row["trainings"][0], "label": 1} == expected["trainings"][0]
    assert found["effects"][0]["verdict"] in {"one training", "not reproduced", "reversed"}


def test_checkpoints_of_rows_that_the_settings_do_not_name_are_refused(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "export" / "configs" / "ich-ablation.toml"
    given = ["--config", str(config), "--data", str(tmp_path), "--held-out", str(tmp_path)]
    result = CliRunner().invoke(
        app, ["score", *given, "--row", "DenseNets=a.pt", "--out", str(tmp_path)]
    )
    assert result.exit_code == InputError.exit_code
    assert "no such rows" in result.output
