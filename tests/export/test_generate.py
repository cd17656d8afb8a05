"""A phantom through the product's preprocessing into a store; the scores that need no network."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from export.datasets.generate import store_pair, to_grid
from export.datasets.store import StudyRecord, grid_digest, open_pairs, write_study
from export.training.config import DataSettings, load_settings
from export.trivial import chest_scores
from pe_infer import preprocess
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import head, open_phantom
from pe_infer.phantom.chest import DEFAULT, PhantomConfig, PhantomStudy, generate_pair
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.head.phantom import HeadPhantom

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
    assert store_pair(tmp_path, 4, grid, ChestPhantom(small)) == 4
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


def test_heads_are_stored_with_their_blood(tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / "ich-data.toml", DataSettings)
    config = dataclasses.replace(
        head.DEFAULT, matrix=128, pixel_spacing_mm=(1.8, 1.9), slice_spacing_mm=(5.0, 5.0)
    )
    store_pair(tmp_path, 1, settings.grid.to_grid(), HeadPhantom(config))
    stored = open_pairs(tmp_path, first_seed=1, pairs=1)[0]
    _, truth = head.generate_pair(1, config)
    facts = stored.positive.record.phantom
    assert facts["configuration"] == config.digest() != head.DEFAULT.digest()
    assert len(facts["hemorrhages"]) == len(truth.hemorrhages) > 0
    assert sum(stored.positive.record.clot_pixels) > 0
    assert not any(stored.negative.record.clot_pixels)
    assert stored.positive.record.slab_planes


def test_a_store_of_another_phantom_is_refused(
    pair: tuple[PhantomStudy, PhantomStudy], small: PhantomConfig, tmp_path: Path
) -> None:
    grid = load_settings(CONFIGS / "pe-data.toml", DataSettings).grid.to_grid()
    for study in pair:
        record = StudyRecord(
            seed=4,
            positive=study.positive,
            positions_um=[0],
            slab_planes=[],
            clot_pixels=[0],
            preprocessing_version=preprocess.VERSION,
            phantom={"configuration": small.digest()},
        )
        write_study(tmp_path, record, np.zeros((1, 8, 8), np.int16), None)
    assert store_pair(tmp_path, 4, grid, ChestPhantom(small)) == 4  # it is there
    with pytest.raises(ConfigurationError, match="another --out"):
        store_pair(tmp_path, 4, grid, open_phantom("chest"))
    record = dataclasses.replace(record, phantom={**record.phantom, "grid": grid_digest(grid)})
    write_study(tmp_path, record, np.zeros((1, 8, 8), np.int16), None)
    assert store_pair(tmp_path, 4, grid, ChestPhantom(small)) == 4
    with pytest.raises(ConfigurationError, match=r"on grid .*another --out"):
        store_pair(tmp_path, 4, dataclasses.replace(grid, rows=10), ChestPhantom(small))


def test_unknown_phantoms_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'knee' is none of"):
        open_phantom("knee")


def test_trivial_scores_are_numbers(pair: tuple[PhantomStudy, PhantomStudy]) -> None:
    grid = load_settings(CONFIGS / "pe-data.toml", DataSettings).grid.to_grid()
    gridded = to_grid(pair[1], grid)
    scores = chest_scores(gridded.hu, gridded.positions_um, grid)
    assert np.isfinite(list(scores.values())).all()
    assert scores["bright volume"] > 0
