"""From study logits to probabilities, and a bundle's thresholds, from validation studies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

WANTED = 0.95  # sensitivity of the "sensitive" point, specificity of the "specific" one


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

    Thresholds lie half-way between neighbouring probabilities. What is said of the points is
    measured on the studies that chose them, hence too good.

    Args:
        probabilities: (N,) calibrated, of validation studies of both classes.
        labels: 1 = PE, 0 = none.
    """
    truth = np.asarray(labels) > 0.5
    false_share, true_share, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    values = np.unique(probabilities)[::-1]
    edges = np.concatenate([[1.0], (values[:-1] + values[1:]) / 2, [0.0]])
    sensitivity, specificity = true_share, 1.0 - false_share
    balanced = int(np.argmax(sensitivity + specificity))
    sensitive = int(np.argmax(sensitivity >= WANTED))
    specific = int(len(specificity) - 1 - np.argmax(specificity[::-1] >= WANTED))
    chosen = {
        "balanced": (balanced, "largest sum of sensitivity and specificity"),
        "sensitive": (sensitive, f"sensitivity of at least {WANTED}"),
        "specific": (specific, f"specificity of at least {WANTED}"),
    }
    return [
        Point(
            name=name,
            threshold=float(np.clip(edges[place], 0.0, 1.0)),
            description=f"{why}, on the validation studies",
            sensitivity=float(sensitivity[place]),
            specificity=float(specificity[place]),
        )
        for name, (place, why) in chosen.items()
    ]
