"""A slice as people look at it: windowed, with the attention as a colour wash, and words on it."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pe_infer.geometry import AIR_HU, Slice, SliceGeometry, Vector
from pe_infer.result import Attention

LEAST_SIDE: Final = 512  # pixels, so that the words fit
# Attention below this share of the study's highest is not shown; from there the colour goes from
# orange to yellow, and hides at most this share of the image. A pure red is dark to those who see
# no red.
SHOWN_FROM: Final = 0.3
MOST_OPAQUE: Final = 0.45
_LEAST_GREEN: Final = 0.4
_FONT_PX: Final = 14
_MARGIN_PX: Final = 4
_WHITE: Final = (255, 255, 255)


class DisplayWindow(NamedTuple):
    """WindowCenter and WindowWidth, in HU."""

    centre: float
    width: float

    def __str__(self) -> str:
        """As consoles write it."""
        return f"C {self.centre:g} W {self.width:g}"


# For sources without a window that is centred on soft tissue (lung and bone windows are not).
DEFAULT_WINDOW: Final = DisplayWindow(40.0, 400.0)
_SOFT_TISSUE_HU: Final = (0.0, 400.0)
_WIDEST_HU: Final = 4096.0


def display_window(stated: Sequence[tuple[float, float]]) -> DisplayWindow:
    """Choose the first window of a source that is centred on soft tissue, else a default."""
    low, high = _SOFT_TISSUE_HU
    suited = (pair for pair in stated if low <= pair[0] <= high and 1 < pair[1] <= _WIDEST_HU)
    return DisplayWindow(*next(suited, DEFAULT_WINDOW))


def rendered(
    image: Slice,
    attention: Attention | None,
    *,
    strongest: float,
    window: DisplayWindow,
    above: Sequence[str],
    below: Sequence[str],
    sides: tuple[str, str] | None = None,
) -> NDArray[np.uint8]:
    """Draw one slice.

    Args:
        image: The slice.
        attention: Of the slab it is nearest to.
        strongest: Highest attention of the study, which gets the full colour.
        window: What becomes black and white.
        above: Lines for the top.
        below: Lines for the bottom.
        sides: Which sides of the patient are left and right in the picture, such as ``("R", "L")``.

    Returns:
        (rows, cols, 3) RGB: the slice, enlarged by a whole number to at least ``LEAST_SIDE`` pixels
        a side, between two black bands with the words, and two with the sides. Lines that are too
        long are folded.
    """
    pixels = image.host_pixels
    hu = pixels.astype(np.float32) * image.rescale_slope + image.rescale_intercept
    if image.padding is not None:
        hu[(pixels >= image.padding[0]) & (pixels <= image.padding[1])] = AIR_HU
    low = window.centre - window.width / 2
    grey = np.clip((hu - low) / window.width, 0.0, 1.0)
    rgb = np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if attention is not None and strongest > 0:
        share = (attention_on(image.geometry, attention) / strongest - SHOWN_FROM) / (
            1 - SHOWN_FROM
        )
        share = np.clip(share, 0.0, 1.0)[:, :, np.newaxis]
        green = _LEAST_GREEN + (1 - _LEAST_GREEN) * share
        colour = np.concatenate([np.ones_like(share), green, np.zeros_like(share)], axis=2)
        opacity = MOST_OPAQUE * np.minimum(1.0, 2.0 * share)
        rgb = (1 - opacity) * rgb + opacity * colour
    factor = math.ceil(LEAST_SIDE / min(rgb.shape[:2]))
    large = (rgb * 255 + 0.5).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
    return _with_words(large, above, below, sides)


def attention_on(geometry: SliceGeometry, attention: Attention) -> NDArray[np.float32]:
    """Interpolate an attention map at the pixels of a slice.

    Returns:
        (rows, cols) activations; 0 outside of the map.
    """
    affine = np.asarray(attention.patient_affine, np.float64)
    origin = affine[:3, 3]
    rows, cols = np.mgrid[: geometry.rows, : geometry.cols].astype(np.float32)
    along_row = _scaled(geometry.row_direction, geometry.col_spacing_mm)
    along_col = _scaled(geometry.col_direction, geometry.row_spacing_mm)
    start = np.asarray(geometry.image_position_mm) - origin
    cells = []
    for axis in (affine[:3, 1], affine[:3, 0]):  # map rows, then map columns
        unit = axis / (axis @ axis)
        cells.append(
            np.float32(start @ unit)
            + np.float32(along_row @ unit) * cols
            + np.float32(along_col @ unit) * rows
        )
    return _interpolated(attention.values, cells[0], cells[1])


def _interpolated(
    values: NDArray[np.float32], rows: NDArray[np.float32], cols: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Interpolate linearly between the centres of cells; constant in the outer half cells."""
    height, width = values.shape
    inside = (rows >= -0.5) & (rows <= height - 0.5) & (cols >= -0.5) & (cols <= width - 0.5)  # noqa: PLR2004
    r = np.clip(rows, 0, height - 1)
    c = np.clip(cols, 0, width - 1)
    r0, c0 = r.astype(np.intp), c.astype(np.intp)
    r1, c1 = np.minimum(r0 + 1, height - 1), np.minimum(c0 + 1, width - 1)
    fr, fc = r - r0, c - c0
    top = values[r0, c0] * (1 - fc) + values[r0, c1] * fc
    bottom = values[r1, c0] * (1 - fc) + values[r1, c1] * fc
    found: NDArray[np.float32] = np.where(inside, top * (1 - fr) + bottom * fr, np.float32(0))
    return found


def _with_words(
    rgb: NDArray[np.uint8],
    above: Sequence[str],
    below: Sequence[str],
    sides: tuple[str, str] | None,
) -> NDArray[np.uint8]:
    """Put black bands with words around the picture, so that they hide nothing."""
    line_px = _FONT_PX + _MARGIN_PX
    font = ImageFont.load_default(_FONT_PX)
    side = 0 if sides is None else line_px
    height, width = rgb.shape[0], rgb.shape[1] + 2 * side
    above, below = (
        [part for line in lines for part in _folded(line, font, width - 2 * _MARGIN_PX)]
        for lines in (above, below)
    )
    top, bottom = (len(lines) * line_px + _MARGIN_PX for lines in (above, below))
    picture = Image.fromarray(np.pad(rgb, ((top, bottom), (side, side), (0, 0))))
    draw = ImageDraw.Draw(picture)
    for start, lines in ((0, above), (top + height, below)):
        for number, text in enumerate(lines):
            place = (_MARGIN_PX, start + number * line_px)
            draw.text(place, text, fill=_WHITE, font=font)
    if sides is not None:
        for text, centre in zip(sides, (side / 2, width - side / 2), strict=True):
            draw.text((centre, top + height / 2), text, fill=_WHITE, font=font, anchor="mm")
    return np.asarray(picture)


def _folded(
    line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int
) -> list[str]:
    """Break a line between words where it is too long."""
    lines: list[str] = []
    for word in line.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _scaled(vector: Vector, factor: float) -> NDArray[np.float64]:
    return np.asarray(vector) * factor
