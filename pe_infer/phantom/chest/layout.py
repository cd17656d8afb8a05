"""Where the slices of a chest study lie, and what lies around the patient."""

import numpy as np

from pe_infer.phantom.acquisition import Layout
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw

_SUBPLANE_MM = 1.25
_LUNG_TOP_MM = 101.0  # reference
_LUNG_BOTTOM_MM = -158.0


def sample_layout(draw: Draw, config: PhantomConfig, frame: Frame) -> Layout:
    """Draw the sampling: complete lungs with a random margin, and a random phase."""
    pixel = draw.uniform("pixel_spacing_mm", config.pixel_spacing_mm)
    spacing = round(draw.uniform("slice_spacing_mm", config.slice_spacing_mm), 3)
    thickness = spacing * draw.uniform("thickness_per_spacing", config.thickness_per_spacing)
    top = frame.scale[2] * _LUNG_TOP_MM + draw.uniform("above_mm", config.coverage_above_lungs_mm)
    bottom = frame.scale[2] * _LUNG_BOTTOM_MM - draw.uniform(
        "below_mm", config.coverage_below_lungs_mm
    )
    count = max(2, int((top - bottom) / spacing) + 1)
    bottom_mm = round(frame.shift_mm[2] + bottom, 3)
    z = np.asarray(bottom_mm + spacing * np.arange(count), np.float64)
    # The patient lies off the middle of the field of view by the frame's shift.
    half = (config.matrix - 1) / 2 * pixel
    per_slice = max(1, int(np.ceil(spacing / _SUBPLANE_MM - 1e-9)))
    step = spacing / per_slice
    return Layout(
        matrix=config.matrix,
        pixel_mm=pixel,
        first_pixel_mm=(-half, 12.0 - half),
        z_mm=z,
        spacing_mm=spacing,
        thickness_mm=thickness,
        subplane_mm=step,
        first_subplane_mm=float(z[0]) - spacing / 2 + step / 2,
    )


def table_background(draw: Draw, layout: Layout, back_mm: float) -> F32:
    """Return (rows, cols) HU of the empty field of view: air, mattress and a table."""
    x, y = layout.axis(0)[None, :].astype(np.float32), layout.axis(1)[:, None].astype(np.float32)
    hu = np.full((layout.matrix, layout.matrix), -1000.0, np.float32)
    width = draw.uniform("table_half_width_mm", (180.0, 235.0))
    curve = draw.uniform("table_curve_per_mm", (0.0, 7e-4))
    top = np.float32(back_mm + draw.uniform("table_gap_mm", (1.0, 14.0)))
    upper = top - np.float32(curve) * x * x
    depth = draw.uniform("table_depth_mm", (8.0, 55.0))
    lower = top + np.float32(depth) - np.clip((np.abs(x) - 0.55 * width) * 0.9, 0, depth)
    shell = draw.uniform("table_shell_mm", (1.0, 2.6))
    inside = np.clip(0.5 - (np.abs(x) - width) / layout.pixel_mm, 0, 1)
    core = np.clip(0.5 + (y - upper) / layout.pixel_mm, 0, 1) * np.clip(
        0.5 - (y - lower) / layout.pixel_mm, 0, 1
    )
    hu += core * inside * (draw.uniform("table_core_hu", (-980.0, -780.0)) + 1000)
    bright = draw.uniform("table_shell_hu", (-350.0, 250.0))
    for edge in (upper, lower):
        near = np.clip(0.5 + (shell / 2 - np.abs(y - edge)) / layout.pixel_mm, 0, 1)
        hu += near * inside * (bright - hu)
    mattress = np.abs(y - upper + draw.uniform("mattress_mm", (3.0, 12.0)))
    hu += np.clip(1.0 - mattress / 1.5, 0, 1) * inside * draw.uniform("mattress_hu", (0.0, 250.0))
    return hu
