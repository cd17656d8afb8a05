"""Stage 2 on a tiny store, resumed; then both checkpoints to a bundle that loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from export.bundle import load_trained
from export.datasets.store import open_pairs
from export.models import SlabClassifier, StudyNet
from export.models.stage2 import CANDIDATE, LEVELS
from export.training.config import DataSettings, Stage2Settings
from export.training.features import Encoder, open_cache
from export.training.stage2 import FeatureSets, Stage2Run, load_stage1
from pe_infer.bundle import Bundle
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.program import Program


def train(
    settings: Stage2Settings,
    features: FeatureSets,
    data: DataSettings,
    stage1: Path,
    folder: Path,
    *stops: int,
) -> Stage2Run:
    """Train to the last stop, interrupted at the others."""
    for index, stop in enumerate(stops):
        run = Stage2Run(settings, data, load_stage1(stage1), features, folder, resume=index > 0)
        run.train(lambda run=run, stop=stop: run.at.step >= stop, Console(quiet=True))
    return run


def test_resumed_run_equals_an_uninterrupted_one(
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path: Path,
) -> None:
    given = (stage2_settings, features, data_settings, stage1_checkpoint)
    straight = train(*given, tmp_path / "one", 99)
    stopped = train(*given, tmp_path / "two", 2, 3, 99)
    assert straight.finished
    assert straight.at.step == stopped.at.step == 9
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name
    assert straight.validation == stopped.validation


def test_features_are_nearly_what_stage_1_makes(
    features: FeatureSets, data_settings: DataSettings, stage1_checkpoint: Path, store: Path
) -> None:
    pair = open_pairs(store, first_seed=0, pairs=3)[0]
    model = load_stage1(stage1_checkpoint)
    encoder = Encoder(model, data_settings.grid)
    for positive, study in ((0, pair.positive), (1, pair.negative)):
        exact = encoder(study, study.record.slab_planes)
        stored = features.cache.decoded(features.train[0][positive].codes)
        error = (exact - stored).abs()
        assert float(error.quantile(0.99)) <= float(features.cache.scale.max())
        assert float(error.mean()) < 0.01 * float(exact.max())


def test_checkpoints_become_a_bundle(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    Program(loaded.manifest)
    golden = loaded.golden()
    assert golden is not None
    assert set(golden.outputs) == {"study_logit", "slab_logit", "attention"}
    assert np.isfinite(golden.outputs["study_logit"]).all()
    assert (bundle / "MODEL_CARD.md").read_text().startswith("# Model card: pe")
    names = [point.name for point in loaded.manifest.operating_points]
    assert names == ["balanced", "sensitive", "specific"]


def test_features_of_another_stage_1_are_refused(
    features: FeatureSets, data_settings: DataSettings, stage1_checkpoint: Path, store: Path
) -> None:
    encoder = Encoder(load_stage1(stage1_checkpoint), data_settings.grid)
    pairs = open_pairs(store, first_seed=0, pairs=3)
    with pytest.raises(ConfigurationError, match="another stage 1"):
        open_cache(features.cache.folder, encoder, pairs, stage1_sha256="b" * 64)


def test_bundle_needs_both_stages(stage1_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="one of each stage"):
        load_trained([stage1_checkpoint])


def test_study_net_that_reads_the_attention_counts_suspicious_places() -> None:
    torch.manual_seed(0)
    stage1, net = SlabClassifier(5, 0.125), StudyNet(64, (8, 8), 8)
    torch.nn.init.normal_(stage1.head.weight, std=1.0)
    weight, bias = stage1.head.weight[1].detach(), stage1.head.bias[1].detach()
    net.read_attention(weight, bias, gain=1.5)
    features = torch.rand(6, 64, 8, 8)
    gates = net.down1.project(features)
    expected = 1.5 * (stage1.activation_maps(features)[:, 1] - LEVELS[2])
    torch.testing.assert_close(gates[:, CANDIDATE * 8 + 2], expected)
    quiet = -weight[None, None, :, None, None].expand(4, 6, 64, 8, 8) / weight.norm()
    loud = quiet.clone()
    loud[2:, 3, :, 4, 4] += 5.0 * weight / weight.norm()
    for _ in range(20):
        net(loud)  # the norms learn what is usual
    with torch.inference_mode():
        logits = net.eval()(loud).flatten()
    assert float(logits[2:].min()) > float(logits[:2].max())
