"""What a bundle said of synthetic studies, compared with the truth: numbers and their intervals.

Studies come in pairs, a patient with lesions and the same patient without. Intervals are 95 %
bootstrap intervals over patients: both studies of a pair are drawn together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from export.anatomies import ARRIVAL, FEET_FIRST, HEAD_FIRST, Anatomy, Largest

BOOTSTRAPS = 1000
SIZES_PX = (50, 150, 500, 10**9)  # lesion pixels of a plane, after what makes it positive
COMBINED = "all of these together"  # logistic regression, cross-validated over patients
FOLDS = 5
PEAKS = 3  # of a study, highest first


@dataclass(frozen=True, kw_only=True)
class SlabCase:
    """One slab: positive, or the same place in the patient without lesions, or negative.

    Attributes:
        position_mm: Of the middle plane.
        positive: Whether the middle plane shows enough of a lesion.
        at_lesion: Whether it is positive, or the twin of a positive slab.
        lesion_pixels: Lesion pixels of the middle plane (of the positive twin).
        probability: What the bundle says of the slab.
        peak: Highest value of the raw attention map.
        hit: Whether the attention peak lies within 10 mm of the lesion (of the positive twin);
            ``None`` elsewhere.
    """

    position_mm: float
    positive: bool
    at_lesion: bool
    lesion_pixels: int
    probability: float
    peak: float
    hit: bool | None


@dataclass(frozen=True, kw_only=True)
class StudyCase:
    """What the bundle said of one study, and what network-free scores say of it.

    Attributes:
        seed: Of the phantom.
        positive: Whether the study has lesions.
        probability: What the bundle said.
        called: Whether that reaches the threshold.
        threshold: Of the operating point.
        alerted: Whether a provisional alert was on at any time.
        largest_mm3: Volume of the largest lesion of the patient, in both studies of the pair.
        largest_place: Where it is.
        largest_kind: What it is.
        kinds: What all lesions of the patient are.
        seconds_after_last_slice: From the last slice to the result.
        gated_positives: Positive slabs that the gate kept from the network: no slab measure has
            them.
        slabs: Slabs with a label that passed the gate.
        trivial: Score name to score.
        conditions: How the patient was examined: name of a condition to its group.
        peaks: Highest values of the raw attention of a slab, the three highest ones of all slabs.
    """

    seed: int
    positive: bool
    probability: float
    called: bool
    threshold: float
    alerted: bool
    largest_mm3: float
    largest_place: str
    largest_kind: str
    kinds: list[str]
    seconds_after_last_slice: float
    gated_positives: int
    slabs: list[SlabCase] = field(default_factory=list)
    trivial: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)

    @property
    def largest(self) -> Largest:
        """The largest lesion of the patient."""
        return Largest(kind=self.largest_kind, place=self.largest_place, mm3=self.largest_mm3)


@dataclass(frozen=True, kw_only=True)
class RefusedPair:
    """A patient who is in no measure, since a study of theirs was not processed.

    Attributes:
        seed: Of the phantom.
        positive: Code of why the study with lesions was not processed; ``None`` if it was.
        negative: The same of the study without.
    """

    seed: int
    positive: str | None
    negative: str | None


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The patients of an evaluation.

    Attributes:
        studies: Both studies of those of whom both were processed.
        refused: The others.
    """

    studies: list[StudyCase] = field(default_factory=list)
    refused: list[RefusedPair] = field(default_factory=list)


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
        "alerted": _share([s.alerted for s in studies if s.positive]),
        "alerted_falsely": _share([s.alerted for s in studies if not s.positive]),
        "slab_auc": auc([s.positive for s in slabs], [s.probability for s in slabs]),
        "slab_peak_auc": auc([s.positive for s in slabs], [s.peak for s in slabs]),
        "peak_hit": _share(hits),
        "peak_control": _share(controls),
        "paired_order": _paired_order(studies, [s.probability for s in studies]),
        "highest_peak_auc": _auc_of_peaks(studies, 1),
        "three_peaks_auc": _auc_of_peaks(studies, PEAKS),
    }


def group_measures(studies: Sequence[StudyCase]) -> dict[str, float]:
    """Those of a group of patients: see `measures`."""
    hits = [s.hit for c in studies for s in c.slabs if s.positive and s.hit is not None]
    return {
        "auc": auc([s.positive for s in studies], [s.probability for s in studies]),
        "sensitivity": _share([s.called for s in studies if s.positive]),
        "peak_hit": _share(hits),
    }


def with_intervals(
    studies: Sequence[StudyCase],
    measure: Callable[[Sequence[StudyCase]], Mapping[str, float]],
    rng: np.random.Generator,
) -> dict[str, dict[str, Any]]:
    """Name to value and interval; what the studies do not define is left out.

    Args:
        studies: Both studies of every pair, at least one.
        measure: What to measure.
        rng: Of the bootstrap.
    """
    by_seed: dict[int, list[StudyCase]] = {}
    for study in studies:
        by_seed.setdefault(study.seed, []).append(study)
    pairs = list(by_seed.values())
    drawn: dict[str, list[float]] = {}
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(pairs), size=len(pairs))
        for name, value in measure([s for i in chosen for s in pairs[int(i)]]).items():
            drawn.setdefault(name, []).append(value)
    return {
        name: {
            "value": value,
            "interval": [float(q) for q in np.nanquantile(drawn[name], [0.025, 0.975])],
        }
        for name, value in measure(studies).items()
        if not math.isnan(value)
    }


def summary(studies: Sequence[StudyCase], anatomy: Anatomy, *, seed: int = 0) -> dict[str, Any]:
    """Measures with intervals, by lesion and by size in the plane, and of the trivial scores.

    Args:
        studies: Both studies of every pair.
        anatomy: Says how lesions are grouped.
        seed: Of the bootstrap.

    Returns:
        Values for JSON. Measures that the studies do not define are left out.
    """
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = dict(with_intervals(studies, measures, rng))
    result["positive_slabs"] = {
        "scored": sum(slab.positive for study in studies for slab in study.slabs),
        "gated": sum(study.gated_positives for study in studies),
    }
    result |= trivial_measures(studies)
    result["by_largest"] = {
        name: _by_group(studies, g.groups, [g.group_of(s.largest) for s in studies], rng)
        for name, g in anatomy.groupings.items()
    }
    groups = {name: condition.groups for name, condition in anatomy.conditions.items()}
    groups[ARRIVAL] = (FEET_FIRST, HEAD_FIRST)
    result["by_condition"] = {
        name: rows
        for name, names in groups.items()
        if (rows := _by_group(studies, names, [s.conditions.get(name) for s in studies], rng))
    }
    result["by_slab_size"] = _by_size(studies, anatomy.lesion_pixels)
    return result


def not_processed(refused: Sequence[RefusedPair]) -> dict[str, Any]:
    """How many patients are in no measure, and why, for JSON.

    Returns:
        ``patients``, how many of their ``positive`` and ``negative`` studies were not processed,
        and ``by_code`` the same three numbers of every reason, the most frequent first.
    """

    def counted(pairs: Sequence[tuple[bool, bool]]) -> dict[str, int]:
        return {
            "patients": sum(any(pair) for pair in pairs),
            "positive": sum(positive for positive, _ in pairs),
            "negative": sum(negative for _, negative in pairs),
        }

    codes = {code for pair in refused for code in (pair.positive, pair.negative) if code}
    rows = {
        code: counted([(pair.positive == code, pair.negative == code) for pair in refused])
        for code in sorted(codes)
    }
    return {
        **counted([(pair.positive is not None, pair.negative is not None) for pair in refused]),
        "by_code": dict(sorted(rows.items(), key=lambda row: -row[1]["patients"])),
    }


def reasons_text(counts: Mapping[str, Any]) -> str:
    """The reasons of `not_processed` in words."""
    return ", ".join(
        f"{code} {row['patients']} (studies with the finding {row['positive']}, without "
        f"{row['negative']})"
        for code, row in counts["by_code"].items()
    )


def trivial_measures(studies: Sequence[StudyCase]) -> dict[str, dict[str, float]]:
    """AUC and order within pairs of the scores that need no network.

    A single score is taken in the direction that suits it, so that it is never below 0.5. Within a
    pair everything but the lesions is equal: there even the mean of all voxels knows which study
    has them. ``paired_order`` of a bundle has to be read beside these.
    """
    truth = [s.positive for s in studies]
    aucs: dict[str, float] = {}
    orders: dict[str, float] = {}
    names = list(studies[0].trivial)
    for name in names:
        scores = [s.trivial[name] for s in studies]
        value, order = auc(truth, scores), _paired_order(studies, scores)
        aucs[name], orders[name] = max(value, 1.0 - value), max(order, 1.0 - order)
    folds = min(FOLDS, len({s.seed for s in studies}))
    if folds > 1:
        scores = cross_val_predict(
            make_pipeline(StandardScaler(), LogisticRegression()),
            [[s.trivial[name] for name in names] for s in studies],
            truth,
            groups=[s.seed for s in studies],
            cv=GroupKFold(folds),
            method="decision_function",
        ).tolist()
        aucs[COMBINED], orders[COMBINED] = auc(truth, scores), _paired_order(studies, scores)
    return {"trivial_auc": aucs, "trivial_paired_order": orders}


def _auc_of_peaks(studies: Sequence[StudyCase], count: int) -> float:
    """Study AUC of the mean of the highest attention peaks: of the first stage by itself."""
    if not all(s.peaks for s in studies):
        return math.nan
    scores = [float(np.mean(s.peaks[:count])) for s in studies]
    return auc([s.positive for s in studies], scores)


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else math.nan


def _paired_order(studies: Sequence[StudyCase], scores: Sequence[float]) -> float:
    """Share of patients whose study with lesions has the higher score; equal ones count half."""
    scored = list(zip(studies, scores, strict=True))
    positives = [(s.seed, v) for s, v in scored if s.positive]
    negatives = [(s.seed, v) for s, v in scored if not s.positive]
    orders: list[float] = []
    for (seed, high), (other, low) in zip(positives, negatives, strict=True):
        if seed != other:
            raise ValueError(f"studies of patients {seed} and {other} where a pair was expected")
        orders.append(float(high > low) + 0.5 * (high == low))
    return float(np.mean(orders))


def _by_group(
    studies: Sequence[StudyCase],
    groups: Sequence[str],
    group_of: Sequence[str | None],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Verdicts by group of patients; groups that nobody is in are left out."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        chosen = [s for s, own in zip(studies, group_of, strict=True) if own == group]
        if chosen:
            right = sum(s.called is s.positive for s in chosen)
            found = with_intervals(chosen, group_measures, rng)
            rows.append({"group": group, "studies": len(chosen), "verdicts_right": right, **found})
    return rows


def _by_size(studies: Sequence[StudyCase], least: int) -> list[dict[str, float | int]]:
    """Slabs by the lesion pixels of their middle plane, against their own twins."""
    rows: list[dict[str, float | int]] = []
    at_lesion = [slab for study in studies for slab in study.slabs if slab.at_lesion]
    for low, high in pairwise((least, *SIZES_PX)):
        slabs = [s for s in at_lesion if low <= s.lesion_pixels < high]
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
