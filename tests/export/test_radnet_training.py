"""RADnet from settings to a bundle that runs: a tiny store of heads, both stages, resumed."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from export.bundle import BundleSettings, load_trained, make_bundle
from export.datasets.augment import OFF, Strengths
from export.datasets.labels import UNSURE
from export.datasets.store import StoredStudy, StudyRecord, open_pairs, write_study
from export.models.radnet import SliceClassifier, SliceContext, SliceOutput, consecutive_score
from export.systems.radnet import Radnet
from export.systems.registry import SYSTEMS, load_study_settings, system_of
from export.training.checkpoint import load_checkpoint
from export.training.config import (
    ContextSettings,
    DataSettings,
    SplitSettings,
    Stage1Loss,
    Stage1Settings,
    load_data_settings,
    load_settings,
)
from export.training.losses import Stage1Terms, slice_terms
from export.training.radnet_studies import RadnetStudies, slice_labels
from export.training.sampling import BatchSource, index_slabs
from export.training.stage1 import Stage1Run
from export.training.stage2 import Stage2Run, load_stage1
from export.training.study_task import StudyTask
from pe_infer import Detector
from pe_infer.bundle import Bundle
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry
from pe_infer.manifest import ConsecutiveRule, Rule, ThresholdRule

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
SIZE, PLANES = 32, 14
QUIET = Console(quiet=True)

DATA = DataSettings.model_validate(
    {
        "name": "tiny heads",
        "min_pixels": 10,
        "grid": {
            "rows": SIZE,
            "cols": SIZE,
            "spacing_mm": 8.0,
            "pitch_um": 5000,
            "planes_per_slab": 1,
            "slab_step": 1,
            "through_plane": "source",
            "windows": [
                {"low_hu": 0, "high_hu": 80},
                {"low_hu": -20, "high_hu": 180},
                {"low_hu": -800, "high_hu": 2000},
            ],
            "gate": {"low_hu": 0, "high_hu": 100, "min_fraction": 0.03, "enclosed_by_hu": 150},
        },
        "train": {"first_seed": 0, "pairs": 3},
        "validation": {"first_seed": 10, "pairs": 2},
        "test": {"first_seed": 20, "pairs": 2},
    }
)
STAGE1 = Stage1Settings.model_validate(
    {
        "system": "radnet",
        "seed": 5,
        "data": "unused.toml",
        "refresh_steps": 2,
        "validation_pairs": 2,
        "phase": [
            {"name": "a", "width": 0.5, "crop": 16, "batch": 4, "steps": 2, "lr": 1e-3},
            {"name": "b", "width": 0.5, "crop": 32, "batch": 4, "steps": 2, "lr": 1e-3},
        ],
    }
)
STAGE2 = ContextSettings.model_validate(
    {
        "seed": 6,
        "data": "unused.toml",
        "train_pairs": 3,
        "validation_pairs": 2,
        "epochs": 3,
        "pairs_per_step": 1,
        "hidden": 5,
        "variants": 2,
        "window_slabs": 5,
        "warmup_steps": 1,
        "lr": 1e-2,
    }
)


@pytest.fixture(scope="module", autouse=True)
def _shallow() -> Iterator[None]:
    """RADnet with one layer per block: exporting 36 layers takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "radnet", Radnet(layers=1))
        yield


def head_hu(rng: np.random.Generator) -> np.ndarray:
    """(PLANES, SIZE, SIZE) brain in a skull."""
    hu = np.full((PLANES, SIZE, SIZE), -1000.0)
    hu[:, 4:28, 6:26] = 900.0
    hu[:, 6:26, 8:24] = rng.normal(35.0, 3.0, (PLANES, 20, 16))
    return hu


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bleeds on five planes, of which the outer ones show too little for a label."""
    folder = tmp_path_factory.mktemp("heads")
    for seed in (*DATA.train.seeds, *DATA.validation.seeds):
        rng = np.random.default_rng(seed)
        brain = head_hu(rng)
        mask = np.zeros(brain.shape, dtype=np.bool_)
        mask[5:8, 10:14, 10:14] = True
        mask[4, 10:12, 10:12] = mask[8, 10:12, 10:12] = True
        for positive in (True, False):
            hu = np.where(mask & positive, 70.0, brain)
            record = StudyRecord(
                seed=seed,
                positive=positive,
                positions_um=[5000 * k for k in range(PLANES)],
                slab_planes=list(range(1, PLANES - 1)),
                clot_pixels=[int(c) * positive for c in mask.sum(axis=(1, 2))],
                preprocessing_version=1,
                phantom={},
            )
            pixels = hu.round().astype(np.int16)
            write_study(folder, record, pixels, mask if positive else None)
    return folder


def train_stage1(store: Path, folder: Path, *stops: int) -> Stage1Run:
    """Train to the last stop, interrupted at the others."""
    for index, stop in enumerate(stops):
        run = Stage1Run(STAGE1, DATA, store, folder, resume=index > 0)
        run.train(lambda run=run, stop=stop: run.at.step >= stop, QUIET)
    return run


@pytest.fixture(scope="module")
def stage1_checkpoint(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 of four steps, never interrupted."""
    folder = tmp_path_factory.mktemp("stage1")
    assert train_stage1(store, folder, 99).finished
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def task(
    store: Path, stage1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> StudyTask:
    """Its features."""
    system = system_of(STAGE2)
    return system.study_task(
        STAGE2,
        DATA,
        store,
        tmp_path_factory.mktemp("features"),
        load_stage1(stage1_checkpoint, DATA, system),
        QUIET,
        stage1_sha256="a" * 64,
        threads=2,
    )


def train_stage2(task: StudyTask, folder: Path, *stops: int) -> Stage2Run:
    """Train to the last stop, interrupted at the others."""
    for index, stop in enumerate(stops):
        run = Stage2Run(STAGE2, DATA, task, folder, resume=index > 0)
        run.train(lambda run=run, stop=stop: run.at.step >= stop, QUIET)
    return run


@pytest.fixture(scope="module")
def stage2_checkpoint(task: StudyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs."""
    folder = tmp_path_factory.mktemp("stage2")
    assert train_stage2(task, folder, 99).finished
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def bundle(
    stage1_checkpoint: Path, stage2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of these checkpoints."""
    folder = tmp_path_factory.mktemp("bundle")
    settings = load_settings(CONFIGS / "ich-bundle.toml", BundleSettings)
    settings = settings.model_copy(update={"checks": ()})  # made-up planes are no heads
    make_bundle(settings, load_trained([stage1_checkpoint, stage2_checkpoint]), folder)
    return folder


def test_resumed_stage_1_equals_an_uninterrupted_one(
    store: Path, stage1_checkpoint: Path, tmp_path: Path
) -> None:
    straight = load_checkpoint(stage1_checkpoint, stage=1)
    stopped = train_stage1(store, tmp_path, 1, 3, 99)
    for name, value in straight["mean"].items():
        assert torch.equal(value, stopped.mean.state[name]), name


def test_a_phase_may_have_an_augmentation_of_its_own(store: Path, tmp_path: Path) -> None:
    def weights(name: str, of_run: Strengths, of_phase: Strengths | None) -> dict[str, Tensor]:
        phases = [phase.model_copy(update={"augment": of_phase}) for phase in STAGE1.phase]
        settings = STAGE1.model_copy(update={"augment": of_run, "phase": tuple(phases)})
        run = Stage1Run(settings, DATA, store, tmp_path / name, resume=False)
        run.train(lambda: False, QUIET)
        return dict(run.model.state_dict())

    shifted = OFF.model_copy(update={"shift_hu_sd": 20.0})
    of_run, of_phase = weights("run", shifted, None), weights("phase", OFF, shifted)
    assert all(torch.equal(value, of_phase[name]) for name, value in of_run.items())
    still = weights("neither", OFF, None)
    assert not all(torch.equal(value, still[name]) for name, value in of_run.items())


def test_resumed_stage_2_equals_an_uninterrupted_one(
    task: StudyTask, stage2_checkpoint: Path, tmp_path: Path
) -> None:
    straight = load_checkpoint(stage2_checkpoint, stage=2)
    stopped = train_stage2(task, tmp_path, 2, 5, 99)
    assert straight["progression"]["step"] == stopped.at.step == 9
    for name, value in straight["model"].items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name
    assert straight["validation"] == stopped.validation
    assert len(stopped.validation["logits"]) == 4


def test_batches_hold_windows_and_masks_of_whole_slices(store: Path) -> None:
    index = index_slabs(open_pairs(store, first_seed=0, pairs=3), 1, DATA.min_pixels)
    assert len(index.positives) == 3 * 3
    source = BatchSource(
        index,
        DATA.grid,
        STAGE1.phase[1],
        seed=1,
        strengths=STAGE1.augment,
        targets=system_of(STAGE1).targets,
        min_pixels=DATA.min_pixels,
    )
    batch = source.batch(0)
    assert batch.slabs.shape == (4, 3, SIZE, SIZE)
    assert batch.target.shape == batch.weight.shape == (4, 1, SIZE, SIZE)
    assert batch.labels.tolist().count(1) == 2
    assert (batch.target.sum(dim=(1, 2, 3)) > 0).tolist() == [True, True, False, False]


def test_labels_of_slices(store: Path) -> None:
    pair = open_pairs(store, first_seed=0, pairs=1)[0]
    middles = list(range(2, 10))
    expected = [0, UNSURE, UNSURE, 1, 1, 1, UNSURE, UNSURE]
    assert slice_labels(pair.positive, middles, DATA) == expected
    assert slice_labels(pair.negative, middles, DATA) == [0] * 8


def test_a_clean_slice_beside_blood_is_unsure(store: Path, tmp_path: Path) -> None:
    pair = open_pairs(store, first_seed=0, pairs=1)[0]
    record = dataclasses.replace(pair.positive.record, clot_pixels=[10, 0, 0, 0, 12, 11, 0, 0, 0])
    write_study(tmp_path, record, np.zeros((9, 1, 1), np.int16), None)
    study = StoredStudy(tmp_path / pair.positive.folder.name)
    middles = [1, 2, 3, 4, 5, 6, 8]  # the neighbour counts whether or not it passed the gate
    assert slice_labels(study, middles, DATA) == [UNSURE, 0, UNSURE, 1, 1, UNSURE, 0]


def test_variants_change_all_slices_of_a_pair_alike(task: StudyTask) -> None:
    assert isinstance(task, RadnetStudies)
    source = task.studies.train[0]
    for positive, negative in zip(source.positives, source.negatives, strict=True):
        assert len(positive.features) == len(negative.features) == STAGE2.variants
        assert (positive.features[0] != positive.features[1]).any()
        clean = [0, 1, 2, *range(8, PLANES - 2)]  # planes 4 to 8 show blood, the first is gated
        for found, expected in (
            (positive.features, negative.features),
            (positive.logits, negative.logits),
        ):
            torch.testing.assert_close(found[:, clean], expected[:, clean])
            assert (found[:, 4] != expected[:, 4]).any()


def test_nothing_is_encoded_where_the_store_is_short_of_pairs(
    store: Path, stage1_checkpoint: Path, tmp_path: Path
) -> None:
    system = system_of(STAGE2)
    data = DATA.model_copy(update={"validation": SplitSettings(first_seed=10, pairs=3)})
    with pytest.raises(ConfigurationError, match="2 pairs from seed 10 on, the settings ask for 3"):
        system.study_task(
            STAGE2.model_copy(update={"validation_pairs": 3}),
            data,
            store,
            tmp_path,
            load_stage1(stage1_checkpoint, data, system),
            QUIET,
            stage1_sha256="a" * 64,
            threads=2,
        )
    assert not list(tmp_path.glob("*.npz"))


def terms(masks: torch.Tensor, labels: list[int], target: torch.Tensor) -> Stage1Terms:
    count = len(labels)
    output = SliceOutput(
        torch.zeros(count, 1), masks, torch.zeros(count, 1, 2, 2), torch.full((count, 1), 2.0)
    )
    weights = Stage1Loss(cross_entropy=1.0, dice=2.0, focal=3.0)
    return slice_terms(output, torch.tensor(labels), target, torch.ones_like(target), weights)


def test_every_branch_is_supervised_on_positive_slices() -> None:
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6, 2:6] = 1.0
    right = (target * 2 - 1).repeat(1, 3, 1, 1) * 20.0
    found = terms(right, [1, 1], target)
    assert float(found.dice) == pytest.approx(0.0, abs=1e-3)
    assert float(found.focal) == pytest.approx(0.0, abs=1e-6)
    assert float(found.cross_entropy) == pytest.approx(math.log1p(math.exp(-2.0)))
    for branch in range(3):
        wrong = right.clone()
        wrong[:, branch] *= -1
        missed = terms(wrong, [1, 1], target)
        assert float(missed.dice) == pytest.approx(1 / 3, abs=0.05)
        assert float(missed.focal) > 1.0
        assert float(terms(wrong, [0, UNSURE], target).dice) == 0.0
    unsure = terms(right, [1, UNSURE], target)
    assert float(unsure.cross_entropy) == pytest.approx(float(found.cross_entropy))
    total = found.cross_entropy + 2 * found.dice + 3 * found.focal
    torch.testing.assert_close(found.total, total)


def test_score_of_a_study_is_what_the_rule_gives() -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    rule = ConsecutiveRule(kind="consecutive", count=3)
    expected = rule.score(torch.sigmoid(logits[0]).tolist())
    assert float(torch.sigmoid(consecutive_score(logits, 3))) == pytest.approx(expected)


def test_untrained_context_leaves_slices_as_they_are_and_sees_both_sides() -> None:
    torch.manual_seed(0)
    model = SliceContext(6, 4).eval()
    features, logits = torch.randn(2, 7, 6), torch.randn(2, 7)
    torch.testing.assert_close(model(features, logits), logits)
    torch.nn.init.normal_(model.head.weight)
    before = model(features, logits)
    for changed in (0, 6):
        other = features.clone()
        other[:, changed] += 1.0
        assert ((model(other, logits) - before).abs() > 1e-6).all()


def test_published_network_has_40_layers_and_masks_of_the_image_size() -> None:
    model = SliceClassifier(3, layers=12).eval()
    on_the_path = [model.stem, *model.blocks.modules(), *model.transitions.modules(), model.head]
    layers = [m for m in on_the_path if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 40
    with torch.inference_mode():
        output = model(torch.rand(1, 3, 64, 64))
    assert output.features.shape == (1, 16 + 36 * 12 + 3)
    assert output.masks.shape == (1, 3, 64, 64)
    assert output.attention.shape == (1, 1, 16, 16)
    assert float(torch.sigmoid(output.masks).mean()) < 0.1


def test_what_comes_out_is_float32_under_autocast() -> None:
    model = SliceClassifier(3, 0.1, layers=1).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(1, 3, 16, 16))
    assert {part.dtype for part in output} == {torch.float32}


def test_committed_settings_load() -> None:
    stage1 = load_settings(CONFIGS / "ich-stage1.toml", Stage1Settings)
    stage2 = load_study_settings(CONFIGS / "ich-stage2.toml")
    data = load_data_settings(CONFIGS / "ich-stage1.toml", stage1.data)
    bundle = load_settings(CONFIGS / "ich-bundle.toml", BundleSettings)
    assert system_of(stage1) is system_of(stage2)
    assert isinstance(stage2, ContextSettings)
    assert stage2.data == stage1.data
    grid = data.grid.to_grid()
    assert (grid.rows, grid.channels, grid.pitch_um) == (256, 3, 5000)
    assert stage1.phase[-1].crop == grid.rows
    assert stage2.train_pairs <= data.train.pairs
    assert isinstance(bundle.rule, ConsecutiveRule)
    assert bundle.rule.count == stage2.consecutive


def test_a_network_that_cannot_grow_says_so(store: Path, tmp_path: Path) -> None:
    phases = [
        phase.model_copy(update={"width": width, "steps": 1})
        for phase, width in zip(STAGE1.phase, (0.1, 0.2), strict=True)
    ]
    settings = STAGE1.model_copy(update={"phase": tuple(phases)})
    with pytest.raises(ConfigurationError, match="cannot grow"):
        Stage1Run(settings, DATA, store, tmp_path, resume=False)


def test_a_checkpoint_of_another_system_is_refused(
    store: Path, stage1_checkpoint: Path, tmp_path: Path
) -> None:
    shi = STAGE1.model_copy(update={"system": "shi"})
    refused: list[Callable[[], object]] = [
        lambda: Stage1Run(shi, DATA, store, tmp_path, resume=False, start=str(stage1_checkpoint)),
        lambda: load_stage1(stage1_checkpoint, DATA, system_of(shi)),
    ]
    for attempt in refused:
        with pytest.raises(ConfigurationError, match="'radnet', the settings are of 'shi'"):
            attempt()
    with pytest.raises(ConfigurationError, match="'third' is none of"):
        system_of({"system": "third"})


def slices_of(hu: np.ndarray, spacing_mm: float) -> list[Slice]:
    return [
        Slice(
            pixels=plane.round().astype(np.int16),
            geometry=SliceGeometry(
                rows=SIZE,
                cols=SIZE,
                row_spacing_mm=8.0,
                col_spacing_mm=8.0,
                image_position_mm=(0.0, 0.0, spacing_mm * index),
                thickness_mm=spacing_mm,
            ),
            series=SeriesInfo(series_instance_uid="1.2", body_part_examined="HEAD"),
            sop_instance_uid=f"1.2.{index}",
        )
        for index, plane in enumerate(hu)
    ]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("spacing_mm", [5.0, 4.0])
def test_the_bundle_runs_whichever_end_comes_first(
    bundle: Path, engine: str, spacing_mm: float
) -> None:
    manifest = Bundle.load(bundle).manifest
    assert isinstance(manifest.rule, ConsecutiveRule)
    assert manifest.finding.code.value == "1386000"
    images = slices_of(head_hu(np.random.default_rng(1)), spacing_mm)
    with Detector(bundle, engine=engine, precision="float32", cache_dir=None) as detector:
        whole = detector.detect(images)
        for arrival in (images, images[::-1], random.Random(0).sample(images, PLANES)):
            with detector.open() as stream:
                updates = [u for image in arrival for u in stream.push(image)]
                result = stream.finish(timeout=60)
                updates += stream.updates()
            assert result.probability == pytest.approx(whole.probability, abs=1e-4)
            for one, other in zip(result.evidence, whole.evidence, strict=True):
                assert one.probability == pytest.approx(other.probability, abs=1e-4)
            said = {update.position_mm: update.probability for update in updates}
            assert said.keys() == {evidence.position_mm for evidence in whole.evidence}
            assert None not in said.values()
    assert whole.status == "processed"
    assert [e.position_mm for e in whole.evidence] == [spacing_mm * k for k in range(PLANES)]
    for evidence in whole.evidence:
        assert evidence.attention is not None
        assert evidence.attention.values.shape == (SIZE // 4, SIZE // 4)


@pytest.mark.parametrize(
    "rule",
    [ThresholdRule(kind="threshold"), ConsecutiveRule(kind="consecutive", count=2)],
)
def test_a_rule_that_training_did_not_know_is_refused(
    rule: Rule, stage1_checkpoint: Path, stage2_checkpoint: Path, tmp_path: Path
) -> None:
    settings = load_settings(CONFIGS / "ich-bundle.toml", BundleSettings)
    other = settings.model_copy(update={"rule": rule})
    with pytest.raises(InputError, match="trained and calibrated for 3"):
        make_bundle(other, load_trained([stage1_checkpoint, stage2_checkpoint]), tmp_path)


def test_the_card_says_what_it_is(bundle: Path) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    assert card.startswith("# Model card: ich")
    assert "arXiv 1710.04934" in card
