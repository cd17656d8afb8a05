"""``pe-infer`` as a user runs it, with a bundle and a series: functions to make fixtures of."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from strategies import REGULAR, body, study
from toy_bundles import make

from pe_infer.dicom import write_series
from pe_infer.geometry import Slice

Cli = Callable[..., subprocess.CompletedProcess[str]]


def runner(tmp_path: Path) -> Cli:
    """Run ``pe-infer`` with its own cache folder; keywords are more environment variables."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
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
                **variables,
            },
        )

    return run


def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}
    return make(tmp_path_factory.mktemp("cli") / "bundle", grid={"gate": gate}, min_slabs=2)


def chest(images: list[Slice]) -> list[Slice]:
    return [replace(i, series=replace(i.series, body_part_examined="CHEST")) for i in images]


def chest_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 slices."""
    folder = tmp_path_factory.mktemp("series")
    write_series(chest(body(study(REGULAR), range(30_000, 70_001))), folder)
    return folder
