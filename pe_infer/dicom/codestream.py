"""JPEG, JPEG-LS and JPEG 2000 codestreams, checked and tidied before a codec sees them.

Codecs trust the DICOM header for the size of their buffers, and differ in what a codestream that
contradicts it does to them: an exception, a cropped image, the end of the process. GDCM also ends
the process where libjpeg merely warns of something in the header, such as an unknown JFIF revision.
A codestream without its end marker was cut short; some codecs fill up the image without a word.
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
_JPEG_LS_FRAME = 0xF7
# Start-of-frame markers of ITU-T T.81 (C4, C8 and CC are others) and of JPEG-LS.
_FRAMES = frozenset({*range(0xC0, 0xD0), _JPEG_LS_FRAME}) - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xF8})  # Huffman, quantisation, restart; JPEG-LS presets
_REMARKS = frozenset({*range(0xE0, 0xF0), 0xFE})  # APPn and comments: nothing about grey values
_FRAME_BYTES = 11  # start of frame with one component, its length included
# Which frames a transfer syntax may hold: baseline and extended, lossless, JPEG-LS.
_SEQUENTIAL, _LOSSLESS = frozenset({0xC0, 0xC1}), frozenset({0xC3})
_FRAMES_OF = {
    "1.2.840.10008.1.2.4.50": _SEQUENTIAL,
    "1.2.840.10008.1.2.4.51": _SEQUENTIAL,
    "1.2.840.10008.1.2.4.57": _LOSSLESS,
    "1.2.840.10008.1.2.4.70": _LOSSLESS,
    "1.2.840.10008.1.2.4.80": frozenset({_JPEG_LS_FRAME}),
    "1.2.840.10008.1.2.4.81": frozenset({_JPEG_LS_FRAME}),
}
_RESEND = "Send the file again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Codestream:
    """A codestream and what its header says of the image.

    Attributes:
        rows: Rows.
        cols: Columns.
        components: Samples per pixel.
        bits: Precision of a sample.
        marker: Start-of-frame marker of a JPEG, which names the process; ``None`` for JPEG 2000.
        data: The codestream; of a JPEG without application data and comments.
    """

    rows: int
    cols: int
    components: int
    bits: int
    marker: int | None
    data: bytes


def checked_codestream(
    frame: bytes, *, transfer_syntax: str, rows: int, cols: int, bits_allocated: int, name: str
) -> Codestream:
    """Read the header of a codestream and compare it with the DICOM header.

    Args:
        frame: One encoded frame.
        transfer_syntax: UID of the encoding, one of the JPEG family.
        rows: Rows.
        cols: Columns.
        bits_allocated: BitsAllocated.
        name: File, for messages.

    Raises:
        DicomError: ``UNDECODABLE_PIXELS`` if there is no codestream of this kind; it has another
            size, more than one component, more bits than are allocated, or no end.
    """
    found = read_codestream(frame)
    if found is None or (found.marker is None) != (transfer_syntax not in _FRAMES_OF):
        raise _damaged(name, "the compressed pixel data holds no image of its transfer syntax")
    if found.marker is not None and found.marker not in _FRAMES_OF[transfer_syntax]:
        raise _damaged(
            name, f"the compressed image is of another JPEG process (FF{found.marker:02X})"
        )
    if (found.rows, found.cols, found.components) != (rows, cols, 1):
        raise _damaged(
            name,
            f"the compressed image is {found.rows} x {found.cols} with {found.components} "
            f"component(s), the header says {rows} x {cols} with 1",
        )
    if found.bits > bits_allocated:
        raise _damaged(
            name, f"the compressed image has {found.bits} bits, BitsAllocated is {bits_allocated}"
        )
    if _END not in frame[-_TAIL_BYTES:]:
        raise _damaged(name, "the compressed image has no end marker, so it was cut short")
    return found


def read_codestream(frame: bytes) -> Codestream | None:
    """Return header and data, or ``None`` if this is no JPEG, JPEG-LS or JPEG 2000 codestream."""
    if frame[:2] == _JPEG_START:
        return _read_jpeg(frame)
    start = frame[:_JP2_HEADER_BYTES].find(_J2K_START)
    return _read_jpeg_2000(frame, start) if start >= 0 else None


def _damaged(name: str, what: str) -> DicomError:
    return DicomError(f"{name}: {what}. {_RESEND}", code=Code.UNDECODABLE_PIXELS)


def _read_jpeg(frame: bytes) -> Codestream | None:
    """Walk the segments up to the first scan (ITU-T T.81 B.1): nothing may lie between them."""
    kept = [_JPEG_START]
    header: bytes | None = None
    at = 2
    while at + 4 <= len(frame):
        marker = frame[at + 1]
        if frame[at] != _PREFIX:
            return None
        if marker == _PREFIX:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(frame):
            return None
        segment = frame[at:end]
        if marker == _SCAN:
            return None if header is None else _jpeg(header, [*kept, frame[at:]])
        if marker in _FRAMES:
            if header is not None or len(segment) < _FRAME_BYTES + 2:
                return None
            header = segment
        elif marker not in _TABLES and marker not in _REMARKS:
            return None
        if marker not in _REMARKS:
            kept.append(segment)
        at = end
    return None


def _jpeg(header: bytes, parts: list[bytes]) -> Codestream:
    return Codestream(
        rows=int.from_bytes(header[5:7], "big"),
        cols=int.from_bytes(header[7:9], "big"),
        components=header[9],
        bits=header[4],
        marker=header[1],
        data=b"".join(parts),
    )


def _read_jpeg_2000(frame: bytes, start: int) -> Codestream | None:
    """Read the SIZ segment (ITU-T T.800 A.5.1), which follows the start marker."""
    siz = frame[start : start + _SIZ_BYTES]
    if len(siz) < _SIZ_BYTES:
        return None
    right, bottom, left, top = (int.from_bytes(siz[at : at + 4], "big") for at in (8, 12, 16, 20))
    return Codestream(
        rows=bottom - top,
        cols=right - left,
        components=int.from_bytes(siz[40:42], "big"),
        bits=(siz[42] & 0x7F) + 1,
        marker=None,
        data=frame,
    )
