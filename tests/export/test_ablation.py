"""The table of what the parts of RADnet contribute: numbers at thresholds, one stage or two."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from export.ablation_radnet import (
    PAPER,
    Row,
    Scored,
    Scorer,
    at_threshold,
    markdown,
    measured,
    score,
)
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
            "settings": {"system": "radnet", "hidden": 4},
            "in_channels": stage1.feature_channels,
            "progression": {"step": 0, "minutes": 0.0},
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
    found = score(Scorer(rows, data, threads=1), pairs, data, Console(quiet=True))

    alone, both = found["attention"], found["recurrence"]
    assert alone["slice"].truth == both["slice"].truth == [True] + [False] * 4
    assert alone["study"].truth == [True, False]
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
    assert alone["slice"].probabilities[:1] == pytest.approx(expected, abs=2e-3)
    said = float(torch.sigmoid(consecutive_score(logits[None], 3)))
    assert alone["study"].probabilities[0] == pytest.approx(said, abs=2e-3)
    assert both["slice"].probabilities != pytest.approx(alone["slice"].probabilities, abs=1e-3)


def test_numbers_at_a_threshold() -> None:
    scored = Scored([0.9, 0.8, 0.7, 0.2, 0.1], [True, True, False, True, False])
    found = at_threshold(scored, 0.5)
    assert found["accuracy"] == 0.6
    assert found["recall"] == found["precision"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["auc"] == pytest.approx(5 / 6)
    assert at_threshold(scored, 0.95)["precision"] == 0


def test_thresholds_are_chosen_on_the_validation() -> None:
    validation = Scored([0.9, 0.8, 0.3, 0.2] * 5, [True, True, False, False] * 5)
    test = Scored([0.5, 0.45], [True, False])
    found = measured({"study": validation}, {"study": test})["study"]
    assert 0.3 < found["threshold"] < 0.8
    assert found["recall"] == float(found["threshold"] <= 0.5)
    text = markdown([{"name": "ours", "study": found}, PAPER], pairs=3, first_seed=9)
    assert "| Grewal et al. 2017, 77 CTs | 0.8182 | 0.8864 | 0.8125 | 0.8478 | - |" in text


def test_rows_are_parsed() -> None:
    assert Row.parse("+ recurrence=a.pt,b.pt") == Row("+ recurrence", Path("a.pt"), Path("b.pt"))
    assert Row.parse("DenseNet=a.pt").stage2 is None
    for wrong in ("a.pt", "x=", "x=a,b,c", "=a.pt"):
        with pytest.raises(InputError, match="expected NAME=STAGE1"):
            Row.parse(wrong)


def test_rows_of_the_ablation_differ_by_their_loss_only() -> None:
    plain, attention = (
        load_settings(CONFIGS / f"ich-ablation-{name}.toml", Stage1Settings)
        for name in ("densenet", "attention")
    )
    assert all(p.loss.dice == p.loss.focal == 0 < p.loss.cross_entropy for p in plain.phase)
    assert all(p.loss.dice > 0 and p.loss.focal > 0 for p in attention.phase)
    unlike = {"phase": plain.phase}
    assert attention.model_copy(update=unlike) == plain
    for one, other in zip(plain.phase, attention.phase, strict=True):
        assert one.model_copy(update={"loss": other.loss}) == other
    bundle = load_settings(CONFIGS / "ich-stage1.toml", Stage1Settings)
    assert [p.loss for p in attention.phase] == [p.loss for p in bundle.phase[:2]]
    assert load_study_settings(CONFIGS / "ich-stage2.toml").data == plain.data
