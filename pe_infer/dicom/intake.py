"""What a node has to know of an image before it takes it, read from data that nobody vouches for.

Nothing but the header is read, and of that no more than a bound, whatever lengths it declares.
"""

import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, cast

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.decoding import decodable_syntaxes
from pe_infer.dicom.frames import MULTI_FRAME_CLASSES
from pe_infer.dicom.headers import CT_CLASSES
from pe_infer.dicom.reading import MAX_INFLATED_BYTES, translated, uid_of
from pe_infer.errors import Code, DicomError

MAX_HEADER_BYTES: Final = 64 << 20  # of what lies before the pixels
MAX_HEADER_READS: Final = 200_000  # some three per attribute
MAX_EXPECTED: Final = 100_000  # a series of more images does not say how many it has

IMPLEMENTATION_UID: Final = uid_of("2.25.332408361306976890301644642787650817096")
IMPLEMENTATION_NAME: Final = "PE_INFER"  # without a version: the same slice is the same file
_VERSION: Final = b"\x00\x01"
_PREAMBLE: Final = b"\x00" * 128 + b"DICM"
_CHUNK_BYTES: Final = 1 << 16
_LAST_TAG: Final = 0x00280103  # PixelRepresentation; frames and pixels come after it
_META_GROUP: Final = 0x0002
_KEYWORDS: Final = (
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagesInAcquisition",
    "NumberOfSeriesRelatedInstances",
    "SamplesPerPixel",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
)
_RESEND: Final = "Send the image again from the scanner or the archive."
_BYTE: Final = 8  # bits


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeHeader:
    """What an image says of itself. UIDs are as they came: whether they are valid is not checked.

    Attributes:
        study_instance_uid: Its study.
        series_instance_uid: Its series.
        sop_instance_uid: The instance.
        sop_class_uid: Its storage class.
        transfer_syntax_uid: How it is encoded.
        modality: Modality; ``None`` if it does not say.
        rows: Rows.
        columns: Columns.
        frames: NumberOfFrames, 1 if absent.
        bits_allocated: Bits of a sample.
        samples: Samples per pixel.
        inflated_bytes: Size of a deflated data set once it is inflated, else ``None``.
        expected: How many instances its series has, if it says so in a way that can be trusted:
            NumberOfSeriesRelatedInstances; or ImagesInAcquisition of an original single-frame
            image, if its own InstanceNumber is within it. A series can still be longer, or shorter.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    modality: str | None
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    samples: int
    inflated_bytes: int | None = None
    expected: int | None = None

    @property
    def decoded_bytes(self) -> int:
        """Size of its pixels once they are decoded."""
        sample_bytes = (self.bits_allocated + _BYTE - 1) // _BYTE
        return self.rows * self.columns * self.frames * self.samples * sample_bytes


def storage_contexts() -> dict[str, tuple[str, ...]]:
    """Return the storage classes that are taken, each with its transfer syntaxes, best first."""
    return {str(uid): tuple(map(str, decodable_syntaxes())) for uid in sorted(CT_CLASSES)}


def file_head(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Return what precedes a data set in a file: always the same bytes for the same arguments."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = _VERSION
    meta.MediaStorageSOPClassUID = uid_of(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = uid_of(sop_instance_uid)
    meta.TransferSyntaxUID = uid_of(transfer_syntax_uid)
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    written = DicomBytesIO()
    write_file_meta_info(written, meta)
    return _PREAMBLE + written.getvalue()


def store_response(status: int, comment: str = "") -> Dataset:
    """Return the response to a C-STORE request (PS3.7 section 9.1.1.1).

    Args:
        status: Of PS3.4 table B.2-1.
        comment: Why, at most 64 characters; for people.
    """
    response = Dataset()
    response.Status = status
    if comment:
        response.ErrorComment = comment
    return response


def read_intake_header(content: bytes | Path, name: str) -> IntakeHeader:
    """Read the header of a file.

    Args:
        content: The file, with or without preamble.
        name: File, for messages.

    Raises:
        DicomError: ``UNREADABLE_FILE`` if this is no DICOM file, its header is cut short,
            or its header or what it inflates to is larger than any CT image's;
            ``MISSING_ATTRIBUTE``, ``INVALID_ATTRIBUTE``.
    """
    with (
        translated(name, "read the file", code=Code.UNREADABLE_FILE, remedy=_RESEND),
        BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
    ):
        read_preamble(file, force=True)
        meta = read_dataset(
            cast("BinaryIO", _Sparing(file)),
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, _vr, _length: tag >> 16 != _META_GROUP,
        )
        syntax = Attributes(meta, name).required_text("TransferSyntaxUID")
        return read_data_set_header(file, syntax, name)


def read_data_set_header(data: BinaryIO, transfer_syntax_uid: str, name: str) -> IntakeHeader:
    """Read the header of a data set as it comes over the network: without file meta information.

    Args:
        data: At its beginning; where it is afterwards is not defined.
        transfer_syntax_uid: How it is encoded.
        name: What it is, for messages.

    Raises:
        DicomError: As `read_intake_header`.
    """
    syntax = uid_of(transfer_syntax_uid)
    passed = False

    def behind(tag: int, _vr: str | None, _length: int) -> bool:
        nonlocal passed
        passed = tag > _LAST_TAG
        return passed

    with translated(name, "read the header", code=Code.UNREADABLE_FILE, remedy=_RESEND):
        inflated: int | None = None
        if syntax == DeflatedExplicitVRLittleEndian:
            data, inflated = _inflated(data, name)
        found = read_dataset(
            cast("BinaryIO", _Sparing(data)),
            is_implicit_VR=syntax.is_implicit_VR,
            is_little_endian=syntax.is_little_endian,
            stop_when=behind,
            specific_tags=[cast("int", tag_for_keyword(keyword)) for keyword in _KEYWORDS],
        )
        if found.original_encoding[0] != syntax.is_implicit_VR:  # which pydicom looks at
            raise DicomError(
                f"{name}: is encoded otherwise than its transfer syntax {syntax} says. {_RESEND}",
                code=Code.UNREADABLE_FILE,
            )
        if not passed:
            raise DicomError(
                f"{name}: ends within its header, so it was cut short. {_RESEND}",
                code=Code.UNREADABLE_FILE,
            )
        return _header(Attributes(found, name), transfer_syntax_uid, inflated)


def _header(a: Attributes, transfer_syntax_uid: str, inflated: int | None) -> IntakeHeader:
    frames = a.whole("NumberOfFrames")
    header = IntakeHeader(
        study_instance_uid=a.required_text("StudyInstanceUID"),
        series_instance_uid=a.required_text("SeriesInstanceUID"),
        sop_instance_uid=a.required_text("SOPInstanceUID"),
        sop_class_uid=a.required_text("SOPClassUID"),
        transfer_syntax_uid=transfer_syntax_uid,
        modality=a.text("Modality"),
        rows=a.required_whole("Rows"),
        columns=a.required_whole("Columns"),
        frames=1 if frames is None else frames,
        bits_allocated=a.required_whole("BitsAllocated"),
        samples=a.required_whole("SamplesPerPixel"),
        inflated_bytes=inflated,
        expected=_expected(a),
    )
    for keyword, number in (
        ("Rows", header.rows),
        ("Columns", header.columns),
        ("NumberOfFrames", header.frames),
        ("BitsAllocated", header.bits_allocated),
        ("SamplesPerPixel", header.samples),
    ):
        if number < 1:
            raise a.invalid(keyword, number, "1 or more")
    return header


def _expected(a: Attributes) -> int | None:
    stated = a.harmless_whole("NumberOfSeriesRelatedInstances")
    if stated is None:
        own = a.harmless_whole("InstanceNumber")
        acquired = a.harmless_whole("ImagesInAcquisition")
        original = a.texts("ImageType")[:1] == ("ORIGINAL",)
        single = a.text("SOPClassUID") not in MULTI_FRAME_CLASSES
        if own is None or acquired is None or not (original and single and 1 <= own <= acquired):
            return None
        stated = acquired
    return stated if 1 <= stated <= MAX_EXPECTED else None


def _inflated(data: BinaryIO, name: str) -> tuple[BytesIO, int]:
    """Return the beginning of a deflated data set, and the size of the whole."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    kept = BytesIO()
    size = 0
    while not inflater.eof and (raw := inflater.unconsumed_tail or data.read(_CHUNK_BYTES)):
        piece = inflater.decompress(raw, _CHUNK_BYTES)
        size += len(piece)
        if kept.tell() < MAX_HEADER_BYTES:
            kept.write(piece)
        if size > MAX_INFLATED_BYTES:
            raise DicomError(
                f"{name}: inflates to more than {MAX_INFLATED_BYTES} bytes, expected a CT image. "
                f"{_RESEND}",
                code=Code.UNREADABLE_FILE,
            )
    kept.seek(0)
    return kept, size


class _Sparing:
    """A file that is read up to a bound: skipping costs nothing, attributes and bytes do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes = MAX_HEADER_BYTES
        self._reads = MAX_HEADER_READS
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        self._reads -= 1
        data = self._file.read(min(size, self._bytes + 1) if size >= 0 else self._bytes + 1)
        self._bytes -= len(data)
        if self._bytes < 0 or self._reads < 0:
            raise ValueError("the header is larger than that of any CT image")
        return data
