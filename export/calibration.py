"""From study logits to probabilities, and a bundle's thresholds, from validation studies.

And how good the probabilities are: of studies that are said to be positive with a probability of
0.8, 80 in 100 should be.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from export.measures import StudyCase, with_intervals

WANTED = 0.95  # sensitivity of the "sensitive" point, specificity of the "specific" one
BOOTSTRAPS = 1000
BINS: Final = 10  # of equal width, of the probability


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

    def undone(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the probabilities would be without the scaling: sigmoids of the plain logits.

        Args:
            probabilities: Calibrated; those that are rounded to 0 or 1 stay so.
        """
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities) - np.log1p(-probabilities)
        return PlattScaling(scale=1.0, offset=0.0)((logits - self.offset) / self.scale)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A threshold on the calibrated probability, and how it did on the studies it was chosen on."""

    name: str
    threshold: float
    description: str
    sensitivity: float
    specificity: float


def calibration_errors(
    probabilities: NDArray[np.float64], truth: NDArray[np.bool_]
) -> dict[str, float]:
    """``ece`` and ``brier``: expected calibration error over ``BINS``, and mean squared error.

    Args:
        probabilities: (N,) in [0, 1].
        truth: (N,).
    """
    rows = reliability(probabilities, truth)
    gaps = [row["studies"] * abs(row["probability"] - row["positive"]) for row in rows]
    return {
        "ece": float(sum(gaps) / len(probabilities)),
        "brier": float(np.mean((probabilities - truth) ** 2)),
    }


def reliability(
    probabilities: NDArray[np.float64], truth: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """What is said and what is so, in bins of the probability that are not empty.

    Args:
        probabilities: (N,) in [0, 1].
        truth: (N,).

    Returns:
        Per bin its ends, the number of ``studies``, the mean ``probability`` that was said, and the
        share that is ``positive``.
    """
    places = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return [
        {
            "from": int(place) / BINS,
            "to": (int(place) + 1) / BINS,
            "studies": int((places == place).sum()),
            "probability": float(probabilities[places == place].mean()),
            "positive": float(truth[places == place].mean()),
        }
        for place in np.unique(places)
    ]


def calibration_report(
    cases: Sequence[StudyCase], scaling: PlattScaling, *, seed: int = 0
) -> dict[str, Any]:
    """How good the probabilities are, before and after a bundle's calibration.

    Half of the studies are positive, as they were where the calibration was fitted: among patients
    of whom fewer are, probabilities are too high.

    Args:
        cases: Both studies of every pair, with calibrated probabilities.
        scaling: Of the bundle.
        seed: Of the bootstrap over patients.

    Returns:
        ``scaling``, and for ``before`` and ``after`` ``ece`` and ``brier`` with intervals, and the
        bins of `reliability`.
    """

    def said(chosen: Sequence[StudyCase], *, plain: bool) -> NDArray[np.float64]:
        calibrated = np.array([case.probability for case in chosen])
        return scaling.undone(calibrated) if plain else calibrated

    def truth(chosen: Sequence[StudyCase]) -> NDArray[np.bool_]:
        return np.array([case.positive for case in chosen])

    def errors(chosen: Sequence[StudyCase], *, plain: bool) -> dict[str, float]:
        return calibration_errors(said(chosen, plain=plain), truth(chosen))

    def measured(*, plain: bool) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        bins = reliability(said(cases, plain=plain), truth(cases))
        return {**with_intervals(cases, partial(errors, plain=plain), rng), "bins": bins}

    return {
        "scaling": asdict(scaling),
        "before": measured(plain=True),
        "after": measured(plain=False),
    }


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
