"""A swapped code is a safety defect: every code is compared with the tables of pydicom."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import outcomes
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr import _concepts_dict
from pydicom.sr.codedict import codes as tables
from pydicom.sr.coding import Code

from pe_infer import bundle as bundles
from pe_infer.dicom.results import codes, write_results

OURS = {name: code for name, code in vars(codes).items() if isinstance(code, Code)}
LANGUAGE = ("en-US", "RFC5646")  # of the document, no concept


def meanings(scheme: str, value: str) -> set[str]:
    """What the tables of pydicom say of a value, without the remarks of SNOMED in brackets."""
    found = set()
    for entries in _concepts_dict.concepts[scheme].values():
        if isinstance(entries, dict):
            if value in entries:
                found.add(entries[value][0])
        elif entries[0] == value:
            found.add(entries[1])
    return found | {re.sub(r" \([a-z ]+\)$", "", meaning) for meaning in found}


def named(scheme: str, keyword: str) -> str:
    return str(getattr(getattr(tables, scheme), keyword).value)


@pytest.mark.parametrize("name", OURS)
def test_our_codes_are_those_of_the_standard(name: str) -> None:
    code = OURS[name]
    if code.scheme_designator == "UCUM":
        keyword = {"%": "Percent", "1": "NoUnits"}[code.value]
        assert getattr(tables.UCUM, keyword) == code
    else:
        assert code.meaning in meanings(code.scheme_designator, code.value)


def test_no_two_of_our_codes_are_the_same() -> None:
    assert len({(code.scheme_designator, code.value) for code in OURS.values()}) == len(OURS)


@pytest.mark.parametrize(
    ("code", "scheme", "keyword"),
    [
        (codes.PRESENT, "SCT", "Present"),
        (codes.ABSENT, "SCT", "Absent"),
        (codes.WITH_FINDINGS, "DCM", "AllAlgorithmsSucceededWithFindings"),
        (codes.WITHOUT_FINDINGS, "DCM", "AllAlgorithmsSucceededWithoutFindings"),
        (codes.NONE_SUCCEEDED, "DCM", "NoAlgorithmsSucceededWithoutFindings"),
        (codes.CERTAINTY, "DCM", "CertaintyOfFinding"),
        (codes.SALIENCY, "DCM", "Saliency"),
        (codes.BEST_ILLUSTRATION, "DCM", "BestIllustrationOfFinding"),
        (codes.PROCESSING_EQUIPMENT, "DCM", "ProcessingEquipment"),
        (codes.OF_INTEREST, "DCM", "OfInterest"),
    ],
)
def test_codes_that_decide_are_the_ones_of_their_keyword(
    code: Code, scheme: str, keyword: str
) -> None:
    assert code.value == named(scheme, keyword)


@pytest.mark.parametrize(
    ("name", "finding", "site"),
    [
        ("pe", "PulmonaryEmbolism", "PulmonaryArtery"),
        ("ich", "IntracranialHemorrhage", "Brain"),
    ],
)
def test_the_shipped_bundles_look_for_what_their_code_says(
    name: str, finding: str, site: str
) -> None:
    manifest = Path(bundles.__file__).parent / "bundles" / name / "bundle.json"
    looked_for = json.loads(manifest.read_text())["finding"]
    for concept, keyword in ((looked_for["code"], finding), (looked_for["site"], site)):
        assert concept["value"] == named("SCT", keyword)
        assert concept["scheme"] == "SCT"
        assert concept["meaning"] in meanings("SCT", concept["value"])


def coded(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                if "CodeMeaning" in item:
                    yield item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning
                yield from coded(item)


def test_every_code_in_every_object_is_that_of_the_standard(tmp_path: Path) -> None:
    sources = outcomes.write(tmp_path / "source")
    found = set()
    for number, outcome in enumerate((outcomes.result(), outcomes.unjudged(), outcomes.alert())):
        made = write_results(outcome, sources, tmp_path / str(number), made_at=outcomes.MADE_AT)
        for item in made:
            found |= set(coded(pydicom.dcmread(item.path)))
    assert {value for value, _, _ in found} >= {"59282003", "111012", "111242", "111245", "130404"}
    for value, scheme, meaning in found:
        if scheme != "UCUM" and (value, scheme) != LANGUAGE:
            assert meaning in meanings(scheme, value), (value, scheme, meaning)
