"""The gates of both systems on real studies: a head has no lungs, a chest no brain."""

from pathlib import Path

import pytest

from pe_infer import preprocess
from pe_infer.dicom import open_series
from pe_infer.geometry import Gate, PatientGrid, Window

BRAIN = PatientGrid(
    rows=256,
    cols=256,
    spacing_mm=1.0,
    pitch_um=5000,
    planes_per_slab=1,
    slab_step=1,
    windows=(Window(low_hu=0.0, high_hu=80.0),),
    gate=Gate(low_hu=0.0, high_hu=100.0, min_fraction=0.03, enclosed_by_hu=150.0),
    through_plane="source",
)
LUNGS = PatientGrid(
    rows=384,
    cols=384,
    spacing_mm=0.75,
    pitch_um=2500,
    planes_per_slab=5,
    slab_step=2,
    windows=(Window(low_hu=-1024.0, high_hu=500.0),),
    gate=Gate(low_hu=-950.0, high_hu=-500.0, min_fraction=0.04),
)
CHESTS = ("chest_contrast", "chest_ctpa_lower")


def passing(folder: Path, grid: PatientGrid) -> list[bool]:
    """Whether each slab passes the gate, from the feet on."""
    series = open_series(folder, None, prefer_contrast=True)
    slices = [image for reference in series.references for image in series.read(reference)]
    return [not slab.gated for slab in preprocess.slabs(slices, grid)]


def test_a_head_is_brain_from_the_skull_base_to_the_vertex(shared_data: Path) -> None:
    passed = passing(shared_data / "head_tilted", BRAIN)
    assert len(passed) == 28  # its own slices, of 4 and 7 mm
    assert passed == [False] * 4 + [True] * 22 + [False] * 2


def test_a_head_has_no_lungs(shared_data: Path) -> None:
    assert not any(passing(shared_data / "head_tilted", LUNGS))


@pytest.mark.parametrize("name", CHESTS)
def test_a_chest_has_lungs_and_no_brain(shared_data: Path, name: str) -> None:
    assert any(passing(shared_data / name, LUNGS))
    assert not any(passing(shared_data / name, BRAIN))
