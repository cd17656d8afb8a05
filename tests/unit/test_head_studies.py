"""What a system over slices of a head needs: skull gate, thick slices, early updates."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import study
from toy_bundles import make, radnet_like

from pe_infer import Detector, Flag, ScopeError, SeriesError, Slice, StudyResult
from pe_infer.bundle import Bundle
from pe_infer.errors import BundleError
from pe_infer.program import Program

SKULL_HU, BRAIN_HU, LUNG_HU = 900, 40, -800
WINDOWS = [
    {"low_hu": 0, "high_hu": 80},
    {"low_hu": -20, "high_hu": 180},
    {"low_hu": -800, "high_hu": 2000},
]
SKULL = {"low_hu": 0, "high_hu": 100, "min_fraction": 0.1, "enclosed_by_hu": 150}
LUNG = {"low_hu": -950, "high_hu": -500, "min_fraction": 0.1}
GRID: dict[str, Any] = {
    "planes_per_slab": 1,
    "slab_step": 1,
    "pitch_um": 5000,
    "through_plane": "source",
    "windows": WINDOWS,
    "gate": SKULL,
}
ALERT = {"slab_probability": 0.0, "consecutive": 4}
THICK = [5000 * k + 1700 for k in range(32)]
THIN = [1250 * k for k in range(128)]


def bidirectional() -> tuple[dict[str, Any], dict[str, bytes]]:
    """The toy in both directions; what a slice says by itself is an output too."""
    document, files = radnet_like()
    document["outputs"] = {**document["outputs"], "online_logit": "own"}
    document["nodes"][0]["outputs"]["logit"] = "own"
    return document, files


def detector_of(folder: Path) -> Detector:
    return Detector(folder, engine="onnxruntime", precision="float32", cache_dir=None)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """A bundle for heads."""
    folder = make(
        tmp_path_factory.mktemp("heads") / "bundle",
        bidirectional,
        grid=GRID,
        scope={"body_part": ["HEAD", "BRAIN"]},
        min_slabs=10,
        provisional_alert=ALERT,
    )
    with detector_of(folder) as made:
        yield made


def painted(image: Slice, hu: np.ndarray, body_part: str | None) -> Slice:
    geometry = replace(
        image.geometry,
        row_spacing_mm=10.0,
        col_spacing_mm=10.0,
        image_position_mm=(-35.0, -35.0, image.position_um / 1000),
    )
    series = replace(image.series, body_part_examined=body_part)
    return replace(image, pixels=hu.astype(np.int16), geometry=geometry, series=series)


def head(
    positions_um: list[int], thickness_mm: float | None, body_part: str | None = "HEAD"
) -> list[Slice]:
    """Two slices of neck, then brain in a skull, then air."""
    images = []
    for index, image in enumerate(study(positions_um, thickness_mm=thickness_mm)):
        height = (image.position_um - positions_um[0]) / (positions_um[-1] - positions_um[0])
        hu = np.full((8, 8), -1000)
        if height < 0.06:
            hu[2:6, 2:6] = BRAIN_HU  # as muscle
            hu[4, 3:5] = SKULL_HU
        elif height < 0.9:
            hu[1:7, 1:7] = SKULL_HU
            hu[2:6, 2:6] = BRAIN_HU + np.random.default_rng(index).integers(-20, 40, (4, 4))
        images.append(painted(image, hu, body_part))
    return images


def chest(body_part: str | None = None) -> list[Slice]:
    """Muscle around lungs and heart, a vertebra."""
    hu = np.full((8, 8), BRAIN_HU)
    hu[2:5, 1:3] = hu[2:5, 5:7] = LUNG_HU
    hu[5:7, 3:5] = SKULL_HU
    return [painted(image, hu, body_part) for image in study(THICK, thickness_mm=5.0)]


def streamed(detector: Detector, images: list[Slice]) -> StudyResult:
    with detector.open() as stream:
        for image in images:
            stream.push(image)
        return stream.finish(timeout=60)


def test_thick_slices_are_kept_as_they_are(heads: Detector) -> None:
    result = heads.detect(head(THICK, 5.0))
    assert result.status == "processed"
    assert [round(e.position_mm * 1000) for e in result.evidence] == THICK
    gated = [e.gated for e in result.evidence]
    assert gated == [True] * 2 + [False] * 26 + [True] * 4
    for evidence, image in zip(result.evidence, head(THICK, 5.0), strict=True):
        assert evidence.sop_instance_uid == image.sop_instance_uid
        assert (evidence.attention is None) == evidence.gated


@pytest.mark.parametrize("thickness_mm", [1.25, None])
def test_thin_slices_are_brought_to_the_pitch(heads: Detector, thickness_mm: float | None) -> None:
    result = heads.detect(head(THIN, thickness_mm))
    assert result.status == "processed"
    assert [e.position_mm for e in result.evidence] == [5.0 * k for k in range(32)]


def test_a_mixed_series_is_brought_to_the_pitch(heads: Detector) -> None:
    lower, upper = [5000 * k + 700 for k in range(20)], [96_000 + 2500 * k for k in range(20)]
    images = head(lower + upper, 5.0)
    images[25:] = [
        replace(image, geometry=replace(image.geometry, thickness_mm=2.5)) for image in images[25:]
    ]
    for arrival in (images, images[::-1]):
        result = streamed(heads, arrival)
        assert all(e.position_mm % 5.0 == 0 for e in result.evidence)


@pytest.mark.parametrize(("positions_um", "thickness_mm"), [(THICK, 5.0), (THIN, 1.25)])
def test_any_order_of_arrival_gives_the_same(
    heads: Detector, positions_um: list[int], thickness_mm: float
) -> None:
    images = head(positions_um, thickness_mm)
    whole = heads.detect(images)
    shuffled = random.Random(0).sample(images, len(images))
    for arrival in (images, images[::-1], shuffled):
        result = streamed(heads, arrival)
        assert result.probability == pytest.approx(whole.probability, abs=1e-5)
        for one, other in zip(result.evidence, whole.evidence, strict=True):
            assert one.position_mm == other.position_mm
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_three_neighbours_decide(heads: Detector) -> None:
    result = heads.detect(head(THICK, 5.0))
    found = [e.probability for e in result.evidence if e.probability is not None]
    runs = [min(found[i : i + 3]) for i in range(len(found) - 2)]
    assert result.probability == pytest.approx(max(runs))


def test_updates_speak_of_the_slice_alone_and_the_result_of_the_whole(heads: Detector) -> None:
    images, updates = head(THICK, 5.0), []
    with heads.open() as stream:
        for image in images:
            updates += stream.push(image)
        result = stream.finish(timeout=60)
        updates += stream.updates()
    said = {u.position_mm: u.probability for u in updates}
    final = {e.position_mm: e.probability for e in result.evidence}
    assert said.keys() == final.keys()
    for evidence in result.evidence:
        assert (said[evidence.position_mm] is None) == evidence.gated
        if not evidence.gated:
            assert said[evidence.position_mm] != final[evidence.position_mm]
    alerts = [u.provisional_alert for u in updates]
    assert alerts.index(True) == 2 + 3  # two of neck, the fourth of brain
    assert alerts[5:] == [True] * (len(alerts) - 5)


def test_a_chest_is_refused_by_its_header_or_by_what_it_shows(heads: Detector) -> None:
    with pytest.raises(ScopeError, match="BodyPartExamined is 'CHEST'"):
        heads.detect(chest("CHEST"))
    result = heads.detect(chest())
    assert result.status == "not_processed"
    assert result.not_processed is not None
    assert result.not_processed.code == "gate.no_organ"
    assert result.positive is None
    assert Flag.SCOPE_UNCONFIRMED in {flag.flag for flag in result.quality}


def test_a_head_is_refused_where_lungs_are_wanted(tmp_path: Path) -> None:
    with detector_of(make(tmp_path / "bundle", grid={"gate": LUNG}, min_slabs=4)) as chests:
        with pytest.raises(ScopeError, match="BodyPartExamined is 'HEAD'"):
            chests.detect(head(THIN, 1.25))
        result = chests.detect(head(THIN, 1.25, body_part=None))
    assert result.status == "not_processed"


def test_a_few_slices_of_a_head_are_refused(heads: Detector) -> None:
    with pytest.raises(SeriesError, match="needs at least 10"):
        heads.detect(head(THICK, 5.0)[:9])
    short = head(THICK, 5.0)[:11]  # two of them of the neck
    assert heads.detect(short).status == "not_processed"


def test_an_alert_of_what_is_known_at_the_end_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="waits for the last slice"):
        make(tmp_path / "bundle", radnet_like, provisional_alert=ALERT)


def test_the_gate_of_the_manifest_is_the_body_unless_it_says_otherwise(tmp_path: Path) -> None:
    manifest = Bundle.load(make(tmp_path / "bundle", grid={"gate": LUNG})).manifest
    assert manifest.grid.gate is not None
    assert manifest.grid.gate.enclosed_by_hu == -200.0
    Program(manifest)
