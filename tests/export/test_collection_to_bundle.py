"""From a made-up collection to a bundle that runs: one command each, for both systems."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chest_layouts import write_fumpe, write_rsna_pe
from collection_layouts import write_rsna
from typer import Typer
from typer.testing import CliRunner

from export import bundle, evaluate_collection
from export.datasets import index, preprocess
from export.datasets.collections.base import Fractions, split_of
from export.training import stage1, stage2
from pe_infer import Detector
from pe_infer.bundle import Bundle

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
FRACTIONS = Fractions(validation=0.3, test=0.3)
GRIDS = {
    "shi": """
rows = 64
cols = 64
spacing_mm = 4.0
pitch_um = 2500
planes_per_slab = 5
slab_step = 2
windows = [{ low_hu = -1024, high_hu = 500 }]
gate = { low_hu = -950, high_hu = -500, min_fraction = 0.01 }
""",
    "radnet": """
rows = 32
cols = 32
spacing_mm = 6.0
pitch_um = 5000
planes_per_slab = 1
slab_step = 1
through_plane = "source"
windows = [{ low_hu = 0, high_hu = 80 }]
gate = { low_hu = 0, high_hu = 100, min_fraction = 0.03, enclosed_by_hu = 150 }
""",
}
SYSTEMS = {"shi": "filters = [4, 6]", "radnet": "hidden = 4\nvariants = 2"}
SHARES = {"rsna-pe-2020": 0.6, "fumpe": 0.4, "rsna-ich-2019": 1.0}


def run(command: Callable[..., None], *arguments: object) -> str:
    app = Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def names(collection: str, pattern: str) -> list[str]:
    """Two patients of every split."""
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number in range(1, 60):
        name = pattern.format(number)
        split = found[split_of(collection, name, FRACTIONS)]
        split.extend([name] if len(split) < 2 else [])
    return [name for split in found.values() for name in split]


def write_collections(system: str, root: Path) -> list[str]:
    """One that labels images, and for chests one with masks; every split has both classes."""
    if system == "radnet":
        patients = names("rsna-ich-2019", "p{}")
        studies = {patient: [f"{number}a"] for number, patient in enumerate(patients)}
        positive = {f"{number}a": [4, 5, 6, 7] for number in range(0, 6, 2)}
        write_rsna(root / "rsna-ich-2019", studies, slices=14, positive=positive)
        return ["rsna-ich-2019"]
    clots = {
        name: list(range(8, 14)) if number % 2 == 0 else []
        for number, name in enumerate(names("rsna-pe-2020", "{:x}0"))
    }
    write_rsna_pe(root / "rsna-pe-2020", clots)
    masked = names("fumpe", "PAT{:03d}")
    write_fumpe(
        root / "fumpe",
        {int(name[3:]): [9, 10, 11] if n % 2 == 0 else [] for n, name in enumerate(masked)},
    )
    return ["rsna-pe-2020", "fumpe"]


def write_settings(folder: Path, system: str, collections: list[str]) -> None:
    """Data, and both stages: tiny networks, a few steps."""
    sources = "".join(
        f'[[source]]\nstore = "{name}"\ncollection = "{name}"\nshare = {SHARES[name]}\n'
        f"validation = {FRACTIONS.validation}\ntest = {FRACTIONS.test}\n"
        for name in collections
    )
    data = f'name = "made up"\nmin_pixels = 2\n[grid]\n{GRIDS[system]}\n{sources}'
    (folder / "data.toml").write_text(data)
    head = f'system = "{system}"\nseed = 1\ndata = "data.toml"\nvalidation_pairs = 2\n'
    crop = {"shi": 64, "radnet": 32}[system]
    (folder / "stage1.toml").write_text(
        f'{head}[[phase]]\nname = "whole"\nwidth = 0.1\ncrop = {crop}\nbatch = 4\nsteps = 3\n'
        "lr = 1e-3\n"
    )
    (folder / "stage2.toml").write_text(
        f"{head}train_pairs = 3\nepochs = 2\npairs_per_step = 1\n{SYSTEMS[system]}\n"
    )


@pytest.mark.parametrize("system", ["shi", "radnet"])
def test_every_command_takes_what_the_one_before_made(system: str, tmp_path: Path) -> None:
    collections = write_collections(system, tmp_path)
    write_settings(tmp_path, system, collections)
    stores, runs = tmp_path / "stores", tmp_path / "runs"
    for name in collections:
        table = tmp_path / f"{name}.jsonl"
        where = ["--collection", name, "--root", tmp_path / name, "--out", table]
        split = ["--validation", FRACTIONS.validation, "--test", FRACTIONS.test]
        run(index.main, *where, *split, "--workers", 1)
        settings = ["--config", tmp_path / "data.toml", "--out", stores / name, "--workers", 1]
        run(preprocess.main, "--index", table, *settings)
        assert not (stores / name / "failures.jsonl").read_text()
    given = ["--data", stores, "--threads", 2]
    config = tmp_path / "stage1.toml"
    run(stage1.main, "--config", config, *given, "--run", runs / "1")
    checkpoint = runs / "1" / "checkpoint.pt"
    config = tmp_path / "stage2.toml"
    run(stage2.main, "--config", config, *given, "--stage1", checkpoint, "--run", runs / "2")
    out = tmp_path / "bundle"
    described = tmp_path / "bundle.toml"
    text = (CONFIGS / {"shi": "pe-bundle.toml", "radnet": "ich-bundle.toml"}[system]).read_text()
    described.write_text(text.partition("[[checks]]")[0])  # what is made up passes no checks
    run(bundle.main, checkpoint, runs / "2" / "checkpoint.pt", "--out", out, "--config", described)

    manifest = Bundle.load(out).manifest
    assert set(manifest.training["collections"]) == set(collections)
    with Detector(out, engine="onnxruntime", cache_dir=None, warm_up=False) as detector:
        assert detector.bundle.manifest.name == manifest.name
    table = tmp_path / f"{collections[0]}.jsonl"
    told = ["--bundle", out, "--index", table, "--engine", "onnxruntime"]
    run(evaluate_collection.main, *told, "--out", tmp_path / "evaluation")
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert (result["studies"], result["with_verdict"], result["held_out"]) == (2, 2, True)
    assert 0.0 <= result["study_auc"]["value"] <= 1.0
    assert result["labelled_slices"] > 5
