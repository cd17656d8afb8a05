"""How good probabilities are: errors before and after calibration, the plot, the model card."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.calibration import (
    PlattScaling,
    calibration_errors,
    calibration_report,
    reliability,
)
from export.evaluation_plots import write_reliability
from export.measures import StudyCase
from export.model_card import model_card


def test_a_scaling_is_undone() -> None:
    logits = np.array([-30.0, -2.0, 0.0, 0.5, 12.0])
    plain = PlattScaling(scale=1.0, offset=0.0)(logits)
    scaling = PlattScaling(scale=0.4, offset=-0.7)
    assert scaling.undone(scaling(logits)) == pytest.approx(plain, rel=1e-6)
    assert scaling.undone(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_errors_and_bins_of_probabilities() -> None:
    probabilities = np.array([0.05, 0.05, 0.85, 0.95, 1.0])
    truth = np.array([False, True, True, True, True])
    rows = reliability(probabilities, truth)
    assert [(row["from"], row["to"], row["studies"]) for row in rows] == [
        (0.0, 0.1, 2),
        (0.8, 0.9, 1),
        (0.9, 1.0, 2),
    ]
    assert rows[0]["positive"] == 0.5
    assert rows[2]["probability"] == pytest.approx(0.975)
    errors = calibration_errors(probabilities, truth)
    assert errors["ece"] == pytest.approx((2 * 0.45 + 0.15 + 2 * 0.025) / 5)
    squares = [0.05**2, 0.95**2, 0.15**2, 0.05**2, 0.0]
    assert errors["brier"] == pytest.approx(sum(squares) / 5)


def case(seed: int, probability: float, *, positive: bool) -> StudyCase:
    return StudyCase(
        seed=seed,
        positive=positive,
        probability=probability,
        called=probability >= 0.5,
        threshold=0.5,
        alerted=False,
        largest_mm3=1.0,
        largest_place="somewhere",
        largest_kind="a kind",
        kinds=["a kind"],
        seconds_after_last_slice=0.0,
        gated_positives=0,
    )


@pytest.fixture
def overconfident() -> tuple[list[StudyCase], PlattScaling]:
    """Pairs whose logits are four times too large, and the scaling that brings them back."""
    rng = np.random.default_rng(3)
    scaling = PlattScaling(scale=0.25, offset=0.0)
    cases = []
    for seed in range(200):
        for positive in (True, False):
            logit = 4 * (rng.normal(0.0, 1.4) + (1.0 if positive else -1.0))
            cases.append(case(seed, float(scaling(np.array(logit))), positive=positive))
    return cases, scaling


def test_calibration_is_reported_before_and_after(
    overconfident: tuple[list[StudyCase], PlattScaling], tmp_path: Path
) -> None:
    cases, scaling = overconfident
    report = calibration_report(cases, scaling)
    assert report["after"]["ece"]["value"] < 0.5 * report["before"]["ece"]["value"]
    assert report["after"]["brier"]["value"] < report["before"]["brier"]["value"]
    for when in ("before", "after"):
        assert sum(row["studies"] for row in report[when]["bins"]) == len(cases)
        low, high = report[when]["brier"]["interval"]
        assert low < report[when]["brier"]["value"] < high
        assert not any(math.isnan(row["positive"]) for row in report[when]["bins"])
    write_reliability(report, tmp_path)
    with Image.open(tmp_path / "reliability.png") as image:
        assert image.size == (600, 720)


def test_the_model_card_has_both(
    overconfident: tuple[list[StudyCase], PlattScaling],
) -> None:
    report = calibration_report(*overconfident)
    stage = {"progression": {"step": 1, "minutes": 2.0}, "loss": {}}
    loss = {"cross_entropy": 1.0, "dice": 1.0, "focal": 0.0}
    evaluation = {
        "engine": "openvino 1",
        "pairs": 200,
        "first_seed": 0,
        "held_out": True,
        "phantom_configuration": "abc",
        "positive_slabs": {"scored": 1, "gated": 0},
    }
    training = {"data": "d", "stage1": {**stage, "loss": loss}, "stage2": stage}
    document = {
        "name": "n",
        "version": "1",
        "intended_use": "none",
        "operating_points": [],
        "training": {**training, "evaluation": evaluation},
    }
    assert "Brier" not in model_card(document, [])
    evaluation["calibration"] = report
    card = model_card(document, [])
    before, after = (report[when]["ece"] for when in ("before", "after"))
    shown = " | ".join(
        f"{one['value']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"
        for one in (before, after)
    )
    assert f"| expected error | {shown} |" in card
    assert "scale 0.250, offset 0.000" in card
