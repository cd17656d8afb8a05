"""Parallel projections of small images, and filtered back-projection: where artefacts come from."""

from functools import lru_cache

import numpy as np
from scipy import fft, sparse

from pe_infer.phantom.raster import F32

SIDE = 96  # pixels of the small images
VIEWS = 96


class Projector:
    """A fixed geometry of ``SIDE`` x ``SIDE`` pixels of width 1 and ``VIEWS`` over half a turn."""

    def __init__(self) -> None:
        """Compute which detector cells every pixel is seen by."""
        centre = np.arange(SIDE) - (SIDE - 1) / 2
        y, x = (g.ravel() for g in np.meshgrid(centre, centre, indexing="ij"))
        angles = np.arange(VIEWS) * np.pi / VIEWS
        cells = SIDE + 2
        at = np.cos(angles)[:, None] * x[None] + np.sin(angles)[:, None] * y[None] + (cells - 1) / 2
        # Corners of the square that no view sees whole are outside the circle of the scan.
        at = np.clip(at, 0, cells - 1.001)
        low = at.astype(np.int64)
        share = at - low
        inside = (np.hypot(x, y) < SIDE / 2)[None] * np.ones_like(at)
        rows = (np.arange(VIEWS)[:, None] * cells + low).ravel()
        columns = np.broadcast_to(np.arange(SIDE * SIDE), at.shape).ravel()
        weights = np.concatenate([((1 - share) * inside).ravel(), (share * inside).ravel()])
        self._matrix = sparse.csr_matrix(
            (
                weights.astype(np.float32),
                (np.concatenate([rows, rows + 1]), np.concatenate([columns, columns])),
            ),
            shape=(VIEWS * cells, SIDE * SIDE),
        )
        self._back = sparse.csr_matrix(self._matrix.T)
        self._cells = cells
        self._ramp = np.abs(fft.rfftfreq(2 * cells)).astype(np.float32)
        self._ramp *= np.cos(np.pi * np.arange(len(self._ramp)) / (2 * len(self._ramp))) ** 2

    def project(self, images: F32) -> F32:
        """Return line integrals (n, VIEWS, cells) of images (n, SIDE, SIDE), per pixel width."""
        found = self._matrix @ images.reshape(len(images), -1).T
        return np.asarray(found.T.reshape(len(images), VIEWS, self._cells), np.float32)

    def reconstruct(self, lines: F32) -> F32:
        """Return images (n, SIDE, SIDE) of line integrals (n, VIEWS, cells)."""
        spectrum = fft.rfft(lines, 2 * self._cells, axis=2) * self._ramp
        filtered = fft.irfft(spectrum, axis=2)[:, :, : self._cells].astype(np.float32)
        found = self._back @ filtered.reshape(len(lines), -1).T
        scale = np.float32(np.pi / VIEWS)
        return np.asarray(found.T.reshape(len(lines), SIDE, SIDE) * scale, np.float32)


@lru_cache(maxsize=1)
def projector() -> Projector:
    """Return the one projector; it takes a moment to make."""
    return Projector()
