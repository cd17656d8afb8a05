"""What a bundle and its model card say of the studies that it was trained on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from export import bundle as command
from export import evaluate
from export.bundle import DEFAULT_CONFIG, BundleSettings, load_trained, make_bundle
from export.datasets.store import StoredStudy, open_pairs
from export.systems.registry import SYSTEMS
from export.training.config import DataSettings, load_settings
from export.training.features import Encoder, open_cache
from export.training.stage2 import load_stage1
from export.training.start import read_start
from pe_infer.bundle import Bundle
from pe_infer.certificate import CERTIFICATE_FILE
from pe_infer.errors import ConfigurationError

ONE = {"folder": "one", "source": "a collection, CC BY 4.0"}
TWO = {"folder": "two", "source": "another, CC BY 3.0"}
SEEDS = {"seeds": [[400, 410]], "collections": {}, "validated": [[420, 425]]}
START: dict[str, Any] = {
    "data": "earlier",
    "progression": {"step": 1, "minutes": 1.0},
    "seen": {**SEEDS, "backgrounds": {"zero": "the first, CC0"}, "all_backgrounds": True},
    "start": None,
}


def changed(path: Path, folder: Path, **values: Any) -> Path:
    """A checkpoint with other contents; of ``data``, with other settings."""
    content = torch.load(path)
    data = {**content["data"], **values.pop("data", {})}
    folder.mkdir(parents=True)
    torch.save({**content, **values, "data": data}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def drawn(*backgrounds: dict[str, str]) -> dict[str, Any]:
    """Data settings of phantoms and painted pairs."""
    seeds = {"first_seed": 900, "pairs": 2}
    painted = {"store": "x", "share": 0.5, "train": seeds, "backgrounds": list(backgrounds)}
    return {"source": [{"store": "phantoms", "share": 0.5}, painted]}


def card_of(paths: list[Path], folder: Path) -> str:
    settings = load_settings(DEFAULT_CONFIG, BundleSettings).model_copy(update={"checks": ()})
    make_bundle(settings, load_trained(paths), folder)
    return (folder / "MODEL_CARD.md").read_text()


def test_the_card_names_all_real_studies_that_both_stages_and_the_start_used(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    stage1 = changed(checkpoints[1], tmp_path / "1", data=drawn(ONE), start=START)
    stage2 = changed(checkpoints[0], tmp_path / "2", data=drawn(TWO))
    card = card_of([stage1, stage2], tmp_path / "bundle")
    for said in ("zero (the first, CC0)", "one (a collection, CC BY 4.0)", "two (another, CC BY"):
        assert f"painted into real studies: {said}" in card
    assert "Every patient is there twice" in card
    assert "A part of the training" not in card
    training = Bundle.load(tmp_path / "bundle").manifest.training
    assert list(training["backgrounds"]) == ["one", "two", "zero"]
    assert training["all_backgrounds"] is True
    assert training["seeds"]["validation 1 before stage 1"] == [420, 5]
    seen = read_start(str(tmp_path / "bundle"), SYSTEMS["shi"]).seen
    assert seen.backgrounds == training["backgrounds"]
    assert seen.all_backgrounds
    assert {range(10, 12), range(420, 425)} <= set(seen.validated)


@pytest.mark.parametrize("old", ["stage 1", "start"])
def test_what_older_versions_did_not_keep_is_said(
    checkpoints: list[Path], tmp_path: Path, old: str
) -> None:
    """A checkpoint without backgrounds, and a start that does not say what it has seen."""
    content = torch.load(checkpoints[1])
    if old == "stage 1":
        del content["backgrounds"], content["data"]["backgrounds"]
    else:
        content["start"] = {**START, "seen": {"seeds": [], "collections": {}}}
    torch.save(content, tmp_path / "1.pt")
    stage2 = changed(checkpoints[0], tmp_path / "2", data=drawn(TWO))
    card = card_of([tmp_path / "1.pt", stage2], tmp_path / "bundle")
    assert "two (another, CC BY 3.0)" in card
    assert "A part of the training was done before" in card
    assert not Bundle.load(tmp_path / "bundle").manifest.training["all_backgrounds"]


def test_the_card_says_terms_of_collections_and_nothing_of_pairs_about_them(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    names = ("cad-pe", "made-up")
    sources = [{"store": name, "share": 0.5, "collection": name} for name in names]
    stage2 = changed(checkpoints[0], tmp_path / "2", data={"source": sources})
    card = card_of([checkpoints[1], stage2], tmp_path / "bundle")
    assert "Real studies of cad-pe: IEEE DataPort, its terms." in card
    assert "Real studies of made-up: terms not known." in card
    assert "Every patient" not in card
    assert Bundle.load(tmp_path / "bundle").manifest.training["validated_on"] == "real studies"


def test_what_stage_1_started_from_may_not_be_held_back_by_stage_2(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    stage1 = changed(checkpoints[1], tmp_path / "1", start=START)
    for first, said in ((405, "trained on seeds 400 to 409"), (421, "chosen on seeds 420 to 424")):
        test = {"first_seed": first, "pairs": 2}
        stage2 = changed(checkpoints[0], tmp_path / f"{first}", data={"test": test})
        with pytest.raises(ConfigurationError, match=said):
            load_trained([stage1, stage2])
        data = DataSettings.model_validate(torch.load(stage2)["data"])
        with pytest.raises(ConfigurationError, match=said):
            load_stage1(stage1, data)
    validation = {"first_seed": 421, "pairs": 2}  # what was chosen on may be chosen on again
    stage2 = changed(checkpoints[0], tmp_path / "again", data={"validation": validation})
    load_trained([stage1, stage2])


def test_a_checkpoint_from_before_the_end_of_its_run_is_told(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    assert load_trained(checkpoints).unfinished == ()
    content = torch.load(checkpoints[1])
    early = {**content["progression"], "step": 1, "phase_step": 1}
    stage1 = changed(checkpoints[1], tmp_path / "1", progression=early)
    (line,) = load_trained([checkpoints[0], stage1]).unfinished
    assert f"{stage1} is of step 1, 1 of 2 steps of its run" in line
    early = {**torch.load(checkpoints[0])["progression"], "epoch": 2, "step": 6}
    stage2 = changed(checkpoints[0], tmp_path / "2", progression=early)
    (line,) = load_trained([stage2, checkpoints[1]]).unfinished
    assert f"{stage2} is of step 6, 2 of 3 epochs of its run" in line


def test_the_command_tells_what_it_removes_and_wants_files(
    checkpoints: list[Path], bundle: Path, tmp_path: Path
) -> None:
    app = Typer()
    app.command()(command.main)
    described = tmp_path / "bundle.toml"
    described.write_text(DEFAULT_CONFIG.read_text().partition("[[checks]]")[0])
    again = shutil.copytree(bundle, tmp_path / "again")
    (again / CERTIFICATE_FILE).write_text("{}")
    given = [*map(str, checkpoints), "--config", str(described), "--out", str(again)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert f"{CERTIFICATE_FILE}: removed" in done.output
    assert "removed" not in CliRunner().invoke(app, given).output
    for option in ("--evaluation", "--shifted"):
        refused = CliRunner().invoke(app, [*given, option, str(tmp_path)])
        assert refused.exit_code == 2, refused.output


def test_a_painted_scan_and_a_phantom_are_not_given_together(bundle: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(evaluate.main)
    given = ["--bundle", str(bundle), "--engine", "onnxruntime", "--out", str(tmp_path)]
    both = ["--semi-synthetic", str(tmp_path), "--phantom", str(tmp_path / "phantom.toml")]
    done = CliRunner().invoke(app, [*given, *both])
    assert done.exit_code == ConfigurationError.exit_code
    assert "Give one of them" in " ".join(done.output.split())


def test_a_study_without_a_slab_does_not_stop_the_scales_of_features(
    store: Path, tmp_path: Path
) -> None:
    class Ones:
        feature_channels = 2

        def __call__(self, study: StoredStudy, middles: Sequence[int]) -> torch.Tensor:
            del study
            return torch.ones(len(middles), 2, 1, 1) if middles else torch.empty(0)

    shutil.copytree(store, tmp_path / "store")
    first, *others = (p.positive for p in open_pairs(tmp_path / "store", first_seed=0, pairs=3))
    path = first.folder / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "slab_planes": []}))
    encoder = cast("Encoder", Ones())
    cache = open_cache(tmp_path / "1", encoder, [first, *others], stage1_sha256="a" * 64)
    assert float(cache.scale.min()) > 1e-3
    with pytest.raises(ConfigurationError, match="passed the gate"):
        open_cache(tmp_path / "2", encoder, [first], stage1_sha256="a" * 64)
