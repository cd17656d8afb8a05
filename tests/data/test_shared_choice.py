"""Which bundle real studies ask for: of those that are shipped, and of both systems' settings."""

import tomllib
from pathlib import Path

import pytest

from pe_infer import ScopeError, choose_bundle
from pe_infer.choice import match, shipped_scopes
from pe_infer.dicom import open_series
from pe_infer.errors import Code
from pe_infer.manifest import Scope

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
CHESTS = {
    "chest_contrast": "ProtocolName '5.4 Chest/ Abd/ Pelvis*' says 'CHEST'",
    "chest_ctpa_lower": "ProtocolName '5.4 CT #131 CHEST PULMONARY EMBOLUS' says 'CHEST'",
}


def settings(name: str) -> Scope:
    scope = tomllib.loads((CONFIGS / f"{name}-bundle.toml").read_text(encoding="utf-8"))["scope"]
    return Scope(**{k: tuple(v) if isinstance(v, list) else v for k, v in scope.items()})


BOTH = {"pe": settings("pe"), "ich": settings("ich")}


def head_bundles() -> set[str]:
    return {name for name, scope in shipped_scopes().items() if "HEAD" in scope.body_part}


def test_a_real_head_asks_for_a_head_bundle_or_for_none_that_is_shipped(shared_data: Path) -> None:
    folder = shared_data / "head_tilted"
    if heads := head_bundles():
        choice = choose_bundle(folder)
        assert choice.bundle in heads
        assert choice.reason == "BodyPartExamined 'HEAD'"
        return
    with pytest.raises(ScopeError) as caught:
        choose_bundle(folder)
    assert caught.value.code is Code.OUT_OF_SCOPE
    for name in shipped_scopes():
        assert f"BodyPartExamined is 'HEAD', bundle {name!r} is for" in str(caught.value)


@pytest.mark.parametrize("name", CHESTS)
def test_a_real_chest_asks_for_the_chest_bundle_that_is_shipped(
    shared_data: Path, name: str
) -> None:
    choice = choose_bundle(shared_data / name)
    assert choice.bundle == "pe"
    assert CHESTS[name] in choice.reason  # neither states BodyPartExamined
    assert choice.bundle not in head_bundles()


def test_the_settings_of_both_systems_tell_real_studies_apart(shared_data: Path) -> None:
    info = open_series(shared_data / "head_tilted").info
    assert match(info, BOTH).bundle == "ich"
    for name in CHESTS:
        assert match(open_series(shared_data / name).info, BOTH).bundle == "pe"


def test_a_real_head_is_refused_where_there_are_chest_bundles_only(shared_data: Path) -> None:
    info = open_series(shared_data / "head_tilted").info
    with pytest.raises(ScopeError, match="bundle 'pe' is for"):
        match(info, {"pe": BOTH["pe"]})


@pytest.mark.parametrize("name", CHESTS)
def test_a_real_chest_asks_for_no_head_bundle(shared_data: Path, name: str) -> None:
    with pytest.raises(ScopeError) as caught:
        match(open_series(shared_data / name).info, {"ich": BOTH["ich"]})
    assert caught.value.code is Code.UNDECIDED_BUNDLE
