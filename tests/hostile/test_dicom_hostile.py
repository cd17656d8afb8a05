"""Damaged and malicious files end in a coded refusal: no crash, no other exception."""

import errno
import os
import random
import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from dicom_files import ct_dataset, enhanced_dataset, items, save, save_series
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from pe_infer.dicom import convert, inspect, open_series, reading, slices_of
from pe_infer.errors import Code, DicomError, InputError


def raw(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def element(tag: tuple[int, int], vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """Return an element in explicit VR little endian with a 16-bit length, true or false."""
    size = len(value) if length is None else length
    return struct.pack("<HH", *tag) + vr + struct.pack("<H", size) + value


def replaced(data: bytes, keyword_tag: tuple[int, int], new: bytes) -> bytes:
    """Replace a short explicit VR element of the data set."""
    start = data.index(struct.pack("<HH", *keyword_tag), 132)
    size = int.from_bytes(data[start + 6 : start + 8], "little")
    return data[:start] + new + data[start + 8 + size :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"This is a text file, not an image. " * 50,
        b"\0" * 500,
        b"\0" * 128 + b"DICM",
        b"\0" * 128 + b"DICM" + b"garbage" * 100,
        b"\x08\x00\x08\x00" + b"\xff" * 300,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 300,
    ],
)
def test_files_that_are_no_dicom_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    with pytest.raises(DicomError, match=r"a\.dcm") as caught:
        convert(path)
    assert caught.value.code is Code.UNREADABLE_FILE


@pytest.mark.parametrize("syntax", [None, JPEGLSLossless, RLELossless])
def test_file_cut_anywhere_is_refused(syntax: str | None, tmp_path: Path) -> None:
    dataset = ct_dataset()
    if syntax:
        dataset.compress(syntax, generate_instance_uid=False)
    data = raw(dataset)
    path = tmp_path / "a.dcm"
    pixels = data.index(b"\xe0\x7f\x10\x00")
    for size in [*range(0, len(data) - 40, 37), pixels, pixels + 4, pixels + 30, len(data) - 12]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            convert(path)


def test_random_bytes_changed_never_escape_the_error_tree(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "a.dcm"
    originals = [raw(ct_dataset()), raw(enhanced_dataset([0.0, 2.0]))]
    compressed = ct_dataset()
    compressed.compress(JPEGLSLossless, generate_instance_uid=False)
    originals.append(raw(compressed))
    for _ in range(250):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(132, len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            slices = slices_of(path)
        except InputError as exc:
            assert str(path) in str(exc)  # noqa: PT017  # either outcome is right
        else:
            assert slices
        inspect(path)


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        ((0x0028, 0x1053), b"DS", b"one "),
        ((0x0028, 0x1053), b"DS", b"1,5 "),
        ((0x0028, 0x1053), b"DS", b"nan "),
        ((0x0028, 0x1053), b"DS", b"1_0 "),
        ((0x0020, 0x0032), b"DS", b"1\\2\\x "),
        ((0x0020, 0x0032), b"DS", b"1\\inf\\3 "),
        ((0x0028, 0x0010), b"US", b"\x01"),
        ((0x0028, 0x0010), b"US", b""),
        ((0x0028, 0x0010), b"LO", b"many"),
        ((0x0028, 0x0030), b"DS", b"-1\\1"),
        ((0x0028, 0x0030), b"DS", b"0\\0 "),
        ((0x0020, 0x0037), b"DS", b"0\\0\\0\\0\\0\\0 "),
    ],
)
def test_values_that_do_not_fit_their_attribute(
    tag: tuple[int, int], vr: bytes, value: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(replaced(raw(ct_dataset()), tag, element(tag, vr, value)))
    with pytest.raises(InputError, match=r"a\.dcm"):
        convert(path)


def test_optional_attributes_with_bad_values_do_no_harm(tmp_path: Path) -> None:
    data = raw(ct_dataset())
    data = replaced(data, (0x0018, 0x0050), element((0x0018, 0x0050), b"DS", b"thin"))
    data = replaced(data, (0x0020, 0x0013), element((0x0020, 0x0013), b"IS", b"one "))
    data = replaced(data, (0x0020, 0x0011), element((0x0020, 0x0011), b"IS", b"1.5 "))
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    (image,) = slices_of(path)
    assert image.geometry.thickness_mm is None
    assert image.series.series_number is None


def test_unknown_value_representation(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    tag = (0x0028, 0x1053)
    path.write_bytes(replaced(raw(ct_dataset()), tag, element(tag, b"ZZ", b"1 ")))
    with pytest.raises(DicomError):
        convert(path)


def test_declared_length_beyond_the_file(tmp_path: Path) -> None:
    tag = (0x0028, 0x1053)
    path = tmp_path / "a.dcm"
    path.write_bytes(replaced(raw(ct_dataset()), tag, element(tag, b"DS", b"1 ", length=60000)))
    with pytest.raises(DicomError):
        convert(path)


def test_pixel_data_of_a_huge_declared_length(tmp_path: Path) -> None:
    data = raw(ct_dataset())
    at = data.index(b"\xe0\x7f\x10\x00OW") + 8
    path = tmp_path / "a.dcm"
    path.write_bytes(data[:at] + b"\xf0\xff\xff\x7f" + data[at + 4 : -2])
    with pytest.raises(DicomError):
        convert(path)


@pytest.mark.parametrize("syntax", [None, JPEGLSLossless, RLELossless])
def test_huge_declared_image_takes_no_memory(syntax: str | None, tmp_path: Path) -> None:
    dataset = ct_dataset()
    if syntax:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.Rows = dataset.Columns = 65535
    path = save(dataset, tmp_path / "a.dcm")
    tracemalloc.start()
    try:
        with pytest.raises(DicomError, match="65535 x 65535") as caught:
            convert(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.code is Code.INVALID_ATTRIBUTE


def test_huge_number_of_frames(tmp_path: Path) -> None:
    path = save(enhanced_dataset([0.0], NumberOfFrames=2_000_000_000), tmp_path / "a.dcm")
    with pytest.raises(DicomError, match="NumberOfFrames"):
        convert(path)


def test_frames_that_would_fill_the_memory_are_refused_before_decoding() -> None:
    # Compressed, a frame of one value takes some bytes, and each of these 128 MiB.
    dataset = enhanced_dataset([float(z) for z in range(33)], Rows=8192, Columns=8192)
    with pytest.raises(DicomError, match="expected at most 32 of 8192 x 8192") as caught:
        convert(dataset)
    assert caught.value.code is Code.INVALID_ATTRIBUTE


def deflated(head: bytes, body: bytes) -> bytes:
    """Return a file: its meta information as it is, the data set compressed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return head + packer.compress(body) + packer.flush()


def test_deflated_file_that_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data = raw(dataset)
    start = 132 + 12 + int.from_bytes(data[140:144], "little")
    body = zlib.decompress(data[start:], -zlib.MAX_WBITS)
    path = tmp_path / "a.dcm"
    path.write_bytes(deflated(data[:start], body))
    assert len(slices_of(path)) == 1
    monkeypatch.setattr(reading, "MAX_INFLATED_BYTES", 5_000_000)
    path.write_bytes(deflated(data[:start], body + bytes(20_000_000)))
    assert path.stat().st_size < 30_000
    tracemalloc.start()
    try:
        for read in (convert, open_series):
            with pytest.raises(DicomError, match="inflates to more than") as caught:
                read(path)
            assert caught.value.code is Code.UNREADABLE_FILE
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_deflated_file_that_is_damaged(tmp_path: Path) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data = raw(dataset)
    path = tmp_path / "a.dcm"
    for damaged in (data[:-60], data[:-60] + bytes(60), data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DicomError, match=r"a\.dcm"):
            convert(path)


def test_sequences_nested_deeply(tmp_path: Path) -> None:
    begin = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = raw(ct_dataset())
    at = data.index(b"\xe0\x7f\x10\x00OW")
    path = tmp_path / "a.dcm"
    path.write_bytes(data[:at] + begin * 5000)
    with pytest.raises(InputError):
        convert(path)


def test_sequence_that_holds_no_items(tmp_path: Path) -> None:
    dataset = enhanced_dataset([0.0])
    dataset.SharedFunctionalGroupsSequence = items()
    with pytest.raises(DicomError) as caught:
        convert(save(dataset, tmp_path / "a.dcm"))
    assert caught.value.code is Code.MISSING_ATTRIBUTE


def test_sequence_that_is_no_sequence(tmp_path: Path) -> None:
    data = raw(enhanced_dataset([0.0]))
    start = data.index(b"\x00\x52\x29\x92SQ")
    path = tmp_path / "a.dcm"
    path.write_bytes(data[:start] + data[start : start + 4] + b"OB" + data[start + 6 :])
    with pytest.raises(InputError):
        convert(path)


def test_offset_table_that_points_outside(tmp_path: Path) -> None:
    dataset = enhanced_dataset([0.0, 2.0])
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    pixels = bytearray(dataset.PixelData)
    pixels[12:16] = b"\xf0\xff\xff\x0f"
    dataset.PixelData = bytes(pixels)
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(DicomError) as caught:
        convert(dataset)
    assert caught.value.code is Code.UNDECODABLE_PIXELS


def test_pixel_data_that_is_text() -> None:
    dataset = ct_dataset()
    dataset["PixelData"]._value = "text"
    with pytest.raises(DicomError):
        convert(dataset)


def test_inspect_reports_damaged_files_beside_good_ones(tmp_path: Path) -> None:
    save_series(tmp_path, [0.0, 2.0])
    data = (tmp_path / "0001.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(data[:300])
    (tmp_path / "short.dcm").write_bytes(data[:-50])
    report = inspect(tmp_path)
    assert not report.usable
    assert [r.code for r in report.refusals] == [Code.UNREADABLE_FILE]
    (series,) = report.series
    assert len(series.refusals) == 1
    assert "short.dcm" in series.refusals[0].message
    assert series.pixels is not None
    assert series.pixels.sha256 is None


def test_file_without_permission(tmp_path: Path) -> None:
    path = save(ct_dataset(), tmp_path / "a.dcm")
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        with pytest.raises(DicomError, match="cannot be opened") as caught:
            open_series(tmp_path)
        assert caught.value.code is Code.UNREADABLE_FILE
    else:
        pytest.skip("this user may read every file")
    finally:
        path.chmod(0o600)


def test_folder_without_permission_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_series(tmp_path / "a", [0.0, 2.0])
    save_series(tmp_path / "locked", [4.0, 6.0])
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DicomError, match=r"locked: cannot be opened: Permission denied") as caught:
        open_series(tmp_path)
    assert caught.value.code is Code.UNREADABLE_FILE
    report = inspect(tmp_path)
    assert not report.usable
    assert [refusal.code for refusal in report.refusals] == [Code.UNREADABLE_FILE]


def test_file_that_cannot_be_looked_at_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_series(tmp_path, [0.0, 2.0])
    stat = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self.name == "0002.dcm":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DicomError, match=r"0002\.dcm: cannot be opened: Permission denied"):
        open_series(tmp_path)
