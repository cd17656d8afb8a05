"""How the pixels of an image are stored: the Image Pixel module (PS3.3 C.7.6.3), checked."""

from dataclasses import dataclass

from pe_infer.dicom.attributes import Attributes
from pe_infer.errors import Code, DicomError

MAX_SIDE = 8192  # rows or columns beyond this are a damaged header, not a CT image
MAX_PIXELS = 1 << 31  # of all frames: 2048 of 1024 x 1024. Compressed, a few kB can claim more


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
        """Read the 16 bits of an attribute such as PixelPaddingValue with the sign of the pixels.

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
            "with 1. Send the axial CT reconstruction.",
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
    if rows * cols * frames > MAX_PIXELS:
        raise a.invalid(
            "NumberOfFrames", frames, f"at most {MAX_PIXELS // (rows * cols)} of {rows} x {cols}"
        )
    return PixelLayout(
        rows=rows,
        cols=cols,
        frames=frames,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        signed=representation == 1,
    )
