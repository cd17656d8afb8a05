"""``pe-infer detect --dicom-out``: the objects of a study that lies in a folder."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cli_runs
import pydicom
import pytest
from cli_runs import Cli, chest
from strategies import REGULAR, body, study

from pe_infer.dicom import write_series

ENGINE = ("--engine", "onnxruntime")
cli = pytest.fixture(cli_runs.runner)
bundle = pytest.fixture(scope="module")(cli_runs.toy_bundle)
series = pytest.fixture(scope="module")(cli_runs.chest_series)


@pytest.mark.parametrize("pace", [(), ("--stream-rate", "5000")])
def test_objects_are_written_beside_the_verdict(
    pace: tuple[str, ...], cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    out = tmp_path / "objects"
    done = cli("detect", series, "--bundle", bundle, *ENGINE, "--dicom-out", out, *pace)
    assert done.returncode == 0, done.stderr
    report = pydicom.dcmread(out / "report.dcm")
    source = pydicom.dcmread(series / "00001.dcm")
    assert report.StudyInstanceUID == source.StudyInstanceUID
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    assert len(evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 100
    told = done.stdout.replace("\n", "")
    assert f"DICOM objects in {out}: report.dcm" in told
    for path in out.iterdir():
        assert path.name in told


def test_json_on_standard_output_stays_alone(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    out = tmp_path / "objects"
    done = cli("detect", series, "--bundle", bundle, *ENGINE, "--dicom-out", out, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert "report.dcm" not in done.stdout
    assert "report.dcm" in done.stderr


def test_a_study_that_was_not_processed_has_a_report(
    cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    write_series(chest(body(study(REGULAR), range(0))), empty)
    out = tmp_path / "objects"
    done = cli("detect", empty, "--bundle", bundle, *ENGINE, "--dicom-out", out)
    assert done.returncode == 10, done.stderr
    assert [path.name for path in out.iterdir()] == ["report.dcm"]


def test_a_refused_study_has_no_objects(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    images = body(study(REGULAR), range(30_000, 70_001))
    headless = [replace(i, series=replace(i.series, body_part_examined="HEAD")) for i in images]
    write_series(headless, tmp_path / "head")
    out = tmp_path / "objects"
    done = cli("detect", tmp_path / "head", "--bundle", bundle, *ENGINE, "--dicom-out", out)
    assert done.returncode == 4
    assert not out.exists()


@pytest.mark.parametrize("kind", ["file", "full"])
def test_a_target_that_holds_files_is_refused_before_the_study_is_read(
    kind: str, cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "objects"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    done = cli("detect", tmp_path / "no such study", "--bundle", bundle, "--dicom-out", out)
    assert done.returncode == 2
    assert "--dicom-out" in done.stderr


def test_the_command_line_starts_without_highdicom() -> None:
    code = "import sys, pe_infer.cli, pe_infer.dicom; print('highdicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
