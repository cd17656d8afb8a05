"""Real studies, which have no twin: what is opened, drawn and learnt from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from export.datasets.augment import OFF
from export.datasets.collections.base import Fractions, Split, split_of
from export.datasets.labels import slab_labels
from export.datasets.store import UNKNOWN_PIXELS, UNLABELLED, StudyRecord, grid_digest, write_study
from export.systems.registry import load_study_settings, system_of
from export.training.config import (
    DataSettings,
    Phase,
    SourceSettings,
    Stage1Settings,
    load_data_settings,
    load_settings,
)
from export.training.sampling import BatchSource, index_slabs
from export.training.sources import open_sources
from export.training.stage1 import Stage1Run
from export.training.study_task import CoupleDraw, EncodedStudies
from export.training.validation import choose_slabs
from pe_infer.errors import ConfigurationError, InputError

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
SIZE, PLANES = 64, 16
WHOLE = Phase(name="x", width=0.0625, crop=SIZE, batch=8, steps=4, lr=1e-3)


def patients(split: str, count: int) -> list[str]:
    """Patients of a made-up collection whom their names put into a split."""
    names = (f"p{number}" for number in range(1000))
    return [name for name in names if split_of("made-up", name, Fractions()) == split][:count]


def write_real(
    store: Path,
    number: int,
    patient: str,
    data: DataSettings,
    *,
    positive: bool,
    masked: bool,
    **facts: Any,
) -> None:
    """One real study; the finding of a positive one is in planes 6 to 9."""
    rng = np.random.default_rng(number)
    hu = rng.normal(-700.0, 30.0, (PLANES, SIZE, SIZE))
    hu[:, 20:44, 20:44] = 300.0
    mask = np.zeros(hu.shape, np.bool_)
    mask[6:10, 26:36, 26:36] = positive
    hu[mask] = 50.0
    labels = mask.any(axis=(1, 2)).astype(int)
    unknown = [UNKNOWN_PIXELS if label else 0 for label in labels]
    record = StudyRecord(
        seed=number,
        positive=positive,
        positions_um=[2500 * k for k in range(PLANES)],
        slab_planes=list(range(2, PLANES - 2, 2)),
        clot_pixels=[int(c) for c in mask.sum(axis=(1, 2))] if masked else unknown,
        preprocessing_version=1,
        phantom={
            "collection": "made-up",
            "study": str(number),
            "patient": patient,
            "split": split_of("made-up", patient, Fractions()),
            "grid": grid_digest(data.grid.to_grid()),
            **facts,
        },
        plane_labels=None if masked and positive else [int(label) for label in labels],
    )
    write_study(store, record, hu.round().astype(np.int16), mask if masked else None)


@pytest.fixture(scope="module")
def data(data_settings: DataSettings) -> DataSettings:
    """A store of real studies only."""
    source = SourceSettings(store="real", share=1.0, collection="made-up")
    return data_settings.model_copy(update={"source": (source,)})


@pytest.fixture(scope="module")
def root(data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two positive studies to train on, one without a mask; three negative ones; two held back."""
    folder = tmp_path_factory.mktemp("stores")
    known = [*patients("train", 5), *patients("validation", 2)]
    for number, patient in enumerate(known):
        positive = number in {0, 1, 5}
        write_real(
            folder / "real", number, patient, data, positive=positive, masked=number in {0, 5}
        )
    return folder


def test_labels_of_planes_count_where_there_is_no_mask() -> None:
    unknown = UNKNOWN_PIXELS
    pixels = [0, 0, unknown, unknown, unknown, 0, 0, 0, 0]
    labels = [0, 0, UNLABELLED, 1, UNLABELLED, 0, 0, 0, 0]
    found = slab_labels(pixels, labels, range(9), 1, 12)
    assert found == [
        *("negative", "dropped", "dropped", "positive", "dropped", "dropped"),
        *["negative"] * 3,
    ]
    assert slab_labels(pixels, labels, [2, 3, 6, 7], 5, 12) == [
        *("dropped", "positive", "dropped", "negative")
    ]
    masked = [0, 0, 0, 20, 0, 0, 0, 0, 0]
    says_more = [0, 0, 1, 1, 0, 0, 0, 0, 0]  # a reader saw it in a plane that the mask leaves clean
    assert slab_labels(masked, says_more, [2, 3, 5], 1, 12) == ["dropped", "positive", "negative"]


def test_every_split_has_its_own_patients(root: Path, data: DataSettings) -> None:
    (train,) = open_sources(data, root, "train")
    (validation,) = open_sources(data, root, "validation")
    names = [[s.record.phantom["patient"] for s in each.studies] for each in (train, validation)]
    assert sorted(names[0]) == sorted(patients("train", 5))
    assert sorted(names[1]) == sorted(patients("validation", 2))
    assert not train.paired
    (few,) = open_sources(data, root, "train", pairs=1)
    assert [s.record.positive for s in few.studies] == [True, False]


def test_annotated_only_leaves_out_positive_studies_without_a_mask(
    root: Path, data: DataSettings
) -> None:
    (every,) = open_sources(data, root, "train")
    (some,) = open_sources(data, root, "train", annotated_only=True)
    assert [s.record.seed for s in every.studies] == [0, 1, 2, 3, 4]
    assert [s.record.seed for s in some.studies] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"split": "test"}, "was indexed for 'test'"),
        ({"collection": "other"}, "collection 'other'"),
        ({"grid": "0"}, "grid '0'"),
    ],
)
def test_a_store_that_does_not_fit_the_settings_is_refused(
    data: DataSettings, tmp_path: Path, facts: dict[str, str], said: str
) -> None:
    patient = patients("train", 1)[0]
    write_real(tmp_path / "real", 0, patient, data, positive=True, masked=True, **facts)
    with pytest.raises(ConfigurationError, match=said):
        open_sources(data, tmp_path, "train")
    with pytest.raises(InputError, match="no study of made-up"):
        open_sources(data, tmp_path / "elsewhere", "train")


def test_another_division_of_the_patients_is_refused(data: DataSettings) -> None:
    (source,) = data.source
    other = data.model_copy(update={"source": (source.model_copy(update={"test": 0.3}),)})
    with pytest.raises(ConfigurationError, match="one index"):
        other.refuse_mixing(data.seen, "stage1.pt")
    data.refuse_mixing(data.seen, "stage1.pt")


def test_a_positive_slab_without_a_mask_is_classified_and_nothing_else(
    root: Path, data: DataSettings
) -> None:
    (train,) = open_sources(data, root, "train")
    index = index_slabs(train, 5)
    assert sorted({ref.study.record.seed for ref in index.positives}) == [0, 1]
    assert {ref.study.record.seed for ref in index.positives if ref.masked} == {0}
    assert all(ref.twin is None for ref in index.positives)
    source = BatchSource(index, data.grid, WHOLE, seed=1, strengths=OFF)
    batches = [source.batch(step) for step in range(4)]
    labels = torch.cat([b.labels for b in batches])
    weight = torch.cat([b.weight for b in batches]).amax(dim=(1, 2, 3))
    target = torch.cat([b.target for b in batches]).amax(dim=(1, 2, 3))
    positive = labels == 1
    assert 0 < int(positive.sum()) < len(labels)
    assert {
        (float(w), float(t)) for w, t in zip(weight[positive], target[positive], strict=True)
    } == {*((1.0, 1.0), (0.0, 0.0))}
    assert (weight[~positive] == 1.0).all()
    assert (target[~positive] == 0.0).all()


def test_crops_are_of_slabs_with_masks_only(root: Path, data: DataSettings) -> None:
    (train,) = open_sources(data, root, "train")
    index = index_slabs(train, 5)
    crops = WHOLE.model_copy(update={"crop": 32})
    batch = BatchSource(index, data.grid, crops, seed=1, strengths=OFF).batch(0)
    assert batch.slabs.shape == (8, 5, 32, 32)
    unmasked = replace(index, positives=[ref for ref in index.positives if not ref.masked])
    with pytest.raises(ConfigurationError, match="crop = 64, the whole plane"):
        BatchSource(unmasked, data.grid, crops, seed=1, strengths=OFF)


def test_sources_are_drawn_by_their_shares(store: Path, root: Path, data: DataSettings) -> None:
    (real,) = open_sources(data, root, "train")
    pairs = open_sources(data.model_copy(update={"source": ()}), store, "train")[0]
    indices = [
        index_slabs(replace(source, share=share), 5)
        for source, share in ((real, 0.8), (pairs, 0.2))
    ]
    phase = WHOLE.model_copy(update={"batch": 40})
    source = BatchSource(indices, data.grid, phase, seed=1, strengths=OFF)
    again = BatchSource(indices, data.grid, phase, seed=1, strengths=OFF)
    batch = source.batch(3)
    assert torch.equal(batch.slabs, again.batch(3).slabs)
    assert batch.labels.tolist().count(1) == 16
    lone = replace(indices[0], positives=[])  # of which nothing positive can be drawn
    batch = BatchSource([lone, indices[1]], data.grid, phase, seed=1, strengths=OFF).batch(0)
    assert batch.labels.tolist().count(1) == 16


def test_a_source_of_pairs_may_have_its_own_seeds_and_is_not_validated_on(
    store: Path, data_settings: DataSettings
) -> None:
    values = data_settings.model_dump()
    painted = {"store": "painted", "share": 0.25, "train": {"first_seed": 2, "pairs": 1}}
    values["source"] = [{"store": store.name, "share": 0.75}, painted]
    data = DataSettings.model_validate(values)
    (store.parent / "painted").symlink_to(store)
    phantoms, one = open_sources(data, store.parent, "train")
    assert [pair.positive.record.seed for pair in phantoms.pairs] == [0, 1, 2]
    assert [pair.positive.record.seed for pair in one.pairs] == [2]
    (held,) = open_sources(data, store.parent, "validation")
    assert [pair.positive.record.seed for pair in held.pairs] == [10, 11]


def test_a_source_can_be_left_out(data_settings: DataSettings) -> None:
    shares = {"phantoms": 0.6, "one": 0.1, "two": 0.3}
    sources = [{"store": name, "share": share} for name, share in shares.items()]
    data = DataSettings.model_validate({**data_settings.model_dump(), "source": sources})
    left = data.without(["two"])
    assert [source.store for source in left.source] == ["phantoms", "one"]
    assert [source.share for source in left.source] == pytest.approx([6 / 7, 1 / 7])
    assert left.name == "tiny, without two"
    for stores in (["three"], ["one", "two", "phantoms"]):
        with pytest.raises(ConfigurationError, match="phantoms, one, two"):
            data.without(stores)


def test_seeds_of_a_source_may_not_be_held_back(data_settings: DataSettings) -> None:
    values = data_settings.model_dump()
    held_back = {"store": "painted", "share": 1.0, "train": {"first_seed": 9, "pairs": 2}}
    with pytest.raises(ValueError, match="overlap"):
        DataSettings.model_validate({**values, "source": [held_back]})
    elsewhere = {**held_back, "train": {"first_seed": 40, "pairs": 2}}
    earlier = DataSettings.model_validate({**values, "source": [elsewhere]})
    later = DataSettings.model_validate({**values, "test": {"first_seed": 41, "pairs": 2}})
    with pytest.raises(ConfigurationError, match="would be known"):
        later.refuse_mixing(earlier.seen, "stage1.pt")
    with pytest.raises(ValueError, match="no seeds to train on"):
        SourceSettings.model_validate({**elsewhere, "collection": "made-up"})


def test_slabs_without_a_twin_are_validated_against_others(root: Path, data: DataSettings) -> None:
    (validation,) = open_sources(data, root, "validation")
    index = index_slabs(validation, 5)
    chosen = choose_slabs(index.positives, index.negatives, 5)
    assert len(chosen) == len(index.positives)
    for positive, negative in chosen:
        assert positive.clot_pixels > 0
        assert negative.clot_pixels == 0
    with pytest.raises(ConfigurationError, match="no negative slab"):
        choose_slabs(index.positives, [], 5)


def test_couples_are_drawn_from_both_classes_equally() -> None:
    real = EncodedStudies(0.75, ["a", "b"], ["n", "m", "o"], twins=False)
    twins = EncodedStudies(0.25, ["x1", "y1"], ["x0", "y0"], twins=True)
    lone = EncodedStudies(0.5, ["z"], [], twins=False)
    draw = CoupleDraw(100, [real, twins], [])
    drawn = [draw(n, np.random.default_rng(n)) for n in range(400)]
    assert drawn == [draw(n, np.random.default_rng(n)) for n in range(400)]
    pairs = [(c.positive, c.negative) for c in drawn if c.twins]
    assert set(pairs) == {("x1", "x0"), ("y1", "y0")}
    assert len(pairs) / 400 == pytest.approx(0.25, abs=0.07)
    others = {(c.positive, c.negative) for c in drawn if not c.twins}
    assert len(others) == 6
    found = CoupleDraw(1, [lone, real], [])(0, np.random.default_rng(0))
    assert found.negative in real.negatives
    assert CoupleDraw(2, [twins], [])(1, np.random.default_rng(0)).positive == "y1"


def test_a_resumed_run_on_real_studies_equals_an_uninterrupted_one(
    root: Path, data: DataSettings, tmp_path: Path
) -> None:
    settings = Stage1Settings(seed=3, data="unused.toml", refresh_steps=2, phase=(WHOLE,))
    quiet = Console(quiet=True)
    straight = Stage1Run(settings, data, root, tmp_path / "one", resume=False)
    straight.train(lambda: False, quiet)
    for resume in (False, True):
        stopped = Stage1Run(settings, data, root, tmp_path / "two", resume=resume)
        stopped.train(lambda run=stopped, last=resume: run.at.step >= (99 if last else 3), quiet)
    assert straight.at.step == stopped.at.step == 4
    for name, value in straight.mean.state.items():
        assert torch.equal(value, stopped.mean.state[name]), name
    stopped.at.pairs += 1
    with pytest.raises(ConfigurationError, match="cannot be resumed on others"):
        stopped._refresh_pairs()


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([("a", 0.5), ("b", 0.4)], "add up to 0.9"),
        ([("x/a", 0.5), ("y/a", 0.5)], "different names"),
    ],
)
def test_impossible_sources_are_refused(
    data_settings: DataSettings, sources: list[tuple[str, float]], said: str
) -> None:
    values = data_settings.model_dump()
    values["source"] = [{"store": store, "share": share} for store, share in sources]
    with pytest.raises(ValueError, match=said):
        DataSettings.model_validate(values)


@pytest.mark.parametrize("name", ["pe-rsna", "ich-rsna"])
def test_committed_settings_of_real_collections_fit_each_other(name: str) -> None:
    configs = Path(__file__).parents[2] / "export" / "configs"
    stage1 = load_settings(configs / f"{name}-stage1.toml", Stage1Settings)
    stage2 = load_study_settings(configs / f"{name}-stage2.toml")
    first = load_data_settings(configs / f"{name}-stage1.toml", stage1.data)
    second = load_data_settings(configs / f"{name}-stage2.toml", stage2.data)
    second.refuse_mixing(first.seen, "stage 1")
    assert {source.collection for source in first.source} <= {
        source.collection for source in second.source
    }
    assert second.unpaired
    assert stage1.phase[-1].crop == second.grid.rows
    assert system_of(stage1) is system_of(stage2)


BACKGROUND = {"folder": "scan", "source": "a collection, its licence"}


def painted(store: Path, folder: Path, source: str = BACKGROUND["source"]) -> Path:
    """A copy of a store that says it was painted into a real study."""
    shutil.copytree(store, folder)
    for path in folder.glob("*/study.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "phantom": {"semi-synthetic": source}}))
    return folder


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_have_to_be_made_of_what_the_settings_name(
    store: Path, data_settings: DataSettings, tmp_path: Path, split: Split
) -> None:
    painted(store, tmp_path / "painted")
    shutil.copytree(store, tmp_path / "phantoms")
    values = data_settings.model_dump()
    for name, backgrounds, refused in (
        ("painted", [BACKGROUND], None),
        ("phantoms", [], None),
        ("painted", [], "a collection, its licence"),
        ("painted", [{**BACKGROUND, "source": "another"}], "another"),
        ("phantoms", [BACKGROUND], "is a phantom"),
    ):
        source = {"store": name, "share": 1.0, "backgrounds": backgrounds}
        beside = DataSettings.model_validate({**values, "source": [source]})
        alone = DataSettings.model_validate({**values, "backgrounds": backgrounds})
        for data, folder in ((beside, tmp_path), (alone, tmp_path / name)):
            if not refused:
                assert open_sources(data, folder, split)
                continue
            with pytest.raises(ConfigurationError, match="'backgrounds' of its") as caught:
                open_sources(data, folder, split)
            assert refused in str(caught.value)
            assert str(tmp_path / name) in str(caught.value)


def test_nothing_is_painted_into_a_collection() -> None:
    values = {"store": "x", "share": 1.0, "collection": "y", "backgrounds": [BACKGROUND]}
    with pytest.raises(ValueError, match="nothing is painted"):
        SourceSettings.model_validate(values)


def test_painted_sources_are_named_as_the_settings_that_make_their_stores_name_them() -> None:
    data = load_settings(CONFIGS / "pe-painted-data.toml", DataSettings)
    painted = [source for source in data.source if source.train]
    assert painted
    for source in painted:
        made = load_settings(CONFIGS / f"pe-painted-{source.store}.toml", DataSettings)
        assert source.train == made.train
        assert {b.folder: b.source for b in source.backgrounds} == made.painted


def test_pairs_of_another_grid_are_refused_where_the_store_says_so(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    values = data_settings.model_dump()
    beside = DataSettings.model_validate({**values, "source": [{"store": "store", "share": 1.0}]})
    shutil.copytree(store, tmp_path / "store")
    study = next((tmp_path / "store").glob("*/study.json"))
    content = json.loads(study.read_text())
    for data, folder in ((beside, tmp_path), (data_settings, tmp_path / "store")):
        for grid in (None, grid_digest(data.grid.to_grid())):
            facts = {"grid": grid} if grid else {}
            study.write_text(json.dumps({**content, "phantom": facts}))
            open_sources(data, folder, "train")
        study.write_text(json.dumps({**content, "phantom": {"grid": "abc"}}))
        with pytest.raises(ConfigurationError, match="grid 'abc', expected"):
            open_sources(data, folder, "train")


def test_an_empty_store_is_told_the_command_that_fills_it(
    data_settings: DataSettings, tmp_path: Path
) -> None:
    values = data_settings.model_dump()
    for backgrounds, command in (([], "generate"), ([BACKGROUND], "generate_semisynthetic")):
        source = {"store": "x", "share": 1.0, "backgrounds": backgrounds}
        data = DataSettings.model_validate({**values, "source": [source]})
        with pytest.raises(InputError, match=rf"export\.datasets\.{command} "):
            open_sources(data, tmp_path, "train")


def test_something_has_to_be_left_to_validate_on(
    data_settings: DataSettings, tmp_path: Path
) -> None:
    painted = {"store": "x", "share": 0.5, "train": {"first_seed": 900, "pairs": 1}}
    sources = [{"store": "phantoms", "share": 0.5}, painted]
    data = DataSettings.model_validate({**data_settings.model_dump(), "source": sources})
    assert data.without(["x"]).source
    with pytest.raises(ConfigurationError, match="nothing is validated on"):
        data.without(["phantoms"])
    only = data.model_copy(update={"source": data.source[1:]})
    with pytest.raises(ConfigurationError, match="none is left to validate on"):
        open_sources(only, tmp_path, "validation")
