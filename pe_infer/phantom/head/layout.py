"""Where the slices of a head study lie: steps, thickness, tilt, and the volume that is painted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.acquisition import slice_profile
from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.frame import Frame
from pe_infer.phantom.raster import F32, Lattice
from pe_infer.phantom.sampling import Draw

_SUBPLANE_MM = 1.7
_RENDER_MM = 0.8  # pixels of the painted planes; below what a head kernel resolves
_COARSE_MM = 2.0
_FORAMEN = (0.0, 22.0, -66.0)  # reference
_PETROUS_TOP = (0.0, 10.0, -12.0)
_VERTEX = (0.0, 0.0, 84.0)
_HALF_WIDTH_MM = 96.0
_FRONT_MM = -134.0
_BACK_MM = 118.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """Where the samples lie, in gantry coordinates (u, v, w).

    Attributes:
        matrix: Rows and columns.
        pixel_mm: Distance of pixels.
        first_pixel_mm: (u, v) of the centre of pixel (0, 0).
        tilt_rad: Of the gantry.
        w_mm: (n,) table positions of the slices, ascending.
        thickness_mm: (n,) widths of the slice profiles, along the normal.
        fine: Lattice of the planes that are painted and then averaged into slices.
        coarse: Lattice of smooth fields.
    """

    matrix: int
    pixel_mm: float
    first_pixel_mm: tuple[float, float]
    tilt_rad: float
    w_mm: NDArray[np.float64]
    thickness_mm: NDArray[np.float64]
    fine: Lattice
    coarse: Lattice

    def axis(self, which: int) -> NDArray[np.float64]:
        """Return pixel centres along u (0) or v (1) in mm."""
        offsets = self.pixel_mm * np.arange(self.matrix, dtype=np.float64)
        return np.asarray(self.first_pixel_mm[which] + offsets, np.float64)

    def profile(self, index: int) -> tuple[int, F32]:
        """Return a slice's first painted plane and the weights from there on (they sum to 1)."""
        along_table = float(self.thickness_mm[index]) / float(np.cos(self.tilt_rad))
        first, step = self.fine.origin_mm[2], self.fine.step_mm[2]
        return slice_profile(float(self.w_mm[index]), along_table, first, step)

    def spacing_mm(self, index: int) -> float:
        """Distance along the normal that a slice stands for: halfway to both neighbours."""
        steps = np.diff(self.w_mm)
        around = steps[max(index - 1, 0) : index + 1]
        return float(around.mean() * np.cos(self.tilt_rad))


def _positions(
    draw: Draw, config: HeadConfig, bottom: float, middle: float, top: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions along the normal and thickness; thin below ``middle`` where spacing is mixed."""
    thick = draw.chance("thick_slices", config.thick_slice_probability)
    spacing = draw.uniform("thick_slice_spacing_mm", config.thick_slice_spacing_mm)
    thin = draw.log_uniform("slice_spacing_mm", config.slice_spacing_mm)
    mixed = draw.chance("mixed_spacing", config.mixed_spacing_probability)
    if not thick:
        spacing = thin
    spacing = round(spacing, 2)
    if not mixed:
        count = max(2, int((top - bottom) / spacing) + 1)
        positions = np.asarray(bottom + spacing * np.arange(count), np.float64)
        return positions, np.full(count, spacing)
    above = round(spacing * draw.uniform("mixed_ratio", (1.3, 2.0)), 2)
    low = np.arange(bottom, middle, spacing)
    # Scanners start the second part anew: its first slice may overlap the last of the first part.
    step = draw.uniform("mixed_step", (0.3, 1.0)) * (spacing + above) / 2
    high = np.arange(low[-1] + round(step, 2), top + above / 2, above)
    widths = [np.full(len(low), spacing), np.full(len(high), above)]
    return np.concatenate([low, high]), np.concatenate(widths)


def sample_layout(draw: Draw, config: HeadConfig, frame: Frame) -> HeadLayout:
    """Draw the sampling: from about the foramen magnum to above the vertex, at a random phase."""
    pixel = draw.uniform("pixel_spacing_mm", config.pixel_spacing_mm)
    ends = frame.to_gantry(np.array([_FORAMEN, _PETROUS_TOP, _VERTEX], np.float32))[:, 2]
    below = draw.uniform("below_foramen_mm", config.coverage_below_foramen_mm)
    above = draw.uniform("above_vertex_mm", config.coverage_above_vertex_mm)
    cosine = float(np.cos(frame.tilt_rad))
    bottom, top = float(ends[0]) - below, float(ends[2]) + above
    n, thickness = _positions(draw, config, bottom * cosine, float(ends[1]) * cosine, top * cosine)
    w = np.round(n / cosine, 4)
    least = float(thickness.min()) / cosine
    step = least / max(1, int(np.ceil(least / _SUBPLANE_MM - 1e-9)))
    first = float(w[0]) - float(thickness[0]) / cosine / 2 + step / 2
    last = float(w[-1]) + float(thickness[-1]) / cosine / 2
    planes = int(np.ceil((last - first) / step)) + 2
    half = (config.matrix - 1) / 2 * pixel
    middle_y = -6.0  # the face reaches further than the back of the head
    render = max(_RENDER_MM, 0.75 * pixel)
    u0, v0 = frame.shift_mm[0] - _HALF_WIDTH_MM, frame.shift_mm[1] + _FRONT_MM
    counts = [int(2 * _HALF_WIDTH_MM / render) + 1, int((_BACK_MM - _FRONT_MM) / render) + 1]
    fine = Lattice(
        origin_mm=(u0, v0, first),
        step_mm=(render, render, step),
        shape=(planes, counts[1], counts[0]),
    )
    sizes = [int(np.ceil(c * render / _COARSE_MM)) + 2 for c in counts]
    coarse = Lattice(
        origin_mm=(u0 - 1.0, v0 - 1.0, first - 3.0),
        step_mm=(_COARSE_MM, _COARSE_MM, _COARSE_MM),
        shape=(int(np.ceil((last - first) / _COARSE_MM)) + 5, sizes[1], sizes[0]),
    )
    return HeadLayout(
        matrix=config.matrix,
        pixel_mm=pixel,
        first_pixel_mm=(-half, middle_y - half),
        tilt_rad=frame.tilt_rad,
        w_mm=np.asarray(w, np.float64),
        thickness_mm=np.asarray(thickness, np.float64),
        fine=fine,
        coarse=coarse,
    )
