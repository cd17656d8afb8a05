"""Who judges a series."""

from dataclasses import replace
from typing import Any

import pytest

from pe_infer.errors import ConfigurationError
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope
from pe_infer.node.routing import Decision, Router
from pe_infer.node.settings import Routing

CHEST = SeriesInfo(
    modality="CT",
    body_part_examined="CHEST",
    protocol_name="Thorax_PE",
    series_description="Angio 1.0",
    study_description="CT Thorax",
    contrast_bolus_agent="Iomeron",
)
SCOPES = {
    "lung": Scope(modality=("CT",), body_part=("CHEST",), contrast="required"),
    "brain": Scope(modality=("CT",), body_part=("HEAD",), contrast="forbidden"),
    "/opt/own": Scope(modality=("CT",), body_part=("CHEST",), contrast="any"),
}


def decide(
    *rules: dict[str, Any],
    series: SeriesInfo = CHEST,
    thickness_mm: float | None = 1.0,
    **routing: Any,
) -> Decision:
    routing = {"bundles": ("lung", "brain"), **routing}
    router = Router(Routing.model_validate({"rules": rules, **routing}), SCOPES)
    return router.decide(series, thickness_mm=thickness_mm, calling_ae_title="CT_1")


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"modality": "ct"}, True),
        ({"modality": "MR"}, False),
        ({"body_part": "che*"}, True),
        ({"body_part": "head"}, False),
        ({"protocol": "*_pe"}, True),
        ({"protocol": "pe"}, False),
        ({"description": "angio*"}, True),
        ({"description": "ct thorax"}, True),
        ({"description": "thorax"}, False),
        ({"calling_ae_title": "ct_?"}, True),
        ({"calling_ae_title": "CT"}, False),
        ({"max_thickness_mm": 1.0}, True),
        ({"max_thickness_mm": 0.9}, False),
        ({"modality": "CT", "protocol": "*PE", "max_thickness_mm": 3}, True),
        ({"modality": "CT", "protocol": "*PE", "max_thickness_mm": 0.5}, False),
        ({}, True),
    ],
)
def test_a_rule_holds_if_all_that_it_names_does(condition: dict[str, Any], holds: bool) -> None:
    decision = decide({"bundle": "/opt/own", **condition})
    assert decision.bundle == ("/opt/own" if holds else "lung")


def test_a_thickness_that_is_not_said_holds_no_rule() -> None:
    assert decide({"bundle": "brain", "max_thickness_mm": 5}, thickness_mm=None).bundle == "lung"


def test_what_is_not_said_fits_the_pattern_for_anything_only() -> None:
    bare = replace(CHEST, protocol_name=None)
    assert decide({"bundle": "brain", "protocol": "*"}, series=bare).bundle == "brain"
    assert decide({"bundle": "brain", "protocol": "?*"}, series=bare).bundle == "lung"


def test_the_first_rule_decides_and_is_named() -> None:
    decision = decide(
        {"bundle": "lung", "modality": "MR"},
        {"bundle": "brain", "modality": "CT"},
        {"bundle": "ignore"},
    )
    assert decision == Decision(bundle="brain", reason="rule 2 of routing.rules: brain")
    assert decide({"bundle": "ignore"}).bundle is None


def test_without_a_rule_the_headers_choose_among_the_bundles_named() -> None:
    decision = decide()
    assert decision.bundle == "lung"
    assert "BodyPartExamined 'CHEST'" in decision.reason
    silent = decide(series=replace(CHEST, body_part_examined="KNEE"))
    assert silent.bundle is None
    assert silent.reason.startswith("scope.mismatch")
    unsaid = decide(series=SeriesInfo())
    assert unsaid.bundle is None
    assert unsaid.reason.startswith("scope.undecided")


def test_without_a_rule_nothing_is_judged_if_so_told() -> None:
    assert decide(otherwise="ignore").bundle is None


def test_without_bundles_named_only_shipped_ones_are_chosen() -> None:
    """A folder that a rule names is for that rule."""
    scopes = {"pe": SCOPES["lung"], "/opt/own": SCOPES["/opt/own"]}
    rule = {"bundle": "/opt/own", "calling_ae_title": "RESEARCH"}
    router = Router(Routing.model_validate({"rules": [rule]}), scopes)
    decision = router.decide(CHEST, thickness_mm=1.0, calling_ae_title="CT_1")
    assert decision.bundle == "pe"


@pytest.mark.parametrize("routing", [{"rules": [{"bundle": "typo"}]}, {"bundles": ["typo"]}])
def test_a_bundle_that_is_not_loaded_is_refused(routing: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="typo"):
        Router(Routing.model_validate(routing), SCOPES)
