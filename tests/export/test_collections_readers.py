"""Readers of collections on made-up copies of their layouts, whole and damaged."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from collection_layouts import (
    PHYSIONET_COLUMNS,
    rsna_dataset,
    save,
    write_cq500,
    write_physionet,
    write_rsna,
    write_table,
)

from export.datasets.collections.base import Found, unfollowed
from export.datasets.collections.cq500 import says_contrast
from export.datasets.collections.registry import open_collection
from pe_infer import dicom
from pe_infer.errors import ConfigurationError, InputError


def indexed(name: str, root: Path, workers: int = 1) -> Found:
    return open_collection(name).index(root, workers=workers, follow=unfollowed)


def reasons(found: Found) -> list[str]:
    return sorted(each.reason for each in found.left_out)


@pytest.fixture
def rsna(tmp_path: Path) -> Path:
    """Two patients; the first has two studies, of which one bleeds in two slices."""
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a", "b"], "p2": ["c"]}, positive={"b": [1, 2]})
    return root


def table_of(rsna: Path) -> Path:
    return rsna / "stage_2_train.csv"


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_of_one_folder_become_studies_with_labels_of_their_slices(
    rsna: Path, workers: int
) -> None:
    found = indexed("rsna-ich-2019", rsna, workers)
    assert [s.study for s in found.studies] == ["ID_a/ID_as", "ID_b/ID_bs", "ID_c/ID_cs"]
    assert [s.patient for s in found.studies] == ["p1", "p1", "p2"]
    assert [s.positive for s in found.studies] == [False, True, False]
    bleeding = found.studies[1]
    assert bleeding.slices == {
        "ID_b0000": (),
        "ID_b0001": ("subdural",),
        "ID_b0002": ("subdural",),
        "ID_b0003": (),
    }
    assert bleeding.types["subdural"]
    assert not bleeding.types["epidural"]
    assert bleeding.files[0] == "stage_2_train/ID_b0000.dcm"
    assert not found.left_out


def test_rows_that_are_there_twice_count_once(rsna: Path) -> None:
    append(table_of(rsna), "ID_b0001_subdural,1", "ID_b0001_any,1")
    found = indexed("rsna-ich-2019", rsna)
    assert found.studies[1].positive
    assert reasons(found) == ["repeated row"]
    assert found.left_out[0].what == "2 rows"


def test_rows_that_contradict_each_other_take_the_label_away(rsna: Path) -> None:
    append(table_of(rsna), "ID_b0001_subdural,0")
    found = indexed("rsna-ich-2019", rsna)
    assert reasons(found) == ["contradicting rows", "no label", "repeated row"]
    assert "ID_b0001" not in (found.studies[1].slices or {})


def test_any_has_to_agree_with_the_types(rsna: Path) -> None:
    text = table_of(rsna).read_text().replace("ID_b0001_any,1", "ID_b0001_any,0")
    table_of(rsna).write_text(text)
    assert "contradicting rows" in reasons(indexed("rsna-ich-2019", rsna))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ID_b0001_contusion,1", "contusion"),
        ("ID_b0001_any,2", "expected 0 or 1"),
        ("b0001_any,1", "expected ID_"),
        ("ID_b0001_any", "1 columns"),
    ],
)
def test_an_unknown_label_names_file_row_and_remedy(rsna: Path, line: str, said: str) -> None:
    append(table_of(rsna), line)
    with pytest.raises(InputError, match=said) as caught:
        indexed("rsna-ich-2019", rsna)
    assert "stage_2_train.csv, row 74" in str(caught.value)
    assert "Unpack the table" in str(caught.value)


def test_missing_file_and_missing_label_are_reported_and_the_rest_is_used(rsna: Path) -> None:
    (rsna / "stage_2_train/ID_a0003.dcm").unlink()
    lines = [line for line in table_of(rsna).read_text().splitlines() if "ID_c0000" not in line]
    table_of(rsna).write_text("\n".join(lines))
    found = indexed("rsna-ich-2019", rsna)
    assert reasons(found) == ["no file", "no label"]
    assert [len(s.files) for s in found.studies] == [3, 4, 3]


def test_damaged_images_are_left_out_and_their_studies_stay(rsna: Path) -> None:
    folder = rsna / "stage_2_train"
    whole = (folder / "ID_a0000.dcm").read_bytes()
    (folder / "ID_a0000.dcm").write_bytes(whole[:-700])
    (folder / "ID_a0001.dcm").write_bytes(b"not DICOM")
    nameless = rsna_dataset("ID_a0002", 10.0, patient="", study="a")
    save(nameless, folder / "ID_a0002.dcm")
    stranger = rsna_dataset("ID_other", 15.0, patient="p1", study="a")
    save(stranger, folder / "ID_a0003.dcm")
    found = indexed("rsna-ich-2019", rsna)
    assert reasons(found) == ["another identity", "no identity", "truncated", "unreadable"]
    assert [s.study[:4] for s in found.studies] == ["ID_b", "ID_c"]
    assert all("ID_a000" in each.message for each in found.left_out)


def test_a_series_of_two_patients_is_left_out(rsna: Path) -> None:
    foreign = rsna_dataset("ID_a0003", 15.0, patient="p2", study="a")
    save(foreign, rsna / "stage_2_train/ID_a0003.dcm")
    found = indexed("rsna-ich-2019", rsna)
    assert reasons(found) == ["several patients"]
    assert len(found.studies) == 2


def test_values_modulo_4096_are_brought_back() -> None:
    dataset = rsna_dataset("ID_a0000", 0.0, patient="p", study="a")
    hu = np.frombuffer(dataset.PixelData, "<i2").copy()
    dataset.PixelData = (hu % 4096).astype("<u2").tobytes()
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
    reader = open_collection("rsna-ich-2019")
    assert reader.repair is not None
    reader.repair(dataset)
    image = dicom.convert(dataset).slices[0]
    values = image.host_pixels * image.rescale_slope + image.rescale_intercept
    np.testing.assert_array_equal(values.ravel(), hu)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for name in ("rsna-ich-2019", "cq500", "physionet-ct-ich"):
        with pytest.raises(ConfigurationError, match="--root"):
            indexed(name, tmp_path)
    with pytest.raises(ConfigurationError, match="none of"):
        open_collection("rsna")


def test_two_of_three_readers_decide_and_contrast_is_left_aside(tmp_path: Path) -> None:
    root = tmp_path / "cq500"
    write_cq500(root, {3: ["ICH SDH", "ICH SDH SAH", ""], 12: ["ICH", "", ""]})
    found = indexed("cq500", root)
    assert [(s.study, s.positive) for s in found.studies] == [
        ("CQ500-CT-3", True),
        ("CQ500-CT-12", False),
    ]
    first = found.studies[0]
    assert (first.types["subdural"], first.types["subarachnoid"]) == (True, False)
    assert first.files == ("CQ500CT3 CQ500CT3/Unknown Study/CT Plain",)
    assert first.slices is None
    assert not found.left_out


def test_archives_unpacked_into_folders_of_their_own_are_found(tmp_path: Path) -> None:
    root = tmp_path / "cq500"
    write_cq500(root, {3: ["", "", ""]})
    (root / "qct01").mkdir()
    (root / "CQ500CT3 CQ500CT3").rename(root / "qct01/CQ500CT3 CQ500CT3")
    assert len(indexed("cq500", root).studies) == 1


def test_studies_without_folder_row_or_plain_series_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "cq500"
    write_cq500(root, {n: ["", "", ""] for n in (1, 2, 3, 4, 5)})
    (root / "CQ500CT1 CQ500CT1").rename(root / "CQ500CT9 CQ500CT9")
    for path in (root / "CQ500CT2 CQ500CT2/Unknown Study/CT Plain").iterdir():
        path.unlink()
    lines = (root / "reads.csv").read_text().splitlines()
    (root / "reads.csv").write_text("\n".join([*lines, lines[3], lines[4].replace("B1,0", "B1,1")]))
    found = indexed("cq500", root)
    assert reasons(found) == [
        *("contradicting rows", "no folder", "no label", "no label"),
        *("no plain series", "repeated row", "repeated row"),
    ]
    assert [s.study for s in found.studies] == ["CQ500-CT-3", "CQ500-CT-5"]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("CT POST CONTRAST-2", True),
        ("CT C THIN", True),
        ("CT CECT THIN", True),
        ("CT PRE CONTRAST 5MM STD", False),
        ("CT Plain 3mm", False),
        ("CT 4cc sec 150cc D3D on", False),
    ],
)
def test_contrast_is_told_by_the_folder(folder: str, expected: bool) -> None:
    assert says_contrast(folder) is expected


def test_cq500_column_that_is_missing_or_not_a_vote_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "cq500"
    write_cq500(root, {1: ["", "", ""]})
    text = (root / "reads.csv").read_text()
    (root / "reads.csv").write_text(text.replace("R3:SAH", "R3:SAB"))
    with pytest.raises(InputError, match="'R3:SAH' is missing"):
        indexed("cq500", root)
    (root / "reads.csv").write_text(text.replace("B1,0", "B1,maybe"))
    with pytest.raises(InputError, match="row 2: column 'R1:ICH' is 'maybe'"):
        indexed("cq500", root)


@pytest.fixture
def physionet(tmp_path: Path) -> Path:
    """Patient 49 bleeds in slices 5 to 7, patient 50 does not."""
    pytest.importorskip("nibabel", reason="NIfTI needs nibabel: pip install -e '.[export]'")
    root = tmp_path / "physionet"
    write_physionet(root, {49: [5, 6, 7], 50: []})
    return root


def test_volumes_have_labels_by_number_and_masks(physionet: Path) -> None:
    found = indexed("physionet-ct-ich", physionet)
    assert [(s.study, s.positive) for s in found.studies] == [("049", True), ("050", False)]
    study = found.studies[0]
    assert study.slices is not None
    assert [n for n, kinds in study.slices.items() if kinds == ("intraparenchymal",)] == [
        *("5", "6", "7")
    ]
    assert (study.files, study.mask) == (("ct_scans/049.nii",), "masks/049.nii")
    assert not found.left_out


def test_damaged_volumes_are_reported(physionet: Path) -> None:
    import nibabel  # noqa: PLC0415

    rows = [[n, 1, 0, 0, 0, 0, 0, 1, 0] for n in (51, 52)]
    lines = (physionet / "hemorrhage_diagnosis_raw_ct.csv").read_text()
    write_table(physionet / "more.csv", PHYSIONET_COLUMNS, rows)
    more = (physionet / "more.csv").read_text().splitlines()[1:]
    beyond = "50,13,0,0,0,0,0,1,0"
    confused = "50,12,0,1,0,0,0,0,0"
    (physionet / "hemorrhage_diagnosis_raw_ct.csv").write_text(
        lines + "\n".join([*more, beyond, confused])
    )
    other = nibabel.Nifti1Image(np.zeros((8, 8, 12), np.int16), np.eye(4))
    nibabel.save(other, physionet / "masks/049.nii")
    (physionet / "ct_scans/052.nii").write_bytes(b"damaged")
    (physionet / "ct_scans/060.nii").write_bytes(b"nobody's")
    found = indexed("physionet-ct-ich", physionet)
    assert reasons(found) == [
        *("contradicting rows", "label without a slice", "mask of another shape"),
        *("no file", "no label", "unreadable"),
    ]
    assert [s.study for s in found.studies] == ["050"]
    assert "12" not in (found.studies[0].slices or {})


def test_a_study_without_mask_stays(physionet: Path) -> None:
    (physionet / "masks/049.nii").unlink()
    found = indexed("physionet-ct-ich", physionet)
    assert reasons(found) == ["no mask"]
    assert found.studies[0].mask is None


def test_dicom_written_as_the_collection_has_it_is_not_whole() -> None:
    dataset = rsna_dataset("ID_a0000", 0.0, patient="p", study="a")
    assert isinstance(dataset, pydicom.Dataset)
    with pytest.raises(InputError, match="SOPClassUID"):
        dicom.convert(dataset)
