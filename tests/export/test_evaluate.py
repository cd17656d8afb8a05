"""A small bundle through its self-test and, by the public API, over a coarse phantom."""

import dataclasses
from pathlib import Path

import pytest

from export.evaluate import case_folder, run
from export.evaluation_plots import write_plots
from export.measures import summary
from export.trivial import NAMES
from pe_infer import Detector
from pe_infer.bundle_check import self_test
from pe_infer.engines.base import EngineOptions, select
from pe_infer.phantom.chest import DEFAULT, PhantomConfig

SEED = 5


@pytest.fixture(scope="module")
def coarse() -> PhantomConfig:
    """Few, coarse slices."""
    return dataclasses.replace(
        DEFAULT, matrix=96, pixel_spacing_mm=(4.0, 4.0), slice_spacing_mm=(5.0, 5.0)
    )


def test_a_pair_is_evaluated_and_remembered(
    bundle: Path, coarse: PhantomConfig, tmp_path: Path
) -> None:
    with Detector(bundle, cache_dir=None, warm_up=False) as detector:
        runtime = select("onnxruntime", EngineOptions(precision="float32"))
        assert self_test(detector.bundle, runtime).passed
        first = run(detector, [SEED], tmp_path, coarse, lambda seeds: seeds)
        again = run(detector, [SEED], tmp_path, coarse, lambda seeds: [s for s in seeds if s < 0])
        folder = tmp_path / case_folder(detector, coarse)
        assert (folder / "studies.jsonl").exists()
        assert case_folder(detector, DEFAULT) != folder.name  # other phantoms, other cases
    with Detector(bundle, cache_dir=None, warm_up=False, engine="onnxruntime") as other:
        assert case_folder(other, coarse) != folder.name
    assert [case.positive for case in first] == [True, False]
    assert again == first
    positive, negative = first
    places = [[slab.position_mm for slab in case.slabs if slab.at_clot] for case in first]
    assert places[0] == places[1]
    assert len(positive.slabs) == len(negative.slabs) > 5
    assert all((slab.hit is None) is not slab.at_clot for slab in positive.slabs)
    assert set(positive.trivial) == set(NAMES)
    found = summary(first)
    assert found["positive_slabs"]["scored"] == len(places[0])
    assert ("peak_hit" in found) is bool(places[0])
    write_plots(first, tmp_path)
    assert (tmp_path / "roc.png").stat().st_size > 1000
