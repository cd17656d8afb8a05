"""The command line as a user runs it: output, JSON, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from strategies import REGULAR, body, study
from toy_bundles import make

from pe_infer.dicom import write_series
from pe_infer.geometry import Slice
from pe_infer.result import result_schema

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``pe-infer`` with its own cache folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pe_infer", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "PATH": "/usr/bin:/bin",
                "COLUMNS": "120",
            },
        )

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}
    return make(tmp_path_factory.mktemp("cli") / "bundle", grid={"gate": gate}, min_slabs=2)


def chest(images: list[Slice]) -> list[Slice]:
    return [replace(i, series=replace(i.series, body_part_examined="CHEST")) for i in images]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    write_series(chest(body(study(REGULAR), range(30_000, 70_001))), folder)
    return folder


def test_detect_prints_a_verdict(cli: Cli, bundle: Path, series: Path) -> None:
    done = cli("detect", series, "--bundle", bundle, "--engine", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "Pulmonary embolism: " in done.stdout
    assert "onnxruntime" in done.stdout
    assert "100/100 slices" in done.stdout  # plain lines where there is no terminal
    assert "\x1b" not in done.stdout


def test_detect_writes_json_and_nothing_else_to_standard_output(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    done = cli("detect", series, "--bundle", bundle, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, result_schema())
    done = cli("detect", series, "--bundle", bundle, "--json", tmp_path / "out.json")
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["probability"] == pytest.approx(document["probability"], abs=1e-5)
    assert "Pulmonary embolism" in done.stdout


def test_detect_streams_at_a_rate(cli: Cli, bundle: Path, series: Path) -> None:
    whole = json.loads(cli("detect", series, "--bundle", bundle, "--json", "-").stdout)
    done = cli("detect", series, "--bundle", bundle, "--json", "-", "--stream-rate", "2000")
    assert json.loads(done.stdout)["probability"] == pytest.approx(whole["probability"], abs=1e-5)


def test_detect_reports_what_was_not_processed(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    write_series(chest(body(study(REGULAR), range(0))), tmp_path)
    done = cli("detect", tmp_path, "--bundle", bundle)
    assert done.returncode == 10
    assert "NOT PROCESSED" in done.stdout
    assert "gate.no_organ" in done.stdout


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--engine", "tensorflow"]),
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--operating-point", "nope"]),
        (2, ["detect"]),
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--json", "{empty}/no/such/out.json"]),
        (3, ["detect", "{empty}", "--bundle", "{bundle}"]),
        (3, ["detect", "{series}", "--bundle", "{bundle}", "--series", "99"]),
        (3, ["inspect", "{empty}"]),
        (5, ["detect", "{series}", "--bundle", "no-such-bundle"]),
        (5, ["bundles", "verify", "{empty}"]),
    ],
)
def test_exit_codes(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path, code: int, arguments: list[str]
) -> None:
    places = {"series": series, "bundle": bundle, "empty": tmp_path}
    done = cli(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr or done.stdout


def test_a_study_outside_the_scope_is_refused(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    images = [
        replace(i, series=replace(i.series, body_part_examined="HEAD")) for i in study(REGULAR)
    ]
    write_series(images, tmp_path)
    done = cli("detect", tmp_path, "--bundle", bundle)
    assert done.returncode == 4
    assert "[scope.mismatch]" in done.stderr
    assert "HEAD" in done.stderr


def test_doctor_names_the_engines_and_their_versions(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0
    assert "openvino" in done.stdout
    assert "onnxruntime" in done.stdout
    facts = json.loads(cli("doctor", "--json").stdout)["facts"]
    assert facts["engine auto"] in {"openvino", "onnxruntime"}


def test_phantom_writes_dicom_and_truth(cli: Cli, tmp_path: Path) -> None:
    done = cli("phantom", tmp_path, "--seed", "3", "--slice-spacing", "5", "--positive")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "phantom-3-positive"
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["positive"]
    assert truth["emboli"]
    report = json.loads(cli("inspect", folder / "dicom", "--json").stdout)
    assert len(report["series"]) == 1


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("pe-infer ")
    assert "Exit status" in cli("--help").stdout
