"""Numbers of an evaluation: what they count, pairs that stay together, what is not measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from phantoms import coarse_phantom
from sklearn.metrics import roc_auc_score

from export.anatomies import ANATOMIES, Largest
from export.evaluate import read_cases
from export.held_out import held_out, unseen_background
from export.measures import (
    COMBINED,
    Cases,
    RefusedPair,
    SlabCase,
    StudyCase,
    auc,
    measures,
    not_processed,
    reasons_text,
    summary,
    trivial_measures,
)
from export.training.config import DataSettings, load_settings
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import ANATOMIES as PHANTOMS

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
CHEST, HEAD = ANATOMIES["chest"], ANATOMIES["head"]
NAMES = ("mean HU", "noise", "bright volume")


def case(
    seed: int,
    probability: float,
    *,
    positive: bool,
    hit: bool = True,
    trivial: Callable[[], float] = lambda: 0.0,
) -> StudyCase:
    """A study with one slab at a lesion (of the twin)."""
    slab = SlabCase(
        position_mm=1.0,
        positive=positive,
        at_lesion=True,
        lesion_pixels=30,
        probability=probability,
        peak=probability,
        hit=hit,
    )
    return StudyCase(
        seed=seed,
        positive=positive,
        probability=probability,
        called=probability > 0.5,
        threshold=0.5,
        alerted=probability > 0.7,
        largest_mm3=30_000.0 if seed % 2 else 1_000.0,
        largest_place="left lower segmental" if seed % 2 else "right main",
        largest_kind="subdural" if seed % 2 else "epidural",
        kinds=["epidural", "subdural"],
        seconds_after_last_slice=0.1,
        gated_positives=int(positive),
        slabs=[slab],
        trivial={name: trivial() for name in NAMES},
    )


def pairs_of(positive: list[float], negative: list[float]) -> list[StudyCase]:
    """Pairs with these probabilities."""
    return [
        case(seed, (positive if with_lesions else negative)[seed], positive=with_lesions)
        for seed in range(len(positive))
        for with_lesions in (True, False)
    ]


def test_auc_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(2)
    truth = (rng.random(300) < 0.3).tolist()
    scores = np.round(rng.normal(size=300) + np.array(truth), 1).tolist()  # many are equal
    assert auc(truth, scores) == pytest.approx(roc_auc_score(truth, scores))
    assert np.isnan(auc([True, True], [0.1, 0.2]))


def test_measures_of_a_perfect_bundle() -> None:
    perfect = measures(pairs_of([0.9] * 4, [0.1] * 4))
    names = ("study_auc", "sensitivity", "specificity", "slab_auc", "paired_order")
    assert {name: perfect[name] for name in names} == dict.fromkeys(names, 1.0)


def test_peaks_by_themselves_are_a_score_of_the_study() -> None:
    studies = pairs_of([0.1, 0.2], [0.8, 0.9])  # the verdicts are all wrong
    peaks = [[3.0, 0.0, 0.0], [2.0, 2.0, 2.0], [4.0, 3.0, 3.0], [0.5, 0.1, 0.0]]
    with_peaks = [replace(s, peaks=own) for s, own in zip(studies, peaks, strict=True)]
    found = measures(with_peaks)
    assert (found["study_auc"], found["highest_peak_auc"]) == (0.0, 1.0)
    assert found["three_peaks_auc"] == 0.75
    assert np.isnan(measures(studies)["highest_peak_auc"])


def test_hits_count_all_positive_slabs_and_controls_all_of_their_twins() -> None:
    studies = [
        case(0, 0.9, positive=True, hit=True),
        case(0, 0.1, positive=False, hit=False),
        case(1, 0.01, positive=True, hit=False),  # called negative, and counted all the same
        case(1, 0.1, positive=False, hit=True),
        case(2, 0.02, positive=True, hit=True),
        case(2, 0.9, positive=False, hit=False),
        case(3, 0.9, positive=True, hit=True),
        case(3, 0.1, positive=False, hit=False),
    ]
    found = measures(studies)
    assert (found["peak_hit"], found["peak_control"]) == (0.75, 0.25)
    assert (found["sensitivity"], found["specificity"]) == (0.5, 0.75)
    assert (found["alerted"], found["alerted_falsely"]) == (0.5, 0.25)
    result = summary(studies, CHEST)
    assert result["positive_slabs"] == {"scored": 4, "gated": 4}
    (row,) = result["by_slab_size"]
    assert (row["slabs"], row["hit"], row["control"]) == (4, 0.75, 0.25)


def test_patients_are_grouped_by_how_they_were_examined() -> None:
    studies = [
        replace(s, conditions={"noise": noise} if s.seed else {})
        for s, noise in zip(
            pairs_of([0.9, 0.3, 0.8, 0.6], [0.1, 0.35, 0.2, 0.4]),
            ["below 12 HU"] * 4 + ["from 20 HU"] * 4,
            strict=True,
        )
    ]
    found = summary(studies, CHEST)["by_condition"]
    assert list(found) == ["noise"]
    assert [(r["group"], r["studies"], r["verdicts_right"]) for r in found["noise"]] == [
        ("below 12 HU", 2, 1),
        ("from 20 HU", 4, 4),
    ]


def test_a_study_knows_how_it_was_examined() -> None:
    study = coarse_phantom("chest").generate(1, positive=False)
    thickness, noise, contrast = CHEST.conditions.values()
    mm = study.slices[0].geometry.thickness_mm
    assert mm is not None
    assert thickness.group_of(study) == by_hand(mm, (1.5, 2.5), "mm")
    assert noise.group_of(study) == by_hand(float(study.parameters["noise_hu"]), (12, 20), "HU")
    assert contrast.group_of(replace(study, parameters={})) is None


def by_hand(value: float, edges: tuple[float, float], unit: str) -> str:
    low, high = edges
    if value < low:
        return f"below {low:g} {unit}"
    return f"from {high:g} {unit}" if value >= high else f"{low:g} to {high:g} {unit}"


def test_patients_are_grouped_by_their_largest_lesion() -> None:
    studies = pairs_of([0.9, 0.3, 0.8, 0.6], [0.1, 0.35, 0.2, 0.4])
    for anatomy, grouping, groups in (
        (CHEST, "place", ["lobar or larger", "segmental or smaller"]),
        (CHEST, "volume", ["0.5 to 2 ml", "from 2 ml"]),
        (HEAD, "type", ["epidural", "subdural"]),
        (HEAD, "volume", ["1 to 5 ml", "from 25 ml"]),
    ):
        rows = summary(studies, anatomy)["by_largest"][grouping]
        assert [row["group"] for row in rows] == groups
        assert [row["studies"] for row in rows] == [4, 4]
        assert [row["verdicts_right"] for row in rows] == [4, 3]
        assert [row["auc"]["value"] for row in rows] == [1.0, 0.5]
        assert [row["sensitivity"]["value"] for row in rows] == [1.0, 0.5]
        low, high = rows[1]["auc"]["interval"]
        assert low <= 0.5 <= high
        assert rows[0]["peak_hit"]["value"] == 1.0
        json.dumps(rows, allow_nan=False)


def test_every_group_has_a_name() -> None:
    volume = HEAD.groupings["volume"]
    assert volume.groups == ("below 1 ml", "1 to 5 ml", "5 to 25 ml", "from 25 ml")
    found = [volume.group_of(Largest(kind="", place="", mm3=v)) for v in (999.0, 1e3, 24e3, 25e3)]
    assert tuple(found) == volume.groups
    assert set(ANATOMIES) == set(PHANTOMS)


def test_a_slab_of_the_evaluation_is_positive_as_in_training() -> None:
    for data in ("pe-data.toml", "ich-data.toml"):
        settings = load_settings(CONFIGS / data, DataSettings)
        assert ANATOMIES[settings.phantom].lesion_pixels == settings.min_pixels


def test_both_studies_of_a_pair_are_drawn_together() -> None:
    values = np.linspace(0.05, 0.95, 20).tolist()
    result = summary(pairs_of(values, values), CHEST)
    # Twins that score alike: every sample of whole pairs has an AUC of 0.5, others do not.
    assert [result["study_auc"]["value"], *result["study_auc"]["interval"]] == pytest.approx(
        [0.5] * 3
    )
    assert result["paired_order"]["value"] == 0.5
    low, high = result["sensitivity"]["interval"]
    assert low < 0.5 < high


def test_a_pair_that_was_torn_apart_is_an_error() -> None:
    studies = pairs_of([0.9, 0.8], [0.1, 0.2])
    with pytest.raises(ValueError, match="a pair was expected"):
        measures([studies[0], studies[1], studies[2], studies[1]])


def test_what_the_studies_do_not_define_is_left_out() -> None:
    bare = [
        StudyCase(**{**asdict(study), "slabs": []}) for study in pairs_of([0.9, 0.8], [0.1, 0.2])
    ]
    result = summary(bare, HEAD)
    assert result["study_auc"]["value"] == 1.0
    assert not {"slab_auc", "slab_peak_auc", "peak_hit", "peak_control"} & set(result)
    json.dumps(result, allow_nan=False)


def test_trivial_scores_are_given_their_best_direction_and_their_pairs() -> None:
    rng = np.random.default_rng(0)
    studies: list[StudyCase] = []
    for seed in range(30):
        patient = float(rng.normal())
        studies.append(case(seed, 0.9, positive=True, trivial=lambda p=patient: p - 1e-3))
        studies.append(case(seed, 0.1, positive=False, trivial=lambda p=patient: p))
    found = trivial_measures(studies)
    assert tuple(found["trivial_auc"]) == (*NAMES, COMBINED)
    # Lost among patients, and yet it knows the positive study of every single pair.
    assert 0.5 <= found["trivial_auc"]["mean HU"] < 0.55
    assert found["trivial_paired_order"]["mean HU"] == 1.0
    telling = [
        case(s // 2, 0.5, positive=s % 2 == 0, trivial=lambda s=s: float(s % 2)) for s in range(60)
    ]
    found = trivial_measures(telling)
    assert set(found["trivial_auc"].values()) == {1.0}


def test_cases_are_read_back_in_whole_pairs(tmp_path: Path) -> None:
    path = tmp_path / "studies.jsonl"
    assert read_cases(path) == Cases()
    studies = pairs_of([0.9, 0.8], [0.1, 0.2])
    refused = [RefusedPair(seed=7, positive="check.noise", negative=None)]
    lines = [json.dumps(asdict(each)) for each in (*refused, *studies)]
    path.write_text("\n".join(lines) + "\n")
    assert read_cases(path) == Cases(studies=studies, refused=refused)
    path.write_text("\n".join(lines))  # the last one was cut short
    assert read_cases(path) == Cases(studies=studies[:2], refused=refused)
    path.write_text("\n".join(lines[:4]) + "\n")
    assert read_cases(path) == Cases(studies=studies[:2], refused=refused)


def test_patients_without_a_measure_are_counted_by_reason_and_study() -> None:
    refused = [
        RefusedPair(seed=0, positive="check.opacification", negative="check.opacification"),
        RefusedPair(seed=1, positive=None, negative="check.opacification"),
        RefusedPair(seed=2, positive="check.noise", negative="gate.no_organ"),
    ]
    counts = not_processed(refused)
    assert (counts["patients"], counts["positive"], counts["negative"]) == (3, 2, 3)
    assert list(counts["by_code"]) == ["check.opacification", "check.noise", "gate.no_organ"]
    assert counts["by_code"]["check.opacification"] == {
        "patients": 2,
        "positive": 1,
        "negative": 2,
    }
    assert counts["by_code"]["check.noise"]["negative"] == 0
    text = reasons_text(counts)
    assert text.startswith("check.opacification 2 (studies with the finding 1, without 2), ")


def test_seeds_of_training_and_validation_are_refused() -> None:
    training = {"seeds": {"training of stage 1": [100, 50], "validation of stage 2": [200, 10]}}
    assert held_out(training, range(150, 200))
    for seeds in (range(90, 101), range(149, 160), range(205, 206)):
        with pytest.raises(ConfigurationError, match="Pass another --first-seed"):
            held_out(training, seeds)
    assert not held_out({}, range(10))


def test_a_painted_scan_is_unseen_only_where_the_bundle_names_all_of_them() -> None:
    backgrounds = {"one": "collection, licence", "two/models": "collection, licence"}
    training = {"backgrounds": backgrounds, "all_backgrounds": True}
    assert unseen_background(training, Path("scans/three"))
    assert unseen_background(training, Path("scans/models"))
    for folder in ("scans/one", "one", "scans/two/models", "scans/x/../one"):
        assert not unseen_background(training, Path(folder))
    for unsaid in ({}, {"backgrounds": ["collection"]}, {**training, "all_backgrounds": False}):
        assert not unseen_background(unsaid, Path("scans/three"))
