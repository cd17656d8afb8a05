"""Steps, gaps, tilt and drift of a series, from the places of its slices alone."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_infer.geometry import SliceGeometry, Vector
from pe_infer.result import Flag
from pe_infer.series import CENTRE_DRIFT_MM, analyse


def place(
    position_mm: Vector,
    *,
    rows: int = 4,
    cols: int = 6,
    row_direction: Vector = (1.0, 0.0, 0.0),
    col_direction: Vector = (0.0, 1.0, 0.0),
) -> SliceGeometry:
    return SliceGeometry(
        rows=rows,
        cols=cols,
        row_spacing_mm=0.7,
        col_spacing_mm=0.7,
        image_position_mm=position_mm,
        row_direction=row_direction,
        col_direction=col_direction,
    )


def stack(heights_mm: Sequence[float]) -> list[SliceGeometry]:
    return [place((-100.0, -90.0, z)) for z in heights_mm]


def tilted(count: int, tilt_deg: float, step_mm: float = 2.5) -> list[SliceGeometry]:
    """Slices of a gantry tilted about the left-right axis, the table moving along the body."""
    c, s = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    return [
        place((-100.0, -90.0, i * step_mm / c), col_direction=(0.0, c, s)) for i in range(count)
    ]


def test_no_slices_measure_nothing() -> None:
    found = analyse([])
    assert (found.count, found.positions_um, found.steps_um, found.extent_um) == (0, (), (), 0)
    assert found.nominal_step_um is None
    assert found.quality_flags() == []


def test_one_slice_has_no_step_and_no_tilt() -> None:
    found = analyse(tilted(1, 20.0))
    assert found.nominal_step_um is None
    assert not found.irregular
    assert found.tilt_deg == 0.0
    assert found.straight
    assert found.parallel


def test_two_slices_have_one_regular_step_and_a_tilt() -> None:
    found = analyse(tilted(2, 20.0))
    assert found.nominal_step_um == 2500
    assert not found.irregular
    assert found.gaps == ()
    assert found.tilt_deg == pytest.approx(20.0, abs=0.05)
    assert found.drift_residual_mm == pytest.approx(0.0, abs=1e-6)


def test_regular_series_has_no_flags() -> None:
    found = analyse(stack([1.25 * i for i in range(20)]))
    assert found.nominal_step_um == 1250
    assert found.extent_um == 19 * 1250
    assert found.quality_flags() == []


def test_positions_written_with_one_decimal_are_regular() -> None:
    heights = [round(0.625 * i, 1) for i in range(30)]
    assert not analyse(stack(heights)).irregular


def test_missing_slices_are_counted_in_the_gap() -> None:
    heights = [2.0 * i for i in range(20) if i not in {7, 8}]
    found = analyse(stack(heights))
    assert [(g.lower_um, g.upper_um, g.missing) for g in found.gaps] == [(12000, 18000, 2)]
    assert found.gaps[0].step_um == 6000
    assert found.irregular
    assert found.irregular_steps == 1


def test_thicker_slices_are_no_gap_but_missing_ones_are() -> None:
    # 4 mm slices every 4 mm, then 7 mm slices every 7 mm, one of them missing.
    heights = [*range(0, 36, 4), *[32 + 7 * i for i in (1, 2, 4, 5)]]
    thick = [
        replace(place((-100.0, -90.0, float(z))), thickness_mm=4.0 if z <= 32 else 7.0)
        for z in heights
    ]
    found = analyse(thick)
    assert found.irregular
    assert [(g.lower_um, g.upper_um) for g in found.gaps] == [(46000, 60000)]


def test_irregular_steps_need_not_be_gaps() -> None:
    found = analyse(stack([0.0, 2.0, 4.0, 6.5, 8.5, 10.5]))
    assert found.irregular
    assert found.gaps == ()
    flag = found.quality_flags()[0]
    assert flag.flag is Flag.IRREGULAR_SPACING
    assert flag.values["max_step_mm"] == 2.5


def test_spacing_is_not_taken_from_the_first_two_slices() -> None:
    found = analyse(stack([0.0, 9.0, *[9.0 + 2.0 * i for i in range(1, 12)]]))
    assert found.nominal_step_um == 2000
    assert [g.lower_um for g in found.gaps] == [0]


def test_shared_positions_are_reported_and_make_no_zero_step() -> None:
    found = analyse(stack([0.0, 2.0, 2.0, 4.0]))
    assert found.count == 4
    assert found.positions_um == (0, 2000, 4000)
    assert found.shared_positions_um == (2000,)
    assert found.steps_um == (2000, 2000)


@pytest.mark.parametrize("tilt_deg", [-30.0, -18.5, 1.0, 12.0])
def test_gantry_tilt_is_measured_and_flagged(tilt_deg: float) -> None:
    found = analyse(tilted(30, tilt_deg))
    assert found.tilt_deg == pytest.approx(abs(tilt_deg), abs=0.02)
    assert found.drift_left_per_mm == pytest.approx(0.0, abs=1e-9)
    # A column that runs back and up: the centre of a higher slice lies further along it.
    assert found.drift_back_per_mm == pytest.approx(math.tan(math.radians(tilt_deg)), abs=1e-3)
    assert found.straight
    assert not found.irregular
    assert [f.flag for f in found.quality_flags()] == [Flag.GANTRY_TILT]


def test_tilt_of_half_a_degree_is_header_rounding() -> None:
    assert analyse(tilted(30, 0.4)).quality_flags() == []


def test_oblique_stack_without_drift_is_not_tilted() -> None:
    c, s = math.cos(math.radians(20.0)), math.sin(math.radians(20.0))
    # Moved along its own normal (0, -s, c): a reconstruction that already followed the tilt.
    oblique = [
        place((0.0, -s * 2.0 * i, c * 2.0 * i), col_direction=(0.0, c, s)) for i in range(10)
    ]
    assert analyse(oblique).tilt_deg == pytest.approx(0.0, abs=0.02)


def test_centre_that_jumps_is_not_straight() -> None:
    slices = stack([2.0 * i for i in range(20)])
    slices[9] = place((-97.0, -90.0, 18.0))
    found = analyse(slices)
    assert found.drift_residual_mm > 2.5
    assert not found.straight


def test_bent_line_is_not_straight() -> None:
    bent = [
        place((-100.0 + (0.0 if i < 10 else 1.0 * (i - 10)), -90.0, 2.0 * i)) for i in range(20)
    ]
    assert analyse(bent).drift_residual_mm > CENTRE_DRIFT_MM


def test_same_place_with_two_centres_is_not_straight() -> None:
    assert not analyse([place((0.0, 0.0, 5.0)), place((10.0, 0.0, 5.0))]).straight


def test_orientation_spread_is_measured() -> None:
    angle = math.radians(3.0)
    turned = place(
        (-100.0, -90.0, 2.0),
        row_direction=(math.cos(angle), math.sin(angle), 0.0),
        col_direction=(-math.sin(angle), math.cos(angle), 0.0),
    )
    found = analyse([place((-100.0, -90.0, 0.0)), turned])
    assert found.orientation_spread_deg == pytest.approx(1.5, abs=0.01)
    assert not found.parallel


def test_prone_and_transposed_images_measure_the_same() -> None:
    supine = analyse(tilted(12, 15.0))
    c, s = math.cos(math.radians(15.0)), math.sin(math.radians(15.0))
    # The same planes stored with both image axes turned round, and with rows and columns exchanged.
    corner = [g.image_position_mm for g in tilted(12, 15.0)]
    across, down = 5 * 0.7, 3 * 0.7
    turned = [
        place(
            (x + across, y + down * c, z + down * s),
            row_direction=(-1.0, 0.0, 0.0),
            col_direction=(0.0, -c, -s),
        )
        for x, y, z in corner
    ]
    exchanged = [
        place(p, rows=6, cols=4, row_direction=(0.0, c, s), col_direction=(1.0, 0.0, 0.0))
        for p in corner
    ]
    for other in (analyse(turned), analyse(exchanged)):
        assert other.positions_um == pytest.approx(supine.positions_um, abs=1)
        assert other.drift_back_per_mm == pytest.approx(supine.drift_back_per_mm, abs=1e-3)
        assert other.drift_left_per_mm == pytest.approx(0.0, abs=1e-9)


@given(
    st.lists(st.integers(-4000, 4000), max_size=25, unique=True),
    st.integers(0, 2**16),
    st.floats(-25.0, 25.0),
)
def test_order_of_arrival_does_not_matter(steps: list[int], seed: int, tilt_deg: float) -> None:
    c, s = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    slices = [place((0.0, 0.0, k / 10.0), col_direction=(0.0, c, s)) for k in steps]
    shuffled = list(slices)
    random.Random(seed).shuffle(shuffled)
    assert analyse(slices) == analyse(shuffled)


@pytest.mark.parametrize("turn_deg", [0.0, 4.0, -20.0, 44.0, 70.0, 170.0])
def test_a_rotation_that_is_not_undone_is_flagged(turn_deg: float) -> None:
    c, s = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))
    found = analyse(
        [
            place((0.0, 0.0, z), row_direction=(c, s, 0.0), col_direction=(-s, c, 0.0))
            for z in (0.0, 1.0, 2.0)
        ]
    )
    left = (turn_deg + 45) % 90 - 45  # quarter turns are undone
    assert found.rotation_deg == pytest.approx(left)
    flagged = Flag.IN_PLANE_ROTATION in {flag.flag for flag in found.quality_flags()}
    assert flagged == (abs(left) > 5)
