"""Encodings of pixel data, the seam to the codecs, and what is refused before a codec sees it."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_files import ct_dataset, enhanced_dataset, ramp, save
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.filewriter import dcmwrite
from pydicom.pixels.decoders import HTJ2KLosslessDecoder, JPEGExtended12BitDecoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from pe_infer.dicom import convert, open_series, reading, slices_of
from pe_infer.dicom.codestream import read_codestream
from pe_infer.errors import Code, DicomError
from pe_infer.result import Flag


def noise(rows: int = 32, cols: int = 48) -> np.ndarray:
    return np.random.default_rng(7).integers(-1024, 2000, (rows, cols)).astype(np.int16)


def compressed(syntax: UID, pixels: np.ndarray | None = None, **options: object) -> Dataset:
    dataset = ct_dataset(pixels=noise() if pixels is None else pixels)
    dataset.compress(syntax, generate_instance_uid=False, **options)
    return dataset


def fragmented(frame: bytes, size: int) -> bytes:
    """Encapsulate one frame in several fragments, without a basic offset table."""
    parts = [frame[at : at + size] for at in range(0, len(frame), size)]
    out = b"\xfe\xff\x00\xe0" + bytes(4)
    for part in parts:
        even = part + b"\0" * (len(part) % 2)
        out += b"\xfe\xff\x00\xe0" + len(even).to_bytes(4, "little") + even
    return out


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ],
)
def test_native_encodings(syntax: UID, tmp_path: Path) -> None:
    pixels = noise()
    dataset = ct_dataset(pixels=pixels)
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.astype(">i2").tobytes()
    dcmwrite(
        tmp_path / "a.dcm",
        dataset,
        enforce_file_format=True,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
    )
    (image,) = slices_of(tmp_path / "a.dcm")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.pixels.dtype == np.dtype(np.int16)
    assert image.pixels.dtype.isnative


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_lossless_compression(syntax: UID, tmp_path: Path) -> None:
    path = save(compressed(syntax), tmp_path / "a.dcm")
    found = convert(path)
    np.testing.assert_array_equal(found.slices[0].pixels, noise())
    assert found.flags == ()


def jpeg_2000(values: np.ndarray, bits: int) -> Dataset:
    dataset = ct_dataset(pixels=values, BitsStored=bits, HighBit=bits - 1)
    dataset.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return dataset


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_lossless_jpeg_2000(signed: bool, bits: int) -> None:
    values = (noise() if signed else noise() + 1024).astype(np.int16 if signed else np.uint16)
    found = convert(jpeg_2000(values, bits))
    np.testing.assert_array_equal(found.slices[0].pixels, values)
    assert found.slices[0].pixels.dtype == values.dtype
    assert found.flags == ()


def test_jpeg_2000_of_another_sign_than_the_header_says() -> None:
    values = noise()
    dataset = jpeg_2000(values.view(np.uint16) & np.uint16(0x0FFF), 12)
    dataset.PixelRepresentation = 1
    np.testing.assert_array_equal(slices_of(dataset)[0].pixels, values)


def test_lossy_compression_is_flagged() -> None:
    found = convert(compressed(JPEGLSNearLossless, jls_error=3))
    assert abs(found.slices[0].pixels.astype(int) - noise()).max() <= 3
    assert [flag.flag for flag in found.flags] == [Flag.LOSSY_COMPRESSION]


def test_garbage_above_the_stored_bits_survives_lossless_compression() -> None:
    values = noise().view(np.uint16) & np.uint16(0x0FFF)
    dataset = ct_dataset(pixels=values | np.uint16(0x5000))
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = 12, 11
    np.testing.assert_array_equal(slices_of(dataset)[0].pixels, values)


def test_past_lossy_compression_is_flagged() -> None:
    found = convert(ct_dataset(LossyImageCompression="01"))
    assert [flag.flag for flag in found.flags] == [Flag.LOSSY_COMPRESSION]


def test_multi_frame_compression(tmp_path: Path) -> None:
    volume = np.stack([noise() + i for i in range(3)])
    dataset = enhanced_dataset([0.0, 2.0, 4.0], volume)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    slices = slices_of(save(dataset, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(np.stack([s.pixels for s in slices]), volume)


def test_extended_offset_table(tmp_path: Path) -> None:
    volume = np.stack([noise() + i for i in range(3)])
    dataset = enhanced_dataset([0.0, 2.0, 4.0], volume)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=3))
    data, offsets, lengths = encapsulate_extended(frames)
    dataset.PixelData, dataset.ExtendedOffsetTableLengths = data, lengths
    dataset.ExtendedOffsetTable = offsets
    slices = slices_of(save(dataset, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(np.stack([s.pixels for s in slices]), volume)
    dataset.ExtendedOffsetTable = offsets[:8]
    with pytest.raises(DicomError, match="Offset Table") as caught:
        convert(save(dataset, tmp_path / "b.dcm"))
    assert caught.value.code is Code.UNDECODABLE_PIXELS


def test_fragments_without_offset_table() -> None:
    dataset = compressed(JPEGLSLossless)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = fragmented(frame, 500)
    np.testing.assert_array_equal(slices_of(dataset)[0].pixels, noise())


def test_fragments_of_several_frames_without_offset_table() -> None:
    volume = np.stack([noise() + i for i in range(2)])
    dataset = enhanced_dataset([0.0, 2.0], volume)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=2))
    dataset.PixelData = fragmented(frames[0], 400) + fragmented(frames[1], 400)[8:]
    np.testing.assert_array_equal(np.stack([s.pixels for s in slices_of(dataset)]), volume)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit])
def test_8_bit_jpeg_in_fragments(syntax: UID) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow makes the baseline JPEG of this test")
    values = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    encoded = BytesIO()
    image.fromarray(values).save(encoded, "JPEG", quality=95)
    dataset = ct_dataset(pixels=values, RescaleSlope=4, RescaleIntercept=-1024)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = fragmented(encoded.getvalue(), 300)
    dataset["PixelData"].is_undefined_length = True
    found = convert(dataset)
    assert abs(found.slices[0].pixels.astype(int) - values).max() <= 4
    assert [flag.flag for flag in found.flags] == [Flag.LOSSY_COMPRESSION]


@pytest.mark.parametrize(
    ("syntax", "first"),
    [
        (ImplicitVRLittleEndian, b"\x08\x00\x08\x00"),  # ImageType begins the data set
        (ExplicitVRLittleEndian, b"\x08\x00\x08\x00"),
        (ExplicitVRBigEndian, b"\x00\x08\x00\x08"),
    ],
)
def test_file_without_preamble(syntax: UID, first: bytes, tmp_path: Path) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    big = syntax == ExplicitVRBigEndian
    if big:
        dataset.PixelData = ramp().astype(">i2").tobytes()
    buffer = BytesIO()
    dcmwrite(buffer, dataset, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=not big)
    raw = buffer.getvalue()
    path = tmp_path / "a.dcm"
    path.write_bytes(raw[raw.index(first) :])
    np.testing.assert_array_equal(slices_of(path)[0].pixels, ramp())


def test_dataset_without_transfer_syntax_is_refused() -> None:
    dataset = ct_dataset()
    del dataset.file_meta
    with pytest.raises(DicomError, match=r"event\.file_meta") as caught:
        convert(dataset)
    assert caught.value.code is Code.MISSING_ATTRIBUTE


@pytest.mark.parametrize("number", [52, 53, 55, 66])
def test_retired_jpeg_is_refused_with_a_remedy(number: int) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.4.{number}")
    with pytest.raises(DicomError, match=r"retired.*dcmdjpeg") as caught:
        convert(dataset)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.4.100", "1.2.3.4.5"])
def test_other_transfer_syntaxes_are_refused_with_a_remedy(uid: str) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = UID(uid)
    with pytest.raises(DicomError, match="Explicit VR Little Endian") as caught:
        convert(dataset)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


def jpeg_header(rows: int, cols: int, bits: int, marker: int = 0xC1) -> bytes:
    """Return a JPEG codestream that has a header and an end, and no image."""
    frame = b"\xff" + bytes([marker]) + b"\x00\x0b" + bytes([bits])
    size = rows.to_bytes(2, "big") + cols.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    return b"\xff\xd8\xff\xe0\x00\x04ab" + frame + size + scan + b"\xff\xd9"


def test_12_bit_lossy_jpeg_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    available = JPEGExtended12BitDecoder._available  # as if pylibjpeg-libjpeg were not installed
    monkeypatch.setattr(
        JPEGExtended12BitDecoder,
        "_available",
        {name: decode for name, decode in available.items() if name != "pylibjpeg"},
    )
    dataset = ct_dataset(BitsStored=12, HighBit=11, PixelRepresentation=0)
    dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    dataset.PixelData = encapsulate([jpeg_header(8, 10, 12)])
    with pytest.raises(DicomError, match=r"pip install 'pe-infer\[gpl-codecs\]'") as caught:
        convert(dataset)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


def test_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HTJ2KLosslessDecoder, "_available", {})
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = HTJ2KLossless
    with pytest.raises(DicomError, match="not installed") as caught:
        convert(dataset)
    assert caught.value.code is Code.UNSUPPORTED_TRANSFER_SYNTAX


def test_application_data_is_kept_from_the_codec() -> None:
    # GDCM ends the process where libjpeg warns of an unknown JFIF revision.
    plain = jpeg_header(8, 10, 12)
    jfif = b"\xff\xe0\x00\x10JFIF\x00\xb4\x01\x00\x00\x01\x00\x01\x00\x00"
    found = read_codestream(plain[:2] + jfif + plain[2:])
    assert found is not None
    assert b"JFIF" not in found.data
    assert found.data.startswith(b"\xff\xd8\xff\xc1")
    assert found.data.endswith(b"\xff\xd9")
    assert read_codestream(plain[:2] + b"stray" + plain[2:]) is None


def test_codestream_of_another_process_is_refused() -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = JPEGLossless
    dataset.PixelData = encapsulate([jpeg_header(8, 10, 12)])
    with pytest.raises(DicomError, match="another JPEG process"):
        convert(dataset)


def test_codestream_of_too_many_bits_is_refused() -> None:
    dataset = ct_dataset(BitsAllocated=8, BitsStored=8, HighBit=7)
    dataset.file_meta.TransferSyntaxUID = JPEGLossless
    dataset.PixelData = encapsulate([jpeg_header(8, 10, 12, marker=0xC3)])
    with pytest.raises(DicomError, match="12 bits, BitsAllocated is 8"):
        convert(dataset)


# --- codestreams that contradict the header, some of which end the process inside a codec


@pytest.mark.parametrize(("rows", "cols"), [(64, 48), (16, 48), (32, 96), (8000, 8000)])
def test_codestream_of_another_size_is_refused(rows: int, cols: int) -> None:
    dataset = compressed(JPEGLSLossless)
    dataset.Rows, dataset.Columns = rows, cols
    with pytest.raises(DicomError, match="32 x 48") as caught:
        convert(dataset)
    assert caught.value.code is Code.UNDECODABLE_PIXELS


@pytest.mark.parametrize("rows", [64, 8000])
def test_run_lengths_of_another_size_are_refused(rows: int) -> None:
    dataset = compressed(RLELossless)
    dataset.Rows = rows
    with pytest.raises(DicomError) as caught:
        convert(dataset)
    assert caught.value.code is Code.UNDECODABLE_PIXELS
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("share", [0.3, 0.95])
@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_truncated_compressed_pixels_are_refused(syntax: UID, share: float) -> None:
    dataset = compressed(syntax)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: int(len(frame) * share)]])
    with pytest.raises(DicomError) as caught:
        convert(dataset)
    assert caught.value.code is Code.UNDECODABLE_PIXELS


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLossless, JPEGLSLossless])
def test_pixels_that_are_no_codestream_are_refused(syntax: UID) -> None:
    dataset = ct_dataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([b"this is no image" * 20])
    with pytest.raises(DicomError, match="holds no image"):
        convert(dataset)


def test_size_of_codestreams() -> None:
    found = read_codestream(jpeg_header(100, 200, 12))
    assert found is not None
    assert (found.rows, found.cols, found.components, found.bits) == (100, 200, 1, 12)
    siz = (
        b"\xff\x4f\xff\x51"
        + bytes(4)
        + b"".join(n.to_bytes(4, "big") for n in (210, 120, 10, 20, 210, 120, 0, 0))
    )
    found = read_codestream(siz + b"\x00\x01\x8b\x01\x01")
    assert found is not None
    assert (found.rows, found.cols, found.components, found.bits) == (100, 200, 1, 12)


@pytest.mark.parametrize("cut", range(0, 24, 3))
def test_codestream_header_may_be_cut_anywhere(cut: int) -> None:
    assert read_codestream(jpeg_header(100, 200, 12)[:cut]) is None


# --- the seam


def test_warnings_of_pydicom_do_not_leave_the_package(tmp_path: Path) -> None:
    dataset = ct_dataset()
    dataset.PixelData += b"\0\0\0\0"  # pydicom warns of excess padding
    path = tmp_path / "a.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.SOPInstanceUID = "1.02.bad"  # and of the value
        save(dataset, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(path)
        convert(dataset)
    assert [str(w.message) for w in caught] == []


def test_own_warnings_of_other_code_are_not_hidden() -> None:
    with pytest.warns(UserWarning, match="mine"), reading.Quiet():
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_overlapping_threads_restore_the_warning_filters() -> None:
    before = list(warnings.filters)
    first_in, second_in = threading.Event(), threading.Event()

    def first() -> None:
        with reading.Quiet():
            first_in.set()
            assert second_in.wait(5)

    def second() -> None:
        assert first_in.wait(5)
        with reading.Quiet():
            second_in.set()
            worker.join(5)  # the first one leaves while the second is inside

    worker = threading.Thread(target=first)
    other = threading.Thread(target=second)
    worker.start()
    other.start()
    other.join(10)
    assert list(warnings.filters) == before


def test_series_is_decoded_in_parallel(tmp_path: Path) -> None:
    volume = np.stack([noise() + i for i in range(6)])
    dataset = enhanced_dataset([2.0 * i for i in range(6)], volume)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    series = open_series(save(dataset, tmp_path / "a.dcm"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(series.read, series.references))
    np.testing.assert_array_equal(np.stack([s.pixels for (s,) in found]), volume)


def test_native_pixel_data_of_another_length_is_refused() -> None:
    short, long = ct_dataset(), ct_dataset()
    short.PixelData = short.PixelData[:-2]
    long.PixelData += bytes(2 * long.Columns)
    for dataset in (short, long):
        with pytest.raises(DicomError, match="PixelData has") as caught:
            convert(dataset)
        assert caught.value.code is Code.UNDECODABLE_PIXELS
