"""Real CT files: codecs, a tilted head, localizers, series. Not in this repository."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGExtended12Bit
from typer import Typer
from typer.testing import CliRunner

from pe_infer.cli.inspect_command import inspect_command
from pe_infer.dicom import convert, find_series, inspect, open_series, slices_of
from pe_infer.dicom.codestream import read_codestream
from pe_infer.dicom.layout import PixelLayout
from pe_infer.dicom.pixels import stored_values
from pe_infer.errors import Code, DicomError, InputError, SeriesError
from pe_infer.result import Flag

APP = Typer()
APP.command()(inspect_command)

LOSSLESS = [
    "CTImage.dcm",
    "CTImage.dcm_BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2.dcm",
    "CTImage.dcm_DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99.dcm",
    "CTImage.dcm_JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm",
    "CTImage.dcm_JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm",
    "CTImage.dcm_JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm",
    "CTImage.dcm_JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57.dcm",
    "CTImage.dcm_LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1.dcm",
    "CTImage.dcm_LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2.dcm",
    "CTImage.dcm_RLELosslessTransferSyntax_1.2.840.10008.1.2.5.dcm",
]
LOSSY = {
    "CTImage.dcm_JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm": 1,
    "CTImage.dcm_JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm": 5,
}
BASELINE = "CTImage.dcm_JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm"
EXTENDED = "CTImage.dcm_JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm"
RETIRED = [
    "CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm",
    "CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm",
]
REFUSED = {
    "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": Code.NOT_AXIAL_IMAGE,  # a perfusion map
    "no-pixel-data.dcm": Code.NOT_CT,  # a report
    "no-pixel-spacing.dcm": Code.NOT_CT,  # ultrasound
}
# sha256 of 512 x 512 stored values as little-endian 32-bit integers
DIGEST = "b76703cf422e7a4bfd3bacc7efe65162040fc973b794118b794f6c92910faaa6"


@pytest.fixture(scope="session")
def codecs(shared_data: Path) -> Path:
    return shared_data / "codecs"


def has_gpl_codecs() -> bool:
    return "pylibjpeg" in get_decoder(JPEGExtended12Bit).available_plugins


def hounsfield(path: Path) -> np.ndarray:
    (image,) = slices_of(path)
    return image.pixels.astype(float) * image.rescale_slope + image.rescale_intercept


def test_every_codec_file_is_covered(codecs: Path) -> None:
    named = {*LOSSLESS, *LOSSY, BASELINE, EXTENDED, *RETIRED, *REFUSED}
    assert {path.name for path in codecs.glob("*.dcm")} == named


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_have_one_digest(name: str, codecs: Path) -> None:
    report = inspect(codecs / name)
    assert report.usable
    (series,) = report.series
    assert series.pixels is not None
    assert series.pixels.sha256 == DIGEST
    assert series.flags == ()


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_files_are_within_their_error(name: str, codecs: Path) -> None:
    difference = np.abs(hounsfield(codecs / name) - hounsfield(codecs / LOSSLESS[0]))
    assert difference.max() == LOSSY[name]
    report = inspect(codecs / name)
    assert report.usable
    assert [flag.flag for flag in report.series[0].flags] == [Flag.LOSSY_COMPRESSION]


def test_baseline_jpeg_has_its_own_rescale(codecs: Path) -> None:
    (image,) = slices_of(codecs / BASELINE)
    assert image.pixels.dtype == np.uint16
    assert image.rescale_slope == pytest.approx(32.1216)
    found = np.maximum(hounsfield(codecs / BASELINE), -1024)
    expected = np.maximum(hounsfield(codecs / LOSSLESS[0]), -1024)
    assert np.abs(found - expected).mean() < 32  # one step of 8 bits


def test_12_bit_lossy_jpeg_is_decoded_or_names_the_extra(codecs: Path) -> None:
    path = codecs / EXTENDED
    if has_gpl_codecs():
        found = np.maximum(hounsfield(path), -1024)
        expected = np.maximum(hounsfield(codecs / LOSSLESS[0]), -1024)
        assert np.abs(found - expected).mean() < 16
        return
    with pytest.raises(DicomError, match=r"pip install 'pe-infer\[gpl-codecs\]'") as caught:
        convert(path)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


def test_fragments_without_offset_table_are_joined_to_frames(codecs: Path) -> None:
    dataset = pydicom.dcmread(codecs / "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm")
    frames = list(generate_frames(dataset.PixelData, number_of_frames=2))
    assert len(frames) == 2
    for frame in frames:
        found = read_codestream(frame)
        assert found is not None
        assert (found.rows, found.cols, found.bits) == (512, 512, 12)
    if has_gpl_codecs():
        layout = PixelLayout(
            rows=512,
            cols=512,
            frames=2,
            bits_allocated=16,
            bits_stored=12,
            high_bit=11,
            signed=False,
        )
        for index in (0, 1):
            values = stored_values(dataset, layout, JPEGExtended12Bit, name="a", index=index)
            assert int(values.max()) > 1000


@pytest.mark.parametrize("name", RETIRED)
def test_retired_jpeg_is_refused_with_a_remedy(name: str, codecs: Path) -> None:
    with pytest.raises(DicomError, match=r"retired.*convert the file") as caught:
        convert(codecs / name)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


@pytest.mark.parametrize("name", REFUSED)
def test_other_objects_are_refused_with_a_remedy(name: str, codecs: Path) -> None:
    with pytest.raises(DicomError, match="Send the axial CT") as caught:
        convert(codecs / name)
    assert caught.value.code is REFUSED[name]


def test_inspect_command_accepts_or_explains_every_codec_file(codecs: Path) -> None:
    for path in sorted(codecs.glob("*.dcm")):
        done = CliRunner().invoke(APP, [str(path)])
        if done.exit_code == 0:
            assert "pixel sha256" in done.stdout
        else:
            assert done.exit_code == 3
            assert any(word in done.stdout for word in ("Send ", "Ask ", "pip install"))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_cut_codec_files_are_refused(share: float, codecs: Path, tmp_path: Path) -> None:
    for name in [*LOSSLESS, *LOSSY, BASELINE]:
        data = (codecs / name).read_bytes()
        path = tmp_path / "cut.dcm"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=r"cut\.dcm"):
            convert(path)


def test_localizers_are_told_apart_from_a_series(shared_data: Path) -> None:
    with pytest.raises(SeriesError, match="localizer") as caught:
        open_series(shared_data / "localizer")
    assert caught.value.code is Code.NO_CT_SERIES
    for series in find_series(shared_data / "localizer"):
        assert series.refusal is not None
        assert series.refusal.code is Code.NOT_AXIAL_IMAGE
    assert not inspect(shared_data / "localizer").usable


def test_localizers_beside_a_series_are_not_read(shared_data: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_data / "localizer", tmp_path / "localizer")
    shutil.copytree(shared_data / "head_tilted", tmp_path / "head")
    assert len(open_series(tmp_path)) == 28


def test_tilted_head(shared_data: Path) -> None:
    report = inspect(shared_data / "head_tilted")
    assert report.usable
    (series,) = report.series
    geometry = series.geometry
    assert geometry is not None
    assert geometry.tilt_deg == pytest.approx(18.5, abs=0.01)
    assert geometry.drift_residual_mm < 0.01
    assert geometry.irregular
    assert geometry.gaps == ()  # 7 mm slices every 7 mm are no gap beside 4 mm slices every 4 mm
    steps = sorted({round(um / 1000 / np.cos(np.radians(18.5)), 2) for um in geometry.steps_um})
    assert steps == [1.14, 4.22, 7.38]  # along the table, as the scanner moved
    assert [f.flag for f in series.flags] == [Flag.GANTRY_TILT, Flag.IRREGULAR_SPACING]
    assert series.paddings == ((-1500, -1500),)
    assert series.pixels is not None
    assert series.pixels.padded_fraction > 0.2


def test_contrast_chest(shared_data: Path) -> None:
    series = open_series(shared_data / "chest_contrast")
    assert len(series) == 100
    assert [f.flag for f in series.flags] in ([], [Flag.FILES_SKIPPED])  # a licence may lie there
    assert series.summary.step_mm == 2.5
    numbers = [reference.header.instance_number for reference in series.references]
    assert numbers == sorted(numbers, reverse=True)  # InstanceNumber falls as z rises
    (image,) = series.read(series.references[50])
    assert image.padding == (-2000, -2000)  # stored as 63536
    assert image.pixels[0, 0] == -2000


def test_ctpa(shared_data: Path) -> None:
    series = open_series(shared_data / "chest_ctpa_lower")
    assert len(series) == 95
    assert series.info.contrast_bolus_agent == "OMNI"
    assert series.summary.step_mm == 0.8
    assert series.summary.thickness_mm == 1.25


def test_small_files_of_pydicom(shared_data: Path) -> None:
    folder = shared_data / "pydicom"
    (small,) = slices_of(folder / "CT_small.dcm")
    assert small.pixels.shape == (128, 128)
    (broken,) = slices_of(folder / "bad_sequence.dcm")
    assert broken.pixels.shape == (512, 512)
    with pytest.raises(DicomError, match="perfusion map") as caught:
        convert(folder / "eCT_Supplemental.dcm")
    assert caught.value.code is Code.NOT_AXIAL_IMAGE
