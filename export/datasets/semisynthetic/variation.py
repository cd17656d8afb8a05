"""One real patient as several: of another size, at another height of the grid."""

from dataclasses import replace

from pe_infer.geometry import Slice


def varied(image: Slice, *, scale: float, shift_mm: float) -> Slice:
    """The same slice of a patient of another size in plane, at another height.

    Args:
        image: The slice.
        scale: Factor on pixel spacings and on the place of the image in its plane.
        shift_mm: Towards the head.
    """
    geometry = image.geometry
    x, y, z = geometry.image_position_mm
    moved = replace(
        geometry,
        row_spacing_mm=geometry.row_spacing_mm * scale,
        col_spacing_mm=geometry.col_spacing_mm * scale,
        image_position_mm=(x * scale, y * scale, z + shift_mm),
    )
    return replace(image, geometry=moved)
