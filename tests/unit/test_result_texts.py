"""How probabilities are written for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_infer.result import percent_text, probability_text, shown_percent, shown_probability

SURE = 1 - 2.0**-53


@pytest.mark.parametrize(
    ("probability", "text", "percent"),
    [
        (0.0, "0.000", "0.0 %"),
        (5e-324, "0.000001", "0.0001 %"),
        (0.0004, "0.0004", "0.04 %"),
        (0.0312, "0.031", "3.1 %"),
        (0.5, "0.500", "50.0 %"),
        (0.9714, "0.971", "97.1 %"),
        (0.9994, "0.999", "99.9 %"),
        (0.9996, "0.9996", "99.96 %"),
        (0.99999994, "0.999999", "99.9999 %"),
        (SURE, "0.999999", "99.9999 %"),
        (1.0, "1.000", "100.0 %"),
    ],
)
def test_probabilities_near_the_ends_have_more_decimals(
    probability: float, text: str, percent: str
) -> None:
    assert probability_text(probability) == text
    assert percent_text(probability) == percent


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 4))
def test_no_probability_is_written_as_certain(probability: float, decimals: int) -> None:
    assert 0 < float(probability_text(probability, decimals)) < 1
    assert 0 < shown_percent(probability) < 100
    assert abs(shown_probability(probability, decimals) - probability) <= 0.51 * 10**-decimals


@given(st.floats(0, 1))
def test_a_percentage_fits_a_decimal_string(probability: float) -> None:
    assert len(str(shown_percent(probability))) <= 16
