"""Small bundles of both systems, untrained, by the public API over coarse phantoms."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import coarse_phantom
from typer import Typer
from typer.testing import CliRunner

from export import evaluate as command
from export.anatomies import ANATOMIES, ARRIVAL
from export.bundle import AlertSettings, BundleSettings, Trained, make_bundle
from export.datasets.generate import to_grid
from export.evaluate import (
    Pair,
    WorkerSettings,
    case_folder,
    evaluate_pair,
    evaluated,
    read_cases,
    run,
)
from export.evaluation_plots import write_plots
from export.measures import RefusedPair, StudyCase, summary
from export.systems.radnet import Radnet
from export.training.config import DataSettings, Stage1Loss, load_settings
from export.trivial import head_scores
from pe_infer import Detector
from pe_infer.bundle import Bundle, set_checks
from pe_infer.bundle_check import self_test
from pe_infer.engines.base import EngineOptions, select
from pe_infer.errors import InputError
from pe_infer.geometry import PatientGrid
from pe_infer.manifest import Check
from pe_infer.phantom import Phantom, open_phantom
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.head.phantom import HeadPhantom

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
SEED = 5


@pytest.fixture(scope="module")
def head_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained RADnet of one layer per block on planes of 4 mm, whose slices all say something."""
    data = load_settings(CONFIGS / "ich-data.toml", DataSettings)
    grid = data.grid.model_copy(update={"rows": 64, "cols": 64, "spacing_mm": 4.0})
    torch.manual_seed(0)
    system = Radnet(layers=1)
    stage1 = system.slab_network(grid.channels, 0.5).eval()
    stage2 = system.study_network({"hidden": 4}, stage1, grid).eval()
    at = {"step": 0, "minutes": 0.0}
    provenance = {
        "data": data.name,
        "stage1": {"sha256": "1" * 64, "progression": at, "loss": Stage1Loss().model_dump()},
        "stage2": {"sha256": "2" * 64, "progression": at},
    }
    tiny = data.model_copy(update={"grid": grid})
    folder = tmp_path_factory.mktemp("heads")
    settings = load_settings(CONFIGS / "ich-bundle.toml", BundleSettings)
    always = AlertSettings(slab_probability=0.01, consecutive=1)
    # Coarse planes have no even cells to check.
    settings = settings.model_copy(update={"checks": (), "provisional_alert": always})
    trained = Trained(
        system, stage1, stage2, tiny, validation={}, consecutive=3, provenance=provenance
    )
    make_bundle(settings, trained, folder)
    return folder


@pytest.fixture(params=["chest", "head"])
def shown(request: pytest.FixtureRequest) -> tuple[Path, Phantom]:
    """A bundle, and what it is shown."""
    name = {"chest": "bundle", "head": "head_bundle"}[request.param]
    return request.getfixturevalue(name), coarse_phantom(request.param)


def test_a_pair_is_evaluated_and_remembered(shown: tuple[Path, Phantom], tmp_path: Path) -> None:
    bundle, phantom = shown
    asked: list[list[int]] = []

    def pairs_of(seeds: Sequence[int]) -> list[Pair]:
        asked.append(list(seeds))
        return [evaluate_pair(detector, seed, phantom) for seed in seeds]

    with Detector(bundle, cache_dir=None, warm_up=False) as detector:
        runtime = select("onnxruntime", EngineOptions(precision="float32"))
        assert self_test(detector.bundle, runtime).passed
        grid = detector.bundle.manifest.grid
        first = run(detector, [SEED], tmp_path, phantom, pairs_of).studies
        again = run(detector, [SEED], tmp_path, phantom, pairs_of).studies
        folder = tmp_path / case_folder(detector, phantom)
        assert (folder / "studies.jsonl").exists()
        default = open_phantom(phantom.anatomy)
        assert case_folder(detector, default) != folder.name  # other phantoms, other cases
    with Detector(bundle, cache_dir=None, warm_up=False, engine="onnxruntime") as other:
        assert case_folder(other, phantom) != folder.name
    assert [case.positive for case in first] == [True, False]
    assert again == first
    assert asked == [[SEED]]
    check_pair(first, phantom, grid)
    found = summary(first, ANATOMIES[phantom.anatomy])
    scored = [slab for slab in first[0].slabs if slab.positive]
    assert found["positive_slabs"]["scored"] == len(scored)
    assert ("peak_hit" in found) is bool(scored)
    write_plots(first, tmp_path, lesion_name=phantom.lesion_name)
    assert (tmp_path / "roc.png").stat().st_size > 1000


def check_pair(pair: list[StudyCase], phantom: Phantom, grid: PatientGrid) -> None:
    """Against the phantom, without what was evaluated."""
    positive, negative = pair
    study = phantom.generate(SEED, positive=True)
    assert positive.largest_kind == negative.largest_kind == study.lesions[0].kind
    assert positive.largest_mm3 == negative.largest_mm3 == study.lesions[0].volume_mm3
    assert positive.kinds == sorted({lesion.kind for lesion in study.lesions})
    assert positive.alerted is negative.alerted is (phantom.anatomy == "head")
    highest = max(slab.peak for slab in positive.slabs)
    assert len(positive.peaks) == 3
    assert positive.peaks == sorted(positive.peaks, reverse=True)
    assert positive.peaks[0] >= highest
    assert positive.conditions == negative.conditions
    assert set(positive.conditions) == {*ANATOMIES[phantom.anatomy].conditions, ARRIVAL}
    assert positive.conditions[ARRIVAL] == "head first"  # the seed is odd
    places = [[slab.position_mm for slab in case.slabs if slab.at_lesion] for case in pair]
    assert places[0] == places[1]
    assert len(positive.slabs) == len(negative.slabs) > 5
    assert all((slab.hit is None) is not slab.at_lesion for slab in positive.slabs)
    assert not any(slab.positive for slab in negative.slabs)
    truth = to_grid(study, grid)
    pixels = dict(zip(truth.positions_um.tolist(), truth.mask.sum(axis=(1, 2)), strict=True))
    least = ANATOMIES[phantom.anatomy].lesion_pixels
    for slab in positive.slabs:
        count = pixels[round(1000 * slab.position_mm)]
        assert slab.lesion_pixels == count
        assert slab.positive is bool(count >= least)
        if grid.planes_per_slab == 1 and not slab.positive:
            assert count == 0  # a plane that shows less than enough has no label
    names = set(ANATOMIES[phantom.anatomy].scores(truth.hu, truth.positions_um, grid))
    assert set(positive.trivial) == set(negative.trivial) == names


def written(phantom: ChestPhantom | HeadPhantom, folder: Path) -> Path:
    """The configuration of a phantom as a file."""
    path = folder / "coarse.toml"
    values = phantom.config.to_mapping().items()
    path.write_text("\n".join(f"{name} = {value}" for name, value in values))
    return path


def test_processes_say_what_one_says(head_bundle: Path, tmp_path: Path) -> None:
    configuration = written(coarse_phantom("head"), tmp_path)
    settings = WorkerSettings(
        bundle=str(head_bundle),
        engine="onnxruntime",
        threads=1,
        anatomy="head",
        configuration=configuration,
    )
    (pair,) = evaluated([SEED], settings, 1)
    with Detector(head_bundle, cache_dir=None, engine="onnxruntime", threads=1) as detector:
        alone = evaluate_pair(detector, SEED, coarse_phantom("head"))
    assert not isinstance(pair, RefusedPair)
    assert not isinstance(alone, RefusedPair)
    assert [(c.seed, c.positive, c.probability, c.slabs) for c in pair] == [
        (c.seed, c.positive, c.probability, c.slabs) for c in alone
    ]


def noise_check(limit_hu: float) -> Check:
    """Refuses studies with more noise."""
    measure = {"kind": "noise", "low_hu": -1024.0, "high_hu": 3000.0, "quantile": 0.5, "cell_px": 4}
    values: dict[str, Any] = {"name": "noise", "over": 0.5, "meaning": "noisy", "measure": measure}
    return Check.model_validate({**values, "refuse_above": limit_hu})


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_tells_who_was_not_processed(
    bundle: Path, tmp_path: Path, workers: int
) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(bundle, strict)
    phantom, seeds = coarse_phantom("chest"), [50, 51, 52]
    set_checks(Bundle.load(strict), [noise_check(1000.0)], "0.0.2")
    noise: dict[int, float] = {}
    with Detector(strict, cache_dir=None, warm_up=False) as detector:
        for seed in seeds:
            results = [detector.detect(study.slices) for study in phantom.pair(seed)]
            noise[seed] = max(result.checks[0].value or 0.0 for result in results)
    *_, below, highest = sorted(noise.values())
    set_checks(Bundle.load(strict), [noise_check((below + highest) / 2)], "0.0.3")
    app = Typer()
    app.command()(command.main)
    asked = ["--bundle", str(strict), "--first-seed", "50", "--pairs", "3", "--anatomy", "chest"]
    asked += ["--phantom", str(written(phantom, tmp_path)), "--workers", str(workers)]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "check.noise" in done.output
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["not_processed"]["by_code"]["check.noise"]["patients"] == 1
    cases = read_cases(tmp_path / result["cases"])
    (refused,) = cases.refused
    assert noise[refused.seed] == highest
    assert sorted({case.seed for case in cases.studies}) == sorted(set(seeds) - {refused.seed})
    nothing = [*asked, "--out", str(tmp_path / "nothing")]
    set_checks(Bundle.load(strict), [noise_check(0.0)], "0.0.4")
    refused_all = CliRunner().invoke(app, nothing)
    assert refused_all.exit_code == InputError.exit_code
    assert "nothing to measure" in " ".join(refused_all.output.split())
    assert not (tmp_path / "nothing" / "evaluation.json").exists()


def head_of(blood_hu: float) -> np.ndarray:
    """(8, 256, 256) a skull with brain of 35 HU, and 10 ml of something on one side."""
    rng = np.random.default_rng(0)
    rows, cols = np.indices((256, 256)) - 127.5
    radius = np.hypot(rows, cols)
    plane = np.where(radius < 80, 1000.0, -1000.0)
    plane[radius < 72] = 35.0
    plane[(np.abs(rows - 76) < 2) & (np.abs(cols) < 2)] = -900.0  # an air cell in the bone
    hu = np.repeat(plane[None], 8, axis=0) + rng.normal(0, 1.0, (8, 256, 256))
    hu[2:6, 100:120, 150:175] = blood_hu
    return hu.astype(np.float32)


def test_scores_of_a_head_that_need_no_network() -> None:
    grid = load_settings(CONFIGS / "ich-data.toml", DataSettings).grid.to_grid()
    positions = 5000 * np.arange(8)
    began = time.perf_counter()
    plain = head_scores(head_of(35.0), positions, grid)
    assert time.perf_counter() - began < 2.0
    bloody = head_scores(head_of(70.0), positions, grid)
    blood = "volume of 50 to 90 HU inside the skull"
    assert plain[blood] == 0
    assert bloody[blood] == pytest.approx(10.0)
    assert plain["mean HU inside the skull"] == pytest.approx(35.0, abs=0.1)
    assert bloody["mean HU inside the skull"] == pytest.approx(35.0 + 35.0 * 2000 / 130295, abs=0.1)
    assert plain["asymmetry"] < 0.1
    assert bloody["asymmetry"] == pytest.approx(35.0 * 500 / 8143 / 2, rel=0.1)
    assert plain["noise"] == pytest.approx(1.0, rel=0.1)
    assert plain["bright volume"] == bloody["bright volume"] == pytest.approx(152.8, rel=0.02)
    nothing = head_scores(np.full((3, 16, 16), -1000.0, np.float32), positions[:3], grid)
    assert all(np.isfinite(value) for value in nothing.values())
