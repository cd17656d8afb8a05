"""From study logits to probabilities, and a bundle's thresholds, from validation studies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

WANTED = 0.95  # sensitivity of the "sensitive" point, specificity of the "specific" one
BOOTSTRAPS = 1000


@dataclass(frozen=True, kw_only=True)
class PlattScaling:
    """probability = sigmoid(scale * logit + offset) (Platt 1999)."""

    scale: float
    offset: float

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of logits."""
        return np.asarray(
            1.0 / (1.0 + np.exp(-(self.scale * logits + self.offset))), dtype=np.float64
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A threshold on the calibrated probability, and how it did on the studies it was chosen on."""

    name: str
    threshold: float
    description: str
    sensitivity: float
    specificity: float


def fit_calibration(logits: Sequence[float], labels: Sequence[float]) -> PlattScaling:
    """Platt scaling by a weakly regularised logistic regression.

    Args:
        logits: Of validation studies of both classes.
        labels: 1 = PE, 0 = none.

    Returns:
        The unscaled logit where the data do not support a rising curve.
    """
    model = LogisticRegression(C=10.0)
    model.fit(np.asarray(logits)[:, None], np.asarray(labels) > 0.5)
    scale = float(model.coef_[0, 0])
    if scale <= 0:
        return PlattScaling(scale=1.0, offset=0.0)
    return PlattScaling(scale=scale, offset=float(model.intercept_[0]))


def choose_points(probabilities: NDArray[np.float64], labels: Sequence[float]) -> list[Point]:
    """Operating points ``balanced`` (largest sum of both), ``sensitive`` and ``specific``.

    What is said of the points is measured on the studies that chose them, hence too good.

    Args:
        probabilities: (N,) calibrated, of validation studies of both classes.
        labels: 1 = PE, 0 = none.
    """
    truth = np.asarray(labels) > 0.5
    positives, negatives = probabilities[truth], probabilities[~truth]
    thresholds, sensitivity, specificity = _curve(positives, negatives)
    balanced = _balanced_threshold(positives, negatives)
    # ascending thresholds: the last that is sensitive, the first that is specific
    sensitive = thresholds[np.flatnonzero(sensitivity >= WANTED)[-1]]
    specific = thresholds[np.flatnonzero(specificity >= WANTED)[0]]
    chosen = {
        "balanced": (balanced, "largest sum of sensitivity and specificity"),
        "sensitive": (min(sensitive, balanced), f"sensitivity of at least {WANTED}"),
        "specific": (max(specific, balanced), f"specificity of at least {WANTED}"),
    }
    return [
        Point(
            name=name,
            threshold=float(threshold),
            description=f"{why}, on the validation studies",
            sensitivity=float((positives >= threshold).mean()),
            specificity=float((negatives < threshold).mean()),
        )
        for name, (threshold, why) in chosen.items()
    ]


def _balanced_threshold(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """Median of the best thresholds of resampled studies: one study more or less moves it little.

    The best threshold of the studies as they are jumps from gap to gap of the probabilities.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(BOOTSTRAPS):
        thresholds, sensitivity, specificity = _curve(
            rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives))
        )
        total = sensitivity + specificity
        found.append(float(np.mean(thresholds[total == total.max()])))
    return float(np.median(found))


def _curve(
    positives: NDArray[np.float64], negatives: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Thresholds half-way between probabilities, ascending; sensitivity and specificity of each."""
    values = np.unique(np.concatenate([positives, negatives]))
    thresholds = np.concatenate([[0.0], (values[:-1] + values[1:]) / 2, [1.0]])
    missed = np.searchsorted(np.sort(positives), thresholds) / len(positives)
    passed = np.searchsorted(np.sort(negatives), thresholds) / len(negatives)
    return thresholds, 1.0 - missed, passed
