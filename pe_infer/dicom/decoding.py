"""Pixel data into arrays: every transfer syntax that the permissive codecs decode.

One order of codecs on every machine, so that lossy images give the same values everywhere. GDCM
ends the process on some damaged data, because its Python binding lets C++ exceptions through: it
is never used for JPEG-LS, comes second for JPEG 2000, and sees only codestreams that have been
checked. Pillow is no dependency of this package and is not used.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from pe_infer.dicom.codestream import checked_codestream
from pe_infer.dicom.layout import PixelLayout
from pe_infer.dicom.reading import translated
from pe_infer.errors import Code, DicomError

# Encodings that lose information by definition, and those that do or do not.
LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 53, 55, 81))
MAYBE_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (91, 93, 112, 203))

_PREFERENCE = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEGLossless,
    RLELossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000,
    HTJ2K,
    JPEGLSNearLossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
)
_JPEG_PLUGINS = ("gdcm", "pylibjpeg")
_JPEG_LS_PLUGINS = ("pyjpegls", "pylibjpeg")
_JPEG_2000_PLUGINS = ("pylibjpeg", "gdcm")
_RLE_PLUGINS = ("pydicom",)
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_RETIRED_JPEG = frozenset(
    f"1.2.840.10008.1.2.4.{n}" for n in (52, 53, 54, 55, 56, 58, 59, *range(60, 67))
)
_BYTE = 8  # bits
_WORD_BYTES = 2
_CONVERT = (
    "Ask the sender for Explicit VR Little Endian, or convert the file first "
    "(dcmdjpeg of dcmtk, or gdcmconv --raw)."
)
_DAMAGED = "The file is damaged or cut short: send it again."


def decodable_syntaxes() -> tuple[UID, ...]:
    """Return what `decoded` takes on this machine: uncompressed, lossless, then the others.

    JPEG Extended is only among them with the opt-in decoder of its 12-bit images: CT has no others.
    """
    return tuple(syntax for syntax in _PREFERENCE if _is_decodable(syntax))


def _is_decodable(syntax: UID) -> bool:
    decoder = get_decoder(syntax)
    if syntax == _JPEG_EXTENDED:
        return "pylibjpeg" in decoder.available_plugins
    return decoder.is_native or bool(_plugins(decoder, syntax))


def decoded(
    dataset: Dataset, layout: PixelLayout, transfer_syntax: UID, *, name: str, index: int
) -> NDArray[np.integer]:
    """Decode one frame.

    Args:
        dataset: Data set with pixel data; not changed.
        layout: Its Image Pixel module.
        transfer_syntax: How the pixel data is encoded.
        name: File, for messages.
        index: 0-based frame.

    Returns:
        (rows, cols) integers of 8 or 16 bits in either byte order, owned by the caller. Of
        uncompressed and run-length encoded data the whole containers, with whatever is in the bits
        that are not stored.

    Raises:
        DicomError: ``UNSUPPORTED_TRANSFER_SYNTAX`` if no decoder exists or is installed,
            ``MISSING_ATTRIBUTE`` without pixel data, ``UNDECODABLE_PIXELS`` if the data is damaged
            or contradicts the header.
    """
    decoder = _decoder(transfer_syntax, name)
    with translated(name, "read PixelData", code=Code.UNDECODABLE_PIXELS, remedy=_DAMAGED):
        data = dataset.get("PixelData")
    if not isinstance(data, bytes | bytearray):
        raise DicomError(
            f"{name}: has no PixelData; the file holds no image or was cut short. Send it again.",
            code=Code.MISSING_ATTRIBUTE,
        )
    if decoder.is_native:
        _check_length(len(data), layout, name)
        return _decode(decoder, "", dataset, layout, {}, name=name, index=index)
    frame = _frame(dataset, layout, name, index)
    if transfer_syntax != RLELossless:
        frame = _checked(frame, layout, transfer_syntax, name)
    single = encapsulate([frame])
    failure: DicomError | None = None
    for plugin in _plugins(decoder, transfer_syntax):
        try:
            options = _options(layout, plugin)
            return _decode(decoder, plugin, single, layout, options, name=name, index=0)
        except DicomError as exc:
            failure = failure or exc
    assert failure is not None  # noqa: S101  # _decoder refused an empty list of plugins
    raise failure


def _decoder(transfer_syntax: UID, name: str) -> Decoder:
    label = f"{name}: transfer syntax {transfer_syntax.name} ({transfer_syntax})"
    code = Code.UNSUPPORTED_TRANSFER_SYNTAX
    if transfer_syntax in _RETIRED_JPEG:
        raise DicomError(
            f"{label} was retired from DICOM and is not supported. {_CONVERT}", code=code
        )
    try:
        decoder = get_decoder(transfer_syntax)
    except NotImplementedError as exc:
        raise DicomError(f"{label} is not supported. {_CONVERT}", code=code) from exc
    if decoder.is_encapsulated and not _plugins(decoder, transfer_syntax):
        missing = "; ".join(decoder.missing_dependencies) or "no decoder"
        raise DicomError(
            f"{label} needs a decoder that is not installed ({missing}). {_CONVERT}", code=code
        )
    return decoder


def _plugins(decoder: Decoder, transfer_syntax: UID) -> list[str]:
    preferred: tuple[str, ...] = _RLE_PLUGINS
    if transfer_syntax in JPEGTransferSyntaxes:
        preferred = _JPEG_PLUGINS
    elif transfer_syntax in JPEGLSTransferSyntaxes:
        preferred = _JPEG_LS_PLUGINS
    elif transfer_syntax in JPEG2000TransferSyntaxes:
        preferred = _JPEG_2000_PLUGINS
    available = decoder.available_plugins
    return [plugin for plugin in preferred if plugin in available]


def _frame(dataset: Dataset, layout: PixelLayout, name: str, index: int) -> bytes:
    """Return one encoded frame, its fragments joined, with or without an offset table."""
    action = f"find frame {index + 1} in the pixel data"
    with translated(name, action, code=Code.UNDECODABLE_PIXELS, remedy=_DAMAGED):
        offsets = dataset.get("ExtendedOffsetTable")
        lengths = dataset.get("ExtendedOffsetTableLengths")
        return get_frame(
            dataset.PixelData,
            index,
            number_of_frames=layout.frames,
            extended_offsets=(offsets, lengths) if offsets and lengths else None,
        )


def _checked(frame: bytes, layout: PixelLayout, transfer_syntax: UID, name: str) -> bytes:
    """Refuse a damaged codestream before a codec sees it, and return it tidied."""
    image = checked_codestream(
        frame,
        transfer_syntax=transfer_syntax,
        rows=layout.rows,
        cols=layout.cols,
        bits_allocated=layout.bits_allocated,
        name=name,
    )
    if (
        transfer_syntax == _JPEG_EXTENDED
        and image.bits > _BYTE
        and "pylibjpeg" not in get_decoder(transfer_syntax).available_plugins
    ):
        raise DicomError(
            f"{name}: {image.bits}-bit lossy JPEG ({transfer_syntax}) is decoded only by the "
            "GPL-licensed pylibjpeg-libjpeg, which is not installed. Run: "
            f"pip install 'pe-infer[gpl-codecs]' (mind its licence). {_CONVERT}",
            code=Code.UNSUPPORTED_TRANSFER_SYNTAX,
        )
    return image.data


def _options(layout: PixelLayout, plugin: str) -> dict[str, Any]:
    """Return what a decoder must know of a frame that comes without its data set.

    GDCM is told that all bits count: where fewer do, it cleans up by itself, or ends the process.
    """
    return {
        "rows": layout.rows,
        "columns": layout.cols,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_allocated if plugin == "gdcm" else layout.bits_stored,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": "PixelData",
    }


def _check_length(actual: int, layout: PixelLayout, name: str) -> None:
    """Refuse uncompressed pixel data that is too short, or longer by a row or more."""
    row = layout.cols * layout.bits_allocated // _BYTE
    expected = row * layout.rows * layout.frames
    if not expected <= actual < expected + max(row, _WORD_BYTES):
        raise DicomError(
            f"{name}: PixelData has {actual} bytes, expected {expected} for {layout.frames} "
            f"frame(s) of {layout.rows} x {layout.cols} pixels of {layout.bits_allocated} bits. "
            f"{_DAMAGED}",
            code=Code.UNDECODABLE_PIXELS,
        )


def _decode(
    decoder: Decoder,
    plugin: str,
    source: Dataset | bytes,
    layout: PixelLayout,
    options: dict[str, Any],
    *,
    name: str,
    index: int,
) -> NDArray[np.integer]:
    action = f"decode frame {index + 1} ({decoder.UID.name})"
    with translated(name, action, code=Code.UNDECODABLE_PIXELS, remedy=_DAMAGED):
        array, _ = decoder.as_array(
            source,
            index=index,
            raw=True,
            decoding_plugin=plugin,
            correct_unused_bits=False,  # type: ignore[arg-type]  # done where padding is known
            **options,
        )
    if array.shape != (layout.rows, layout.cols) or array.dtype.kind not in "iu":
        raise DicomError(
            f"{name}: decoded to {array.dtype} {array.shape}, expected {layout.rows} x "
            f"{layout.cols} integers. {_DAMAGED}",
            code=Code.UNDECODABLE_PIXELS,
        )
    return array
