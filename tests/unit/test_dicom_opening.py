"""Folders, files and data sets into one ordered series."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import ct_dataset, enhanced_dataset, save, save_series
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
)

from pe_infer.dicom import find_series, open_series
from pe_infer.errors import Code, ConfigurationError, DicomError, GeometryError, SeriesError
from pe_infer.result import Flag

POSITIONS = [0.0, 2.5, 5.0, 7.5]


def positions_of(folder: object, **options: object) -> list[float]:
    return [r.position_um / 1000 for r in open_series(folder, **options).references]


def test_folder_is_read_in_order_of_position(tmp_path: Path) -> None:
    save_series(tmp_path, [7.5, 0.0, 5.0, 2.5], PatientPosition="FFS")
    series = open_series(tmp_path)
    assert [r.geometry.image_position_mm[2] for r in series.references] == POSITIONS
    assert len(series) == 4
    assert series.flags == []
    assert series.info.patient_position == "FFS"
    assert series.summary.step_mm == 2.5
    up = [s.geometry.image_position_mm[2] for s in series.slices()]
    down = [s.geometry.image_position_mm[2] for s in series.slices(descending=True)]
    assert up == POSITIONS == down[::-1]


def test_trap_sorting_by_instance_number_or_whole_mm(tmp_path: Path) -> None:
    # InstanceNumber falls as z rises, and whole millimetres would make positions equal.
    heights = [0.9, 0.6, 0.3, 0.0, -0.3, -0.6]
    save_series(tmp_path, heights)
    series = open_series(tmp_path)
    assert [r.geometry.image_position_mm[2] for r in series.references] == heights[::-1]
    assert [r.header.instance_number for r in series.references] == [6, 5, 4, 3, 2, 1]


def test_files_datasets_and_paths_as_text(tmp_path: Path) -> None:
    paths = save_series(tmp_path, POSITIONS)
    datasets = [ct_dataset(z) for z in reversed(POSITIONS)]
    expected = positions_of(tmp_path)
    assert positions_of(paths) == expected
    assert positions_of(str(tmp_path)) == expected
    assert positions_of(iter(datasets)) == expected
    assert [s.pixels.shape for s in open_series(datasets).slices()] == [(8, 10)] * 4


def test_enhanced_file_is_a_series_by_itself(tmp_path: Path) -> None:
    path = save(enhanced_dataset([5.0, 0.0, 2.5]), tmp_path / "e.dcm")
    series = open_series(path)
    assert [r.frame_number for r in series.references] == [2, 3, 1]
    (lowest,) = series.read(series.references[0])
    assert lowest.frame_number == 2
    assert lowest.pixels[0, 0] == -999


def test_nothing_is_decoded_before_it_is_read(tmp_path: Path) -> None:
    paths = save_series(tmp_path, POSITIONS)
    series = open_series(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    series.read(series.references[0])
    with pytest.raises(DicomError, match=r"0002\.dcm") as caught:
        series.read(series.references[1])
    assert caught.value.code in {Code.UNDECODABLE_PIXELS, Code.MISSING_ATTRIBUTE}


def test_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    paths = save_series(tmp_path, POSITIONS)
    series = open_series(tmp_path)
    shutil.copy(paths[2], paths[1])
    with pytest.raises(DicomError, match="SOPInstanceUID"):
        series.read(series.references[1])


# --- what else lies in a folder


def test_other_files_are_skipped_counted_and_flagged(tmp_path: Path) -> None:
    save_series(tmp_path / "a" / "b", POSITIONS)
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "a" / "notes.txt").write_text("8" * 500)
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    shutil.copy(tmp_path / "a" / "b" / "0001.dcm", tmp_path / "a" / "._0001.dcm")
    hidden = tmp_path / ".cache"
    save_series(hidden, POSITIONS)
    series = open_series(tmp_path)
    assert len(series) == 4
    (flag,) = series.flags
    assert flag.flag is Flag.FILES_SKIPPED
    assert dict(flag.values) == {"hidden": 3, "not_dicom": 3}
    assert "3 not DICOM" in flag.message


def test_dicomdir_is_skipped(tmp_path: Path) -> None:
    save_series(tmp_path / "IMAGES", POSITIONS)
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = UID("2.25.4")
    directory.FileSetID = "TEST"
    save(directory, tmp_path / "DICOMDIR")
    series = open_series(tmp_path)
    assert len(series) == 4
    assert [dict(f.values) for f in series.flags] == [{"dicomdir": 1}]
    with pytest.raises(DicomError, match="Give the folder it lies in"):
        open_series(tmp_path / "DICOMDIR")


def test_links_that_form_a_loop_are_followed_once(tmp_path: Path) -> None:
    save_series(tmp_path / "a", POSITIONS)
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    series = open_series(tmp_path)
    assert len(series) == 4
    assert [dict(f.values) for f in series.flags] == [{"not_a_file": 1}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    os.mkfifo(tmp_path / "pipe")
    assert len(open_series(tmp_path)) == 4
    with pytest.raises(DicomError, match="no ordinary file"):
        open_series(tmp_path / "pipe")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="no DICOM image") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.NO_CT_SERIES


def test_folder_without_dicom_says_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SeriesError, match="1 not DICOM") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.NO_CT_SERIES


def test_paths_that_do_not_exist_and_empty_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        open_series(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="no files were given"):
        open_series([])
    for source in (5, [5], b"a", None):
        with pytest.raises(ConfigurationError, match="cannot read a"):
            open_series(source)  # type: ignore[arg-type]
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(ConfigurationError, match="does not exist"):
            open_series(name)


def test_file_named_by_the_caller_must_be_dicom(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    with pytest.raises(DicomError, match="not a DICOM file") as caught:
        open_series([*save_series(tmp_path / "s", POSITIONS), text])
    assert caught.value.code is Code.UNREADABLE_FILE


# --- refused instances


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient"])
def test_trap_slices_without_position_are_not_dropped_silently(
    keyword: str, tmp_path: Path
) -> None:
    save_series(tmp_path, POSITIONS)
    save(ct_dataset(10.0, **{keyword: None}), tmp_path / "bad.dcm")
    with pytest.raises(DicomError, match=r"bad\.dcm") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.MISSING_ATTRIBUTE
    (summary,) = find_series(tmp_path)
    assert [problem.code for problem in summary.problems] == [Code.MISSING_ATTRIBUTE]
    assert summary.refusal is None


@pytest.mark.parametrize("keyword", ["Modality", "SOPClassUID"])
def test_slices_that_do_not_say_what_they_are_are_not_set_aside(
    keyword: str, tmp_path: Path
) -> None:
    good = [ct_dataset(z) for z in POSITIONS]
    with pytest.raises(DicomError, match=keyword) as caught:
        open_series([*good, ct_dataset(10.0, **{keyword: None})])
    assert caught.value.code is Code.MISSING_ATTRIBUTE


def test_number_of_refused_instances_is_told(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    for name in ("bad1.dcm", "bad2.dcm"):
        save(ct_dataset(10.0, PixelSpacing=None), tmp_path / name)
    with pytest.raises(DicomError, match=r"bad1\.dcm.*2 of 6 instances"):
        open_series(tmp_path)


def test_trap_one_slice_of_another_orientation_is_not_dropped(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    save(ct_dataset(10.0, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), tmp_path / "cor.dcm")
    with pytest.raises(GeometryError, match=r"cor\.dcm"):
        open_series(tmp_path)


def test_damaged_dicom_file_in_the_folder_is_refused(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "0001.dcm").read_bytes()[:200])
    with pytest.raises(DicomError, match=r"cut\.dcm") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.UNREADABLE_FILE


def test_trap_localizer_in_the_same_series_is_left_out_and_flagged(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    scout = ct_dataset(
        0.0,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
    )
    save(scout, tmp_path / "scout.dcm")
    series = open_series(tmp_path)
    assert len(series) == 4
    assert [dict(f.values) for f in series.flags] == [{"other_kind": 1}]


def test_localizers_and_screen_shots_alone_are_no_series(tmp_path: Path) -> None:
    save(ct_dataset(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "a.dcm")
    save(
        ct_dataset(SOPClassUID=SecondaryCaptureImageStorage, SeriesInstanceUID="2.25.9"),
        tmp_path / "b.dcm",
    )
    with pytest.raises(SeriesError, match=r"localizer.*Secondary Capture") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.NO_CT_SERIES


def test_one_refused_file_gives_its_own_reason(tmp_path: Path) -> None:
    path = save(ct_dataset(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "a.dcm")
    with pytest.raises(DicomError, match="localizer") as caught:
        open_series(path)
    assert caught.value.code is Code.NOT_AXIAL_IMAGE


def test_coronal_series_is_not_usable(tmp_path: Path) -> None:
    save_series(tmp_path / "a", POSITIONS)
    save_series(
        tmp_path / "c",
        POSITIONS,
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
        SeriesInstanceUID="2.25.8",
        SeriesNumber=8,
    )
    series = open_series(tmp_path)
    assert series.summary.series_number == 3
    assert series.flags == []
    with pytest.raises(SeriesError, match="not along the body axis"):
        open_series(tmp_path, series=8)


# --- several series


def test_trap_several_reconstructions_in_one_study(tmp_path: Path) -> None:
    heights = [2.0 * i for i in range(30)]
    save_series(tmp_path / "thick", heights, SliceThickness=5)
    save_series(tmp_path / "thin", heights, SeriesInstanceUID="2.25.7", SeriesNumber=7)
    series = open_series(tmp_path)
    assert series.summary.series_number == 7
    (flag,) = series.flags
    assert flag.flag is Flag.SERIES_CHOSEN
    assert "at most 3 mm" in flag.message
    assert flag.values["candidates"] == 2
    named = open_series(tmp_path, series=3)
    assert named.summary.series_number == 3
    assert named.flags == []
    assert [s.series_number for s in find_series(tmp_path)] == [7, 3]


def test_equal_series_are_refused_with_the_list(tmp_path: Path) -> None:
    heights = [2.0 * i for i in range(30)]
    save_series(tmp_path / "a", heights, SeriesDescription="arterial")
    save_series(
        tmp_path / "b",
        heights,
        SeriesInstanceUID="2.25.7",
        SeriesNumber=7,
        SeriesDescription="venous",
    )
    with pytest.raises(SeriesError, match=r"arterial.*venous.*--series") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.AMBIGUOUS_SERIES
    assert open_series(tmp_path, series="2.25.7").info.series_description == "venous"


def test_series_of_another_frame_of_reference_is_not_split(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS)
    save(ct_dataset(10.0, FrameOfReferenceUID="2.25.6"), tmp_path / "other.dcm")
    series = open_series(tmp_path)  # for the sequencer to refuse
    assert len({r.header.series.frame_of_reference_uid for r in series.references}) == 2


def test_trap_same_instance_in_two_encodings_stays_in_the_series(tmp_path: Path) -> None:
    paths = save_series(tmp_path, POSITIONS)
    again = ct_dataset(0.0)
    again.SOPInstanceUID = open_series(paths[0]).references[0].sop_instance_uid
    again.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    save(again, tmp_path / "again.dcm")
    series = open_series(tmp_path)
    first, second = [
        s for s in series.slices() if s.position_um == series.references[0].position_um
    ]
    assert first.sop_instance_uid == second.sop_instance_uid
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_one_identity_of_images_in_different_places_is_refused(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS, SOPInstanceUID="2.25.77")
    with pytest.raises(SeriesError, match=r"2\.25\.77.*2\.500 and 0\.000 mm") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.CONFLICTING_DUPLICATE
    (summary,) = find_series(tmp_path)
    assert [problem.code for problem in summary.problems] == [Code.CONFLICTING_DUPLICATE]


def test_lossy_and_prone_are_flagged_once(tmp_path: Path) -> None:
    save_series(tmp_path, POSITIONS, LossyImageCompression="01", PatientPosition="HFP")
    flags = open_series(tmp_path).flags
    assert [f.flag for f in flags] == [Flag.LOSSY_COMPRESSION, Flag.PRONE]
    assert flags[0].values["images"] == 4
