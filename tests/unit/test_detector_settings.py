"""What a detector is made of: rules, operating points, engines, the cache folder."""

from pathlib import Path
from typing import Any

import pytest
from strategies import REGULAR, study
from toy_bundles import make, radnet_like

from pe_infer import (
    ConfigurationError,
    Detector,
)
from pe_infer.detector import default_cache_dir


def detector_of(folder: Path, **options: Any) -> Detector:
    return Detector(folder, precision="float32", cache_dir=None, **options)


def test_consecutive_rule_and_gates(tmp_path: Path) -> None:
    folder = make(tmp_path / "b", radnet_like)
    with detector_of(folder, engine="onnxruntime") as detector:
        result = detector.detect(study(REGULAR))
        probabilities = [e.probability for e in result.evidence]
        expected = max(min(probabilities[i : i + 3]) for i in range(len(probabilities) - 2))
        assert result.probability == pytest.approx(expected)


def test_unknown_operating_points_and_engines_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    with pytest.raises(ConfigurationError, match="'nope' is none of"):
        detector_of(folder, operating_point="nope")
    with pytest.raises(ConfigurationError, match="unknown"):
        detector_of(folder, engine="tensorflow")


def test_without_a_home_a_cache_folder_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ConfigurationError, match="cache_dir=None"):
        Detector(make(tmp_path / "b"), precision="float32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pe_infer"
