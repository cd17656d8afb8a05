"""Pixel data into stored values: every transfer syntax that the permissive codecs decode."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.uid import UID, JPEGLSLossless, JPEGLSNearLossless, RLELossless

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.codestream import check_codestream
from pe_infer.dicom.reading import translated
from pe_infer.errors import Code, DicomError
from pe_infer.geometry import StoredPixels

_BYTE = 8  # bits
_WORD_BYTES = 2
MAX_SIDE = 8192  # rows or columns beyond this are a damaged header, not a CT image
PADDING_BELOW_HU = (
    -900.0
)  # padding that is denser than this must be seen in a corner before it is believed

# One order on every machine, so that lossy images give the same values. GDCM ends the process on
# JPEG-LS data whose size contradicts the header, and is not used for it. Pillow is no dependency of
# this package.
_PLUGINS = ("pydicom", "pyjpegls", "gdcm", "pylibjpeg")
_OPTIONS: Any = {"correct_unused_bits": False}  # done here, where padding is known
_JPEG_LS = frozenset({JPEGLSLossless, JPEGLSNearLossless})
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_RETIRED_JPEG = frozenset(
    f"1.2.840.10008.1.2.4.{n}" for n in (52, 53, 54, 55, 56, 58, 59, *range(60, 67))
)
_CONVERT = (
    "Ask the sender for Explicit VR Little Endian, or convert the file first "
    "(dcmdjpeg of dcmtk, or gdcmconv --raw)."
)
_DAMAGED = "The file is damaged or cut short: send it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLayout:
    """How the pixels of an image are stored (PS3.3 C.7.6.3).

    Attributes:
        rows: Rows.
        cols: Columns.
        frames: NumberOfFrames, 1 if absent.
        bits_allocated: 8 or 16.
        bits_stored: Bits that carry the value.
        high_bit: Highest of them.
        signed: Whether values are in two's complement.
    """

    rows: int
    cols: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def low(self) -> int:
        """Lowest value that ``bits_stored`` can hold."""
        return -(1 << (self.bits_stored - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Highest value that ``bits_stored`` can hold."""
        return (1 << (self.bits_stored - 1 if self.signed else self.bits_stored)) - 1

    def as_stored(self, value: int) -> int:
        """Read the bits of an attribute such as PixelPaddingValue with the sign of the pixels.

        A value that does not fit into ``bits_stored`` is kept: some writers pad with a value
        outside of it.
        """
        if not self.signed:
            return value & 0xFFFF
        if self.high < value < 1 << self.bits_stored:
            return value - (1 << self.bits_stored)
        return ((value + 0x8000) & 0xFFFF) - 0x8000


def pixel_layout(a: Attributes) -> PixelLayout:
    """Read and check the Image Pixel module.

    Raises:
        DicomError: ``UNSUPPORTED_PIXELS`` for colour, inverted, 1-bit or 32-bit images and absurd
            sizes; ``MISSING_ATTRIBUTE`` and ``INVALID_ATTRIBUTE``.
    """
    samples = a.required_whole("SamplesPerPixel")
    photometric = a.required_text("PhotometricInterpretation")
    if samples != 1 or photometric != "MONOCHROME2":
        raise DicomError(
            f"{a.name}: pixels are {photometric} with {samples} sample(s), expected MONOCHROME2 "
            "with 1. "
            "Send the axial CT reconstruction.",
            code=Code.UNSUPPORTED_PIXELS,
        )
    allocated = a.required_whole("BitsAllocated")
    if allocated not in (8, 16):
        raise DicomError(
            f"{a.name}: BitsAllocated is {allocated}, expected 8 or 16. Send the axial CT "
            "reconstruction.",
            code=Code.UNSUPPORTED_PIXELS,
        )
    stored = a.required_whole("BitsStored")
    if not 1 <= stored <= allocated:
        raise a.invalid("BitsStored", stored, f"1 to {allocated} (BitsAllocated)")
    high_bit = a.whole("HighBit")
    high_bit = stored - 1 if high_bit is None else high_bit
    if not stored - 1 <= high_bit < allocated:
        raise a.invalid("HighBit", high_bit, f"{stored - 1} to {allocated - 1}")
    representation = a.required_whole("PixelRepresentation")
    if representation not in (0, 1):
        raise a.invalid("PixelRepresentation", representation, "0 or 1")
    rows, cols = a.required_whole("Rows"), a.required_whole("Columns")
    if not (1 <= rows <= MAX_SIDE and 1 <= cols <= MAX_SIDE):
        raise a.invalid("Rows x Columns", f"{rows} x {cols}", f"1 to {MAX_SIDE} each")
    frames = a.whole("NumberOfFrames")
    frames = 1 if frames is None else frames
    if frames < 1:
        raise a.invalid("NumberOfFrames", frames, "1 or more")
    return PixelLayout(
        rows=rows,
        cols=cols,
        frames=frames,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        signed=representation == 1,
    )


def stored_values(
    dataset: Dataset,
    layout: PixelLayout,
    transfer_syntax: UID,
    *,
    name: str,
    index: int = 0,
    padding: tuple[int, int] | None = None,
) -> StoredPixels:
    """Decode one frame.

    Args:
        dataset: Data set with pixel data; not changed.
        layout: Its Image Pixel module.
        transfer_syntax: How the pixel data is encoded.
        name: File, for messages.
        index: 0-based frame.
        padding: Declared padding. Where it lies outside of ``bits_stored`` (a known habit), pixels
            with exactly these values keep them; all other bits outside of ``bits_stored`` are
            garbage or overlays, and dropped.

    Returns:
        (rows, cols) int16 if signed, otherwise uint16; C-contiguous, writable, owned by the caller.

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
    if decoder.is_encapsulated:
        _check_frame(dataset, layout, transfer_syntax, name, index)
    else:
        _check_length(len(data), layout, name)
    raw = _decode(decoder, dataset, layout, transfer_syntax, name=name, index=index)
    kept = decoder.is_native or transfer_syntax == RLELossless
    return _within_bits_stored(raw, layout, name, container=kept, padding=padding)


def believable_padding(
    pixels: StoredPixels, padding: tuple[int, int] | None, slope: float, intercept: float
) -> tuple[int, int] | None:
    """Return the declared padding if it marks pixels without data, ``None`` if it is not used.

    Padding is what lies outside of the reconstructed circle. A range of -900 HU and less is
    believed without a look: it can only replace air by air. A denser one (0 HU is common) would
    erase tissue that happens to have the value, and is believed only if a corner of the image has
    it.

    Args:
        pixels: (rows, cols) stored values.
        padding: Declared inclusive range of stored values.
        slope: HU per stored value.
        intercept: HU of the stored value 0.
    """
    if padding is None:
        return None
    if max(slope * end + intercept for end in padding) <= PADDING_BELOW_HU:
        return padding
    corners = pixels[np.ix_([0, -1], [0, -1])].astype(np.int32)
    return padding if bool(((corners >= padding[0]) & (corners <= padding[1])).any()) else None


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
    available = decoder.available_plugins
    return [
        p for p in _PLUGINS if p in available and not (p == "gdcm" and transfer_syntax in _JPEG_LS)
    ]


def _check_frame(
    dataset: Dataset, layout: PixelLayout, transfer_syntax: UID, name: str, index: int
) -> None:
    """Refuse a damaged codestream before a codec sees it; some codecs do not survive it."""
    with translated(
        name,
        f"find frame {index + 1} in the pixel data",
        code=Code.UNDECODABLE_PIXELS,
        remedy=_DAMAGED,
    ):
        table, lengths = (
            dataset.get("ExtendedOffsetTable"),
            dataset.get("ExtendedOffsetTableLengths"),
        )
        frame = get_frame(
            dataset.PixelData,
            index,
            number_of_frames=layout.frames,
            extended_offsets=(table, lengths) if table and lengths else None,
        )
    if transfer_syntax == RLELossless:
        return
    image = check_codestream(frame, rows=layout.rows, cols=layout.cols, name=name)
    if (
        transfer_syntax == _JPEG_EXTENDED
        and image.bits > _BYTE
        and "pylibjpeg" not in get_decoder(transfer_syntax).available_plugins
    ):
        raise DicomError(
            f"{name}: {image.bits}-bit lossy JPEG ({transfer_syntax}) is decoded only by the "
            "GPL-licensed "
            "pylibjpeg-libjpeg, which is not installed. Run: pip install 'pe-infer[gpl-codecs]' "
            "(mind its "
            f"licence). {_CONVERT}",
            code=Code.UNSUPPORTED_TRANSFER_SYNTAX,
        )


def _check_length(actual: int, layout: PixelLayout, name: str) -> None:
    """Refuse uncompressed pixel data that is too short, or longer by a row or more."""
    row = layout.cols * layout.bits_allocated // 8
    expected = row * layout.rows * layout.frames
    if not expected <= actual < expected + max(row, 2):
        raise DicomError(
            f"{name}: PixelData has {actual} bytes, expected {expected} for {layout.frames} "
            f"frame(s) of {layout.rows} x {layout.cols} pixels of {layout.bits_allocated} bits. "
            f"{_DAMAGED}",
            code=Code.UNDECODABLE_PIXELS,
        )


def _decode(
    decoder: Decoder,
    dataset: Dataset,
    layout: PixelLayout,
    transfer_syntax: UID,
    *,
    name: str,
    index: int,
) -> NDArray[np.integer]:
    plugins = _plugins(decoder, transfer_syntax) if decoder.is_encapsulated else [""]
    action = f"decode frame {index + 1} ({transfer_syntax.name})"
    failure: DicomError | None = None
    for plugin in plugins:
        try:
            with translated(name, action, code=Code.UNDECODABLE_PIXELS, remedy=_DAMAGED):
                array, _ = decoder.as_array(
                    dataset, index=index, raw=True, decoding_plugin=plugin, **_OPTIONS
                )
        except DicomError as exc:
            failure = exc
            continue
        if (
            array.shape == (layout.rows, layout.cols)
            and array.dtype.kind in "iu"
            and array.dtype.itemsize <= _WORD_BYTES
        ):
            return array
        failure = DicomError(
            f"{name}: decoded to {array.dtype} {array.shape}, expected {layout.rows} x "
            f"{layout.cols} integers of at most 16 bits. {_DAMAGED}",
            code=Code.UNDECODABLE_PIXELS,
        )
    assert failure is not None  # noqa: S101  # _decoder refused an empty list of plugins
    raise failure


def _within_bits_stored(
    raw: NDArray[np.integer],
    layout: PixelLayout,
    name: str,
    *,
    container: bool,
    padding: tuple[int, int] | None,
) -> StoredPixels:
    """Return the values that ``bits_stored`` bits hold, with their sign.

    Args:
        raw: Decoded values.
        layout: The Image Pixel module.
        name: File, for messages.
        container: Whether ``raw`` is the container of ``bits_allocated`` bits as stored, which may
            hold garbage above ``high_bit``, rather than values from a codec that knows its
            precision.
        padding: Declared padding.
    """
    values: StoredPixels = (  # in native byte order
        raw.astype(np.int16, order="C", copy=False)
        if layout.signed
        else raw.astype(np.uint16, order="C", copy=False)
    )
    if layout.bits_stored == layout.bits_allocated:
        return values
    low, high = int(values.min()), int(values.max())
    if layout.low <= low and high <= layout.high and layout.high_bit == layout.bits_stored - 1:
        return values
    unsigned_high = (1 << layout.bits_stored) - 1
    if not container and not (low >= 0 and high <= unsigned_high):
        raise DicomError(
            f"{name}: decoded values range from {low} to {high}, which BitsStored "
            f"{layout.bits_stored} cannot hold. "
            f"{_DAMAGED}",
            code=Code.UNDECODABLE_PIXELS,
        )
    bits = values.view(np.uint16) >> (layout.high_bit + 1 - layout.bits_stored if container else 0)
    up = 16 - layout.bits_stored
    fixed: StoredPixels = (bits << up).view(np.int16) >> up if layout.signed else (bits << up) >> up
    if padding is not None and (padding[0] < layout.low or padding[1] > layout.high):
        kept = (values >= padding[0]) & (values <= padding[1])
        fixed[kept] = values[kept]
    return fixed
