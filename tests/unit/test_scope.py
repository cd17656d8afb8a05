"""What a series says of itself against what a bundle is for."""

import pytest

from pe_infer.errors import ScopeError
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope
from pe_infer.result import Flag
from pe_infer.scope import check_scope


def flags(scope: Scope, **said: str) -> list[Flag]:
    return [flag.flag for flag in check_scope(scope, SeriesInfo(**said), bundle="toy")]


@pytest.mark.parametrize("part", ["CHEST", "chest", "CHEST_ABDOMEN", "CHEST/ABDOMEN"])
def test_a_body_part_that_holds_an_accepted_one_is_in_scope(part: str) -> None:
    assert flags(Scope(body_part=("CHEST",)), body_part_examined=part) == []


def test_what_the_series_does_not_say_is_flagged() -> None:
    scope = Scope(body_part=("CHEST",), contrast="required")
    assert flags(scope) == [Flag.SCOPE_UNCONFIRMED]
    assert flags(scope, body_part_examined="CHEST") == [Flag.SCOPE_UNCONFIRMED]
    assert flags(scope, body_part_examined="CHEST", contrast_bolus_agent="Iohexol") == []


@pytest.mark.parametrize("agent", ["NONE", "no contrast", "Without", "N", "native"])
def test_a_native_series_is_refused_where_contrast_is_needed_and_only_there(agent: str) -> None:
    with pytest.raises(ScopeError, match="select the enhanced series"):
        flags(Scope(contrast="required"), contrast_bolus_agent=agent)
    assert flags(Scope(contrast="forbidden"), contrast_bolus_agent=agent) == []


def test_an_enhanced_series_is_refused_where_contrast_is_forbidden() -> None:
    with pytest.raises(ScopeError, match="select the native series"):
        flags(Scope(contrast="forbidden"), contrast_bolus_agent="OMNIPAQUE 350")
    assert flags(Scope(contrast="any"), contrast_bolus_agent="OMNIPAQUE 350") == []
    assert flags(Scope(contrast="forbidden"), contrast_bolus_agent=" ") == []


def test_another_modality_is_refused() -> None:
    with pytest.raises(ScopeError, match="Modality is 'MR'"):
        flags(Scope(), modality="MR")
