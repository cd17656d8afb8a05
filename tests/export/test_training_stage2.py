"""Stage 2 on a tiny store, resumed; then both checkpoints to a bundle that loads."""

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from export.bundle import load_trained
from export.datasets.store import open_pairs, study_name
from export.models import SlabClassifier, StudyNet
from export.models.stage2 import CANDIDATE
from export.training.config import DataSettings, Stage2Settings
from export.training.features import Encoder, open_cache
from export.training.shi_studies import FeatureSets, ShiStudies, encode_all
from export.training.stage2 import Stage2Run, load_stage1
from export.training.study_task import window_start
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
        task = ShiStudies(settings, load_stage1(stage1, data), features, data.grid.rows // 16)
        run = Stage2Run(settings, data, task, folder, resume=index > 0)
        run.train(lambda run=run, stop=stop: run.at.step >= stop, Console(quiet=True))
    return run


@pytest.fixture
def task(
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
) -> ShiStudies:
    """What stage 2 learns from."""
    stage1 = load_stage1(stage1_checkpoint, data_settings)
    return ShiStudies(stage2_settings, stage1, features, data_settings.grid.rows // 16)


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
    model = load_stage1(stage1_checkpoint, data_settings)
    encoder = Encoder(model, data_settings.grid)
    source = features.studies.train[0]
    pairs = ((source.positives[0], pair.positive), (source.negatives[0], pair.negative))
    for found, study in pairs:
        exact = encoder(study, study.record.slab_planes)
        stored = features.cache.decoded(found.codes)
        largest = 255 * features.cache.scale[:, None, None]
        assert float((exact > largest).float().mean()) < 0.01
        # Half a step, and what bfloat16 does in batches of other sizes.
        step = features.cache.scale[:, None, None]
        assert ((stored - exact.minimum(largest)).abs() <= 0.51 * step + 0.02 * exact).all()


def test_checkpoints_become_a_bundle(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    Program(loaded.manifest)
    golden = loaded.golden()
    assert golden is not None
    assert set(golden.outputs) == {"study_logit", "slab_logit", "attention"}
    assert np.isfinite(golden.outputs["study_logit"]).all()
    card = (bundle / "MODEL_CARD.md").read_text()
    assert card.startswith("# Model card: pe")
    points = loaded.manifest.operating_points
    assert [point.name for point in points] == ["balanced", "sensitive", "specific"]
    for point in points:
        assert f"| {point.name} | {point.threshold:.4f} | {point.description} | data: " in card


def test_the_network_as_it_begins_competes_as_epoch_0(
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path: Path,
) -> None:
    run = train(stage2_settings, features, data_settings, stage1_checkpoint, tmp_path, 1, 99)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == ["epoch", "0", "1", "2", "3"]
    losses = [float(row.split(",")[5]) for row in rows[1:]]
    assert run.at.best == pytest.approx(min(losses), abs=1e-5)
    train(stage2_settings, features, data_settings, stage1_checkpoint, tmp_path / "begun", 1)
    kept = torch.load(tmp_path / "begun" / "best.pt")
    torch.manual_seed(stage2_settings.seed)
    begun = run.task.fresh().state_dict()
    assert kept["progression"]["step"] == 0
    assert all(torch.equal(kept["mean"][name], begun[name]) for name in begun)


def test_the_network_begins_as_a_logistic_regression_of_the_map(
    task: ShiStudies,
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
) -> None:
    stage1 = load_stage1(stage1_checkpoint, data_settings)
    start = task.attention_start
    with torch.inference_mode():
        maps = [
            stage1.activation_maps(features.cache.decoded(study.codes))[:, 1]
            for study in features.studies.train[0].studies
        ]
    highest = [float(each.max()) for each in maps]
    assert start.levels == sorted(start.levels)
    assert len(start.levels) == len(start.counts) == min(stage2_settings.filters)
    assert min(highest) <= start.levels[0] < start.levels[-1] <= max(highest)
    # Without its other channels the whole network says what the fit says.
    net = task.fresh().eval()
    with torch.no_grad():
        channels = net.dense.weight.view(1, stage2_settings.filters[1], -1)
        channels[:, len(start.levels) :] = 0.0
        channels[:, : len(start.levels)] = torch.tensor(start.counts)[:, None]
    studies = features.studies.train[0].studies
    with torch.inference_mode():
        logits = [float(net(features.cache.decoded(s.codes)[None])) for s in studies]
    assert np.std(logits) > 0
    assert np.mean(torch.sigmoid(torch.tensor(logits)).numpy()) == pytest.approx(0.5, abs=0.02)


def test_a_source_may_have_studies_of_one_kind_only(
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
) -> None:
    (pairs,) = features.studies.train
    sources = [replace(pairs, negatives=[], twins=False), replace(pairs, twins=False)]
    draw = replace(features.studies, train=sources)
    task = ShiStudies(
        stage2_settings,
        load_stage1(stage1_checkpoint, data_settings),
        replace(features, studies=draw),
        data_settings.grid.rows // 16,
    )
    assert np.isfinite(task.attention_start.counts).all()


def test_channels_that_read_the_map_stay_as_they_are(
    stage2_settings: Stage2Settings,
    features: FeatureSets,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path: Path,
) -> None:
    run = train(stage2_settings, features, data_settings, stage1_checkpoint, tmp_path, 99)
    torch.manual_seed(stage2_settings.seed)
    begun, trained = run.task.fresh().state_dict(), run.model.state_dict()
    levels = len(run.task.attention_start.levels)
    assert levels < stage2_settings.filters[1]  # some channels of the second block are others
    for layer in ("down1", "up1", "down2", "up2"):
        for name in ("project.weight", "project.bias", "cell.recurrent.weight"):
            before, after = (
                state[f"{layer}.{name}"].unflatten(0, (4, -1)) for state in (begun, trained)
            )
            torch.testing.assert_close(after[:, :levels], before[:, :levels])
            if before.shape[1] > levels:
                assert not torch.equal(after[:, levels:], before[:, levels:]), f"{layer}.{name}"
    assert not torch.equal(begun["dense.weight"], trained["dense.weight"])


def test_stage_1_alone_scores_the_validation_studies(
    task: ShiStudies, features: FeatureSets, data_settings: DataSettings, stage1_checkpoint: Path
) -> None:
    stage1 = load_stage1(stage1_checkpoint, data_settings)
    study = features.studies.validation[0]
    with torch.inference_mode():
        peaks = stage1.activation_maps(features.cache.decoded(study.codes))[:, 1].amax((1, 2))
    scores = task.stage1_scores()
    assert scores["highest peak"][0] == pytest.approx(float(peaks.max()))
    highest = peaks.sort(descending=True).values[:3]
    assert scores["three peaks"][0] == pytest.approx(float(highest.mean()))


def test_pairs_that_show_nothing_are_not_trained_on(
    store: Path,
    stage2_settings: Stage2Settings,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(store, tmp_path / "store")
    record = tmp_path / "store" / study_name(1, positive=True) / "study.json"
    content = json.loads(record.read_text())
    content["clot_pixels"] = [min(pixels, 11) for pixels in content["clot_pixels"]]
    record.write_text(json.dumps(content))
    encoder = Encoder(load_stage1(stage1_checkpoint, data_settings), data_settings.grid)
    console = Console(record=True, width=200, file=io.StringIO())
    found = encode_all(
        stage2_settings,
        data_settings,
        tmp_path / "store",
        tmp_path / "features",
        encoder,
        console,
        stage1_sha256="a" * 64,
    )
    assert [study.seed for study in found.studies.train[0].positives] == [0, 2]
    assert "1 of 3 pairs are left out" in console.export_text()


def test_features_of_another_stage_1_are_refused(
    features: FeatureSets, data_settings: DataSettings, stage1_checkpoint: Path, store: Path
) -> None:
    encoder = Encoder(load_stage1(stage1_checkpoint, data_settings), data_settings.grid)
    studies = [pair.positive for pair in open_pairs(store, first_seed=0, pairs=3)]
    with pytest.raises(ConfigurationError, match="another stage 1"):
        open_cache(features.cache.folder, encoder, studies, stage1_sha256="b" * 64)


def test_bundle_needs_both_stages(checkpoints: list[Path], stage1_checkpoint: Path) -> None:
    for paths in ([stage1_checkpoint], [*checkpoints, stage1_checkpoint]):
        with pytest.raises(InputError, match="one of each stage"):
            load_trained(paths)


def test_bundle_needs_the_stage_1_that_stage_2_was_trained_on(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    stage2 = tmp_path / "checkpoint.pt"
    shutil.copy(checkpoints[0], stage2)
    (tmp_path / "features").mkdir()
    cache = tmp_path / "features" / "cache.json"
    cache.write_text(json.dumps({"stage1_sha256": "b" * 64}))
    with pytest.raises(InputError, match="features of stage 1 bbbb"):
        load_trained([stage2, checkpoints[1]])
    right = hashlib.sha256(checkpoints[1].read_bytes()).hexdigest()
    cache.write_text(json.dumps({"stage1_sha256": right}))
    assert load_trained([checkpoints[1], stage2]).provenance["stage1"]["sha256"] == right


def test_fewer_pairs_than_asked_for_are_refused(
    store: Path,
    stage2_settings: Stage2Settings,
    data_settings: DataSettings,
    stage1_checkpoint: Path,
    tmp_path: Path,
) -> None:
    encoder = Encoder(load_stage1(stage1_checkpoint, data_settings), data_settings.grid)
    settings = stage2_settings.model_copy(update={"train_pairs": 4})
    quiet = Console(quiet=True)
    with pytest.raises(ConfigurationError, match="3 pairs from seed 0 on, the settings ask for 4"):
        encode_all(settings, data_settings, store, tmp_path, encoder, quiet, stage1_sha256="a" * 64)


def test_a_window_of_a_positive_study_holds_an_embolus(features: FeatureSets) -> None:
    study = features.studies.train[0].positives[0]
    assert study.clot_slabs
    rng = np.random.default_rng(0)
    firsts = {window_start(study.slabs, 3, study.clot_slabs, rng) for _ in range(50)}
    assert len(firsts) > 1
    for first in firsts:
        assert 0 <= first <= study.slabs - 3
        assert set(range(first, first + 3)) & set(study.clot_slabs)


def test_study_net_that_reads_the_attention_counts_suspicious_places() -> None:
    torch.manual_seed(0)
    stage1, net = SlabClassifier(5, 0.125), StudyNet(64, (8, 8), 8)
    torch.nn.init.normal_(stage1.head.weight, std=1.0)
    weight, bias = stage1.head.weight[1].detach(), stage1.head.bias[1].detach()
    net.read_attention(
        weight, bias, gain=1.5, levels=(0.0, 1.0, 2.0, 3.0), counts=(1.0, 1.0, 1.0, 1.0)
    )
    features = torch.rand(6, 64, 8, 8)
    gates = net.down1.project(features)
    expected = 1.5 * (stage1.activation_maps(features)[:, 1] - 2.0)
    torch.testing.assert_close(gates[:, CANDIDATE * 8 + 2], expected)
    quiet = -weight[None, None, :, None, None].expand(4, 6, 64, 8, 8) / weight.norm()
    loud = quiet.clone()
    loud[2:, 3, :, 4, 4] += 5.0 * weight / weight.norm()
    with torch.inference_mode():
        logits = net.eval()(loud).flatten()
    assert float(logits[2:].min()) > float(logits[:2].max())
