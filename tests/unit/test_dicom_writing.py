"""Synthetic slices into valid CT images."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import enhanced_dataset
from pydicom.uid import UID

from pe_infer.dicom import open_series, slices_of, write_series
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry

INFO = SeriesInfo(
    series_instance_uid="2.25.20",
    study_instance_uid="2.25.10",
    frame_of_reference_uid="2.25.30",
    body_part_examined="CHEST",
    protocol_name="CTPA",
    series_description="phantom",
    contrast_bolus_agent="SYNTHETIC IODINE",
    patient_position="HFS",
    convolution_kernel="STANDARD",
    series_number=2,
)


def phantom(count: int = 4, *, dtype: type = np.int16, info: SeriesInfo = INFO) -> list[Slice]:
    rng = np.random.default_rng(3)
    return [
        Slice(
            pixels=rng.integers(0, 3000, (12, 16)).astype(dtype),
            geometry=SliceGeometry(
                rows=12,
                cols=16,
                row_spacing_mm=0.703125,
                col_spacing_mm=0.703125,
                image_position_mm=(-166.0123456789012, -171.2, 1.25 * number),
                row_direction=(1.0, 0.0, 0.0),
                col_direction=(0.0, 0.9483236552, -0.3173046564),
                thickness_mm=1.25,
            ),
            rescale_slope=1.0,
            rescale_intercept=-1024.0,
            padding=(0, 0) if dtype is np.uint16 else (-2000, -1990),
            series=info,
            sop_instance_uid=f"2.25.40{number}" if info.series_instance_uid else "",
            acquisition_number=1,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_written_slices_are_read_back(dtype: type, tmp_path: Path) -> None:
    slices = phantom(dtype=dtype)
    paths = write_series(slices[::-1], tmp_path / "study", patient_name="PHANTOM^SEED 7")
    assert [path.name for path in paths] == [f"{n:05d}.dcm" for n in range(1, 5)]
    series = open_series(tmp_path / "study")
    assert series.flags == []
    for expected, found in zip(slices, series.slices(), strict=True):
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        assert found.pixels.dtype == expected.pixels.dtype
        assert found.sop_instance_uid == expected.sop_instance_uid
        assert found.acquisition_number == 1
        assert (found.rescale_slope, found.rescale_intercept) == (1.0, -1024.0)
        assert found.padding == expected.padding
        assert found.geometry.position_um == expected.geometry.position_um
        assert found.geometry.thickness_mm == 1.25
        for axis in ("row_direction", "col_direction", "image_position_mm"):
            assert getattr(found.geometry, axis) == pytest.approx(
                getattr(expected.geometry, axis), abs=1e-8
            )
        assert found.series == replace(
            INFO, manufacturer="pe_infer phantom", study_description="Synthetic CT"
        )


def test_files_say_that_they_are_synthetic(tmp_path: Path) -> None:
    path = write_series(phantom(1), tmp_path, patient_name="PHANTOM^SEED 7", patient_id="P7")[0]
    dataset = pydicom.dcmread(path)
    assert dataset.PatientName == "PHANTOM^SEED 7"
    assert dataset.PatientID == "P7"
    assert "not of a patient" in dataset.ImageComments
    assert dataset.RescaleType == "HU"
    assert dataset.ImageType == ["ORIGINAL", "PRIMARY", "AXIAL"]


def test_missing_uids_depend_on_the_content_alone(tmp_path: Path) -> None:
    anonymous = phantom(info=SeriesInfo())
    first = write_series(anonymous, tmp_path / "a")
    second = write_series(anonymous, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    datasets = [pydicom.dcmread(path) for path in first]
    uids = {d.SOPInstanceUID for d in datasets}
    assert len(uids) == 4
    for uid in (*uids, datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID):
        assert uid.startswith("2.25.")
        assert UID(uid).is_valid
    other = write_series(phantom(3, info=SeriesInfo()), tmp_path / "c")
    assert pydicom.dcmread(other[0]).SeriesInstanceUID != datasets[0].SeriesInstanceUID


def test_frames_become_instances(tmp_path: Path) -> None:
    frames = slices_of(enhanced_dataset([0.0, 2.0]))
    paths = write_series(frames, tmp_path)
    assert len({pydicom.dcmread(path).SOPInstanceUID for path in paths}) == 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_series(phantom(), tmp_path)
    with pytest.raises(ConfigurationError, match="not overwritten"):
        write_series(phantom(), tmp_path)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigurationError, match="folder cannot be made"):
        write_series(phantom(), tmp_path / "file")


def test_no_slices_and_several_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no slices"):
        write_series([], tmp_path)
    other = [replace(s, series=SeriesInfo(series_instance_uid="2.25.9")) for s in phantom()]
    with pytest.raises(ConfigurationError, match="2 series"):
        write_series([*phantom(), *other], tmp_path)


def test_dcmdump_reads_what_is_written(tmp_path: Path) -> None:
    if shutil.which("dcmdump") is None:
        pytest.skip("dcmdump is not installed (package dcmtk)")
    path = write_series(phantom(), tmp_path, patient_name="PHANTOM^SEED 7")[0]
    done = subprocess.run(["dcmdump", path], capture_output=True, text=True, check=True)
    assert "PHANTOM^SEED 7" in done.stdout
    assert not re.search(r"^[WEF]: ", done.stdout + done.stderr, re.MULTILINE)


@pytest.mark.parametrize("info", [INFO, SeriesInfo()])
def test_dciodvfy_finds_no_error(info: SeriesInfo, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (package dicom3tools)")
    for dtype in (np.int16, np.uint16):
        path = write_series(phantom(1, dtype=dtype, info=info), tmp_path / dtype.__name__)[0]
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        report = done.stdout + done.stderr
        assert "CTImage" in report
        errors = [line for line in report.splitlines() if line.startswith("Error")]
        assert errors == []


def test_simpleitk_reads_what_is_written(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    upright = [
        replace(s, geometry=replace(s.geometry, col_direction=(0.0, 1.0, 0.0))) for s in phantom()
    ]
    paths = write_series(upright, tmp_path)
    image = sitk.ReadImage([str(path) for path in paths])
    expected = np.stack([s.pixels.astype(float) - 1024.0 for s in upright])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
    assert image.GetSpacing() == pytest.approx((0.703125, 0.703125, 1.25))
    assert image.GetOrigin() == pytest.approx(upright[0].geometry.image_position_mm)


def test_tilt_and_windows_are_written(tmp_path: Path) -> None:
    write_series(phantom(2), tmp_path, windows_hu=((40.0, 80.0), (80.0, 200.0)))
    dataset = pydicom.dcmread(tmp_path / "00001.dcm")
    assert float(dataset.GantryDetectorTilt) == pytest.approx(18.5, abs=0.01)
    assert list(dataset.WindowCenter) == [40, 80]
    assert list(dataset.WindowWidth) == [80, 200]


def test_a_level_gantry_has_no_tilt(tmp_path: Path) -> None:
    image = phantom(1)[0]
    level = replace(image, geometry=replace(image.geometry, col_direction=(0.0, 1.0, 0.0)))
    write_series([level], tmp_path)
    assert "GantryDetectorTilt" not in pydicom.dcmread(tmp_path / "00001.dcm")
