"""Size and precision of a JPEG, JPEG-LS or JPEG 2000 codestream, read before a codec sees it.

Codecs trust the DICOM header for the size of their buffers, and differ in what a codestream of
another size does to
them: an exception, a cropped image, the end of the process. A codestream without its end marker was
    cut short; some
codecs fill up the rest of the image without a word.
"""

from dataclasses import dataclass

from pe_infer.errors import Code, DicomError

_JPEG_START = b"\xff\xd8"
_J2K_START = b"\xff\x4f\xff\x51"
_END = b"\xff\xd9"
_PREFIX = 0xFF
_SIZ_BYTES = 43  # up to the precision of the first component
_TAIL_BYTES = 16  # the end marker may be followed by padding to an even length
_JP2_HEADER_BYTES = 512  # boxes before the codestream in a file of JP2 format
# Start-of-frame markers of ITU-T T.81 (C4, C8 and CC are others) and of JPEG-LS (F7).
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_RESEND = "Send the file again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Codestream:
    """What a codestream says of its image.

    Attributes:
        rows: Rows.
        cols: Columns.
        components: Samples per pixel.
        bits: Precision of a sample.
    """

    rows: int
    cols: int
    components: int
    bits: int


def check_codestream(frame: bytes, *, rows: int, cols: int, name: str) -> Codestream:
    """Read the header of a codestream and compare it with the DICOM header.

    Args:
        frame: One encoded frame.
        rows: Rows.
        cols: Columns.
        name: File, for messages.

    Raises:
        DicomError: ``UNDECODABLE_PIXELS`` if there is no codestream, it has another size, more than
            one component, or no end.
    """
    found = read_codestream(frame)
    if found is None:
        raise DicomError(
            f"{name}: the compressed pixel data holds no JPEG image. {_RESEND}",
            code=Code.UNDECODABLE_PIXELS,
        )
    if (found.rows, found.cols, found.components) != (rows, cols, 1):
        raise DicomError(
            f"{name}: the compressed image is {found.rows} x {found.cols} with {found.components} "
            "component(s), the "
            f"header says {rows} x {cols} with 1. {_RESEND}",
            code=Code.UNDECODABLE_PIXELS,
        )
    if _END not in frame[-_TAIL_BYTES:]:
        raise DicomError(
            f"{name}: the compressed image has no end marker, so it was cut short. {_RESEND}",
            code=Code.UNDECODABLE_PIXELS,
        )
    return found


def read_codestream(frame: bytes) -> Codestream | None:
    """Return size and precision; ``None`` if this is no JPEG, JPEG-LS or JPEG 2000 data."""
    if frame[:2] == _JPEG_START:
        return _read_jpeg(frame)
    start = frame[:_JP2_HEADER_BYTES].find(_J2K_START)
    return _read_jpeg_2000(frame[start:]) if start >= 0 else None


def _read_jpeg(frame: bytes) -> Codestream | None:
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != _PREFIX:
            return None
        marker = frame[at + 1]
        if marker == _PREFIX:  # fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        if marker in _FRAME_MARKERS:
            if at + 10 > len(frame):
                return None
            return Codestream(
                rows=int.from_bytes(frame[at + 5 : at + 7], "big"),
                cols=int.from_bytes(frame[at + 7 : at + 9], "big"),
                components=frame[at + 9],
                bits=frame[at + 4],
            )
        at += 2 + max(2, int.from_bytes(frame[at + 2 : at + 4], "big"))
    return None


def _read_jpeg_2000(frame: bytes) -> Codestream | None:
    """Read the SIZ segment (ITU-T T.800 A.5.1), which follows the start marker."""
    if len(frame) < _SIZ_BYTES:
        return None
    right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
    return Codestream(
        rows=bottom - top,
        cols=right - left,
        components=int.from_bytes(frame[40:42], "big"),
        bits=(frame[42] & 0x7F) + 1,
    )
