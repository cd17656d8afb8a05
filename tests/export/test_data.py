"""Labels, masks, the store, sampling, settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export.datasets.augment import OFF, Strengths, augmented, windowed
from export.datasets.labels import UNSURE, attention_target, cell_counts, slab_label
from export.datasets.store import StoredStudy, open_pairs, study_name
from export.systems.registry import load_study_settings
from export.training.config import (
    DataSettings,
    Phase,
    Stage1Settings,
    Stage2Settings,
    load_data_settings,
    load_settings,
)
from export.training.sampling import BatchSource, index_slabs, load_slab, prefetched
from pe_infer.errors import ConfigurationError, InputError

CONFIGS = Path(__file__).parents[2] / "export" / "configs"


@pytest.mark.parametrize(
    ("pixels", "label"),
    [
        ([0, 0, 12, 0, 0], "positive"),
        ([0, 0, 11, 0, 0], "dropped"),
        ([0, 0, 0, 0, 1], "dropped"),
        ([0, 0, 0, 0, 0], "negative"),
    ],
)
def test_slab_label(pixels: list[int], label: str) -> None:
    clot = np.array([5, *pixels, 5])  # planes outside the slab do not count
    assert slab_label(clot, 3, 5) == label


def test_a_clean_plane_beside_a_lesion_is_no_negative() -> None:
    clot = np.array([0, 3, 0, 0, 12, 0])
    labels = [slab_label(clot, middle, 1) for middle in range(6)]
    assert labels == ["dropped", "dropped", "dropped", "dropped", "positive", "dropped"]
    assert slab_label(np.array([0, 0, 12]), 0, 1) == "negative"


def test_mask_is_pooled_to_cells_and_doubtful_cells_have_no_weight() -> None:
    mask = np.zeros((5, 64, 64), dtype=np.bool_)
    mask[2, 16:18, 0:2] = True  # 4 pixels: a positive cell
    mask[2, 0, 63] = True  # 1 pixel: positive in the paper's mask, but without weight
    mask[0, 40, 40] = True  # another plane only: not positive, without weight
    target, weight = attention_target(mask)
    assert target.shape == weight.shape == (4, 4)
    assert np.argwhere(target).tolist() == [[0, 3], [1, 0]]
    assert np.argwhere(weight == 0).tolist() == [[0, 3], [2, 2]]
    assert int(cell_counts(mask).sum()) == int(mask.sum())


def test_store_gives_back_what_was_written(store: Path, data_settings: DataSettings) -> None:
    pairs = open_pairs(store, first_seed=0, pairs=3)
    assert [pair.seed for pair in pairs] == [0, 1, 2]
    study = pairs[0].positive
    middle = 8
    mask = study.slab_mask(middle, 5)
    assert int(mask[2].sum()) == study.record.clot_pixels[middle]
    assert mask.shape == study.slab_hu(middle, 5).shape == (5, 64, 64)
    assert not pairs[0].negative.slab_mask(middle, 5).any()
    changed = study.slab_hu(middle, 5) != pairs[0].negative.slab_hu(middle, 5)
    assert (changed <= mask).all()
    with pytest.raises(InputError, match=r"export\.datasets\.generate"):
        open_pairs(store, first_seed=500, pairs=3)
    assert len(open_pairs(store, first_seed=0, pairs=3, limit=2)) == 2


def test_batches_depend_on_seed_and_step_only(store: Path, data_settings: DataSettings) -> None:
    index = index_slabs(open_pairs(store, first_seed=0, pairs=3), 5)
    phase = Phase(name="x", width=1, crop=32, batch=10, steps=5, lr=1)
    source = BatchSource(index, data_settings.grid, phase, seed=3, strengths=Strengths())
    ahead = list(prefetched(source, 0, 3))
    again = source.batch(2)
    assert torch.equal(ahead[2].slabs, again.slabs)
    assert not torch.equal(ahead[1].slabs, again.slabs)
    assert again.slabs.shape == (10, 5, 32, 32)
    assert again.target.shape == (10, 1, 2, 2)
    assert 0.0 <= float(again.slabs.min()) <= float(again.slabs.max()) <= 1.0
    assert again.labels[4:].sum() == 0
    assert again.labels[:4].sum() > 0


def test_paired_negative_is_the_same_place_without_the_embolus(
    store: Path, data_settings: DataSettings
) -> None:
    index = index_slabs(open_pairs(store, first_seed=0, pairs=3), 5)
    phase = Phase(name="x", width=1, crop=32, batch=8, steps=5, lr=1)
    source = BatchSource(index, data_settings.grid, phase, seed=3, strengths=OFF)
    batch = source.batch(0)
    for positive, twin in zip(batch.slabs[:3], batch.slabs[3:6], strict=True):
        changed = positive != twin
        assert changed.any()
        assert (positive[changed] < twin[changed]).all()


def test_a_crop_with_too_little_clot_has_no_class(store: Path, data_settings: DataSettings) -> None:
    ref = index_slabs(open_pairs(store, first_seed=0, pairs=3), 5).positives[0]
    mask = ref.study.slab_mask(ref.middle, 5)
    labels: set[int] = set()
    for top in range(0, 49, 4):
        for left in range(0, 49, 4):
            sample = load_slab(
                ref,
                data_settings.grid,
                corner=(top, left),
                crop=16,
                strengths=OFF,
                generator=torch.Generator(),
            )
            shown = mask[:, top : top + 16, left : left + 16]
            enough = int(shown[2].sum()) >= 12
            assert sample.label == (1 if enough else UNSURE if shown.any() else 0)
            labels.add(sample.label)
    assert labels == {0, 1, UNSURE}


def test_pairs_end_at_the_first_gap(store: Path, tmp_path: Path) -> None:
    for seed in (0, 2):
        for positive in (True, False):
            name = study_name(seed, positive=positive)
            shutil.copytree(store / name, tmp_path / name)
    assert [pair.seed for pair in open_pairs(tmp_path, first_seed=0, pairs=3)] == [0]


def test_planes_of_another_kernel_are_refused(store: Path, tmp_path: Path) -> None:
    name = study_name(0, positive=True)
    shutil.copytree(store / name, tmp_path / name)
    path = tmp_path / name / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocessing_version": 99}))
    with pytest.raises(InputError, match="preprocessing version 99"):
        _ = StoredStudy(tmp_path / name).record


@pytest.mark.parametrize(
    "change",
    [
        {"crop": 40},
        {"shares": {"positive": 0.3, "paired_negative": 0.4}},
        {"shares": {"positive": 0.7, "paired_negative": 0.4}},
    ],
)
def test_impossible_phases_are_refused(change: dict[str, object]) -> None:
    values = {"name": "x", "width": 1, "crop": 32, "batch": 10, "steps": 5, "lr": 1}
    Phase.model_validate(values)
    with pytest.raises(ValueError, match=r"multiple of 16|paired negatives"):
        Phase.model_validate({**values, **change})


def test_augmentation_moves_slab_and_mask_alike() -> None:
    hu = torch.full((5, 64, 64), -800.0)
    mask = torch.zeros(5, 64, 64, dtype=torch.bool)
    mask[2:, 20:30, 10:20] = True
    hu[mask] = 50.0
    still = Strengths(gain_log_sd=0, shift_hu_sd=0, filter_share=0, noise_hu_max=0, warp_share=1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        moved, truth = augmented(hu.clone(), mask, still, generator, positive=True)
        agree = (moved > -375.0) == truth
        assert float(agree.float().mean()) > 0.999
    same, truth = augmented(hu.clone(), mask, OFF, torch.Generator(), positive=True)
    assert torch.equal(same, hu)
    assert torch.equal(truth, mask)


def test_coarse_noise_is_as_strong_as_white_noise_and_its_neighbours_agree() -> None:
    still = Strengths(
        gain_log_sd=0, shift_hu_sd=0, filter_share=0, warp_share=0, noise_hu_max=20, z_flip_share=0
    )
    coarse = still.model_copy(update={"coarse_noise_share": 1.0})
    hu, mask = torch.zeros(5, 64, 64), torch.zeros(5, 64, 64, dtype=torch.bool)
    grain = []
    for strengths in (still, coarse):
        generator = torch.Generator().manual_seed(4)
        noise, _ = augmented(hu.clone(), mask, strengths, generator, positive=True)
        beside = (noise[:, :, 1:] * noise[:, :, :-1]).mean() / noise.square().mean()
        grain.append((float(noise.std()), float(beside)))
    (white_sd, white), (coarse_sd, blurred) = grain
    assert coarse_sd == pytest.approx(white_sd, rel=0.05)
    assert abs(white) < 0.03
    assert blurred > 0.5


def test_thickened_planes_are_means_of_their_neighbours() -> None:
    strengths = OFF.model_copy(update={"thick_share": 1.0})
    hu = torch.zeros(5, 8, 8)
    hu[2] = 90.0
    mask = torch.zeros(5, 8, 8, dtype=torch.bool)
    thick, _ = augmented(hu.clone(), mask, strengths, torch.Generator(), positive=True)
    assert thick[:, 0, 0].tolist() == [0.0, 30.0, 30.0, 30.0, 0.0]


def test_window_maps_its_ends_to_0_and_1() -> None:
    values = windowed(torch.tensor([-2000.0, -1024.0, -262.0, 500.0, 900.0]), -1024, 500)
    assert values.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_committed_settings_load() -> None:
    stage1 = load_settings(CONFIGS / "pe-stage1.toml", Stage1Settings)
    stage2 = load_settings(CONFIGS / "pe-stage2.toml", Stage2Settings)
    data = load_data_settings(CONFIGS / "pe-stage1.toml", stage1.data)
    assert stage2.data == stage1.data
    grid = data.grid.to_grid()
    assert (grid.rows, grid.channels, grid.pitch_um) == (384, 5, 2500)
    assert stage1.phase[-1].width == 1.0
    assert stage1.phase[-1].crop == grid.rows
    assert stage2.train_pairs <= data.train.pairs


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("pe-*stage1*.toml")), ids=lambda path: path.stem
)
def test_every_committed_stage_1_of_pe_is_on_the_grid_of_the_bundle(path: Path) -> None:
    settings = load_settings(path, Stage1Settings)
    grid = load_data_settings(path, settings.data).grid.to_grid()
    assert (grid.rows, grid.channels) == (384, 5)
    assert all(phase.crop <= grid.rows for phase in settings.phase)
    assert {phase.width for phase in settings.phase} <= {0.25, 0.5, 1.0}


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("pe-*stage2*.toml")), ids=lambda path: path.stem
)
def test_every_committed_stage_2_of_pe_asks_for_pairs_that_there_are(path: Path) -> None:
    settings = load_study_settings(path)
    data = load_data_settings(path, settings.data)
    assert data.grid.to_grid().channels == 5
    assert settings.train_pairs <= data.train.pairs or data.source  # drawn from sources
    assert settings.validation_pairs <= data.validation.pairs


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed = 1\ncolour = 2", "colour"),
        ("seed = ", "not valid TOML"),
        ("seed = 'a'", "seed"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        load_settings(path, Stage2Settings)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigurationError, match="no such file"):
        load_settings(tmp_path / "absent.toml", Stage2Settings)


def test_splits_may_not_share_a_patient(data_settings: DataSettings) -> None:
    values = data_settings.model_dump()
    values["test"] = {"first_seed": 11, "pairs": 5}
    with pytest.raises(ValueError, match="overlap"):
        DataSettings.model_validate(values)


def test_glare_is_beside_bone_and_leaves_bone_and_far_tissue_as_they_are() -> None:
    hu = torch.full((1, 64, 64), 35.0)
    hu[:, :, 30:36] = 1200.0
    glaring = OFF.model_copy(update={"bone_glare_share": 1.0, "bone_glare_hu_max": 20.0})
    most = 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        changed, _ = augmented(hu.clone(), hu > 1e4, glaring, generator, positive=False)
        added = (changed - hu)[0, 32]
        assert float(added[30:36].abs().max()) == 0.0
        assert float(added[:24].abs().max()) == 0.0
        assert 0.0 <= float(added.min()) <= float(added.max()) <= 20.0
        assert float(added[29]) > float(added[27])
        most = max(most, float(added[29]))
    assert most > 5.0


def test_soft_tissues_part_about_their_middle_and_shading_has_its_size() -> None:
    hu = torch.tensor([-50.0, 30.0, 40.0, 60.0, 300.0]).repeat(1, 8, 1)
    parted = OFF.model_copy(update={"tissue_gain_log_sd": 0.3})
    changed, _ = augmented(
        hu.clone(), hu > 1e4, parted, torch.Generator().manual_seed(1), positive=True
    )
    low, gray, middle, blood, bone = changed[0, 0].tolist()
    assert (low, middle, bone) == (-50.0, 40.0, 300.0)
    assert (blood - 40.0) == pytest.approx(2.0 * (40.0 - gray))
    assert blood != 60.0
    flat = torch.zeros(1, 64, 64)
    shaded = OFF.model_copy(update={"shading_hu_sd": 3.0})
    sizes = [
        float(
            augmented(
                flat.clone(), flat > 1, shaded, torch.Generator().manual_seed(seed), positive=True
            )[0].std()
        )
        for seed in range(20)
    ]
    assert 1.0 < sum(sizes) / len(sizes) < 5.0
