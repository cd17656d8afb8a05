"""From logits to probabilities and thresholds; what the model card says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import (
    DEFAULT_CONFIG,
    BundleSettings,
    load_trained,
    make_bundle,
    read_section,
)
from export.calibration import PlattScaling, choose_points, fit_calibration
from export.model_card import HEADLINES, model_card
from export.training.config import load_settings
from pe_infer.bundle import Bundle
from pe_infer.errors import InputError


def test_calibration_finds_the_slope_of_the_data() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 4000)
    labels = rng.random(4000) < 1 / (1 + np.exp(-(0.5 * logits - 1.0)))
    scaling = fit_calibration(logits.tolist(), labels.astype(float).tolist())
    assert scaling.scale == pytest.approx(0.5, abs=0.05)
    assert scaling.offset == pytest.approx(-1.0, abs=0.1)
    assert scaling(np.array([2.0]))[0] == pytest.approx(0.5, abs=0.03)


def test_a_falling_curve_is_not_fitted() -> None:
    assert fit_calibration([3.0, 2.0, -2.0, -3.0], [0, 0, 1, 1]) == PlattScaling(
        scale=1.0, offset=0.0
    )


def test_points_do_what_they_say_on_the_studies_that_chose_them() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 2
    probabilities = np.round(np.clip(0.3 + 0.3 * labels + rng.normal(0, 0.2, 200), 0, 1), 2)
    points = {p.name: p for p in choose_points(probabilities, labels.astype(float).tolist())}
    for point in points.values():
        called = probabilities >= point.threshold
        assert called[labels == 1].mean() == pytest.approx(point.sensitivity)
        assert 1 - called[labels == 0].mean() == pytest.approx(point.specificity)
        assert point.threshold not in probabilities
    assert points["sensitive"].sensitivity >= 0.95
    assert points["specific"].specificity >= 0.95
    sums = [
        (probabilities[labels == 1] >= t).mean() - (probabilities[labels == 0] >= t).mean()
        for t in np.linspace(0, 1, 301)
    ]
    balanced = points["balanced"]
    assert balanced.sensitivity + balanced.specificity - 1 >= max(sums) - 0.05
    assert (
        points["sensitive"].threshold
        <= points["balanced"].threshold
        <= points["specific"].threshold
    )


def test_one_lucky_gap_does_not_move_the_balanced_threshold() -> None:
    probabilities = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9] * 8) + np.arange(64) * 1e-4
    labels = (probabilities > 0.5).astype(float)
    labels[(probabilities > 0.6) & (probabilities < 0.605)] = 0.0  # seven positives look negative
    labels[(probabilities > 0.3) & (probabilities < 0.304)] = 1.0  # and six the other way round
    balanced = next(p for p in choose_points(probabilities, labels.tolist()))
    assert 0.4 < balanced.threshold < 0.65
    again = next(p for p in choose_points(probabilities[1:], labels[1:].tolist()))
    assert again.threshold == pytest.approx(balanced.threshold, abs=0.1)


def evaluation(weights: dict[str, str]) -> dict[str, Any]:
    """What ``export.evaluate`` would have written, every number another one."""
    headlines = {
        name: {"value": 0.5 + 0.01 * i, "interval": [0.4 + 0.01 * i, 0.6 + 0.01 * i]}
        for i, name in enumerate(HEADLINES)
    }
    return {
        "checkpoints": weights,
        "engine": "openvino 1.2.3",
        "pairs": 7,
        "first_seed": 4000,
        "held_out": True,
        "shifted": False,
        "phantom_configuration": "abc" * 10,
        "by_largest": {
            "type": [
                {
                    "group": "subdural",
                    "studies": 12,
                    "verdicts_right": 11,
                    "auc": {"value": 0.871, "interval": [0.8, 0.93]},
                    "sensitivity": {"value": 0.75, "interval": [0.5, 1.0]},
                }
            ]
        },
        "by_condition": {
            "noise": [
                {
                    "group": "from 20 HU",
                    "studies": 8,
                    "verdicts_right": 6,
                    "auc": {"value": 0.812, "interval": [0.7, 0.9]},
                }
            ],
            "order of arrival": [{"group": "feet first", "studies": 3, "verdicts_right": 2}],
        },
        "by_slab_size": [
            {
                "from_px": 12,
                "to_px": 50,
                "slabs": 9,
                "auc_against_twins": 0.61,
                "hit": 0.42,
                "control": 0.17,
            },
            {"from_px": 50, "slabs": 0, "auc_against_twins": None, "hit": None, "control": None},
        ],
        "positive_slabs": {"scored": 91, "gated": 3},
        "trivial_auc": {"mean HU": 0.541},
        **headlines,
    }


def test_the_model_card_has_the_numbers_of_an_evaluation_of_these_weights(
    checkpoints: list[Path], bundle: Path, tmp_path: Path
) -> None:
    assert "Not evaluated." in (bundle / "MODEL_CARD.md").read_text()
    settings = load_settings(DEFAULT_CONFIG, BundleSettings)
    trained = load_trained(checkpoints)
    weights = {stage: trained.provenance[stage]["sha256"] for stage in ("stage1", "stage2")}
    measured = evaluation(weights)
    for other in ({}, {**weights, "stage2": "f" * 64}):
        with pytest.raises(InputError, match="Evaluate these weights"):
            make_bundle(settings, trained, tmp_path, {**measured, "checkpoints": other})
    assert not list(tmp_path.iterdir())
    make_bundle(settings, trained, tmp_path, measured)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    for i, name in enumerate(HEADLINES.values()):
        low, value, high = 0.4 + 0.01 * i, 0.5 + 0.01 * i, 0.6 + 0.01 * i
        assert f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |" in card
    for text in ("7 pairs", "seeds 4000", "4006", "openvino 1.2.3", "91", "| mean HU | 0.541 |"):
        assert text in card
    assert "that training never saw" in card
    assert "| subdural | 12 | 11 | 0.87 (0.80 to 0.93) | 0.75 (0.50 to 1.00) | - |" in card
    assert "| from 20 HU | 8 | 6 | 0.81 (0.70 to 0.90) | - | - |" in card
    assert "| 12 to 49 | 9 | 0.61 | 0.42 | 0.17 |" in card
    assert "| 50 and more | 0 | - | - | - |" in card
    before, after = card.split("| feet first | 3 | 2 |")
    assert "different patients" in after
    assert "different patients" not in before
    assert "shifted" not in card
    document = Bundle.load(tmp_path).manifest.model_dump(mode="json")
    assert document["training"]["evaluation"] == json.loads(json.dumps(measured))
    document["training"]["evaluation"]["held_out"] = False
    assert "never saw" not in model_card(document, ["A network."])


def test_the_model_card_has_shifted_studies_and_further_sections_in_their_order(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    settings = load_settings(DEFAULT_CONFIG, BundleSettings)
    trained = load_trained(checkpoints)
    usual = evaluation(
        {stage: trained.provenance[stage]["sha256"] for stage in ("stage1", "stage2")}
    )
    shifted = {**usual, "shifted": True, "first_seed": 9000}
    for swapped in ({"evaluation": shifted}, {"shifted": usual}):
        with pytest.raises(InputError, match="expected the default one"):
            make_bundle(settings, trained, tmp_path, **swapped)
    sections = ["## Ablation\n\n| a | b |\n", "## Real studies\n\nNone."]
    make_bundle(settings, trained, tmp_path, usual, shifted=shifted, sections=sections)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    before, after = card.split("## Evaluation on shifted studies")
    assert "seeds 4000" in before
    assert "seeds 9000" in after
    assert after.endswith("\n\n## Ablation\n\n| a | b |\n\n## Real studies\n\nNone.\n")
    assert Bundle.load(tmp_path).manifest.training["shifted"]["first_seed"] == 9000


def card_of(measured: dict[str, Any]) -> str:
    """The card of a bundle with this evaluation and nothing else to tell, on one line."""
    at, loss = {"step": 1, "minutes": 2.0}, {"cross_entropy": 1.0, "dice": 1.0, "focal": 0.0}
    document = {
        "name": "n",
        "version": "1",
        "intended_use": "none",
        "operating_points": [],
        "training": {
            "data": "d",
            "stage1": {"progression": at, "loss": loss},
            "stage2": {"progression": at},
            "evaluation": measured,
        },
    }
    return " ".join(model_card(document, []).split())


def test_the_model_card_says_who_was_not_processed() -> None:
    counts = {"patients": 2, "positive": 2, "negative": 1}
    nobody = {"patients": 0, "positive": 0, "negative": 0, "by_code": {}}
    refused = {**counts, "by_code": {"check.opacification": counts}}
    assert "2 of 7 patients are in no measure, since a study of theirs was not processed: " in (
        card := card_of({**evaluation({}), "not_processed": refused})
    )
    assert "check.opacification 2 (studies with the finding 2, without 1)." in card
    for without in ({}, {"not_processed": nobody}):
        assert "processed" not in card_of({**evaluation({}), **without})


def test_the_model_card_names_the_real_study_that_pairs_were_made_of() -> None:
    assert "7 pairs of synthetic studies that training never saw" in card_of(evaluation({}))
    real = card_of({**evaluation({}), "semi_synthetic": "chest_contrast"})
    assert "7 pairs of semi-synthetic studies made of chest_contrast" in real
    assert " synthetic studies" not in real


def test_a_section_has_a_heading_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "section.md"
    path.write_text("\n## Ablation\n\ntext\n")
    assert read_section(path) == "## Ablation\n\ntext"
    for wrong in ("", "text", "# Title", "### Part\n"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="expected a heading"):
            read_section(path)
