"""``pe-infer bundles``."""

import json
from pathlib import Path

import pytest
import toy_bundles as toy
from typer.testing import CliRunner

from pe_infer import bundle as bundles
from pe_infer.cli.bundles_command import app
from pe_infer.engines.base import installed
from pe_infer.errors import BundleError, Code, ConfigurationError


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    toy.write_toy(folder / "toy")
    return folder


@pytest.fixture(autouse=True)
def shipped(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "SHIPPED", package)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_lists_what_is_shipped() -> None:
    output = invoke("list")
    assert "toy" in output
    assert "Pulmonary embolism" in output


def test_says_when_nothing_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "nothing")
    assert "no bundle" in invoke("list")


def test_shows_a_bundle(package: Path) -> None:
    output = invoke("show", "toy")
    for expected in ("SCT 59282003", "balanced 0.5 (default)", "scan down", "down or up", "never"):
        assert expected in output
    assert bundles.Bundle.load(package / "toy").sha256 in output


def test_what_is_piped_can_be_searched(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert bundles.Bundle.load(package / "toy").sha256 in invoke("show", "toy")


def test_says_that_a_bundle_must_be_trusted() -> None:
    assert "do not trust" in " ".join(invoke("--help").split())


def test_shows_the_manifest_as_json() -> None:
    assert json.loads(invoke("show", "toy", "--json"))["name"] == "toy"


def test_verifies_files(package: Path) -> None:
    assert "7 files intact" in invoke("verify", str(package / "toy"))


def test_verifies_on_every_engine_present() -> None:
    output = invoke("verify", "toy", "--run")
    for name in installed():
        assert name in output
    assert "passed" in output
    assert "FAILED" not in output


def test_verifies_on_one_engine() -> None:
    output = invoke("verify", "toy", "--run", "--engine", "onnxruntime")
    assert "onnxruntime" in output
    assert "openvino" not in output


def test_refuses_an_unknown_engine() -> None:
    with pytest.raises(ConfigurationError, match="'abacus'"):
        invoke("verify", "toy", "--run", "--engine", "abacus")


def test_an_engine_without_a_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--engine onnxruntime .* add --run"):
        invoke("verify", "toy", "--engine", "onnxruntime")


def test_a_bundle_that_misses_its_golden_outputs_fails(tmp_path: Path) -> None:
    document, files = toy.pe_like()
    document["golden"] = {"tolerance": {"float32": 1e-30, "reduced": 1e-30}}
    toy.build_bundle(tmp_path / "strict", document, files, toy.golden_slabs())
    with pytest.raises(BundleError, match="golden outputs are missed on openvino") as caught:
        invoke("verify", str(tmp_path / "strict"), "--run", "--engine", "openvino")
    assert caught.value.code == Code.BUNDLE_SELF_TEST
    assert caught.value.exit_code == 5


def test_an_altered_bundle_fails(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    (bundle.folder / "up.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"up\.onnx") as caught:
        invoke("verify", str(bundle.folder))
    assert caught.value.code == Code.BUNDLE_ALTERED
