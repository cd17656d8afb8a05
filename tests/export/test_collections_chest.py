"""Readers of chests on made-up copies of their layouts, whole and damaged."""

from pathlib import Path

import numpy as np
import pytest
from chest_layouts import SIDE, clot_pixels, write_cad_pe, write_fumpe, write_rsna_pe
from scipy.io import savemat

from export.datasets.collections.base import Found, Fractions, IndexedStudy, unfollowed
from export.datasets.collections.gridded import to_grid
from export.datasets.collections.index import Index, split_studies
from export.datasets.collections.reading import RealStudy, read_study
from export.datasets.collections.registry import open_collection
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.geometry import Gate, PatientGrid, Window

GRID = PatientGrid(
    rows=SIDE,
    cols=SIDE,
    spacing_mm=6.0,
    pitch_um=2500,
    planes_per_slab=5,
    slab_step=2,
    windows=(Window(low_hu=-1024, high_hu=500),),
    gate=Gate(low_hu=-950, high_hu=-500, min_fraction=0.04),
)


def indexed(name: str, root: Path, workers: int = 1) -> Found:
    return open_collection(name).index(root, workers=workers, follow=unfollowed)


def reasons(found: Found) -> list[str]:
    return sorted(each.reason for each in found.left_out)


def read(name: str, root: Path, number: int = 0) -> tuple[IndexedStudy, RealStudy]:
    index: Index = split_studies(name, root, indexed(name, root), Fractions())
    study = index.entries[number].study
    return study, read_study(open_collection(name), study, root)


@pytest.fixture
def rsna(tmp_path: Path) -> Path:
    """Positive, negative and indeterminate; the first two are of one patient."""
    root = tmp_path / "rsna"
    studies = {"a1": [8, 9, 10], "b2": [], "c3": []}
    write_rsna_pe(root, studies, indeterminate=["c3"], patients={"a1": "p", "b2": "p"})
    return root


def edited(root: Path, old: str, new: str) -> Path:
    table = root / "train.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_studies_have_labels_of_their_images_and_indeterminate_ones_are_counted(
    rsna: Path, workers: int
) -> None:
    found = indexed("rsna-pe-2020", rsna, workers)
    assert [(s.study, s.patient, s.positive) for s in found.studies] == [
        ("a1/a15", "p", True),
        ("b2/b25", "p", False),
    ]
    first = found.studies[0]
    assert first.slices is not None
    assert [image for image, kinds in first.slices.items() if kinds] == [
        *("a10008", "a10009", "a10010")
    ]
    assert first.types["central"]
    assert not first.types["chronic"]
    assert first.files == ("train/a1/a15",)
    assert reasons(found) == ["indeterminate"]


def test_a_study_stands_for_a_patient_that_no_header_names(tmp_path: Path) -> None:
    write_rsna_pe(tmp_path / "r", {"a1": [], "b2": []}, slices=3)
    found = indexed("rsna-pe-2020", tmp_path / "r")
    assert [s.patient for s in found.studies] == ["a1", "b2"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a1,a15,a10003,0,0", "a1,a15,a10003,0,1"),  # of the study, in one row
        ("b2,b25,b20003,0,1", "b2,b25,b20003,1,1"),  # a negative study with a positive image
        ("b2,b25,b20003,0,1", "b2,b25,b20002,1,1"),  # one image, two labels
    ],
)
def test_a_study_that_contradicts_itself_is_left_out(rsna: Path, old: str, new: str) -> None:
    found = indexed("rsna-pe-2020", edited(rsna, old, new))
    assert "contradicting rows" in reasons(found)
    assert len(found.studies) == 1


def test_a_positive_study_without_a_positive_image_is_left_out(rsna: Path) -> None:
    for index in (8, 9, 10):
        (rsna / f"train/a1/a15/a1{index:04d}.dcm").unlink()
    found = indexed("rsna-pe-2020", rsna)
    assert [s.study for s in found.studies] == ["b2/b25"]
    assert reasons(found).count("no file") == 3
    assert "contradicting rows" in reasons(found)


def test_files_and_rows_that_belong_to_nothing_are_reported(rsna: Path) -> None:
    (rsna / "train/a1/a15/a10000.dcm").unlink()
    (rsna / "train/a1/a15/a10001.dcm").rename(rsna / "train/a1/a15/x1.dcm")
    found = indexed("rsna-pe-2020", rsna)
    assert reasons(found) == ["indeterminate", "no file", "no file", "no label"]
    assert len(found.studies[0].slices or {}) == 22


def test_a_header_of_another_study_and_a_damaged_one_leave_the_study_out(rsna: Path) -> None:
    (rsna / "train/a1/a15/a10000.dcm").write_bytes((rsna / "train/b2/b25/b20000.dcm").read_bytes())
    path = rsna / "train/b2/b25/b20000.dcm"
    path.write_bytes(path.read_bytes()[:-700])
    found = indexed("rsna-pe-2020", rsna)
    assert reasons(found) == ["another identity", "indeterminate", "truncated"]
    assert not found.studies


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a1,a15,a10003,0,", "a1,a15,a10003,2,", "expected 0 or 1"),
        ("a1,a15,a10003,0,", "../a1,a15,a10003,0,", "expected an identifier"),
        ("central_pe", "central", "'central_pe' is missing"),
    ],
)
def test_an_unknown_table_ends_the_command(rsna: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        indexed("rsna-pe-2020", edited(rsna, old, new))


def test_labels_of_images_reach_the_planes(rsna: Path) -> None:
    study, real = read("rsna-pe-2020", rsna)
    gridded = to_grid(real, study, GRID)
    assert gridded.labels is not None
    np.testing.assert_array_equal(np.flatnonzero(gridded.labels == 1), [8, 9, 10])
    assert (np.delete(gridded.labels, [8, 9, 10]) == 0).all()
    assert gridded.mask is None
    assert len(gridded.slab_planes) > 5


@pytest.mark.parametrize("downwards", [True, False])
def test_planes_of_a_matlab_mask_follow_the_names_of_files(tmp_path: Path, downwards: bool) -> None:
    write_fumpe(tmp_path / "f", {1: [3, 4, 5], 2: []}, downwards=downwards)
    found = indexed("fumpe", tmp_path / "f")
    assert [(s.study, s.positive) for s in found.studies] == [("PAT001", True), ("PAT002", False)]
    study, real = read("fumpe", tmp_path / "f")
    gridded = to_grid(real, study, GRID)
    assert gridded.mask is not None
    np.testing.assert_array_equal(np.flatnonzero(gridded.mask.any(axis=(1, 2))), [3, 4, 5])
    np.testing.assert_array_equal(gridded.mask[4], clot_pixels())
    assert (gridded.hu[4][gridded.mask[4]] == 50).all()


def test_masks_that_do_not_fit_their_series_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "f"
    write_fumpe(root, {n: [3] for n in range(1, 7)}, slices=12)
    truth = root / "GroundTruth"
    savemat(truth / "PAT001.mat", {"Mask": np.zeros((SIDE, SIDE, 11))})
    savemat(truth / "PAT002.mat", {"Other": np.zeros((SIDE, SIDE, 12))})
    (truth / "PAT003.mat").rename(truth / "PAT009.mat")
    (truth / "PAT004.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF")
    for number in range(1, 13):
        folder = root / "CT_scans/PAT005"
        (folder / f"D{number:04d}.dcm").rename(folder / f"D{number}.dcm")
    found = indexed("fumpe", root)
    assert reasons(found) == [
        *("mask of another shape", "no mask", "no scan", "order of files"),
        *("unreadable", "unreadable"),
    ]
    assert [s.study for s in found.studies] == ["PAT006"]
    assert "version 7.3" in " ".join(each.message for each in found.left_out)
    study, _ = read("fumpe", root)
    savemat(truth / "PAT006.mat", {"Mask": np.zeros((8, 8, 12))})
    with pytest.raises(InputError, match=r"planes of \(8, 8\) pixels"):
        read_study(open_collection("fumpe"), study, root)


@pytest.fixture
def cad_pe(tmp_path: Path) -> Path:
    """Two positive studies of either kind of name, and a negative one."""
    pytest.importorskip("SimpleITK", reason="NRRD needs SimpleITK: pip install -e '.[export]'")
    write_cad_pe(tmp_path / "c", {"001": [3, 4], "002": [], "e0032": [7]})
    return tmp_path / "c"


def test_nrrd_volumes_and_their_masks_are_found_by_number(cad_pe: Path) -> None:
    found = indexed("cad-pe", cad_pe)
    assert [(s.study, s.positive) for s in found.studies] == [
        *(("001", True), ("002", False), ("e0032", True))
    ]
    study, real = read("cad-pe", cad_pe)
    assert study.mask == "rs/0001RefStd.nrrd"
    assert real.slices[0].geometry.image_position_mm == pytest.approx((-93.0, -93.0, 100.0))
    gridded = to_grid(real, study, GRID)
    assert gridded.mask is not None
    np.testing.assert_array_equal(np.flatnonzero(gridded.mask.any(axis=(1, 2))), [3, 4])
    np.testing.assert_array_equal(gridded.mask[3], clot_pixels())
    assert (gridded.hu[3][gridded.mask[3]] == 50).all()


def test_nrrd_files_that_fit_nothing_are_reported(cad_pe: Path) -> None:
    (cad_pe / "rs/0002RefStd.nrrd").rename(cad_pe / "rs/0007RefStd.nrrd")
    (cad_pe / "images/e0032.nrrd").write_bytes(b"NRRD0004\ndamaged")
    (cad_pe / "images/copy of 1.nrrd").write_bytes(b"")
    (cad_pe / "images/1.nrrd").write_bytes(b"")
    found = indexed("cad-pe", cad_pe)
    assert reasons(found) == ["no mask", "no scan", "two of a number", "unknown name", "unreadable"]
    other = (cad_pe / "rs/e0032RefStd.nrrd").read_bytes()
    (cad_pe / "rs/0007RefStd.nrrd").write_bytes(other[:-900])
    assert "no scan" in reasons(indexed("cad-pe", cad_pe))


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    for name in ("rsna-pe-2020", "fumpe", "cad-pe"):
        with pytest.raises(ConfigurationError, match="--root"):
            indexed(name, tmp_path)
