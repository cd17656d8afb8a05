"""A phantom through the product's preprocessing into a store, and a bundle's evaluation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from export.datasets.generate import store_pair, to_grid
from export.datasets.store import open_pairs
from export.evaluate import SlabCase, StudyCase, measures, read_cases, summary
from export.training.config import DataSettings, load_settings
from export.trivial import NAMES, trivial_scores
from pe_infer import preprocess
from pe_infer.phantom import DEFAULT, PhantomConfig, PhantomStudy, generate_pair

CONFIGS = Path(__file__).parents[2] / "export" / "configs"


@pytest.fixture(scope="module")
def small() -> PhantomConfig:
    """Few, coarse slices."""
    return dataclasses.replace(
        DEFAULT, matrix=96, pixel_spacing_mm=(4.0, 4.0), slice_spacing_mm=(5.0, 5.0)
    )


@pytest.fixture(scope="module")
def pair(small: PhantomConfig) -> tuple[PhantomStudy, PhantomStudy]:
    """A negative and a positive study."""
    return generate_pair(4, small)


def test_stored_planes_are_what_the_product_makes(
    pair: tuple[PhantomStudy, PhantomStudy], small: PhantomConfig, tmp_path: Path
) -> None:
    grid = load_settings(CONFIGS / "pe-data.toml", DataSettings).grid.to_grid()
    assert store_pair(tmp_path, 4, grid, small) == 4
    stored = open_pairs(tmp_path, first_seed=4, pairs=1)[0].positive
    slabs = [s for s in preprocess.slabs(pair[1].slices, grid) if not s.gated]
    record = stored.record
    assert [record.positions_um[m] for m in record.slab_planes] == [s.position_um for s in slabs]
    middle = record.slab_planes[len(slabs) // 2]
    window = grid.windows[0]
    hu = stored.slab_hu(middle, 5).astype(np.float32)
    tensor = np.clip((hu - window.low_hu) / (window.high_hu - window.low_hu), 0, 1)
    np.testing.assert_allclose(tensor, slabs[len(slabs) // 2].tensor, atol=0.51 / 1524)
    assert record.phantom["configuration"] == small.digest()


def test_trivial_scores_are_numbers(pair: tuple[PhantomStudy, PhantomStudy]) -> None:
    grid = load_settings(CONFIGS / "pe-data.toml", DataSettings).grid.to_grid()
    gridded = to_grid(pair[1], grid)
    scores = trivial_scores(gridded.hu)
    assert tuple(scores) == NAMES
    assert np.isfinite(list(scores.values())).all()
    assert scores["bright volume"] > 0


def case(seed: int, probability: float, *, positive: bool) -> StudyCase:
    slab = SlabCase(
        position_mm=1.0,
        positive=positive,
        at_clot=True,
        clot_pixels=30,
        probability=probability,
        peak=probability,
        hit=positive,
    )
    return StudyCase(
        seed=seed,
        positive=positive,
        probability=probability,
        called=probability > 0.5,
        threshold=0.5,
        largest_mm3=1.0,
        largest_place="left lower segmental" if seed % 2 else "right main",
        seconds_after_last_slice=0.1,
        slabs=[slab],
        trivial=dict.fromkeys(NAMES, 0.0),
    )


def test_measures_and_their_intervals() -> None:
    cases = [
        case(s // 2, p, positive=t) for s, (t, p) in enumerate([(True, 0.9), (False, 0.1)] * 10)
    ]
    perfect = measures(cases)
    assert perfect["study_auc"] == perfect["sensitivity"] == perfect["specificity"] == 1.0
    assert perfect["peak_hit"] == 1.0
    assert perfect["peak_control"] == 0.0
    paired = [case(s // 2, 0.5, positive=s % 2 == 0) for s in range(20)]
    result = summary(paired)
    assert result["study_auc"] == {"value": 0.5, "interval": [0.5, 0.5]}
    assert result["paired_order"]["value"] == 0.5
    assert result["by_clot_size"][0]["slabs"] == 10
    assert [row["studies"] for row in result["by_place"]] == [10, 10]
    assert [row["verdicts_right"] for row in result["by_place"]] == [5, 5]


def test_no_cases_yet(tmp_path: Path) -> None:
    assert read_cases(tmp_path / "absent.jsonl") == []
