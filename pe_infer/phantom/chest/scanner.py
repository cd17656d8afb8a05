"""One scanner and its settings: what it does to a painted slice until stored values come out."""

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.acquisition import Layout, Noise, Streaks, apply_kernel
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.chest.mediastinum import CAVA, smooth
from pe_infer.phantom.chest.motion import Motion
from pe_infer.phantom.chest.tissues import Tissues
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw

_PADDING_STORED = -2000


class Scanner:
    """Turns painted slices into stored values."""

    def __init__(
        self, draw: Draw, config: PhantomConfig, layout: Layout, tissues: Tissues, frame: Frame
    ) -> None:
        """Draw kernel, noise, streaks and the way values are stored."""
        self._seed_rng = draw.rng("noise_slices")
        sharpness = draw.uniform("kernel_sharpness", config.kernel_sharpness)
        self.sharpness = sharpness
        self._taps = 0.2 - 0.36 * sharpness
        iterative = draw.uniform("iterative_strength", config.iterative_strength)
        self._noise = Noise(draw.rng("noise"), layout.matrix, layout.pixel_mm, sharpness, iterative)
        self._noise_hu = draw.log_uniform("noise_hu", config.noise_hu)
        if config.noise_kernel_gain:
            self._noise_hu *= float(np.exp(config.noise_kernel_gain * (sharpness - 0.4)))
        self._lung_drop = draw.uniform("noise_lung_drop", config.noise_lung_drop)
        overlap = layout.thickness_mm / layout.spacing_mm - 1
        apart = draw.uniform("noise_z_correlation", config.noise_z_correlation)
        self._like_before = min(apart + 0.45 * max(overlap, 0.0), 0.85) if apart else 0.0
        self._before: F32 | None = None
        x, y = layout.axis(0) - frame.shift_mm[0], layout.axis(1) - frame.shift_mm[1] - 10
        reach = (x[None, :] / 190) ** 2 + (y[:, None] / 130) ** 2
        self._spread = (0.5 + 0.55 * np.exp(-reach)).astype(np.float32)
        shoulders = (layout.z_mm - frame.shift_mm[2]) / frame.scale[2]
        self._gain = 1 + draw.uniform("shoulder_noise", (0.1, 0.7)) * np.clip(
            (shoulders - 55) / 30, 0, 1
        )
        self._shoulder = np.clip((shoulders - 60) / 25, 0, 1) * draw.uniform(
            "shoulder_streak_hu", (0.0, 22.0)
        )
        if draw.chance("arms_down", config.arms_down_probability):
            self._gain *= draw.uniform("arm_noise", (1.1, 1.5))
            self._shoulder = self._shoulder + draw.uniform("arm_streak_hu", (2.0, 14.0))
        self._motion = Motion.of(draw, config, layout, frame)
        circle = np.hypot(layout.axis(0)[None, :], layout.axis(1)[:, None] - 12)
        padded = draw.chance("padded_circle", config.padded_circle_probability)
        self._outside = circle > layout.pixel_mm * layout.matrix / 2 if padded else None
        self.padding = (_PADDING_STORED, _PADDING_STORED) if padded else None
        self.intercept = -1024.0 if draw.chance("stored_offset", 0.5) else 0.0
        fine = draw.chance("fine_streaks", config.fine_streak_probability)
        self._streaks = Streaks(
            draw.rng("streaks"), layout.pixel_mm, waves=Streaks.FINE if fine else Streaks.BROAD
        )
        dense = max(tissues.blood["cava"][0] - 250.0, 0.0) / 1000.0
        streaky = draw.chance("streaks", config.streak_probability)
        self._streak_hu = (
            170.0 * dense * draw.uniform("streak_strength", (0.3, 1.2)) if streaky else 0.0
        )
        path = frame.to_patient(smooth(CAVA[0])[:, :3].astype(np.float32))
        order = np.argsort(path[:, 2])
        self._cava = path[order]
        self._layout = layout

    def noise(self, index: int, air: F32 | None = None) -> F32:
        """Return the noise of the next slice; call it once per slice, in order.

        Args:
            index: Of the slice.
            air: (rows, cols) 0 in soft tissue to 1 deep in the lungs; ``None`` if all is alike.
        """
        rng = self._seed_rng
        out = self._noise.slice(rng)
        if self._like_before:
            if self._before is not None:
                out *= np.float32(np.sqrt(1 - self._like_before**2))
                out += np.float32(self._like_before) * self._before
            self._before = out.copy()
        out *= self._spread * np.float32(self._noise_hu * self._gain[index])
        if air is not None:
            out *= 1 - np.float32(self._lung_drop) * air
        if self._shoulder[index] > 0.5:
            lines = self._noise.slice(rng)
            lines = np.cumsum(lines, axis=1)
            lines[:, 24:] -= lines[:, :-24].copy()
            out += lines * np.float32(self._shoulder[index] / max(float(lines.std()), 1e-3))
        return out

    def streak(self, hu: F32, index: int) -> None:
        """Add the streaks of dense contrast in the superior vena cava, in place."""
        z = self._layout.z_mm[index]
        if self._streak_hu < 2 or not self._cava[0, 2] + 10 < z < self._cava[-1, 2] + 12:
            return
        x, y = (float(np.interp(z, self._cava[:, 2], self._cava[:, k])) for k in (0, 1))
        row = (y - self._layout.first_pixel_mm[1]) / self._layout.pixel_mm
        col = (x - self._layout.first_pixel_mm[0]) / self._layout.pixel_mm
        self._streaks.add(hu, row, col, self._streak_hu, self._seed_rng)

    @property
    def uneven(self) -> bool:
        """Whether noise is lower in the lungs."""
        return self._lung_drop > 0

    def blur(self, hu: F32, index: int) -> F32:
        """Apply breathing, and the kernel's blur or edge enhancement."""
        return apply_kernel(self._motion.apply(hu, index), self._taps)

    def store(self, hu: F32) -> NDArray[np.int16]:
        """Round to stored values."""
        values = np.clip(np.rint(hu), -1024, 3071) - self.intercept
        if self._outside is not None:
            values[self._outside] = _PADDING_STORED
        return values.astype(np.int16)
