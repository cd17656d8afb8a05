"""How a volume is sampled, and what an acquisition adds to it: kernel, noise, streaks."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from pe_infer.phantom.raster import F32


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the samples lie.

    Attributes:
        matrix: Rows and columns.
        pixel_mm: Distance of pixels.
        first_pixel_mm: (x, y) of the centre of pixel (0, 0).
        z_mm: (n,) positions of the slices, ascending.
        spacing_mm: Distance of slices.
        thickness_mm: Width of the slice profile.
        subplane_mm: Distance of the planes that are averaged into slices.
        first_subplane_mm: Position of plane 0.
    """

    matrix: int
    pixel_mm: float
    first_pixel_mm: tuple[float, float]
    z_mm: NDArray[np.float64]
    spacing_mm: float
    thickness_mm: float
    subplane_mm: float
    first_subplane_mm: float

    def axis(self, which: int) -> NDArray[np.float64]:
        """Return pixel centres along x (0) or y (1) in mm."""
        offsets = self.pixel_mm * np.arange(self.matrix, dtype=np.float64)
        return np.asarray(self.first_pixel_mm[which] + offsets, np.float64)

    def profile(self, index: int) -> tuple[int, F32]:
        """Return a slice's first sub-plane and the weights from there on (they sum to 1)."""
        return slice_profile(
            float(self.z_mm[index]), self.thickness_mm, self.first_subplane_mm, self.subplane_mm
        )


def slice_profile(
    position_mm: float, thickness_mm: float, first_mm: float, step_mm: float
) -> tuple[int, F32]:
    """Return the first of the planes that a slice averages, and the weights from there on.

    Args:
        position_mm: Of the slice.
        thickness_mm: Width of its profile.
        first_mm: Position of plane 0.
        step_mm: Distance of planes.
    """
    half = thickness_mm / 2
    low = (position_mm - half - first_mm) / step_mm
    high = (position_mm + half - first_mm) / step_mm
    planes = np.arange(int(np.floor(low + 0.5 + 1e-6)), int(np.ceil(high - 0.5 - 1e-6)) + 1)
    weights = np.minimum(planes + 0.5, high) - np.maximum(planes - 0.5, low)
    return int(planes[0]), np.asarray(weights / weights.sum(), np.float32)


class Noise:
    """Band-passed noise of unit variance: each slice mixes random windows of a few large fields."""

    _FIELDS = 5
    _MARGIN = 160

    def __init__(
        self,
        rng: np.random.Generator,
        size: int,
        pixel_mm: float,
        sharpness: float,
        iterative: float = 0.0,
    ) -> None:
        """Filter the fields.

        Args:
            rng: Source of random numbers.
            size: Rows and columns of a slice.
            pixel_mm: Distance of pixels.
            sharpness: 0 is a soft tissue kernel, 1 a lung kernel.
            iterative: 0 is filtered back-projection; towards 1 the noise becomes coarse blotches.
        """
        n = int(fft.next_fast_len(size + self._MARGIN, real=True))
        fy, fx = np.fft.fftfreq(n, pixel_mm)[:, None], np.fft.rfftfreq(n, pixel_mm)[None, :]
        cycles = np.hypot(fy, fx).astype(np.float32)
        cut = (0.32 + 0.38 * sharpness) * (1 - 0.35 * iterative)  # per mm
        slope = (0.5 + 0.4 * sharpness) * (1 - 0.8 * iterative)
        shape = (cycles + 0.02) ** slope * np.exp(-((cycles / cut) ** 3))
        self._size = size
        self._fields: list[F32] = []
        for _ in range(self._FIELDS):
            white = rng.standard_normal((n, n), dtype=np.float32)
            field = fft.irfft2(fft.rfft2(white) * shape, s=(n, n)).astype(np.float32)
            self._fields.append(np.asarray(field / field.std(), np.float32))

    def slice(self, rng: np.random.Generator) -> F32:
        """Return (size, size) float32 of unit variance."""
        first, second = rng.permutation(self._FIELDS)[:2]
        angle = rng.uniform(0, 2 * np.pi)
        out = self._window(int(first), rng) * np.float32(np.cos(angle))
        out += self._window(int(second), rng) * np.float32(np.sin(angle))
        return out

    def _window(self, index: int, rng: np.random.Generator) -> F32:
        field = self._fields[index]
        y, x = rng.integers(0, field.shape[0] - self._size + 1, 2)
        window = field[y : y + self._size, x : x + self._size]
        flips = rng.integers(0, 2, 3)
        if flips[2]:
            window = window.T
        return window[:: 1 - 2 * int(flips[0]), :: 1 - 2 * int(flips[1])]


class Streaks:
    """Fan-shaped dark and bright streaks around one point, from a few prepared patterns."""

    _PATTERNS = 4
    BROAD: ClassVar[tuple[int, ...]] = (3, 5, 8, 13, 19, 26)
    FINE: ClassVar[tuple[int, ...]] = (4, 9, 17, 29, 43, 61, 80)

    def __init__(
        self,
        rng: np.random.Generator,
        pixel_mm: float,
        reach_mm: float = 85.0,
        waves: tuple[int, ...] = BROAD,
    ) -> None:
        """Prepare patterns that fade out at ``reach_mm``; ``waves`` are numbers of rays."""
        self._half = int(reach_mm / pixel_mm)
        axis = np.arange(-self._half, self._half + 1) * pixel_mm
        radius = np.hypot(axis[:, None], axis[None, :])
        angle = np.arctan2(axis[:, None], axis[None, :])
        fade = np.clip(1 - radius / reach_mm, 0, 1) * np.clip(radius / 9.0, 0, 1)
        self._patterns: list[F32] = []
        for _ in range(self._PATTERNS):
            wave = sum(rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in waves)
            sharp = np.sign(wave) * np.abs(wave) ** 1.3
            self._patterns.append((sharp / np.abs(sharp).std() * 0.5 * fade).astype(np.float32))

    def add(
        self, hu: F32, row: float, col: float, amplitude_hu: float, rng: np.random.Generator
    ) -> None:
        """Add a mix of two patterns centred on a pixel, in place."""
        first, second = rng.permutation(self._PATTERNS)[:2]
        share = rng.uniform(0.3, 0.7)
        r0, c0 = round(row) - self._half, round(col) - self._half
        size = 2 * self._half + 1
        a, b = max(r0, 0), min(r0 + size, hu.shape[0])
        c, d = max(c0, 0), min(c0 + size, hu.shape[1])
        if a >= b or c >= d:
            return
        part = (slice(a - r0, b - r0), slice(c - c0, d - c0))
        pattern = self._patterns[first][part] * np.float32(share * amplitude_hu)
        pattern += self._patterns[second][part] * np.float32((1 - share) * amplitude_hu)
        hu[a:b, c:d] += pattern


def apply_kernel(hu: F32, amount: float) -> F32:
    """Blur (``amount`` > 0) or sharpen (< 0).

    The taps along rows and columns are ``(amount, 1 - 2 amount, amount)``.
    """
    out = hu * np.float32(1 - 2 * amount)
    out[1:-1] += np.float32(amount) * (hu[2:] + hu[:-2])
    out[[0, -1]] += np.float32(2 * amount) * hu[[0, -1]]
    across = out * np.float32(1 - 2 * amount)
    across[:, 1:-1] += np.float32(amount) * (out[:, 2:] + out[:, :-2])
    across[:, [0, -1]] += np.float32(2 * amount) * out[:, [0, -1]]
    return across
