"""What a bundle said of synthetic studies, compared with the truth: numbers and their intervals.

Studies come in pairs, a patient with emboli and the same patient without. Intervals are 95 %
bootstrap intervals over patients: both studies of a pair are drawn together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from export.datasets.labels import MIN_CLOT_PIXELS
from export.trivial import NAMES

BOOTSTRAPS = 1000
SIZES_PX = (MIN_CLOT_PIXELS, 50, 150, 500, 10**9)
COMBINED = "all of these together"  # logistic regression, cross-validated over patients
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class SlabCase:
    """One slab: positive, or the same place in the patient without emboli, or negative.

    Attributes:
        position_mm: Of the middle plane.
        positive: Whether the middle plane shows enough clot.
        at_clot: Whether it is positive, or the twin of a positive slab.
        clot_pixels: Clot pixels of the middle plane (of the positive twin).
        probability: Stage-1 probability.
        peak: Highest value of the raw attention map.
        hit: Whether the attention peak lies within 10 mm of the clot (of the positive twin);
            ``None`` elsewhere.
    """

    position_mm: float
    positive: bool
    at_clot: bool
    clot_pixels: int
    probability: float
    peak: float
    hit: bool | None


@dataclass(frozen=True, kw_only=True)
class StudyCase:
    """What the bundle said of one study, and what network-free scores say of it.

    Attributes:
        seed: Of the phantom.
        positive: Whether the study has emboli.
        probability: What the bundle said.
        called: Whether that reaches the threshold.
        threshold: Of the operating point.
        largest_mm3: Volume of the largest embolus of the patient, in both studies of the pair.
        largest_place: Its artery.
        seconds_after_last_slice: From the last slice to the result.
        gated_positives: Positive slabs that the gate kept from the network: no slab measure has
            them.
        slabs: Slabs with a label that passed the gate.
        trivial: Score name to score.
    """

    seed: int
    positive: bool
    probability: float
    called: bool
    threshold: float
    largest_mm3: float
    largest_place: str
    seconds_after_last_slice: float
    gated_positives: int
    slabs: list[SlabCase] = field(default_factory=list)
    trivial: dict[str, float] = field(default_factory=dict)


def auc(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """ROC AUC, by ranks (Mann-Whitney); not a number where only one class is there."""
    positive = np.asarray(truth, dtype=np.bool_)
    high = int(positive.sum())
    low = len(positive) - high
    if not high or not low:
        return math.nan
    ranks = rankdata(scores)  # equal scores share their mean rank
    return float((ranks[positive].sum() - high * (high + 1) / 2) / (high * low))


def measures(studies: Sequence[StudyCase]) -> dict[str, float]:
    """All numbers that get an interval; one that the studies do not define is not a number.

    Args:
        studies: Both studies of every pair, in one order; a pair may be there more than once.
    """
    slabs = [slab for study in studies for slab in study.slabs]
    hits = [s.hit for s in slabs if s.positive and s.hit is not None]
    controls = [s.hit for s in slabs if not s.positive and s.hit is not None]
    positives = [s.called for s in studies if s.positive]
    negatives = [s.called for s in studies if not s.positive]
    return {
        "study_auc": auc([s.positive for s in studies], [s.probability for s in studies]),
        "sensitivity": _share(positives),
        "specificity": 1.0 - _share(negatives),
        "slab_auc": auc([s.positive for s in slabs], [s.probability for s in slabs]),
        "slab_peak_auc": auc([s.positive for s in slabs], [s.peak for s in slabs]),
        "peak_hit": _share(hits),
        "peak_control": _share(controls),
        "paired_order": _paired_order(studies, [s.probability for s in studies]),
    }


def summary(studies: Sequence[StudyCase], *, seed: int = 0) -> dict[str, Any]:
    """Measures with intervals, by clot size and place, and of the trivial scores.

    Args:
        studies: Both studies of every pair.
        seed: Of the bootstrap.

    Returns:
        Values for JSON. Measures that the studies do not define are left out.
    """
    by_seed: dict[int, list[StudyCase]] = {}
    for study in studies:
        by_seed.setdefault(study.seed, []).append(study)
    pairs = list(by_seed.values())
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(pairs), size=len(pairs))
        for name, value in measures([s for i in chosen for s in pairs[int(i)]]).items():
            drawn.setdefault(name, []).append(value)
    result: dict[str, Any] = {
        name: {
            "value": value,
            "interval": [float(q) for q in np.nanquantile(drawn[name], [0.025, 0.975])],
        }
        for name, value in measures(studies).items()
        if not math.isnan(value)
    }
    result["positive_slabs"] = {
        "scored": sum(slab.positive for study in studies for slab in study.slabs),
        "gated": sum(study.gated_positives for study in studies),
    }
    result |= trivial_measures(studies)
    result["by_clot_size"] = _by_size(studies)
    result["by_place"] = _by_place(studies)
    return result


def trivial_measures(studies: Sequence[StudyCase]) -> dict[str, dict[str, float]]:
    """AUC and order within pairs of the scores that need no network.

    A single score is taken in the direction that suits it, so that it is never below 0.5. Within a
    pair everything but the emboli is equal: there even the mean of all voxels knows which study has
    them. ``paired_order`` of a bundle has to be read beside these.
    """
    truth = [s.positive for s in studies]
    aucs: dict[str, float] = {}
    orders: dict[str, float] = {}
    for name in NAMES:
        scores = [s.trivial[name] for s in studies]
        value, order = auc(truth, scores), _paired_order(studies, scores)
        aucs[name], orders[name] = max(value, 1.0 - value), max(order, 1.0 - order)
    folds = min(FOLDS, len({s.seed for s in studies}))
    if folds > 1:
        scores = cross_val_predict(
            make_pipeline(StandardScaler(), LogisticRegression()),
            [[s.trivial[name] for name in NAMES] for s in studies],
            truth,
            groups=[s.seed for s in studies],
            cv=GroupKFold(folds),
            method="decision_function",
        ).tolist()
        aucs[COMBINED], orders[COMBINED] = auc(truth, scores), _paired_order(studies, scores)
    return {"trivial_auc": aucs, "trivial_paired_order": orders}


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else math.nan


def _paired_order(studies: Sequence[StudyCase], scores: Sequence[float]) -> float:
    """Share of patients whose study with emboli has the higher score; equal ones count half."""
    scored = list(zip(studies, scores, strict=True))
    positives = [(s.seed, v) for s, v in scored if s.positive]
    negatives = [(s.seed, v) for s, v in scored if not s.positive]
    orders: list[float] = []
    for (seed, high), (other, low) in zip(positives, negatives, strict=True):
        if seed != other:
            raise ValueError(f"studies of patients {seed} and {other} where a pair was expected")
        orders.append(float(high > low) + 0.5 * (high == low))
    return float(np.mean(orders))


def _by_place(studies: Sequence[StudyCase]) -> list[dict[str, float | int | str]]:
    """Verdicts by the artery of the largest embolus of the patient."""
    rows: list[dict[str, float | int | str]] = []
    for name, wanted in (("lobar or larger", False), ("segmental or smaller", True)):
        chosen = [s for s in studies if ("segmental" in s.largest_place) is wanted]
        if chosen:
            rows.append(
                {
                    "place": name,
                    "studies": len(chosen),
                    "verdicts_right": sum(s.called is s.positive for s in chosen),
                    "auc": auc([s.positive for s in chosen], [s.probability for s in chosen]),
                    "sensitivity": _share([s.called for s in chosen if s.positive]),
                }
            )
    return rows


def _by_size(studies: Sequence[StudyCase]) -> list[dict[str, float | int]]:
    """Slabs by the clot pixels of their middle plane, against their own twins."""
    rows: list[dict[str, float | int]] = []
    at_clot = [slab for study in studies for slab in study.slabs if slab.at_clot]
    for low, high in pairwise(SIZES_PX):
        slabs = [s for s in at_clot if low <= s.clot_pixels < high]
        positives = [s for s in slabs if s.positive]
        twins = [s for s in slabs if not s.positive]
        if positives and twins:
            rows.append(
                {
                    "from_px": low,
                    "to_px": high,
                    "slabs": len(positives),
                    "auc_against_twins": auc(
                        [s.positive for s in slabs], [s.probability for s in slabs]
                    ),
                    "hit": _share([bool(s.hit) for s in positives]),
                    "control": _share([bool(s.hit) for s in twins]),
                }
            )
    return rows
