"""The report on files, and its command."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import typer
from dicom_files import ct_dataset, enhanced_dataset, ramp, save, save_series
from pydicom.uid import RLELossless
from rich.console import Console
from typer.testing import CliRunner

from pe_infer.cli.inspect_command import inspect_command, print_report
from pe_infer.dicom import inspect
from pe_infer.errors import Code, SeriesError
from pe_infer.result import Flag

APP = typer.Typer()
APP.command()(inspect_command)


def test_report_of_a_series(tmp_path: Path) -> None:
    for number, z in enumerate([5.0, 0.0, 2.5], start=1):
        dataset = ct_dataset(z, InstanceNumber=number, RescaleIntercept=-24)
        dataset.add_new("PixelPaddingValue", "US", 63536)
        save(dataset, tmp_path / f"{number}.dcm")
    (tmp_path / "note.txt").write_text("text")
    report = inspect(tmp_path)
    assert report.usable
    assert report.skipped == {"not_dicom": 1}
    (series,) = report.series
    assert series.usable
    assert series.geometry is not None
    assert series.geometry.positions_um == (0, 2500, 5000)
    assert series.row_spacing_mm == (0.7,)
    assert series.col_spacing_mm == (0.8,)
    assert series.thicknesses_mm == (1.25,)
    assert series.rescales == ((1.0, -24.0),)
    assert series.paddings == ((-2000, -2000),)
    assert series.row_direction == (1.0, 0.0, 0.0)
    assert series.summary.transfer_syntaxes == ("Explicit VR Little Endian",)
    assert series.pixels is not None
    assert (series.pixels.low_hu, series.pixels.high_hu) == (-1024.0, 951.0)
    assert series.pixels.padded_fraction == 0.0


def test_digest_is_that_of_the_values_in_ascending_position(tmp_path: Path) -> None:
    for z, offset in ((2.0, 5), (0.0, 0)):
        save(ct_dataset(z, pixels=ramp() + np.int16(offset)), tmp_path / f"{offset}.dcm")
    (series,) = inspect(tmp_path).series
    values = b"".join((ramp().astype("<i4") + offset).tobytes() for offset in (0, 5))
    assert series.pixels is not None
    assert series.pixels.sha256 == hashlib.sha256(values).hexdigest()


def test_digest_does_not_depend_on_the_encoding(tmp_path: Path) -> None:
    plain, packed = ct_dataset(), ct_dataset()
    packed.compress(RLELossless, generate_instance_uid=False)
    unsigned = ct_dataset(pixels=(ramp() + 1000).astype(np.uint16))
    signed = ct_dataset(pixels=(ramp() + 1000).astype(np.int16))
    digests = [inspect(d).series[0].pixels for d in (plain, packed, unsigned, signed)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert digests[0] != digests[2]


def test_padding_is_left_out_of_the_values(tmp_path: Path) -> None:
    pixels = ramp()
    pixels[0] = -2000
    dataset = ct_dataset(pixels=pixels)
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    (series,) = inspect(save(dataset, tmp_path / "a.dcm")).series
    assert series.pixels is not None
    assert series.pixels.low_hu == -750.0
    assert series.pixels.padded_fraction == pytest.approx(1 / 8)
    assert series.pixels.padding_ignored == 0


def test_images_that_form_no_stack_are_told(tmp_path: Path) -> None:
    save(ct_dataset(0.0), tmp_path / "a.dcm")
    save(ct_dataset(2.0, pixels=ramp(6, 7)), tmp_path / "b.dcm")
    save(ct_dataset(4.0, FrameOfReferenceUID=None), tmp_path / "c.dcm")
    report = inspect(tmp_path)
    (series,) = report.series
    assert series.sizes == ((6, 7), (8, 10))
    assert series.frames_of_reference == 2
    shown = CliRunner().invoke(APP, [str(tmp_path)]).stdout
    assert "3 in 3 instances, 6 x 7 / 8 x 10" in shown
    assert "frames of reference     2" in shown


def test_padding_that_is_not_believed_is_told(tmp_path: Path) -> None:
    for z in (0.0, 2.0):
        dataset = ct_dataset(z)
        dataset.add_new("PixelPaddingValue", "SS", 0)  # in no corner
        save(dataset, tmp_path / f"{z}.dcm")
    (series,) = inspect(tmp_path).series
    assert series.pixels is not None
    assert series.pixels.padding_ignored == 2
    assert series.pixels.padded_fraction == 0.0
    shown = CliRunner().invoke(APP, [str(tmp_path)]).stdout
    assert "padding not believed    in 2 images" in shown


def test_tilt_gaps_and_shared_positions(tmp_path: Path) -> None:
    c, s = math.cos(math.radians(18.5)), math.sin(math.radians(18.5))
    for number, z in enumerate([0.0, 3.0, 3.0, 6.0, 9.0, 18.0]):
        dataset = ct_dataset(z / c, ImageOrientationPatient=[1, 0, 0, 0, c, -s])
        save(dataset, tmp_path / f"{number}.dcm")
    (series,) = inspect(tmp_path).series
    assert [f.flag for f in series.flags] == [Flag.GANTRY_TILT, Flag.IRREGULAR_SPACING]
    geometry = series.geometry
    assert geometry is not None
    assert geometry.tilt_deg == pytest.approx(18.5, abs=0.05)
    assert len(geometry.gaps) == 1
    assert len(geometry.shared_positions_um) == 1


def test_refusals_are_reported_per_file(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0])
    save(ct_dataset(4.0, PixelSpacing=None), tmp_path / "bad.dcm")
    report = inspect(tmp_path)
    assert not report.usable
    (series,) = report.series
    assert [r.code for r in series.refusals] == [Code.MISSING_ATTRIBUTE]
    assert "bad.dcm" in series.refusals[0].message
    assert series.pixels is not None  # of the two that can be read


def test_series_that_is_no_ct_slices_is_reported(tmp_path: Path) -> None:
    save(ct_dataset(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "a.dcm")
    report = inspect(tmp_path)
    assert not report.usable
    (series,) = report.series
    assert series.summary.refusal is not None
    assert series.summary.refusal.code is Code.NOT_AXIAL_IMAGE
    assert series.pixels is None


def test_one_series_of_several(tmp_path: Path) -> None:
    save_series(tmp_path / "a", [0.0, 2.0])
    save_series(tmp_path / "b", [0.0, 2.0], SeriesInstanceUID="2.25.7", SeriesNumber=7)
    assert len(inspect(tmp_path).series) == 2
    for name in (7, "7", "007", "2.25.7"):
        assert [s.summary.series_number for s in inspect(tmp_path, series=name).series] == [7]


def test_unknown_series_is_refused(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0])
    with pytest.raises(SeriesError, match="series 9 was not found") as caught:
        inspect(tmp_path, series=9)
    assert caught.value.code is Code.NO_CT_SERIES


def test_pixels_may_be_left_alone(tmp_path: Path) -> None:
    dataset = ct_dataset()
    del dataset.PixelData
    (series,) = inspect(save(dataset, tmp_path / "a.dcm"), decode=False).series
    assert series.pixels is None
    assert series.usable


def test_json_is_plain_and_holds_no_patient_data(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0, 4.0])
    save(enhanced_dataset([0.0], SeriesInstanceUID="2.25.5"), tmp_path / "e.dcm")
    report = inspect(tmp_path)
    text = report.to_json()
    assert json.loads(text) == json.loads(json.dumps(report.to_dict()))
    assert "SECRET" not in text
    first = report.to_dict()["series"][0]
    assert first["geometry"]["median_step_mm"] == 2.0
    assert first["geometry"]["gantry_tilt_deg"] == 0.0


def test_command_prints_one_fact_per_line(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0, 4.0])
    done = CliRunner().invoke(APP, [str(tmp_path)])
    assert done.exit_code == 0
    assert "min 2.000, median 2.000, max 2.000 mm" in done.stdout
    assert "pixel sha256" in done.stdout
    assert "\x1b" not in done.stdout
    assert "SECRET" not in done.stdout


def test_command_prints_json(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0])
    done = CliRunner().invoke(APP, ["--json", str(tmp_path)])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["usable"] is True


def test_command_fails_if_nothing_is_usable(tmp_path: Path) -> None:
    save(ct_dataset(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "a.dcm")
    done = CliRunner().invoke(APP, [str(tmp_path)])
    assert done.exit_code == 3
    assert "Send the axial CT reconstruction" in done.stdout
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(APP, [str(tmp_path / "empty")])
    assert done.exit_code == 3
    assert "no DICOM image was found" in done.stdout


def test_any_file_name_can_be_printed(tmp_path: Path) -> None:
    (path,) = save_series(tmp_path, [0.0])
    name = os.fsencode(tmp_path) + b"/\xff\x1b[2J\n.dcm"
    try:
        Path(os.fsdecode(name)).write_bytes(path.read_bytes()[:200])
    except OSError:
        pytest.skip("this file system does not take any bytes for a name")
    done = CliRunner().invoke(APP, [str(tmp_path)])
    assert done.exit_code == 3
    assert r"\udcff\x1b[2J\n.dcm" in done.stdout
    done = CliRunner().invoke(APP, ["--json", str(tmp_path)])
    assert json.loads(done.stdout)["refusals"]


def test_terminal_gets_tables(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0, 9.0])
    (tmp_path / "a.txt").write_text("x")
    console = Console(force_terminal=True, width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_report(inspect(tmp_path), console)
        text = console.export_text()
    assert "╭" in text
    assert "irregular_spacing" in text
    assert "skipped: 1 not_dicom" in text
