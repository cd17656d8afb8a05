"""From what single studies gave to the numbers of a certificate."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from export.precision import Inside, Key, Measured, TensorSpreads
from export.spread import LARGEST_FLOAT32, Spread
from pe_infer.certificate import (
    FLOAT16_LARGEST,
    MARGIN,
    SCORE_BINS,
    Deviation,
    Flips,
    Growth,
    HalfRange,
    LogitError,
    TensorError,
)
from pe_infer.conclusion import slab_probability
from pe_infer.manifest import (
    ONLINE_LOGIT,
    SLAB_LOGIT,
    STUDY_LOGIT,
    ConsecutiveRule,
    Manifest,
    ReduceNode,
)

DIGITS = 4  # of every measured number that is stored


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What is kept of one study.

    Attributes:
        gated: By slab, ascending.
        logits: Output to the values of the float32 and of the float16 variant: one of the study,
            or one per slab that passed the gate, ascending.
        tensors: By node and tensor.
        inside: By node, where the study was looked at in detail.
        growth: By node, tensor and number of steps, where it was.
    """

    gated: list[bool]
    logits: dict[str, tuple[list[float], list[float]]]
    tensors: dict[Key, TensorSpreads]
    inside: dict[str, Inside] | None
    growth: dict[tuple[str, str, int], Spread] | None

    @classmethod
    def of(cls, measured: Measured, gated: Sequence[bool]) -> Self:
        """Take what is needed from a measurement."""
        exact, half = (
            {**outputs.slabs, **outputs.study} for outputs in (measured.exact, measured.half)
        )
        return cls(
            gated=list(gated),
            logits={
                name: (exact[name].reshape(-1).tolist(), half[name].reshape(-1).tolist())
                for name in (STUDY_LOGIT, SLAB_LOGIT, ONLINE_LOGIT)
                if name in exact
            },
            tensors=measured.tensors,
            inside=measured.details.inside if measured.details else None,
            growth=measured.details.growth if measured.details else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "gated": self.gated,
            "logits": self.logits,
            "tensors": [
                [
                    *key,
                    spreads.half_largest,
                    {name: getattr(spreads, name).to_json() for name in _SPREADS},
                ]
                for key, spreads in self.tensors.items()
            ],
            "inside": self.inside and {name: vars(found) for name, found in self.inside.items()},
            "growth": self.growth and [[*key, s.to_json()] for key, s in self.growth.items()],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        inside, growth = values["inside"], values["growth"]
        return cls(
            gated=values["gated"],
            logits={name: (exact, half) for name, (exact, half) in values["logits"].items()},
            tensors={
                (node, tensor): TensorSpreads(
                    half_largest=half_largest,
                    **{name: Spread.from_json(spread) for name, spread in spreads.items()},
                )
                for node, tensor, half_largest, spreads in values["tensors"]
            },
            inside=None if inside is None else {n: Inside(**found) for n, found in inside.items()},
            growth=None
            if growth is None
            else {(n, t, steps): Spread.from_json(s) for n, t, steps, s in growth},
        )


_SPREADS = ("magnitude", "own", "accumulated")


def summarise(studies: Iterable[StudyRecord], manifest: Manifest) -> dict[str, Any]:
    """All measured fields of a certificate.

    Args:
        studies: Of one bundle; taken one after the other, as the magnitudes of one are many.
        manifest: Of the bundle.
    """
    tensors: dict[Key, TensorSpreads] = {}
    growth: dict[tuple[str, str, int], Spread] = {}
    inside: dict[str, Inside] = {}
    records: list[StudyRecord] = []
    for record in studies:
        records.append(replace(record, tensors={}, growth=None))
        for key, found in record.tensors.items():
            total = tensors.setdefault(key, TensorSpreads())
            for name in _SPREADS:
                getattr(total, name).merge(getattr(found, name))
            total.half_largest = max(total.half_largest, found.half_largest)
        for place, spread in (record.growth or {}).items():
            growth.setdefault(place, Spread()).merge(spread)
        for node, part in (record.inside or {}).items():
            _merge(inside.setdefault(node, Inside()), part)
    scores = [[_score(manifest, record, variant) for record in records] for variant in (0, 1)]
    return {
        "studies": len(records),
        "slabs": sum(record.gated.count(False) for record in records),
        "inner_studies": sum(record.inside is not None for record in records),
        "errors": _errors(tensors, manifest),
        "growth": tuple(
            Growth(
                node=node,
                tensor=tensor,
                steps=steps,
                error=_deviation(spread, tensors[node, tensor].magnitude),
            )
            for (node, tensor, steps), spread in growth.items()
        ),
        "ranges": tuple(
            _range(node, found) for node, found in inside.items() if any(found.largest.values())
        ),
        "logits": _logit_errors(records),
        "largest_score_error": _rounded(max(map(_score_error, *scores))),
        "flips": tuple(
            _flips(point.name, point.threshold, *scores) for point in manifest.operating_points
        ),
        "study_scores": _histogram([score for score in scores[0] if score is not None]),
        "slab_scores": _histogram(
            [
                slab_probability(manifest, logit)
                for record in records
                for logit in record.logits.get(SLAB_LOGIT, ([], []))[0]
            ]
        ),
    }


def _errors(tensors: dict[Key, TensorSpreads], manifest: Manifest) -> tuple[TensorError, ...]:
    written = {
        (node.name, tensor): sequence
        for node in manifest.nodes
        if not isinstance(node, ReduceNode)
        for tensor, sequence in node.outputs.items()
    }
    return tuple(
        TensorError(
            node=node,
            tensor=tensor,
            sequence=written.get((node, tensor)),
            magnitude_p99=_rounded(found.magnitude.quantile(0.99)),
            magnitude_max=_rounded(max(found.magnitude.largest, found.half_largest)),
            own=_deviation(found.own, found.magnitude),
            accumulated=_deviation(found.accumulated, found.magnitude),
        )
        for (node, tensor), found in tensors.items()
    )


def _deviation(error: Spread, magnitude: Spread) -> Deviation:
    unit = magnitude.quantile(0.99) or magnitude.largest
    p99, largest = error.quantile(0.99), error.largest
    return Deviation(
        p99=_rounded(p99),
        max=_rounded(largest),
        relative_p99=_rounded(_ratio(p99, unit)),
        relative_max=_rounded(_ratio(largest, unit)),
    )


def _ratio(error: float, unit: float) -> float:
    if error == 0:
        return 0.0
    return min(error / unit, LARGEST_FLOAT32) if unit else LARGEST_FLOAT32


def _merge(total: Inside, part: Inside) -> None:
    for tensor, largest in part.largest.items():
        total.largest[tensor] = max(total.largest.get(tensor, 0.0), largest)
    total.values += part.values
    total.subnormal += part.subnormal


def _range(node: str, found: Inside) -> HalfRange:
    tensor = max(found.largest, key=lambda name: found.largest[name])
    return HalfRange(
        node=node,
        tensor=tensor,
        largest=_rounded(found.largest[tensor]),
        head_room=_rounded(FLOAT16_LARGEST / found.largest[tensor]),
        subnormal_share=_rounded(found.subnormal / found.values),
    )


def _logit_errors(records: Sequence[StudyRecord]) -> tuple[LogitError, ...]:
    errors: dict[str, list[float]] = {}
    for record in records:
        for output, (exact, half) in record.logits.items():
            errors.setdefault(output, []).extend(
                abs(a - b) if math.isfinite(a - b) else LARGEST_FLOAT32
                for a, b in zip(exact, half, strict=True)
            )
    return tuple(
        LogitError(
            output=output,
            count=len(found),
            p99=_rounded(float(np.quantile(found, 0.99, method="higher"))),
            max=_rounded(max(found)),
        )
        for output, found in errors.items()
    )


def _score(manifest: Manifest, record: StudyRecord, variant: int) -> float | None:
    """The study's probability; ``None`` where the product gives none."""
    if any(
        not math.isfinite(logit) for logits in record.logits.values() for logit in logits[variant]
    ):
        return None
    if isinstance(manifest.rule, ConsecutiveRule):
        logits = iter(record.logits[SLAB_LOGIT][variant])
        return manifest.rule.score(
            [None if gated else slab_probability(manifest, next(logits)) for gated in record.gated]
        )
    return manifest.calibration.probability(record.logits[STUDY_LOGIT][variant][0])


def _score_error(exact: float | None, half: float | None) -> float:
    if exact is None or half is None:
        return float(exact is not half)
    return abs(exact - half)


def _flips(
    name: str, threshold: float, exact: Sequence[float | None], half: Sequence[float | None]
) -> Flips:
    near = far = 0
    for before, after in zip(exact, half, strict=True):
        if before is None or after is None:
            far += before is not after
        elif (before >= threshold) != (after >= threshold):
            is_near = abs(before - threshold) <= MARGIN
            near, far = near + is_near, far + (not is_near)
    return Flips(operating_point=name, threshold=threshold, within=near, beyond=far)


def _histogram(scores: Sequence[float]) -> tuple[int, ...]:
    counts, _ = np.histogram(scores, bins=SCORE_BINS, range=(0.0, 1.0))
    return tuple(counts.tolist())


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
