"""What other people's programs say of our objects."""

import re
import shutil
import subprocess
from pathlib import Path

import outcomes
import pytest
from strategies import AXIAL_ORIENTATIONS

from pe_infer.dicom import Series, open_series
from pe_infer.dicom.results import ResultObject, write_results
from pe_infer.geometry import Vector
from pe_infer.result import CodedConcept, Finding, StudyResult

IOD = {
    "report": "Comprehensive3DSR",
    "key_image": "SCImage",
    "key_object_selection": "KeyObjectSelectionDocument",
    "attention": "ParametricMap",
}


def check(objects: list[ResultObject]) -> None:
    """Let dciodvfy look at objects: it knows their kind and finds no error."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (package dicom3tools)")
    for item in objects:
        done = subprocess.run(["dciodvfy", item.path], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert IOD[item.kind] in lines
        assert [line for line in lines if line.startswith("Error")] == []


def dump(item: ResultObject) -> str:
    """Let dsrdump read a document, without warnings of its own on UTF-8."""
    if shutil.which("dsrdump") is None:
        pytest.skip("dsrdump is not installed (package dcmtk)")
    command = ["dsrdump", "+Pl", "+Pu", "-Dv", item.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not re.search(r"^[EF]: ", done.stdout + done.stderr, re.MULTILINE)
    return done.stdout


sources = pytest.fixture(scope="module")(outcomes.made_sources)
written = pytest.fixture(scope="module")(outcomes.made_objects)


@pytest.mark.parametrize("name", outcomes.OUTCOMES)
def test_dciodvfy_finds_no_error(name: str, written: dict[str, list[ResultObject]]) -> None:
    check(written[name])


def test_dciodvfy_finds_no_error_in_later_versions(sources: list[Path], tmp_path: Path) -> None:
    at = outcomes.MADE_AT
    outcome = outcomes.result(positive=False)
    check(
        write_results(
            outcome, sources, tmp_path, version=3, made_at=at, supersedes=2, after_alert=1
        )
    )


@pytest.mark.parametrize(("row", "col"), AXIAL_ORIENTATIONS[3::2])
def test_dciodvfy_finds_no_error_whatever_the_orientation(
    row: Vector, col: Vector, tmp_path: Path
) -> None:
    images = outcomes.slices(row_direction=row, col_direction=col)
    files = outcomes.write(tmp_path / "source", images)
    result = outcomes.result(images)
    check(write_results(result, files, tmp_path / "objects", made_at=outcomes.MADE_AT))


def test_dciodvfy_finds_no_error_without_body_part_site_and_attention(tmp_path: Path) -> None:
    images = outcomes.renamed(outcomes.slices(), body_part_examined=None)
    files = outcomes.write(tmp_path / "source", images)
    code = CodedConcept(value="1386000", scheme="SCT", meaning="Intracranial hemorrhage")
    result = outcomes.result(images, attention=False, finding=Finding(code=code))
    check(write_results(result, files, tmp_path / "objects", made_at=outcomes.MADE_AT))


def test_dciodvfy_finds_no_error_for_a_body_part_of_a_pair(tmp_path: Path) -> None:
    images = outcomes.renamed(outcomes.slices(), body_part_examined="LUNG")
    files = outcomes.write(tmp_path / "source", images)
    result = outcomes.result(images)
    check(write_results(result, files, tmp_path / "objects", made_at=outcomes.MADE_AT))


def test_dciodvfy_finds_no_error_for_an_enhanced_image(tmp_path: Path) -> None:
    files, result = outcomes.multi_frame(tmp_path / "source")
    check(write_results(result, files, tmp_path / "objects", made_at=outcomes.MADE_AT))


def test_dsrdump_shows_finding_certainty_and_sources(
    written: dict[str, list[ResultObject]],
) -> None:
    text = dump(written["positive"][0])
    for line in (
        "Preliminary Flag    : FINAL",
        "Completion Flag     : COMPLETE",
        "Verification Flag   : UNVERIFIED",
        'CODE:(,,"Finding")=(59282003,SCT,"Pulmonary embolism")',
        'CODE:(,,"Finding Site")=(81040000,SCT,"Pulmonary artery")',
        'NUM:(,,"Certainty of Finding")="97.1" (%,UCUM,"Percent")',
        'CODE:(,,"Pulmonary embolism")=(52101004,SCT,"Present")',
        'TEXT:(,,"Algorithm Version")="1.2.0"',
        f'TEXT:(,,"Comment")="{outcomes.INTENDED_USE}"',
    ):
        assert line in text
    assert len(re.findall(r'IMAGE:\(,,"Source of Measurement"\)=\(CT image', text)) == 3
    assert len(re.findall(r"<contains IMAGE:=\(CT image", text)) == 12
    for number in range(1, 13):
        assert f'"{outcomes.SERIES}.{number}"' in text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("negative", 'CODE:(,,"Pulmonary embolism")=(272519000,SCT,"Absent")'),
        ("not_processed", '(111245,DCM,"No algorithms succeeded; without findings")'),
        ("unjudged", "slices are missing between 10.0 and 30.0 mm (series.gap)"),
        ("alert", "Preliminary Flag    : PRELIMINARY"),
    ],
)
def test_dsrdump_shows_what_the_other_reports_say(
    name: str, line: str, written: dict[str, list[ResultObject]]
) -> None:
    assert line in dump(written[name][0])


def test_dsrdump_shows_the_key_slices(written: dict[str, list[ResultObject]]) -> None:
    text = dump(written["positive"][4])
    assert 'CONTAINER:(,,"Of Interest")' in text
    found = re.findall(
        rf'"Best illustration of finding"\)=\(CT image,"({outcomes.SERIES}\.\d+)"', text
    )
    assert len(set(found)) == 3


def test_dcmdump_reads_every_object(written: dict[str, list[ResultObject]]) -> None:
    if shutil.which("dcmdump") is None:
        pytest.skip("dcmdump is not installed (package dcmtk)")
    for item in written["positive"]:
        done = subprocess.run(["dcmdump", item.path], capture_output=True, text=True, check=True)
        assert not re.search(r"^[WEF]: ", done.stdout + done.stderr, re.MULTILINE)


def result_on(series: Series) -> StudyResult:
    """A positive result that names some slices of a real series."""
    references = series.references
    base = outcomes.result()
    evidence = []
    for slab, reference in zip(
        base.evidence, references[:: max(1, len(references) // 12)], strict=False
    ):
        named = {"sop_instance_uid": reference.sop_instance_uid, "frame_number": None}
        evidence.append(slab.model_copy(update=named))
    uids = {
        "study_instance_uid": series.info.study_instance_uid,
        "series_instance_uid": series.info.series_instance_uid,
    }
    made = base.provenance.model_copy(update=uids)
    return base.model_copy(update={"evidence": tuple(evidence), "provenance": made})


@pytest.mark.parametrize("name", ["head_tilted", "chest_contrast", "chest_ctpa_lower"])
def test_dciodvfy_finds_no_error_for_real_series(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    series = open_series(shared_data / name)
    files = [r.instance.path for r in series.references if r.instance.path is not None]
    outcome = result_on(series)
    objects = write_results(outcome, files, tmp_path / "objects", made_at=outcomes.MADE_AT)
    assert len(objects) == 6
    check(objects)
