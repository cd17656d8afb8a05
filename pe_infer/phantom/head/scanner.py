"""One scanner and its settings: what it adds to a painted slice until stored values come out.

Beam hardening, motion and the streaks of noise are made where they arise, in projections of small
images, and brought to the slices: they depend on the bones, so that dark bands lie between the
petrous bones and the skull casts a haze on the brain beneath it.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from pe_infer.phantom.acquisition import Noise, apply_kernel
from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.layout import HeadLayout
from pe_infer.phantom.head.projector import SIDE, projector
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw

_PADDING_STORED = -2000
_KEY_MM = 4.0  # artefacts are computed for slices this far apart
_BONE_HU = 250.0
_LARGEST_HU = np.float32(35.0)  # of an artefact: scanners correct most of it
_BAND_HU = 0.0024  # fall of a line integral with the square of its bone, per mm of bone


class Scanner:
    """Turns painted slices into stored values."""

    def __init__(self, draw: Draw, config: HeadConfig, layout: HeadLayout) -> None:
        """Draw kernel, noise, artefacts and the way values are stored."""
        self._layout = layout
        self._rng = draw.rng("noise_slices")
        self.sharpness = draw.uniform("kernel_sharpness", config.kernel_sharpness)
        self._taps = 0.17 - 0.32 * self.sharpness
        self._noise = Noise(
            draw.rng("noise"), layout.matrix, layout.pixel_mm, 0.15 + 0.7 * self.sharpness
        )
        base = draw.log_uniform("noise_hu", config.noise_hu)
        self._noise_hu = base * (5.0 / np.maximum(layout.thickness_mm, 0.5)) ** 0.4
        self._streaky = draw.uniform("noise_streaks", (0.2, 0.6))
        self._hardening = draw.uniform("beam_hardening", config.beam_hardening)
        self._residual = draw.uniform("cupping_hu", (-4.0, 4.0))
        self._moved = draw.chance("motion", config.motion_probability)
        self._motion_mm = draw.uniform("motion_mm", config.motion_mm)
        self._motion_rng = draw.rng("motion_views")
        self._streak_rng = draw.rng("noise_streak_lines")
        radius = np.hypot(layout.axis(0)[None, :], layout.axis(1)[:, None])
        self._spread = np.asarray(0.55 + 0.45 * np.exp(-((radius / 95.0) ** 4)), np.float32)
        padded = draw.chance("padded_circle", config.padded_circle_probability)
        middle = layout.first_pixel_mm[1] + (layout.matrix - 1) / 2 * layout.pixel_mm
        circle = np.hypot(layout.axis(0)[None, :], layout.axis(1)[:, None] - middle)
        self._outside = circle > layout.pixel_mm * layout.matrix / 2 if padded else None
        self.padding = (_PADDING_STORED, _PADDING_STORED) if padded else None
        self.intercept = -1024.0 if draw.chance("stored_offset", 0.5) else 0.0
        self._keys: NDArray[np.int64] = np.zeros(0, np.int64)
        self._fixed: F32 = np.zeros((0, SIDE, SIDE), np.float32)
        self._lines: F32 = np.zeros((0, SIDE, SIDE), np.float32)

    def look(self, slices: F32) -> None:
        """Work out the artefacts of all slices from their painted values without hemorrhage.

        Args:
            slices: (n, rows, cols) HU on the painted planes' lattice.
        """
        layout, engine = self._layout, projector()
        reach = float(np.ptp(layout.w_mm))
        count = min(len(slices), max(2, int(reach / _KEY_MM) + 1))
        targets = np.linspace(layout.w_mm[0], layout.w_mm[-1], count)
        self._keys = np.unique(np.abs(layout.w_mm[:, None] - targets).argmin(0))
        along_v, along_u = self._shares(1), self._shares(0).T
        # Sums of einsum, unlike those of a product of matrices, do not depend on threads.
        rows = [np.einsum("sv,vu->su", along_v, slices[k] + 1000) for k in self._keys]
        small = np.stack([np.einsum("sv,vu->su", row, along_u) - 1000 for row in rows])
        pixel = self._small_mm
        bone = np.asarray(np.where(small > _BONE_HU, small, 0) * (pixel / 1000), np.float32)
        water = np.asarray(np.clip(small + 1000, 0, 1100) * (pixel / 1000), np.float32)
        thick, wet = engine.project(bone), engine.project(water)
        error = -_BAND_HU * self._hardening * thick * (thick + 0.10 * wet)
        cup = self._residual * 2.2e-5 * wet * wet
        fixed = engine.reconstruct(error + cup) * 1000 / pixel
        if self._moved:
            fixed += self._motion(small)
        brain = (small > -50) & (small < 120)
        for k in np.flatnonzero(brain.any((1, 2))):
            # The scanner's calibration sets the middle right, slice by slice, to a degree.
            fixed[k] -= np.float32(0.85 * np.median(fixed[k][brain[k]]))
        self._fixed = np.asarray(_LARGEST_HU * np.tanh(fixed / _LARGEST_HU), np.float32)
        noisy = self._streak_rng.standard_normal(thick.shape, dtype=np.float32)
        noisy *= np.exp(0.5 * np.minimum(0.019 * (wet + 1.6 * thick), 7.0))
        lines = engine.reconstruct(noisy)
        middle = slice(SIDE // 3, 2 * SIDE // 3)
        self._lines = lines / max(float(np.median(lines[:, middle, middle].std((1, 2)))), 1e-6)

    @property
    def _small_mm(self) -> float:
        return self._layout.pixel_mm * self._layout.matrix / SIDE

    def _shares(self, which: int) -> F32:
        """Share (small pixels, painted pixels) of the mean along u (0) or v (1)."""
        layout, size = self._layout, self._small_mm
        painted = layout.fine.axis(which)
        low = layout.first_pixel_mm[which] - layout.pixel_mm / 2 + np.arange(SIDE) * size
        step = layout.fine.step_mm[which]
        overlap = np.minimum(low[:, None] + size, painted + step / 2) - np.maximum(
            low[:, None], painted - step / 2
        )
        return np.asarray(np.clip(overlap, 0, None) / size, np.float32)

    def _motion(self, small: F32) -> F32:
        """What is added where the head moved during a part of the turn, in a few slices."""
        rng, engine = self._motion_rng, projector()
        out = np.zeros_like(small)
        first = int(rng.integers(0, len(small)))
        for k in range(first, min(first + int(rng.integers(2, 7)), len(small))):
            dy, dx = rng.normal(0, self._motion_mm / self._small_mm / 1.4, 2)
            turn = np.deg2rad(rng.normal(0, 0.5 * self._motion_mm))
            y, x = np.meshgrid(*(np.arange(SIDE) - (SIDE - 1) / 2,) * 2, indexing="ij")
            c, s = np.cos(turn), np.sin(turn)
            at = (c * y - s * x + dy + (SIDE - 1) / 2, s * y + c * x + dx + (SIDE - 1) / 2)
            moved = map_coordinates(small[k], at, order=1, mode="constant", cval=-1000.0)
            change = engine.project((moved - small[k])[None])
            views = np.arange(change.shape[1])
            start, width = rng.integers(0, len(views)), rng.integers(20, 60)
            part = np.clip(1.5 - np.abs(views - start) / width, 0, 1)
            out[k] = engine.reconstruct(change * part[None, :, None].astype(np.float32))[0]
        return out

    def _enlarge(self, small: F32) -> F32:
        """Bring a small image to the pixels of a slice."""
        n = self._layout.matrix
        at = (np.arange(n) + 0.5) * SIDE / n - 0.5
        low = np.clip(np.floor(at).astype(np.int64), 0, SIDE - 2)
        t = np.clip(at - low, 0, 1).astype(np.float32)
        rows = small[low] + (small[low + 1] - small[low]) * t[:, None]
        return np.asarray(rows[:, low] + (rows[:, low + 1] - rows[:, low]) * t[None, :])

    def extras(self, index: int) -> F32:
        """Return artefacts and noise of the next slice; call it once per slice, in order."""
        rng = self._rng
        after = int(np.clip(np.searchsorted(self._keys, index, "right"), 1, len(self._keys) - 1))
        before = after - 1
        a, b = int(self._keys[before]), int(self._keys[after])
        share = np.float32(np.clip((index - a) / max(b - a, 1), 0, 1))
        fixed = self._fixed[before] * (1 - share) + self._fixed[after] * share
        angle = np.float32(np.pi / 2) * share
        lines = self._lines[before] * np.cos(angle) + self._lines[after] * np.sin(angle)
        if rng.integers(0, 2):
            lines = -lines
        noise = np.float32(self._noise_hu[index])
        small = fixed + lines * (noise * np.float32(self._streaky))
        grain = self._noise.slice(rng) * self._spread
        return self._enlarge(small) + grain * (noise * np.float32(1 - 0.5 * self._streaky))

    def blur(self, hu: F32) -> F32:
        """Apply the kernel's blur or edge enhancement."""
        return apply_kernel(hu, self._taps)

    def store(self, hu: F32) -> NDArray[np.int16]:
        """Round to stored values."""
        values = np.clip(np.rint(hu), -1024, 3071) - self.intercept
        if self._outside is not None:
            values[self._outside] = _PADDING_STORED
        return values.astype(np.int16)


def head_holder(draw: Draw, layout: HeadLayout, back_mm: float, middle_mm: float) -> F32:
    """Return (rows, cols) HU of the empty field of view: air, and a shell the head lies in.

    Args:
        draw: Source of random numbers.
        layout: Where the pixels lie.
        back_mm: v of the back of the head.
        middle_mm: u of its middle.
    """
    u = layout.axis(0)[None, :].astype(np.float32) - np.float32(middle_mm)
    v = layout.axis(1)[:, None].astype(np.float32)
    hu = np.full((layout.matrix, layout.matrix), -1000.0, np.float32)
    width = draw.uniform("holder_half_width_mm", (84.0, 102.0))
    depth = draw.uniform("holder_depth_mm", (80.0, 120.0))
    gap = draw.uniform("holder_gap_mm", (6.0, 16.0))
    power = draw.uniform("holder_power", (2.0, 4.0))
    foam = draw.uniform("foam_hu", (-985.0, -940.0))
    shell = draw.uniform("holder_hu", (-150.0, 180.0))
    thickness = draw.uniform("holder_mm", (1.5, 4.0))
    top = np.float32(back_mm + gap - depth)
    ahead = np.maximum(v - top, 0)
    level = (np.abs(u / width) ** power + (ahead / depth) ** power) ** (1 / power)
    distance = (level - 1) * np.float32(min(width, depth))
    low = np.clip((v - top - draw.uniform("holder_rim_mm", (0.0, 40.0))) / layout.pixel_mm, 0, 1)
    inner = np.clip(0.5 - distance / layout.pixel_mm, 0, 1) * low
    hu += inner * (foam - hu)
    wall = np.clip(0.5 + (thickness / 2 - np.abs(distance)) / layout.pixel_mm, 0, 1) * low
    return np.asarray(hu + wall * (shell - hu), np.float32)
