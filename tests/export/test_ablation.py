"""Ablations: what is read of both systems, numbers at thresholds, effects and their words."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from export.ablation_scores import Row, Scorer, score
from export.ablation_table import (
    Scored,
    Scores,
    Training,
    Verdict,
    at_threshold,
    effect_of,
    markdown,
    measured,
    paper_difference,
    row_summary,
    verdict_of,
)
from export.ablation_training import AblationSettings, RowSettings
from export.bundle import load_trained
from export.datasets.augment import slab_of
from export.datasets.store import StudyRecord, open_pairs, write_study
from export.models.radnet import consecutive_score
from export.systems.radnet import Radnet
from export.systems.registry import SYSTEMS, load_study_settings
from export.training.checkpoint import save_checkpoint
from export.training.config import DataSettings, Stage1Settings, load_settings
from export.training.stage2 import load_stage1
from pe_infer.errors import InputError

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
SIZE, PLANES = 32, 6


@pytest.fixture(autouse=True)
def _shallow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "radnet", Radnet(layers=1))
        yield


def tiny_data() -> DataSettings:
    data = load_settings(CONFIGS / "ich-data.toml", DataSettings)
    grid = data.grid.model_copy(update={"rows": SIZE, "cols": SIZE, "spacing_mm": 8.0})
    return data.model_copy(update={"grid": grid})


def write_checkpoints(folder: Path, data: DataSettings) -> tuple[Path, Path]:
    """Untrained networks, of which the second says something of its own."""
    torch.manual_seed(0)
    system = SYSTEMS["radnet"]
    settings = load_settings(CONFIGS / "ich-ablation-attention.toml", Stage1Settings)
    stage1 = system.slab_network(3, 0.5)
    stage2 = system.study_network({"hidden": 4}, stage1, data.grid)
    torch.nn.init.normal_(stage2.get_parameter("head.weight"))
    one, two = folder / "one.pt", folder / "two.pt"
    common = {"data": data.model_dump(mode="json")}
    save_checkpoint(
        one,
        {
            **common,
            "stage": 1,
            "settings": settings.model_dump(mode="json"),
            "width": 0.5,
            "progression": {"phase": 0, "step": 0, "minutes": 0.0},
            "mean": stage1.state_dict(),
        },
    )
    save_checkpoint(
        two,
        {
            **common,
            "stage": 2,
            "settings": {"system": "radnet", "hidden": 4, "epochs": 1},
            "in_channels": stage1.feature_channels,
            "progression": {"epoch": 0, "step": 0, "minutes": 0.0},
            "mean": stage2.state_dict(),
        },
    )
    return one, two


def write_pair(store: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.normal(35.0, 20.0, (PLANES, SIZE, SIZE)).round().astype(np.int16)
    mask = np.zeros(hu.shape, dtype=np.bool_)
    mask[2, 4:8, 4:8] = mask[3, :1, :3] = True
    for positive in (True, False):
        record = StudyRecord(
            seed=seed,
            positive=positive,
            positions_um=[5000 * k for k in range(PLANES)],
            slab_planes=[1, 2, 3, 4],
            clot_pixels=[int(c) * positive for c in mask.sum(axis=(1, 2))],
            preprocessing_version=1,
            phantom={},
        )
        write_study(store, record, hu + 40 * mask * positive, mask if positive else None)


def test_rows_are_scored_with_one_stage_and_with_both(tmp_path: Path) -> None:
    data = tiny_data()
    one, two = write_checkpoints(tmp_path, data)
    write_pair(tmp_path / "store", 7)
    rows = [Row("attention", one, None), Row("recurrence", one, two)]
    pairs = open_pairs(tmp_path / "store", first_seed=7, pairs=1)
    quiet = Console(quiet=True)
    scorer = Scorer(rows, data, threads=1)
    assert score(scorer, {"test": pairs}, quiet, stop=lambda: True) is None
    found = score(scorer, {"test": pairs}, quiet)
    assert found is not None

    alone, both = (sets["test"] for sets in found)
    assert alone.slab.truth == both.slab.truth == [True] + [False] * 4
    assert alone.study.truth == [True, False]
    assert set(alone.slab.patients + both.study.patients) == {7}
    assert len(alone.hits) == len(alone.controls) == 1
    assert not both.hits
    network = load_stage1(one, data)
    study = pairs[0].positive
    with torch.inference_mode():
        logits = torch.stack(
            [
                network(
                    slab_of(
                        torch.from_numpy(study.slab_hu(k, 1).astype(np.float32)),
                        data.grid.window_bounds,
                    )[None]
                ).stage1_logit[0, 0]
                for k in (1, 2, 3, 4)
            ]
        )
    # The third shows too little, the first and the last lie beside blood: they have no label.
    expected = torch.sigmoid(logits)[[1]].tolist()
    assert alone.slab.probabilities[:1] == pytest.approx(expected, abs=2e-3)
    said = float(torch.sigmoid(consecutive_score(logits[None], 3)))
    assert alone.study.probabilities[0] == pytest.approx(said, abs=2e-3)
    assert both.slab.probabilities != pytest.approx(alone.slab.probabilities, abs=1e-3)


def test_rows_of_shi_are_scored_by_the_maximum_and_by_both_stages(
    checkpoints: list[Path], store: Path, data_settings: DataSettings
) -> None:
    stage2, stage1 = checkpoints
    rows = [
        Row("maximum", stage1, None),
        Row("stage 2", stage1, stage2),
        Row("highest attention", stage1, None, peak=True),
    ]
    pairs = open_pairs(store, first_seed=10, pairs=1)
    found = score(Scorer(rows, data_settings, threads=1), {"x": pairs}, Console(quiet=True))
    assert found is not None
    alone, both, peak = (sets["x"] for sets in found)
    assert not both.slab.truth  # it says nothing of slabs
    assert sum(alone.slab.truth) == len(alone.hits) == len(alone.controls) > 0
    study, network = pairs[0].positive, load_stage1(stage1, data_settings)
    trained = load_trained(checkpoints)
    with torch.inference_mode():
        slabs = [
            slab_of(
                torch.from_numpy(study.slab_hu(middle, 5).astype(np.float32)),
                data_settings.grid.window_bounds,
            )
            for middle in study.record.slab_planes
        ]
        outputs = network(torch.stack(slabs))
        logit = float(trained.stage2(outputs.features[None]))
    expected = [float(torch.sigmoid(outputs.stage1_logit.max())), 1 / (1 + np.exp(-logit))]
    said = [alone.study.probabilities[0], both.study.probabilities[0]]
    assert said == pytest.approx(expected, abs=2e-3)
    highest = float(torch.sigmoid(outputs.attention.max()))
    assert peak.study.probabilities[0] == pytest.approx(highest, abs=2e-3)
    assert peak.study.probabilities[0] != said[0]  # untrained networks say nearly the same
    assert (peak.slab.truth, peak.hits) == (alone.slab.truth, alone.hits)


def test_numbers_at_a_threshold() -> None:
    some = Scored([0.9, 0.8, 0.7, 0.2, 0.1], [True, True, False, True, False])
    found = at_threshold(some, 0.5)
    assert found["accuracy"] == 0.6
    assert found["recall"] == found["precision"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["auc"] == pytest.approx(5 / 6)
    assert at_threshold(some, 0.95)["precision"] == 0


def scored(probabilities: Sequence[float], truth: Sequence[bool]) -> Scored:
    """Two entries a patient."""
    return Scored(list(probabilities), list(truth), [i // 2 for i in range(len(truth))])


def test_thresholds_are_chosen_on_the_validation() -> None:
    validation = Scores(study=scored([0.9, 0.8, 0.3, 0.2] * 5, [True, True, False, False] * 5))
    test = Scores(study=scored([0.5, 0.45], [True, False]))
    found = measured(Training(0, validation, test))
    assert found.keys() == {"study"}
    assert 0.3 < found["study"]["threshold"] < 0.8
    assert found["study"]["recall"] == float(found["study"]["threshold"] <= 0.5)


def training(label: int, gap: float, *, noise_seed: int = 0) -> Training:
    """Studies of 60 patients, of which the positive ones score higher by ``gap``."""
    rng = np.random.default_rng((label, noise_seed))
    truth = [True, False] * 60
    scores = rng.normal(0.0, 1.0, 120) + gap * np.array(truth)
    study = scored((1 / (1 + np.exp(-scores))).tolist(), truth)
    return Training(label, Scores(study=study), Scores(study=study))


def test_a_row_has_mean_and_range_of_its_trainings_and_the_papers_numbers() -> None:
    trainings = [training(1, 2.0), training(2, 1.0)]
    row = row_summary("a", trainings, {"study": {"auc": 0.812}, "slab": {"auc": 0.953}})
    aucs = [measured(t)["study"]["auc"] for t in trainings]
    assert row["study"]["auc"] == {"mean": np.mean(aucs), "low": min(aucs), "high": max(aucs)}
    document = {"rows": [row], "effects": [], "pairs": 60, "first_seed": 9, "source": "A 2020"}
    document["note"] = "\nSmall\nnetworks.\n"
    text = markdown(document)
    assert "\n\nSmall\nnetworks.\n\n| Slabs |" in text
    assert text.startswith("## Ablation\n\n")  # a section of the model card
    assert f"{np.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f}) |" in text
    assert "| *paper: a* | - | - | - | - | *0.812* |" in text
    assert "| *paper: a* | - | - | - | - | *0.953* | - | - |" in text
    assert "A 2020" in text
    one = row_summary("b", trainings[:1], {})
    assert f"| {aucs[0]:.3f} |" in markdown({**document, "rows": [one]})


@pytest.mark.parametrize(
    ("differences", "interval", "verdict"),
    [
        ([0.1, 0.2], (0.05, 0.3), "reproduced"),
        ([0.1], (0.05, 0.3), "one training"),
        ([0.1, 0.2], (-0.01, 0.3), "not reproduced"),
        ([0.3, -0.01], (0.05, 0.3), "not reproduced"),
        ([-0.1, -0.2], (-0.3, -0.05), "reversed"),
        ([-0.1], (-0.3, -0.05), "reversed"),
    ],
)
def test_what_reproduces_is_decided_by_interval_and_signs(
    differences: list[float], interval: tuple[float, float], verdict: Verdict
) -> None:
    assert verdict_of(differences, interval) == verdict


def test_effects_are_said_in_words() -> None:
    better = ("with", [training(1, 2.5), training(2, 2.5)])
    worse = ("without", [training(1, 0.3, noise_seed=1), training(2, 0.3, noise_seed=1)])
    found = effect_of("part", "study", better, worse, 0.169)
    assert found is not None
    assert found.verdict == "reproduced"
    assert found.interval[0] < np.mean(found.by_training) < found.interval[1]
    assert "paper: +0.169. Reproduces" in found.words
    back = effect_of("part", "study", worse, better, None)
    assert back is not None
    assert back.by_training == pytest.approx([-d for d in found.by_training])
    assert "paper: no figure known. Does not show: the sign is reversed" in back.words
    same = effect_of("part", "study", ("a", better[1]), ("b", better[1]), None)
    assert same is not None
    assert "includes zero and 2 of 2 trainings do not have the expected sign" in same.words
    single = effect_of("part", "study", ("a", better[1][:1]), worse, None)
    assert single is not None
    assert "what another seed would change is not known" in single.words
    assert effect_of("part", "slab", better, worse, None) is None
    assert effect_of("part", "study", better, ("c", [training(3, 1.0)]), None) is None


def test_the_papers_difference_needs_both_of_its_numbers() -> None:
    assert paper_difference(
        {"study": {"auc": 0.812}}, {"study": {"auc": 0.643}}, "study"
    ) == pytest.approx(0.169)
    assert paper_difference({"study": {"auc": 0.812}}, {"slab": {"auc": 0.9}}, "study") is None


def test_rows_are_parsed() -> None:
    assert Row.parse("+ recurrence=a.pt,b.pt") == Row("+ recurrence", Path("a.pt"), Path("b.pt"))
    assert Row.parse("DenseNet=a.pt").stage2 is None
    for wrong in ("a.pt", "x=", "x=a,b,c", "=a.pt"):
        with pytest.raises(InputError, match="expected NAME=STAGE1"):
            Row.parse(wrong)


def test_peaks_are_of_stage_1_by_itself() -> None:
    assert RowSettings(name="a", stage1="A.toml", peak=True).key == "A@peak"
    with pytest.raises(ValidationError, match="row 'a': peak is of stage 1 by itself"):
        RowSettings(name="a", stage1="A.toml", stage2="B.toml", peak=True)
    with pytest.raises(InputError, match=r"stage 2 'b\.pt' was given: leave it out"):
        dataclasses.replace(Row.parse("a=a.pt,b.pt"), peak=True)


@pytest.mark.parametrize(
    "names",
    [
        ("ich-ablation-densenet", "ich-ablation-attention", "ich-stage1"),
        ("pe-ablation-classification", "pe-ablation-attention", "pe-stage1"),
    ],
)
def test_rows_of_the_ablation_differ_by_their_loss_only(names: tuple[str, str, str]) -> None:
    plain, attention, bundle = (
        load_settings(CONFIGS / f"{name}.toml", Stage1Settings) for name in names
    )
    assert all(p.loss.dice == p.loss.focal == 0 < p.loss.cross_entropy for p in plain.phase)
    assert all(p.loss.dice > 0 and p.loss.focal > 0 for p in attention.phase)
    unlike = {"phase": plain.phase}
    assert attention.model_copy(update=unlike) == plain
    for one, other in zip(plain.phase, attention.phase, strict=True):
        assert one.model_copy(update={"loss": other.loss}) == other
    assert [p.loss for p in attention.phase] == [p.loss for p in bundle.phase[:2]]


def test_few_and_all_studies_of_the_pe_ablation_take_the_same_steps() -> None:
    few, everything = (
        load_study_settings(CONFIGS / f"pe-ablation-{name}.toml") for name in ("annotated", "all")
    )
    unlike = {"train_pairs": everything.train_pairs, "epochs": everything.epochs}
    assert few.model_copy(update=unlike) == everything
    assert few.train_pairs * few.epochs == everything.train_pairs * everything.epochs
    assert few.train_pairs * 4 == everything.train_pairs
    annotated, data, product = (
        load_settings(CONFIGS / f"{name}.toml", DataSettings)
        for name in ("pe-ablation-annotated-data", "pe-ablation-data", "pe-data")
    )
    assert annotated.grid == data.grid == product.grid
    assert annotated.train.pairs == few.train_pairs
    assert data.train.pairs == everything.train_pairs
    assert annotated.train.first_seed == data.train.first_seed
    assert annotated.validation == data.validation
    assert annotated.test == data.test


@pytest.mark.parametrize("name", ["pe-ablation", "ich-ablation"])
def test_an_ablation_names_settings_that_are_there(name: str) -> None:
    settings = load_settings(CONFIGS / f"{name}.toml", AblationSettings)
    for row in settings.row:
        load_settings(CONFIGS / row.stage1, Stage1Settings)
        if row.stage2:
            load_study_settings(CONFIGS / row.stage2)
    data = load_settings(CONFIGS / settings.data, DataSettings)
    assert data.test.pairs >= settings.pairs
    if settings.phantom:
        assert (CONFIGS / settings.phantom).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "seeds"),
        ({"row": [{"name": "a", "stage1": "x"}, {"name": "a", "stage1": "y"}]}, "names of rows"),
        ({"row": [{"name": "a", "stage1": "x"}, {"name": "b", "stage1": "x"}]}, "stages of rows"),
        ({"effect": [{"name": "e", "level": "slab", "row": "a", "over": "z"}]}, "row 'z'"),
    ],
)
def test_ambiguous_ablations_are_refused(change: dict[str, Any], message: str) -> None:
    values = {"data": "d", "source": "s", "seeds": [1], "row": [{"name": "a", "stage1": "x"}]}
    AblationSettings.model_validate(values)
    with pytest.raises(ValidationError, match=message):
        AblationSettings.model_validate({**values, **change})
