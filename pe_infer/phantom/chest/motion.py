"""Breathing during the scan: over some height the image is mixed of two positions."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.acquisition import Layout
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """A double contour.

    Attributes:
        rows: Shift of the second position in pixels.
        cols: The same, along a row.
        share: (n,) weight of the second position per slice, 0 at rest.
    """

    rows: int
    cols: int
    share: NDArray[np.float32]

    @classmethod
    def of(cls, draw: Draw, config: PhantomConfig, layout: Layout, frame: Frame) -> Self:
        """Draw where and how far a patient moves; most do not."""
        still = np.zeros(len(layout.z_mm), np.float32)
        if not draw.chance("motion", config.motion_probability):
            return cls(rows=0, cols=0, share=still)
        way = draw.uniform("motion_mm", config.motion_mm) / layout.pixel_mm
        angle = draw.uniform("motion_angle", (-0.6, 0.6)) + np.pi / 2  # mostly front to back
        centre = frame.shift_mm[2] + frame.scale[2] * draw.uniform("motion_z_mm", (-130.0, 40.0))
        reach = draw.uniform("motion_reach_mm", (12.0, 60.0))
        share = draw.uniform("motion_share", (0.25, 0.5)) * np.clip(
            1.5 - np.abs(layout.z_mm - centre) / reach, 0, 1
        )
        return cls(
            rows=round(way * float(np.sin(angle))),
            cols=round(way * float(np.cos(angle))),
            share=share.astype(np.float32),
        )

    def apply(self, hu: F32, index: int) -> F32:
        """Return a slice as it is seen: (rows, cols)."""
        share = self.share[index]
        if not share or not (self.rows or self.cols):
            return hu
        return np.asarray(
            hu + share * (np.roll(hu, (self.rows, self.cols), (0, 1)) - hu), np.float32
        )
