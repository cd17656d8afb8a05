"""The benchmark measures what it says, or ends."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pe_infer.engines.base import installed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"


@pytest.fixture(scope="module")
def latency() -> ModuleType:
    spec = importlib.util.spec_from_file_location("latency", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_study_of_another_length_is_refused(latency: ModuleType) -> None:
    latency.check_slices(300)
    with pytest.raises(SystemExit, match="gave 276 slices, the figures are for 300"):
        latency.check_slices(276)


@pytest.mark.parametrize(
    ("status", "slices", "slabs"),
    [("not_processed", 300, 58), ("processed", 299, 58), ("processed", 300, 57)],
)
def test_a_result_of_less_than_the_study_is_refused(
    latency: ModuleType, status: str, slices: int, slabs: int
) -> None:
    def result(status: str, slices: int, slabs: int) -> SimpleNamespace:
        coverage = SimpleNamespace(slices=slices, slabs=slabs - 10, gated_slabs=10)
        return SimpleNamespace(status=status, coverage=coverage)

    latency.check_slabs(result("processed", 300, 58), 58)
    with pytest.raises(SystemExit, match="the figures would say nothing"):
        latency.check_slabs(result(status, slices, slabs), 58)


def test_the_engine_asked_for_is_the_one_that_is_measured(latency: ModuleType) -> None:
    assert latency.engines("auto") == installed()
    assert latency.engines("onnxruntime") == ("onnxruntime",)


def test_a_cold_start_that_fails_says_why(
    latency: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="empty_cache: the new process ended with 1"):
        latency._cold_start("no-such-bundle", "auto", tmp_path, tmp_path / "cache")
    assert "no bundle 'no-such-bundle'" in capfd.readouterr().err
