"""What the checks of the images measure, against plain loops, and what follows from a value."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pe_infer.checks import MIN_CELLS, assess, plane_measure, quality_flags, refused
from pe_infer.geometry import Gate, PatientGrid, Window
from pe_infer.manifest import Check
from pe_infer.result import Flag

GRID = PatientGrid(
    rows=80,
    cols=96,
    spacing_mm=2.0,
    pitch_um=5000,
    planes_per_slab=1,
    slab_step=1,
    windows=(Window(low_hu=-1000.0, high_hu=400.0),),
    gate=Gate(low_hu=-950.0, high_hu=-500.0, min_fraction=0.05),
)
LEVEL = {"kind": "level", "low_hu": -100.0, "high_hu": 300.0, "quantile": 0.5, "cell_px": 4}
NOISE = {**LEVEL, "kind": "noise"}
AREA = {"kind": "area", "low_hu": 1000.0}


def check(measure: dict[str, Any], **values: Any) -> Check:
    limits = values or {"refuse_below": 0.0}
    document = {"name": "a_check", "measure": measure, "over": 0.5, "meaning": "bad images"}
    return Check.model_validate({**document, **limits})


def value_of(plane: NDArray[np.float32], measure: dict[str, Any]) -> float | None:
    found = plane_measure([check(measure)], GRID)
    assert found is not None
    (value,) = found(plane)
    return value


def lower_quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.floor(share * (len(values) - 1))]


def tissue(hu: float = 50.0) -> NDArray[np.float32]:
    return np.full((GRID.rows, GRID.cols), hu, np.float32)


def chest(between: float, spine: float = 200.0) -> NDArray[np.float32]:
    """Two lungs in a body, something between them, and a spine behind that."""
    plane = tissue(-1000.0)
    plane[8:72, 8:88] = 40.0
    plane[16:64, 16:40] = plane[16:64, 56:80] = -800.0
    plane[16:40, 40:56] = between
    plane[40:72, 40:56] = spine
    return plane


planes = arrays.arrays(
    np.float32, (11, 14), elements=st.integers(-400, 600).map(lambda hu: hu / 2), fill=st.nothing()
)


@given(planes, st.floats(0, 1), st.sampled_from([1, 2]))
def test_level_and_noise_are_quantiles_over_cells(
    plane: NDArray[np.float32], share: float, size: int
) -> None:
    cells = [
        plane[r : r + size, c : c + size].astype(np.float64)
        for r in range(0, plane.shape[0] - size + 1, size)
        for c in range(0, plane.shape[1] - size + 1, size)
    ]
    counted = [cell for cell in cells if -100 <= cell.mean() <= 300]
    measure = {**LEVEL, "quantile": share, "cell_px": size}
    level, noise = value_of(plane, measure), value_of(plane, {**measure, "kind": "noise"})
    if len(counted) < MIN_CELLS:
        assert level is None
        assert noise is None
        return
    assert level == pytest.approx(lower_quantile([c.mean() for c in counted], share), abs=1e-3)
    assert noise == pytest.approx(lower_quantile([c.std() for c in counted], share), abs=0.05)


def test_area_counts_pixels_in_square_millimetres() -> None:
    plane = tissue()
    plane[3, 3:10] = 1000.0
    plane[4, 4] = 999.0
    assert value_of(plane, AREA) == 7 * 2.0**2


def test_a_region_lies_where_the_organ_is() -> None:
    region = {"right": 0.25, "left": 0.75, "front": 0.05, "back": 0.5}
    inside = {**LEVEL, "region": region}
    everywhere = {**LEVEL, "quantile": 1.0}
    assert value_of(chest(120.0), inside) == 120.0
    assert value_of(chest(120.0, spine=290.0), inside) == 120.0
    assert value_of(chest(40.0), inside) == 40.0
    assert value_of(chest(40.0), everywhere) == 200.0  # the spine


def test_air_around_the_body_is_no_organ() -> None:
    region = {"right": 0.25, "left": 0.75, "front": 0.05, "back": 0.5}
    plane = chest(120.0)
    plane[plane == -1000.0] = -900.0  # a blanket
    assert value_of(plane, {**LEVEL, "region": region}) == 120.0


def test_without_the_organ_a_region_has_no_value() -> None:
    assert value_of(tissue(), {**LEVEL, "region": {"back": 0.5}}) is None


def test_noise_is_not_that_of_edges() -> None:
    plane = chest(120.0)
    rng = np.random.default_rng(0)
    noisy = plane + rng.normal(0, 10, plane.shape).astype(np.float32)
    assert value_of(plane, {**NOISE, "quantile": 0.25}) == 0.0
    assert value_of(noisy, {**NOISE, "quantile": 0.25}) == pytest.approx(9, abs=1.5)


def test_the_level_does_not_grow_with_noise() -> None:
    rng = np.random.default_rng(0)
    region = {"right": 0.25, "left": 0.75, "front": 0.05, "back": 0.5}
    noisy = chest(40.0) + rng.normal(0, 60, (GRID.rows, GRID.cols)).astype(np.float32)
    wide = {**LEVEL, "low_hu": -200.0, "region": region}
    assert value_of(noisy, wide) == pytest.approx(40, abs=20)


LIMITS = {"refuse_below": 10.0, "flag_below": 20.0, "flag_above": 30.0, "refuse_above": 40.0}


@pytest.mark.parametrize(
    ("value", "outcome", "limit"),
    [
        (9.9, "refused", 10.0),
        (10.0, "flagged", 20.0),
        (19.9, "flagged", 20.0),
        (20.0, "passed", None),
        (30.0, "passed", None),
        (30.1, "flagged", 30.0),
        (40.0, "flagged", 30.0),
        (40.1, "refused", 40.0),
    ],
)
def test_what_follows_from_a_value(value: float, outcome: str, limit: float | None) -> None:
    checks = [check(AREA, **LIMITS)]
    (result,) = assess(checks, [(value,)])
    assert (result.outcome, result.limit, result.value) == (outcome, limit, value)
    assert result.unit == "mm2"
    flags = quality_flags(checks, [result])
    assert set(flags) == (set() if outcome == "passed" else {"a_check"})
    assert (refused([result]) is not None) == (outcome == "refused")


@given(st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1), st.randoms(), st.floats(0, 1))
def test_a_study_is_a_quantile_of_its_planes_in_any_order(
    values: list[float | None], shuffle: Any, over: float
) -> None:
    checks = [check(AREA, flag_above=1.0).model_copy(update={"over": over})]
    planes = [(value,) for value in values]
    (result,) = found = assess(checks, planes)
    shuffle.shuffle(planes)
    assert assess(checks, planes) == found
    known = [value for value in values if value is not None]
    assert result.planes == len(known)
    assert result.value == (lower_quantile(known, over) if known else None)


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        ({"refuse_below": 1.0}, "refused"),
        ({"refuse_above": 1.0, "flag_above": 0.0}, "refused"),
        ({"flag_above": 1.0}, "flagged"),
    ],
)
def test_what_cannot_be_measured_gets_the_worst_outcome(
    limits: dict[str, float], outcome: str
) -> None:
    checks = [check(LEVEL, **limits)]
    (result,) = found = assess(checks, [(None,), (None,)])
    assert (result.value, result.planes, result.outcome) == (None, 0, outcome)
    assert "cannot be measured" in quality_flags(checks, found)["a_check"].message


def test_a_flag_says_what_how_much_and_what_to_do() -> None:
    checks = [check(LEVEL, refuse_below=80.0, remedy="take the other series")]
    flag = quality_flags(checks, assess(checks, [(43.21,)]))["a_check"]
    assert flag.flag is Flag.IMAGE_CHECK
    assert flag.message == (
        "bad images (a check is 43.21 HU, at least 80 HU needed); take the other series"
    )
    assert flag.values == {
        "check": "a_check",
        "outcome": "refused",
        "value_hu": 43.21,
        "limit_hu": 80.0,
    }


def test_no_checks_measure_nothing() -> None:
    assert plane_measure([], GRID) is None
    assert assess([], [(), ()]) == ()
