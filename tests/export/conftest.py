"""A tiny store of studies: bright discs for vessels, dark squares in them for emboli."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export tests need PyTorch: pip install -e '.[export]'")

import torch
from rich.console import Console

from export.bundle import DEFAULT_CONFIG, BundleSettings, load_trained, make_bundle
from export.datasets.store import StudyRecord, write_study
from export.training.config import DataSettings, Stage1Settings, Stage2Settings, load_settings
from export.training.features import Encoder
from export.training.shi_studies import FeatureSets, ShiStudies, encode_all
from export.training.stage1 import Stage1Run
from export.training.stage2 import Stage2Run, load_stage1

SIZE = 64
PLANES = 16

STAGE1 = Stage1Settings.model_validate(
    {
        "seed": 5,
        "data": "unused.toml",
        "validation_pairs": 2,
        "phase": [{"name": "a", "width": 0.0625, "crop": 64, "batch": 4, "steps": 2, "lr": 1e-3}],
    }
)
STAGE2 = Stage2Settings.model_validate(
    {
        "seed": 6,
        "data": "unused.toml",
        "train_pairs": 3,
        "validation_pairs": 2,
        "epochs": 3,
        "pairs_per_step": 1,
        "filters": [4, 6],
        "window_slabs": 3,
        "attention_gain": 0.5,
    }
)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data_settings() -> DataSettings:
    """Settings of the tiny store."""
    return DataSettings.model_validate(
        {
            "name": "tiny",
            "grid": {
                "rows": SIZE,
                "cols": SIZE,
                "spacing_mm": 4.0,
                "pitch_um": 2500,
                "planes_per_slab": 5,
                "slab_step": 2,
                "window": {"low_hu": -1024, "high_hu": 500},
                "gate": {"low_hu": -950, "high_hu": -500, "min_fraction": 0.04},
            },
            "train": {"first_seed": 0, "pairs": 3},
            "validation": {"first_seed": 10, "pairs": 2},
            "test": {"first_seed": 20, "pairs": 2},
        }
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, data_settings: DataSettings) -> Path:
    """A store with the training and validation pairs of ``data_settings``."""
    folder = tmp_path_factory.mktemp("store")
    for split in (data_settings.train, data_settings.validation):
        for seed in split.seeds:
            _write_pair(folder, seed)
    return folder


def _write_pair(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planes = rng.normal(-700.0, 30.0, (PLANES, SIZE, SIZE))
    mask = np.zeros(planes.shape, dtype=np.bool_)
    for row, col in rng.integers(10, SIZE - 10, (4, 2)):
        planes[:, row - 6 : row + 6, col - 6 : col + 6] = 300.0
    mask[5:11, row - 4 : row + 4, col - 4 : col + 4] = True
    for positive in (True, False):
        hu = np.where(mask & positive, 50.0, planes).round().astype(np.int16)
        clot = mask.sum(axis=(1, 2)) if positive else np.zeros(PLANES, dtype=np.int64)
        record = StudyRecord(
            seed=seed,
            positive=positive,
            positions_um=[2500 * k for k in range(PLANES)],
            slab_planes=list(range(2, PLANES - 2, 2)),
            clot_pixels=[int(c) for c in clot],
            preprocessing_version=1,
            phantom={},
        )
        write_study(folder, record, hu, mask if positive else None)


@pytest.fixture(scope="session")
def stage2_settings() -> Stage2Settings:
    """Three epochs of three steps."""
    return STAGE2


@pytest.fixture(scope="session")
def stage1_checkpoint(
    store: Path, data_settings: DataSettings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A stage 1 that was trained for two steps."""
    folder = tmp_path_factory.mktemp("stage1")
    Stage1Run(STAGE1, data_settings, store, folder, resume=False).train(
        lambda: False, Console(quiet=True)
    )
    return folder / "checkpoint.pt"


@pytest.fixture(scope="session")
def features(
    store: Path,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeatureSets:
    """Its features."""
    encoder = Encoder(load_stage1(stage1_checkpoint, data_settings), data_settings.grid)
    folder = tmp_path_factory.mktemp("features")
    quiet = Console(quiet=True)
    return encode_all(STAGE2, data_settings, store, folder, encoder, quiet, stage1_sha256="a" * 64)


@pytest.fixture(scope="session")
def checkpoints(
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """A checkpoint of each stage."""
    folder = tmp_path_factory.mktemp("stage2")
    stage1 = load_stage1(stage1_checkpoint, data_settings)
    task = ShiStudies(STAGE2, stage1, features, SIZE // 16)
    run = Stage2Run(STAGE2, data_settings, task, folder, resume=False)
    run.train(lambda: False, Console(quiet=True))
    return [folder / "checkpoint.pt", stage1_checkpoint]


@pytest.fixture(scope="session")
def bundle(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of these checkpoints."""
    folder = tmp_path_factory.mktemp("bundle")
    settings = load_settings(DEFAULT_CONFIG, BundleSettings)
    settings = settings.model_copy(update={"checks": ()})  # made-up planes are no chests
    make_bundle(settings, load_trained(checkpoints), folder)
    return folder
