"""Whether a study's images are fit for an answer: the checks that a bundle declares.

Every slab that passes the gate is measured in its middle plane, in HU on the patient grid, on the
host: the same bits from a CPU's and a GPU's planes. A study's value is a quantile of its planes'
values, so it depends neither on the order in which they came nor on how the slices were sent. The
formulas are those of `pe_infer.manifest.Level`, `Noise` and `Area`; quantiles are never
interpolated.
"""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import TISSUE_HU, Gate, PatientGrid
from pe_infer.manifest import Area, Check, Level, Noise, Region
from pe_infer.preprocess import PlaneMeasure
from pe_infer.result import CheckResult, Flag, QualityFlag

MIN_CELLS: Final = 8  # that count; a plane with fewer has no value

Plane: TypeAlias = NDArray[np.float32]
Outcome: TypeAlias = Literal["passed", "flagged", "refused"]


def plane_measure(checks: Sequence[Check], grid: PatientGrid) -> PlaneMeasure | None:
    """What measures one plane for all checks, in their order; ``None`` without any."""
    if not checks:
        return None
    measures = [check.measure for check in checks]
    sizes = {measure.cell_px for measure in measures if not isinstance(measure, Area)}

    def measure_plane(plane: Plane) -> tuple[float | None, ...]:
        cells = {size: _Cells.of(plane, size) for size in sizes}
        return tuple(
            _area(plane, measure, grid)
            if isinstance(measure, Area)
            else _of_cells(cells[measure.cell_px], measure, grid.gate)
            for measure in measures
        )

    return measure_plane


def assess(
    checks: Sequence[Check], measured: Sequence[tuple[float | None, ...]]
) -> tuple[CheckResult, ...]:
    """Compare a study with the limits of checks.

    Args:
        checks: The bundle's.
        measured: What `plane_measure` found, plane by plane in any order.
    """
    columns = ([plane[index] for plane in measured] for index in range(len(checks)))
    return tuple(
        _result(check, [value for value in column if value is not None])
        for check, column in zip(checks, columns, strict=True)
    )


def refused(results: Sequence[CheckResult]) -> CheckResult | None:
    """The first check that refuses the study, if any does."""
    return next((result for result in results if result.outcome == "refused"), None)


def quality_flags(
    checks: Sequence[Check], results: Sequence[CheckResult]
) -> dict[str, QualityFlag]:
    """A flag by name of the check for each that did not pass, refusals too."""
    named = {check.name: check for check in checks}
    return {
        result.name: _flag(named[result.name], result)
        for result in results
        if result.outcome != "passed"
    }


def _result(check: Check, values: Sequence[float]) -> CheckResult:
    value = _quantile(np.array(values), check.over) if values else None
    outcome, limit = _judged(check, value)
    return CheckResult(
        name=check.name,
        value=value,
        unit=check.unit,
        limit=limit,
        outcome=outcome,
        planes=len(values),
    )


def _judged(check: Check, value: float | None) -> tuple[Outcome, float | None]:
    """What follows from a value, and the limit that it has passed."""
    limits: tuple[tuple[Outcome, float | None, float | None], ...] = (
        ("refused", check.refuse_below, check.refuse_above),
        ("flagged", check.flag_below, check.flag_above),
    )
    for outcome, below, above in limits:
        if value is None:
            if below is not None or above is not None:
                return outcome, None
        elif below is not None and value < below:
            return outcome, below
        elif above is not None and value > above:
            return outcome, above
    return "passed", None


def _flag(check: Check, result: CheckResult) -> QualityFlag:
    name, remedy = check.name.replace("_", " "), f"; {check.remedy}" if check.remedy else ""
    values: dict[str, float | int | str] = {"check": check.name, "outcome": result.outcome}
    if result.value is None or result.limit is None:
        said = f"{name} cannot be measured in any plane"
    else:
        side = "at least" if result.value < result.limit else "at most"
        demanded = "needed" if result.outcome == "refused" else "expected"
        said = (
            f"{name} is {result.value:.4g} {check.unit}, {side} {result.limit:g} {check.unit} "
            f"{demanded}"
        )
        unit = check.unit.lower()
        values |= {f"value_{unit}": result.value, f"limit_{unit}": result.limit}
    return QualityFlag(
        flag=Flag.IMAGE_CHECK, message=f"{check.meaning} ({said}){remedy}", values=values
    )


class _Cells(NamedTuple):
    """(rows, cols) float32 each: mean and standard deviation of the pixels of every whole cell."""

    mean: Plane
    deviation: Plane

    @classmethod
    def of(cls, plane: Plane, size: int) -> "_Cells":
        """Cut up a plane into cells of ``size`` x ``size`` pixels."""
        rows, cols = (length // size for length in plane.shape)
        whole = plane[: rows * size, : cols * size]

        def mean(values: Plane) -> Plane:
            strips = values.reshape(rows, size, cols * size).sum(axis=1)
            total: Plane = strips.reshape(rows, cols, size).sum(axis=2)
            return total / np.float32(size * size)

        middle = mean(whole)
        variance = mean(whole * whole) - middle * middle
        return cls(middle, np.sqrt(np.maximum(variance, np.float32(0))))


def _of_cells(cells: _Cells, measure: Level | Noise, gate: Gate | None) -> float | None:
    counted = (cells.mean >= measure.low_hu) & (cells.mean <= measure.high_hu)
    values = cells.mean if isinstance(measure, Level) else cells.deviation
    if measure.region is not None and gate is not None:
        box = _box(cells.mean, measure.region, gate)
        if box is None:
            return None
        values, counted = values[box], counted[box]
    chosen = values[counted]
    return _quantile(chosen, measure.quantile) if len(chosen) >= MIN_CELLS else None


def _box(mean: Plane, region: Region, gate: Gate) -> tuple[slice, slice] | None:
    organ = (mean >= gate.low_hu) & (mean <= gate.high_hu) & _enclosed(mean >= TISSUE_HU)
    rows, cols = np.nonzero(organ)
    if len(rows) < MIN_CELLS:
        return None
    return (
        slice(int(_quantile(rows, region.front)), int(_quantile(rows, region.back)) + 1),
        slice(int(_quantile(cols, region.right)), int(_quantile(cols, region.left)) + 1),
    )


def _enclosed(tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where there is tissue to the left and right, in front and behind."""
    reach = np.logical_or.accumulate
    across = reach(tissue, axis=1) & reach(tissue[:, ::-1], axis=1)[:, ::-1]
    along = reach(tissue, axis=0) & reach(tissue[::-1], axis=0)[::-1]
    enclosed: NDArray[np.bool_] = across & along
    return enclosed


def _area(plane: Plane, measure: Area, grid: PatientGrid) -> float:
    return float(np.count_nonzero(plane >= measure.low_hu) * grid.spacing_mm**2)


def _quantile(values: NDArray[np.float32] | NDArray[np.int64], share: float) -> float:
    return float(np.sort(values)[int(share * (len(values) - 1))])
