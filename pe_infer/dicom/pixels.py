"""Decoded pixels into stored values: the bits that count, their sign, and which mean no data."""

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID

from pe_infer.dicom.decoding import LOSSY_SYNTAXES, MAYBE_LOSSY_SYNTAXES, decoded
from pe_infer.dicom.layout import PixelLayout
from pe_infer.pixels import StoredPixels

PADDING_BELOW_HU = -900.0  # denser padding must be seen in a corner before it is believed


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
    raw = decoded(dataset, layout, transfer_syntax, name=name, index=index)
    container = transfer_syntax not in LOSSY_SYNTAXES | MAYBE_LOSSY_SYNTAXES
    return _within_bits_stored(raw, layout, container=container, padding=padding)


def believable_padding(
    pixels: StoredPixels, padding: tuple[int, int] | None, slope: float, intercept: float
) -> tuple[int, int] | None:
    """Return the declared padding if it marks pixels without data, ``None`` if it is not used.

    Padding is what lies outside of the reconstructed circle. A range of -900 HU and less is
    believed without a look: it can only replace air by air. A denser value (0 HU is common) would
    erase tissue that happens to have it, and is believed only if a corner of the image has it. A
    range of values that is denser at one end (a limit of 0 that nobody set) is never believed: it
    would erase whole organs, and what lies below the range of HU is air anyway.

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
    low, high = padding
    corners = pixels[np.ix_([0, -1], [0, -1])]
    return padding if low == high and bool((corners == low).any()) else None


def _within_bits_stored(
    raw: NDArray[np.integer],
    layout: PixelLayout,
    *,
    container: bool,
    padding: tuple[int, int] | None,
) -> StoredPixels:
    """Return the values that ``bits_stored`` bits hold, with their sign.

    Args:
        raw: Decoded values.
        layout: The Image Pixel module.
        container: Whether ``raw`` is the container of ``bits_allocated`` bits, bit for bit, with
            possible garbage above ``high_bit``. After compression with loss it is not: values are
            taken as they are, and may exceed ``bits_stored`` by the loss.
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
    if not container and not (layout.signed and low >= 0 and high < 1 << layout.bits_stored):
        return values
    bits = values.view(np.uint16) >> (layout.high_bit + 1 - layout.bits_stored if container else 0)
    up = 16 - layout.bits_stored
    fixed: StoredPixels = (bits << up).view(np.int16) >> up if layout.signed else (bits << up) >> up
    if padding is not None and (padding[0] < layout.low or padding[1] > layout.high):
        kept = (values >= padding[0]) & (values <= padding[1])
        fixed[kept] = values[kept]
    return fixed
