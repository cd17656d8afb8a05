"""Headers of images that nobody vouches for, and the files that slices are kept in."""

import io
import zlib
from pathlib import Path

import pydicom
import pytest
from dicom_files import ct_dataset, enhanced_dataset, items, save
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    RLELossless,
)

import pe_infer.dicom.intake as intake_module
from pe_infer.dicom import (
    file_head,
    read_data_set_header,
    read_intake_header,
    storage_contexts,
    store_response,
)
from pe_infer.errors import Code, DicomError

SEQUENCE = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"  # (0008,1140), undefined length
ITEM = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"


def encoded(dataset: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    stream = pydicom.filebase.DicomBytesIO()
    stream.is_little_endian = syntax.is_little_endian
    stream.is_implicit_VR = syntax.is_implicit_VR
    plain = Dataset()
    plain.update({tag: dataset[tag] for tag in dataset.keys()})  # noqa: SIM118  # as they are
    write_dataset(stream, plain)
    return stream.getvalue()


def header_of(data: bytes, syntax: str = ExplicitVRLittleEndian) -> intake_module.IntakeHeader:
    return read_data_set_header(io.BytesIO(data), syntax, "sent")


def refusal(data: bytes, syntax: str = ExplicitVRLittleEndian) -> DicomError:
    with pytest.raises(DicomError) as caught:
        header_of(data, syntax)
    assert "SECRET" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_a_header_is_read_in_every_encoding(syntax: UID) -> None:
    dataset = ct_dataset()
    header = header_of(encoded(dataset, syntax), syntax)
    assert header.sop_instance_uid == dataset.SOPInstanceUID
    assert header.sop_class_uid == CTImageStorage
    assert (header.study_instance_uid, header.series_instance_uid) == ("2.25.1000", "2.25.2000")
    assert (header.rows, header.columns, header.frames, header.samples) == (8, 10, 1, 1)
    assert (header.decoded_bytes, header.modality) == (160, "CT")
    assert header.transfer_syntax_uid == syntax
    assert header.inflated_bytes is None


@pytest.mark.parametrize(
    ("sent", "agreed"),
    [
        (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        (ExplicitVRBigEndian, ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, ExplicitVRBigEndian),
    ],
)
def test_a_data_set_in_another_encoding_than_was_agreed_is_refused(sent: UID, agreed: UID) -> None:
    """Others would read the file by what its meta information says."""
    found = refusal(encoded(ct_dataset(), sent), agreed)
    assert found.code in {Code.UNREADABLE_FILE, Code.MISSING_ATTRIBUTE}


def test_a_deflated_header_is_read_and_what_it_inflates_to_is_told() -> None:
    data = encoded(ct_dataset())
    squeezed = zlib.compress(data, wbits=-zlib.MAX_WBITS)
    header = header_of(squeezed, DeflatedExplicitVRLittleEndian)
    assert header.rows == 8
    assert header.inflated_bytes == len(data)


def test_a_bomb_is_not_inflated_further_than_any_ct_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake_module, "MAX_INFLATED_BYTES", 1 << 20)
    bomb = zlib.compress(encoded(ct_dataset()) + b"\0" * (4 << 20), wbits=-zlib.MAX_WBITS)
    assert "inflates" in str(refusal(bomb, DeflatedExplicitVRLittleEndian))


def test_frames_count_for_the_size_of_the_pixels() -> None:
    header = header_of(encoded(enhanced_dataset([0.0, 1.0, 2.0])))
    assert (header.frames, header.decoded_bytes) == (3, 480)


def test_a_file_is_read_with_and_without_being_in_memory(tmp_path: Path) -> None:
    path = save(ct_dataset(), tmp_path / "a.dcm")
    assert read_intake_header(path, "a") == read_intake_header(path.read_bytes(), "a")
    (tmp_path / "b").write_text("no DICOM")
    with pytest.raises(DicomError):
        read_intake_header(tmp_path / "b", "b")
    with pytest.raises(DicomError):
        read_intake_header(tmp_path / "missing", "missing")


def test_the_same_data_set_is_always_the_same_file(tmp_path: Path) -> None:
    dataset = ct_dataset()
    head = file_head(CTImageStorage, dataset.SOPInstanceUID, ExplicitVRLittleEndian)
    assert head == file_head(CTImageStorage, dataset.SOPInstanceUID, ExplicitVRLittleEndian)
    path = tmp_path / "a.dcm"
    path.write_bytes(head + encoded(dataset))
    read = pydicom.dcmread(path)
    assert read.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert read.pixel_array.shape == (8, 10)
    assert pydicom.__version__.encode() not in head


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 300])
def test_a_data_set_that_ends_within_its_header_is_refused(kept: int) -> None:
    assert refusal(encoded(ct_dataset())[:kept]).code in {
        Code.UNREADABLE_FILE,
        Code.MISSING_ATTRIBUTE,
    }


def test_a_declared_length_of_gigabytes_is_not_believed() -> None:
    data = b"\x08\x00\x05\x00UN\0\0\xf0\xff\xff\xff" + encoded(ct_dataset())
    assert refusal(data).code is Code.UNREADABLE_FILE
    # An attribute that is not wanted is skipped, beyond the end of what is there.
    assert "cut short" in str(refusal(b"\x08\x00\x07\x00UN\0\0\xf0\xff\xff\xff"))


def test_sequences_nested_beyond_reason_are_refused() -> None:
    assert refusal((SEQUENCE + ITEM) * 50_000).code is Code.UNREADABLE_FILE


def test_a_header_of_countless_attributes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "MAX_HEADER_READS", 1000)
    attributes = b"".join(
        b"\x09\x00" + number.to_bytes(2, "little") + b"LO\0\0" for number in range(2000)
    )
    assert "larger than" in str(refusal(attributes + encoded(ct_dataset())))


def test_a_header_of_more_bytes_than_any_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "MAX_HEADER_BYTES", 1000)
    private = b"\x08\x00\x05\x00LT\x00\x20" + b"x" * 0x2000
    assert "larger than" in str(refusal(private + encoded(ct_dataset())))


def test_a_long_attribute_that_is_skipped_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "MAX_HEADER_BYTES", 4000)
    dataset = ct_dataset()
    dataset.add_new(0x00091001, "OB", b"\0" * 100_000)
    assert header_of(encoded(dataset)).rows == 8


@pytest.mark.parametrize(
    "missing",
    ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Rows", "Columns"],
)
def test_what_has_to_be_known_is_asked_for(missing: str) -> None:
    found = refusal(encoded(ct_dataset(**{missing: None})))
    assert found.code is Code.MISSING_ATTRIBUTE
    assert missing in str(found)


@pytest.mark.parametrize("frames", [0, -1, "many", "1.5", "1e30"])
def test_a_number_of_frames_that_makes_no_sense_is_refused(frames: object) -> None:
    data = encoded(ct_dataset())
    element = b"\x28\x00\x08\x00IS" + b"\x04\x00" + str(frames).encode().ljust(4)[:4]
    at = data.index(b"\x28\x00\x10\x00")
    assert refusal(data[:at] + element + data[at:]).code is Code.INVALID_ATTRIBUTE


def test_how_many_instances_a_series_has_is_believed_only_where_it_can_be() -> None:
    def expected(**changes: object) -> int | None:
        return header_of(encoded(ct_dataset(**changes))).expected

    assert expected() is None
    assert expected(NumberOfSeriesRelatedInstances=120) == 120
    assert expected(ImagesInAcquisition=90, InstanceNumber=90) == 90
    assert expected(ImagesInAcquisition=90, InstanceNumber=91) is None
    assert expected(ImagesInAcquisition=90, InstanceNumber=None) is None
    assert expected(ImagesInAcquisition=90, ImageType=["DERIVED", "SECONDARY"]) is None
    assert expected(NumberOfSeriesRelatedInstances=0) is None
    enhanced = enhanced_dataset([0.0, 1.0], ImagesInAcquisition=2, InstanceNumber=1)
    assert header_of(encoded(enhanced)).expected is None


def test_nested_attributes_are_not_taken_for_those_of_the_image() -> None:
    dataset = ct_dataset()
    dataset.ReferencedImageSequence = items(SOPInstanceUID="1.2.3", Rows=5)
    assert header_of(encoded(dataset)).rows == 8


def test_only_what_can_be_decoded_is_offered_uncompressed_first() -> None:
    contexts = storage_contexts()
    assert len(contexts) == 3
    for syntaxes in contexts.values():
        assert syntaxes[:2] == (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
        assert {RLELossless, JPEG2000Lossless} <= set(syntaxes)
        assert JPEGExtended12Bit not in syntaxes  # its decoder is an opt-in
        assert "1.2.840.10008.1.2.4.100" not in syntaxes  # MPEG2


def test_a_response_has_a_comment_only_if_there_is_one() -> None:
    assert store_response(0).Status == 0
    assert "ErrorComment" not in store_response(0)
    assert store_response(0xA700, "full").ErrorComment == "full"
