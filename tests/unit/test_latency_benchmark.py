"""The benchmark measures what it says, or ends."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import toy_bundles as toy
import typer
from strategies import study
from typer.testing import CliRunner

from pe_infer.bundle import Bundle, shipped
from pe_infer.engines.base import installed
from pe_infer.phantom import ANATOMIES, open_phantom

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"
HEADS: dict[str, Any] = {
    "scope": {"body_part": ["HEAD"]},
    "grid": {"planes_per_slab": 3, "slab_step": 1, "pitch_um": 5000, "through_plane": "source"},
}
FIGURES = {
    *("bundle_hash", "engine", "precision", "anatomy", "slices", "spacing_mm", "slabs"),
    *("gated_slabs", "slices_per_s", "streamed_down", "streamed_up", "all_at_the_end"),
    *("kernel", "folder", "cold_start"),
}


@pytest.fixture(scope="module")
def latency() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("latency", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "latency", module)  # where its dataclasses look for their types
        spec.loader.exec_module(module)
        yield module


def recipe(latency: ModuleType, slices: int, spacing_mm: float) -> Any:
    return latency.Recipe(
        anatomy="head", slices=slices, spacing_mm=spacing_mm, seed=1, cut_every_mm=spacing_mm
    )


def test_the_study_is_of_the_anatomy_that_a_bundle_accepts(
    latency: ModuleType, tmp_path: Path
) -> None:
    for kind, (anatomy, slices, spacing_mm, slices_per_s) in {
        "chest": ("chest", 300, 1.0, 30.0),
        "head": ("head", 40, 5.0, 6.0),
    }.items():
        folder = toy.make(tmp_path / kind, scope={"body_part": [anatomy.upper()]})
        found = latency.Recipe.of(Bundle.load(folder).manifest)
        assert (found.anatomy, found.slices, found.spacing_mm) == (anatomy, slices, spacing_mm)
        assert found.slices_per_s == slices_per_s


def test_every_anatomy_has_a_study(latency: ModuleType) -> None:
    assert latency.STUDIES.keys() == latency.PATIENTS.keys() == ANATOMIES.keys()


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_bundle_has_a_study(latency: ModuleType, name: str) -> None:
    manifest = Bundle.load(name).manifest
    found = latency.Recipe.of(manifest)
    assert found.anatomy.upper() in manifest.scope.body_part


def test_slices_are_laid_along_the_table(latency: ModuleType) -> None:
    cut = study([3200 * k + 700 for k in range(5)], thickness_mm=3.2)
    images = latency.laid(cut, 5.0)
    assert [image.position_um for image in images] == [5000 * k + 700 for k in range(5)]
    assert {image.geometry.thickness_mm for image in images} == {5.0}
    assert all(a.pixels is b.pixels for a, b in zip(images, cut, strict=True))


@pytest.mark.parametrize(
    ("positions_um", "said"),
    [
        (
            [5000 * k for k in range(39)],
            r"gave 39 slices, \[5.0\] mm apart, the figures are for 40",
        ),
        ([4900 * k for k in range(40)], r"gave 40 slices, \[4.9\] mm apart"),
        ([*range(0, 195_000, 5000), 196_000], r"\[5.0, 6.0\] mm apart"),
    ],
)
def test_another_study_is_refused(latency: ModuleType, positions_um: list[int], said: str) -> None:
    asked = recipe(latency, 40, 5.0)
    latency.check_study(study([5000 * k for k in range(40)]), asked)
    with pytest.raises(SystemExit, match=said):
        latency.check_study(study(positions_um), asked)


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

    measured = latency.Study(images=[None] * 300, slabs=58, slices_per_s=30.0)
    measured.check(result("processed", 300, 58))
    with pytest.raises(SystemExit, match="the figures would say nothing"):
        measured.check(result(status, slices, slabs))


def test_the_engine_asked_for_is_the_one_that_is_measured(latency: ModuleType) -> None:
    assert latency.engines("auto") == installed()
    assert latency.engines("onnxruntime") == ("onnxruntime",)


def test_a_cold_start_that_fails_says_why(
    latency: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="empty_cache: the new process ended with 1"):
        latency._cold_start("no-such-bundle", "auto", tmp_path, tmp_path / "cache")
    assert "no bundle 'no-such-bundle'" in capfd.readouterr().err


@dataclass(frozen=True)
class NoisyHead:
    """What the benchmark asks of a phantom, without the half minute that a patient takes."""

    spacing_um: int = 5000
    anatomy = "head"

    def with_spacing(self, spacing_mm: float) -> "NoisyHead":
        return NoisyHead(round(spacing_mm * 1000))

    def generate(self, seed: int, *, positive: bool) -> SimpleNamespace:
        assert positive
        series = open_phantom("head").series
        images = study([self.spacing_um * k for k in range(53)], seed=seed, size=64)
        return SimpleNamespace(slices=[replace(image, series=series) for image in images])


def test_every_bundle_is_measured_and_every_figure_written(
    latency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "phantom_for", lambda _: NoisyHead())
    monkeypatch.setattr(latency, "TABLE_MM_PER_S", 5000.0)
    names = [str(toy.make(tmp_path / name, toy.radnet_like, **HEADS)) for name in ("a", "b")]
    program = typer.Typer()
    program.command()(latency.main)
    command = ["--engine", "onnxruntime", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(
        program,
        [*command, *(part for name in names for part in ("--bundle", name))],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["asked_engine"] == "onnxruntime"
    assert list(found["bundles"]) == names
    for figures in found["bundles"].values():
        assert figures.keys() == FIGURES
        assert (figures["slices"], figures["spacing_mm"], figures["slabs"]) == (40, 5.0, 38)
        assert list(figures["folder"]) == ["onnxruntime"]
        assert list(figures["cold_start"]) == ["empty_cache", "filled_cache"]
        assert figures["streamed_down"]["last_slice_to_result_ms"] > 0
