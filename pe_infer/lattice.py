"""Which planes and slabs exist, and from which slices a plane is made: integers only, no pixels.

All positions are in micrometres along the slice normal, growing to the head; slice positions come
as ascending sequences without repetition.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import PatientGrid

SOURCE_THICKNESS_MM: Final = 4.0  # with through_plane="source", series this thick keep their slices


class PlaneLattice(Protocol):
    """Where planes and slabs lie over the slices of a series."""

    def centres(self, positions_um: Sequence[int]) -> list[int]:
        """Middle planes of all whole slabs, ascending."""

    def slab_planes(self, positions_um: Sequence[int], centre_um: int) -> list[int]:
        """Planes of the slab centred there, ascending."""

    def contributors(
        self, positions_um: Sequence[int], plane_um: int
    ) -> tuple[int, NDArray[np.float32]]:
        """Index of a plane's first slice; float32 weights of it and the next ones, sum 1."""

    def slab_reach(self, positions_um: Sequence[int], centre_um: int) -> tuple[float, float]:
        """Open interval in which one more slice would change the slab; may be infinite."""


class ResampledPlanes:
    """Planes at absolute multiples of the pitch (``through_plane = "resample"``)."""

    def __init__(self, grid: PatientGrid) -> None:
        """Use pitch, slab size and step of ``grid``."""
        self._pitch_um = grid.pitch_um
        self._half = grid.planes_per_slab // 2
        self._step = grid.slab_step

    def centres(self, positions_um: Sequence[int]) -> list[int]:
        """Multiples of step * pitch whose planes all lie within the slices."""
        if not positions_um:
            return []
        lowest = -(-positions_um[0] // self._pitch_um) + self._half
        highest = positions_um[-1] // self._pitch_um - self._half
        first = -(-lowest // self._step) * self._step
        return [k * self._pitch_um for k in range(first, highest + 1, self._step)]

    def slab_planes(self, positions_um: Sequence[int], centre_um: int) -> list[int]:  # noqa: ARG002 (Protocol)
        """Neighbouring multiples of the pitch."""
        reach = range(-self._half, self._half + 1)
        return [centre_um + offset * self._pitch_um for offset in reach]

    def contributors(
        self, positions_um: Sequence[int], plane_um: int
    ) -> tuple[int, NDArray[np.float32]]:
        """Two slices interpolated if they are at least a pitch apart, else all under a hat."""
        low, high = self._bracket(positions_um, plane_um)
        if high - low >= self._pitch_um and math.isfinite(high - low):
            share = (plane_um - low) / (high - low)
            return bisect_left(positions_um, low), np.array([1.0 - share, share], np.float32)
        first = bisect_right(positions_um, plane_um - self._pitch_um)
        last = bisect_left(positions_um, plane_um + self._pitch_um)
        hat = [self._pitch_um - abs(positions_um[i] - plane_um) for i in range(first, last)]
        total = sum(hat)
        return first, np.array([weight / total for weight in hat], np.float32)

    def slab_reach(self, positions_um: Sequence[int], centre_um: int) -> tuple[float, float]:
        """From below the first plane to above the last."""
        half_um = self._half * self._pitch_um
        return (
            self._plane_reach(positions_um, centre_um - half_um)[0],
            self._plane_reach(positions_um, centre_um + half_um)[1],
        )

    def _bracket(self, positions_um: Sequence[int], plane_um: int) -> tuple[float, float]:
        """Neighbouring slices with low <= plane < high."""
        above = bisect_right(positions_um, plane_um)
        low = positions_um[above - 1] if above > 0 else -math.inf
        high = positions_um[above] if above < len(positions_um) else math.inf
        return low, high

    def _plane_reach(self, positions_um: Sequence[int], plane_um: int) -> tuple[float, float]:
        """The bracket of an interpolated plane, else a pitch to either side."""
        low, high = self._bracket(positions_um, plane_um)
        if math.isinf(high):
            return plane_um - self._pitch_um, math.inf
        if high - low >= self._pitch_um:
            return low, high
        return plane_um - self._pitch_um, plane_um + self._pitch_um


class SourcePlanes:
    """The slices themselves are the planes (``through_plane = "source"`` and a thick series)."""

    def __init__(self, grid: PatientGrid) -> None:
        """Use the slab size of ``grid``."""
        self._half = grid.planes_per_slab // 2

    def centres(self, positions_um: Sequence[int]) -> list[int]:
        """Every slice with enough neighbours."""
        return list(positions_um[self._half : len(positions_um) - self._half])

    def slab_planes(self, positions_um: Sequence[int], centre_um: int) -> list[int]:
        """The slice and its neighbours."""
        middle = bisect_left(positions_um, centre_um)
        return list(positions_um[middle - self._half : middle + self._half + 1])

    def contributors(
        self, positions_um: Sequence[int], plane_um: int
    ) -> tuple[int, NDArray[np.float32]]:
        """The slice itself."""
        return bisect_left(positions_um, plane_um), np.ones(1, np.float32)

    def slab_reach(self, positions_um: Sequence[int], centre_um: int) -> tuple[float, float]:
        """Between the outer slices of the slab: one more in there would become a neighbour."""
        taken = self.slab_planes(positions_um, centre_um)
        return taken[0], taken[-1]


def lattice_for(grid: PatientGrid, thicknesses_mm: Iterable[float | None]) -> PlaneLattice:
    """Choose where planes lie for a series.

    ``through_plane="source"`` keeps the slices of a series as planes if every slice says that it is
    at least ``SOURCE_THICKNESS_MM`` thick; otherwise, and if a thickness is unknown (``None``),
    they are resampled.
    """
    if grid.through_plane == "source" and all(
        (thickness or 0.0) >= SOURCE_THICKNESS_MM for thickness in thicknesses_mm
    ):
        return SourcePlanes(grid)
    return ResampledPlanes(grid)
