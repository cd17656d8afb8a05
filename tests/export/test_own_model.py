"""docs/own-model.md does what it says: a foreign model, from its manifest alone, equals PyTorch."""

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pe_infer import Detector, preprocess
from pe_infer.bundle import Bundle
from pe_infer.bundle_check import self_test
from pe_infer.dicom import write_series
from pe_infer.engines.base import EngineOptions, select
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry

DOCUMENT = Path(__file__).parents[2] / "docs" / "own-model.md"


def chest(rng: np.random.Generator) -> list[Slice]:
    """60 slices of 2 mm: muscle with two lungs that grow towards the feet."""
    series = SeriesInfo(
        series_instance_uid="1.2.3", study_instance_uid="1.2", body_part_examined="CHEST"
    )
    slices = []
    for index in range(60):
        hu = rng.normal(40.0, 10.0, (80, 80))
        size = 30 - index // 4
        hu[20 : 20 + size, 8:32] = hu[20 : 20 + size, 48:72] = -850.0
        geometry = SliceGeometry(
            rows=80,
            cols=80,
            row_spacing_mm=4.0,
            col_spacing_mm=4.0,
            image_position_mm=(-160.0, -160.0, 2.0 * index),
        )
        slices.append(
            Slice(
                pixels=hu.round().astype(np.int16),
                geometry=geometry,
                series=series,
                sop_instance_uid=f"1.2.3.{index}",
            )
        )
    return slices


@pytest.fixture(scope="module")
def images() -> list[Slice]:
    """A study."""
    return chest(np.random.default_rng(0))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, images: list[Slice]) -> dict[str, Any]:
    """What the code of the page defines, run in a folder that holds a study."""
    folder = tmp_path_factory.mktemp("own")
    write_series(images, folder / "study")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "own_model"}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            for number, block in enumerate(blocks, start=1):
                exec(compile(block, f"{DOCUMENT.name}, block {number}", "exec"), namespace)  # noqa: S102
    namespace["folder"] = folder / "pneumothorax"
    namespace["printed"] = printed.getvalue()
    return namespace


def expected(names: dict[str, Any], images: list[Slice]) -> float:
    """The probability that the page's network gives in PyTorch."""
    grid = Bundle.load(names["folder"]).manifest.grid
    slabs = np.stack([slab.tensor for slab in preprocess.slabs(images, grid)])
    with torch.inference_mode():
        return float(torch.sigmoid(names["network"](torch.from_numpy(slabs))))


def test_the_page_ends_in_a_result(names: dict[str, Any], images: list[Slice]) -> None:
    result = names["result"]
    assert result.status == "processed"
    assert result.provenance.bundle == "pneumothorax"
    assert len(result.evidence) > 10
    assert str(result.probability) in names["printed"]
    assert result.probability == pytest.approx(expected(names, images), abs=0.01)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_foreign_model_computes_what_pytorch_computes(
    names: dict[str, Any], images: list[Slice], engine: str
) -> None:
    options = {"engine": engine, "precision": "float32", "cache_dir": None}
    with Detector(names["folder"], **options) as detector:
        for arrival in (images, images[::-1]):
            with detector.open() as stream:
                for image in arrival:
                    stream.push(image)
                result = stream.finish(timeout=60)
            assert result.probability == pytest.approx(expected(names, images), abs=1e-5)
        shorter = detector.detect(images[:30])
    assert shorter.probability == pytest.approx(expected(names, images[:30]), abs=1e-5)
    assert abs(expected(names, images) - expected(names, images[:30])) > 1e-4


def test_it_passes_its_own_self_test(names: dict[str, Any]) -> None:
    runtime = select("onnxruntime", EngineOptions(precision="float32"))
    found = self_test(Bundle.load(names["folder"]), runtime)
    assert found.passed
    assert set(found.deviations) == {"study_logit", "sides"}


def test_both_directions_count(names: dict[str, Any], images: list[Slice]) -> None:
    network, grid = names["network"], Bundle.load(names["folder"]).manifest.grid
    slabs = torch.from_numpy(np.stack([s.tensor for s in preprocess.slabs(images, grid)]))
    with torch.inference_mode():
        assert abs(float(network(slabs) - network(slabs.flip(0)))) > 1e-3
