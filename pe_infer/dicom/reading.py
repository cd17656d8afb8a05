"""DICOM files into pydicom datasets: the seam where pydicom's errors and warnings stop.

Only the attributes that pe_infer uses are kept, so names and numbers of patients are never in
memory.
"""

import re
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from pathlib import Path
from typing import ClassVar

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from pe_infer.dicom.attributes import Attributes, brief
from pe_infer.errors import Code, DicomError, PeInferError

HEADER_KEYWORDS: tuple[str, ...] = (
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "Manufacturer",
    "StudyDescription",
    "SeriesDescription",
    "ContrastBolusAgent",
    "ContrastBolusAgentSequence",
    "BodyPartExamined",
    "SliceThickness",
    "ProtocolName",
    "ConvolutionKernel",
    "PatientPosition",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "AcquisitionNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "FrameOfReferenceUID",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "LossyImageCompression",
    "BurnedInAnnotation",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
PIXEL_KEYWORDS: tuple[str, ...] = (
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PlanarConfiguration",
)

MAX_INFLATED_BYTES = 1 << 30  # of a deflated file: beyond any CT image
_CHUNK_BYTES = 1 << 16
_META_GROUP = 0x0002
_PREAMBLE_BYTES = 128
_FIRST_ELEMENT_BYTES = 12
_MAX_FIRST_LENGTH = 256  # the first elements of a data set are short
# The first group of a file without preamble, in either byte order.
_FIRST_GROUPS = frozenset({b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08"})
_ITEM_TAG = b"\xfe\xff\x00\xe0"  # begins compressed fragments
_VENDOR_MODULES = re.compile(r"(pydicom|gdcm|pylibjpeg|openjpeg|libjpeg|jpeg_ls)\b")
_RESEND = "Send the file again."


class Quiet(ContextDecorator):
    """Keeps warnings of pydicom and its codecs from leaving this package, in any thread.

    ``warnings.catch_warnings`` restores what it found, which goes wrong when two threads overlap.
    Therefore the first thread in installs the filter and the last one out removes it. May be
    nested.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[int] = 0
    _context: ClassVar["warnings.catch_warnings[None] | None"] = None

    def __enter__(self) -> None:
        """Install the filter, unless another thread has."""
        with Quiet._lock:
            if Quiet._inside == 0:
                context = warnings.catch_warnings()
                context.__enter__()
                warnings.filterwarnings("ignore", module=_VENDOR_MODULES.pattern)
                Quiet._context = context
            Quiet._inside += 1

    def __exit__(self, *_: object) -> None:
        """Remove the filter, unless another thread needs it."""
        with Quiet._lock:
            Quiet._inside -= 1
            if Quiet._inside == 0 and Quiet._context is not None:
                Quiet._context.__exit__(None, None, None)
                Quiet._context = None


@contextmanager
def translated(name: str, action: str, *, code: Code, remedy: str) -> Iterator[None]:
    """Turn whatever pydicom or a codec raises into a ``DicomError`` that keeps the cause.

    Args:
        name: File, for the message.
        action: What was attempted, completing "cannot ...".
        code: Reason to report.
        remedy: What the user can do, as a sentence.
    """
    try:
        with Quiet():
            yield
    except PeInferError:
        raise
    except Exception as exc:
        why = brief(str(exc)) or type(exc).__name__
        raise DicomError(f"{name}: cannot {action}: {why}. {remedy}", code=code) from exc


def uid_of(text: str) -> UID:
    """Return a UID as it stands: whether it is valid shows where it is used."""
    return UID(text, validation_mode=pydicom.config.IGNORE)


def cannot_open(path: str | Path, cause: Exception) -> DicomError:
    """Return the refusal for a file or folder that the system does not open."""
    why = getattr(cause, "strerror", None) or brief(str(cause))
    return DicomError(
        f"{path}: cannot be opened: {why}. Check that it exists and that you may read it.",
        code=Code.UNREADABLE_FILE,
    )


def looks_like_dicom(path: Path) -> bool:
    """Tell from its first bytes whether a file is DICOM, with the 128-byte preamble or without.

    Raises:
        DicomError: ``UNREADABLE_FILE``: this is no ordinary file (a pipe would wait for a writer),
            or cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DicomError(
                f"{path}: is no ordinary file. Give DICOM files or a folder.",
                code=Code.UNREADABLE_FILE,
            )
        with path.open("rb") as file:
            head = file.read(_PREAMBLE_BYTES + 4)
    except (OSError, ValueError) as exc:  # ValueError: a null character in the name
        raise cannot_open(path, exc) from exc
    if head[_PREAMBLE_BYTES:] == b"DICM":
        return True
    if len(head) < _FIRST_ELEMENT_BYTES or head[:2] not in _FIRST_GROUPS:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    order = "little" if head[1] == 0 else "big"
    length = int.from_bytes(head[4:8], order)  # type: ignore[arg-type]
    return explicit or length < _MAX_FIRST_LENGTH


@Quiet()
def read_header(path: Path) -> Dataset:
    """Read the attributes of ``HEADER_KEYWORDS``, without pixels.

    Raises:
        DicomError: ``UNREADABLE_FILE`` if this is no DICOM file, or one that pydicom cannot parse.
    """
    return _read(path, HEADER_KEYWORDS, stop_before_pixels=True)


@Quiet()
def read_image(path: Path) -> Dataset:
    """Read the attributes of ``HEADER_KEYWORDS`` and the pixel data.

    Raises:
        DicomError: As ``read_header``.
    """
    return _read(path, HEADER_KEYWORDS + PIXEL_KEYWORDS, stop_before_pixels=False)


def _read(path: Path, keywords: tuple[str, ...], *, stop_before_pixels: bool) -> Dataset:
    if not looks_like_dicom(path):  # pydicom would find elements in any file
        raise DicomError(
            f"{path}: this is not a DICOM file (no DICM prefix after {_PREAMBLE_BYTES} bytes, and "
            "no DICOM element at the start). Give CT images, or a folder of them.",
            code=Code.UNREADABLE_FILE,
        )
    with translated(str(path), "read the DICOM header", code=Code.UNREADABLE_FILE, remedy=_RESEND):
        _check_inflated_size(path)
        dataset = pydicom.dcmread(
            path, force=True, stop_before_pixels=stop_before_pixels, specific_tags=list(keywords)
        )
        if "SOPClassUID" not in dataset and not is_dicomdir(dataset):
            raise DicomError(
                f"{path}: has no SOPClassUID, so its content is not known. {_RESEND}",
                code=Code.UNREADABLE_FILE,
            )
    return dataset


def _check_inflated_size(path: Path) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates it as a whole."""
    with path.open("rb") as file:
        read_preamble(file, force=True)
        meta = read_dataset(
            file,
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, _vr, _length: tag >> 16 != _META_GROUP,
        )
        if Attributes(meta, str(path)).text("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size = 0
        while data := inflater.unconsumed_tail or file.read(_CHUNK_BYTES):
            size += len(inflater.decompress(data, _CHUNK_BYTES))
            if size > MAX_INFLATED_BYTES:
                raise DicomError(
                    f"{path}: inflates to more than {MAX_INFLATED_BYTES} bytes, expected a CT "
                    f"image. {_RESEND}",
                    code=Code.UNREADABLE_FILE,
                )
            if inflater.eof:
                return


@Quiet()
def is_dicomdir(dataset: Dataset) -> bool:
    """Tell whether this is the directory of a DICOM medium, which holds no image."""
    return _meta_text(dataset, "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage


@Quiet()
def stated_transfer_syntax(dataset: Dataset) -> UID | None:
    """Return the transfer syntax in the file meta information; ``None`` without one."""
    stated = _meta_text(dataset, "TransferSyntaxUID")
    return None if stated is None else uid_of(stated)


@Quiet()
def transfer_syntax_of(dataset: Dataset, name: str) -> UID:
    """Return the transfer syntax of a data set.

    A file without file meta information has the encoding that pydicom found while parsing it; it
    cannot be a compressed one.

    Raises:
        DicomError: ``MISSING_ATTRIBUTE`` if nothing tells how the pixels are encoded.
    """
    stated = stated_transfer_syntax(dataset)
    if stated is not None:
        return stated
    implicit, little = dataset.original_encoding
    if implicit is not None and little is not None and not _encapsulated(dataset, name):
        if implicit:
            return ImplicitVRLittleEndian
        return ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    raise DicomError(
        f"{name}: TransferSyntaxUID is missing, so the encoding of the pixels is not known. "
        "Set dataset.file_meta (pynetdicom: dataset.file_meta = event.file_meta), or send a "
        "complete file.",
        code=Code.MISSING_ATTRIBUTE,
    )


def _meta_text(dataset: Dataset, keyword: str) -> str | None:
    meta = getattr(dataset, "file_meta", None)
    if not isinstance(meta, Dataset):
        return None
    return Attributes(meta, "file meta information").text(keyword)


def _encapsulated(dataset: Dataset, name: str) -> bool:
    with translated(name, "read PixelData", code=Code.UNDECODABLE_PIXELS, remedy=_RESEND):
        pixels = dataset.get("PixelData")
    return isinstance(pixels, bytes) and pixels.startswith(_ITEM_TAG)
