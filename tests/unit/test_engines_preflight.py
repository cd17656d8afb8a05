"""``pe-infer doctor --engines``."""

import json
from pathlib import Path
from typing import Any

import engine_files as made_up
import pytest
from typer.testing import CliRunner, Result

from pe_infer.bundle import Bundle
from pe_infer.cli.app import app
from pe_infer.engine_folder import EngineFolder
from pe_infer.errors import Code, ConfigurationError, EngineError

FITTING = "sm=86,tensorrt-rtx=1.7"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    return made_up.write_made_up(tmp_path / "engines", bundle).folder


def doctor(*arguments: object) -> Result:
    texts = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, ["doctor", *texts])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report(*arguments: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(doctor(*arguments, "--json").output)
    return document


def test_engines_that_fit(folder: Path, bundle: Bundle) -> None:
    result = doctor("--engines", folder, "--machine", FITTING, "--bundle", bundle.folder)
    assert result.exit_code == 0
    assert "DOES NOT FIT" not in result.output
    for expected in ("as described", "8.6, 8.9", "tensorrt-rtx 1.7.1.116 on linux", "encoder"):
        assert expected in result.output


def test_engines_that_do_not_fit(folder: Path) -> None:
    result = doctor("--engines", folder, "--machine", "sm=87,tensorrt=10.3")
    assert result.exit_code == EngineError.exit_code
    assert "DOES NOT FIT" in result.output
    assert "the GPU has 8.7" in result.output
    assert "not compared" in result.output


def test_what_speaks_against_every_engine_is_said_once(folder: Path) -> None:
    entry = EngineFolder.open(folder).manifest.engines["down"]
    (folder / entry.file).write_bytes(b"short")
    output = doctor("--engines", folder, "--machine", "sm=87").output
    assert output.count("the GPU has 8.7") == 1
    (line,) = (line for line in output.splitlines() if "altered" in line)
    assert line.split()[0] == "down"


def test_the_report_is_json(folder: Path, bundle: Bundle) -> None:
    document = report("--engines", folder, "--machine", FITTING, "--bundle", bundle.folder)
    assert document["fits"] is True
    assert document["machine"]["compute_capability"] == "8.6"
    assert {engine["node"] for engine in document["engines"]} >= {"encoder", "down", "score"}
    assert all(engine["fits"] and not engine["reasons"] for engine in document["engines"])


def test_one_engine_that_is_not_whole(folder: Path) -> None:
    entry = EngineFolder.open(folder).manifest.engines["down"]
    (folder / entry.file).write_bytes(b"short")
    document = report("--engines", folder, "--machine", FITTING)
    verdicts = {engine["node"]: engine for engine in document["engines"]}
    assert document["fits"] is False
    assert "altered" in verdicts["down"]["reasons"][0]
    assert verdicts["encoder"]["fits"]


def test_engines_of_another_bundle(folder: Path, both_ways: Bundle) -> None:
    document = report("--engines", folder, "--machine", FITTING, "--bundle", both_ways.folder)
    verdicts = {engine["node"]: engine["reasons"] for engine in document["engines"]}
    assert any("no engine was built" in reason for reason in verdicts["forward"])
    assert any("no such node" in reason for reason in verdicts["down"])


def test_this_machine_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_infer.machine.device_capability", lambda: None)
    document = report("--engines", folder)
    assert document["machine"]["here"] is True
    assert "no NVIDIA GPU was found here" in document["engines"][0]["reasons"]


def test_a_folder_that_others_can_write_is_an_error(folder: Path) -> None:
    made_up.open_to_others(folder)
    with pytest.raises(EngineError) as caught:
        doctor("--engines", folder, "--machine", FITTING)
    assert caught.value.code == Code.ENGINE_UNTRUSTED


@pytest.mark.parametrize("arguments", [("--machine", FITTING), ("--bundle", "pe")])
def test_options_that_need_a_folder(arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="--engines"):
        doctor(*arguments)
