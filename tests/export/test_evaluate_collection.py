"""A bundle on an index of made-up real studies, through the detector."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from collection_layouts import write_physionet, write_rsna
from toy_bundles import make, radnet_like
from typer import Typer
from typer.testing import CliRunner

from export import evaluate_collection as command
from export.datasets.collections.base import Found, Fractions, unfollowed
from export.datasets.collections.index import Index, split_studies, write_index
from export.datasets.collections.registry import open_collection
from export.evaluate_collection import CollectionCase, PlaneCase, measures, summary
from export.training.validation import near_share
from pe_infer import Detector


def case(
    number: int, *, positive: bool, probability: float | None, kind: str = "subdural"
) -> CollectionCase:
    return CollectionCase(
        study=f"s{number}",
        patient=f"p{number}",
        positive=positive,
        types=[kind] if positive else [],
        probability=probability,
        called=None if probability is None else probability >= 0.5,
        threshold=0.5,
        refused=None if probability is not None else "series.gap",
        planes=[PlaneCase(position_mm=0.0, positive=positive, probability=probability or 0.0)],
    )


def indexed(name: str, root: Path, path: Path) -> Index:
    found = open_collection(name).index(root, workers=1, follow=unfollowed)
    index = split_studies(name, root, found, Fractions(validation=0.0, test=1.0))
    write_index(path, index, Found())
    return index


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make(
        tmp_path / "bundle",
        radnet_like,
        scope={"modality": ["CT"]},
        min_slabs=3,
        grid={"rows": 8, "cols": 8, "spacing_mm": 24.0, "slab_step": 1},
    )


def app() -> Typer:
    app = Typer()
    app.command()(command.main)
    return app


def test_a_study_without_verdict_is_neither_positive_nor_negative() -> None:
    cases = [
        case(0, positive=True, probability=0.9),
        case(1, positive=True, probability=None),
        case(2, positive=False, probability=0.2),
        case(3, positive=False, probability=0.6),
    ]
    values = measures(cases)
    assert values["study_auc"] == 1.0
    assert values["sensitivity"] == 1.0
    assert values["specificity"] == 0.5
    result = summary(cases)
    assert result["positive_without_verdict"] == 1
    assert result["refused"] == {"series.gap": 1}
    assert result["by_type"] == [{"type": "subdural", "studies": 1, "sensitivity": 1.0, "auc": 1.0}]


def test_what_the_cases_do_not_define_is_left_out() -> None:
    result = summary([case(0, positive=False, probability=0.1)])
    assert "study_auc" not in result
    assert "peak_hit" not in result
    assert math.isnan(measures([case(1, positive=True, probability=None)])["sensitivity"])


def test_intervals_are_over_patients_and_hold_the_value() -> None:
    rng = np.random.default_rng(3)
    cases = [
        case(
            n, positive=n % 2 == 0, probability=float(rng.uniform(0, 1) * 0.5 + 0.3 * (n % 2 == 0))
        )
        for n in range(60)
    ]
    single = summary(cases)["study_auc"]
    low, high = single["interval"]
    assert low < single["value"] < high
    twice = [*cases, *cases]  # of the same patients: no more certain than before
    low_twice, high_twice = summary(twice)["study_auc"]["interval"]
    assert high_twice - low_twice == pytest.approx(high - low, rel=0.15)


def test_guessing_hits_a_mask_as_often_as_it_fills_the_patient() -> None:
    mask = np.zeros((100, 100), np.bool_)
    mask[50, 50] = True
    hu = np.full((100, 100), 40.0, np.float32)
    assert near_share(mask, hu, 1.0) == pytest.approx(math.pi * 100 / 10_000, rel=0.05)
    hu[:, 60:] = -1000.0
    assert near_share(mask, hu, 1.0) == pytest.approx(math.pi * 100 / 6000, rel=0.06)


def test_slices_with_labels_are_compared_and_damage_is_a_case(tmp_path: Path, bundle: Path) -> None:
    root = tmp_path / "rsna"
    studies = {"p1": ["a"], "p2": ["b"], "p3": ["c"]}
    images = write_rsna(root, studies, slices=12, positive={"a": [4, 5, 6]})
    index = indexed("rsna-ich-2019", root, tmp_path / "i.jsonl")
    for image in images[26:30]:
        (root / f"stage_2_train/{image}.dcm").unlink()
    with Detector(bundle, engine="onnxruntime", cache_dir=None, warm_up=False) as detector:
        cases = [command.evaluate_study(detector, index, entry) for entry in index.entries]
    first, second, third = cases
    assert first.probability is not None
    assert first.called is (first.probability >= (first.threshold or 0))
    assert [p.positive for p in first.planes].count(True) >= 5  # planes of 2.5 mm
    assert not any(p.positive for p in second.planes)
    assert third.refused == "dicom.unreadable_file"
    assert images[26] in (third.message or "")
    assert first.flags == ["scope_unconfirmed"] or "scope_unconfirmed" not in first.flags


def test_masks_say_where_the_peak_should_be(tmp_path: Path, bundle: Path) -> None:
    pytest.importorskip("nibabel", reason="NIfTI needs nibabel: pip install -e '.[export]'")
    root = tmp_path / "physionet"
    write_physionet(root, {49: [5, 6, 7]})
    index = indexed("physionet-ct-ich", root, tmp_path / "i.jsonl")
    with Detector(bundle, engine="onnxruntime", cache_dir=None, warm_up=False) as detector:
        one = command.evaluate_study(detector, index, index.entries[0])
    assert one.probability is not None
    assert any(p.positive for p in one.planes)
    assert all(p.hit is None for p in one.planes)  # 30 mm are one of these pixels, too few to judge


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path, bundle: Path) -> None:
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a"], "p2": ["b"]}, slices=12, positive={"a": [4, 5, 6]})
    indexed("rsna-ich-2019", root, tmp_path / "i.jsonl")
    out = tmp_path / "out"
    arguments = ["--bundle", str(bundle), "--index", str(tmp_path / "i.jsonl"), "--out", str(out)]
    done = CliRunner().invoke(app(), [*arguments, "--engine", "onnxruntime", "--limit", "1"])
    assert done.exit_code == 0, done.output
    cases = next(out.glob("*/studies.jsonl"))
    first = cases.read_text()
    cases.write_text(first + '{"study": "cut sh')
    done = CliRunner().invoke(app(), [*arguments, "--engine", "onnxruntime"])
    assert done.exit_code == 0, done.output
    assert cases.read_text().startswith(first)
    assert len(cases.read_text().splitlines()) == 2
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["studies"], result["patients"], result["with_verdict"]) == (2, 2, 2)
    assert 0.0 <= result["study_auc"]["value"] <= 1.0
    assert result["by_type"][0]["type"] == "subdural"
