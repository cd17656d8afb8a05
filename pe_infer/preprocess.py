"""Slices to planes to slabs: the patient grid, preprocessing version 1.

A slice is brought to the grid in its own plane as soon as it is there (`SliceResampler`) and kept
as int16 in 1/8 HU. Planes and slabs are pure functions of the resampled slices (`Volume`), gathered
in ascending position: whatever order the slices came in, the same slices give the same bits.

Which planes and slabs exist follows from the positions alone: see `pe_infer.lattice`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Protocol, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pe_infer import _native
from pe_infer.errors import Code, SeriesError
from pe_infer.geometry import PatientGrid, Slice, SliceGeometry
from pe_infer.lattice import PlaneLattice, lattice_for
from pe_infer.pixels import StoredPixels

VERSION: Final = 1
CACHED_PLANES: Final = 16  # of one volume: slabs that follow each other share planes

Resampled = TypeVar("Resampled")
PlaneMeasure: TypeAlias = Callable[[NDArray[np.float32]], tuple[float | None, ...]]
"""Looks at the HU of a plane of the grid, on the host; see `pe_infer.checks`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slab:
    """A stack of neighbouring planes, windowed.

    Attributes:
        position_um: Position of the middle plane.
        tensor: (channels, rows, cols) float32 in [0, 1]; plane by plane ascending, window fastest.
            Made on a GPU, it is an array of that GPU (`pe_infer.cuda.preprocess`).
        gate_fraction: Share of the middle plane within the gate's range and enclosed as it says;
            1 without a gate.
        gated: Whether the gate keeps this slab from the network.
        measured: What a `PlaneMeasure` says of the middle plane; empty without one, and if gated.
    """

    position_um: int
    tensor: NDArray[np.float32]
    gate_fraction: float
    gated: bool
    measured: tuple[float | None, ...] = ()

    @classmethod
    def judged(
        cls,
        position_um: int,
        tensor: NDArray[np.float32],
        grid: PatientGrid,
        middle: NDArray[np.float32] | None,
        measure: PlaneMeasure | None = None,
    ) -> Self:
        """A slab by what gate and ``measure`` say of its ``middle`` plane; ``None``: no such."""
        fraction, gated = 1.0, False
        if grid.gate is not None and middle is not None:
            gate = grid.gate
            fraction = _native.gate_fraction(middle, gate.low_hu, gate.high_hu, gate.enclosed_by_hu)
            gated = fraction < gate.min_fraction
        measured = () if gated or measure is None or middle is None else measure(middle)
        return cls(
            position_um=position_um,
            tensor=tensor,
            gate_fraction=fraction,
            gated=gated,
            measured=measured,
        )


class Resampler(Protocol):
    """Brings slices to the grid, where a `SlabMaker` of the same kind takes them.

    Not thread-safe.
    """

    def stored(self, image: Slice) -> StoredPixels:
        """The slice's stored values in memory, to be read only.

        Raises:
            InputError: They lie where this kind of resampler does not look.
        """
        ...

    def __call__(self, image: Slice) -> Any:
        """Resample one slice; its pixels may be changed once this returns."""
        ...


class SlabMaker(Protocol):
    """The slices of one study, and the slabs made of them.

    One thread may `put` slices while another makes slabs that those slices do not change.
    """

    def put(self, position_um: int, resampled: Any) -> None:
        """Add a slice, or replace the one at the same position."""
        ...

    def forget_planes(self) -> None:
        """Make planes anew: slices were put that change some of them."""
        ...

    def slabs(self, centres_um: Sequence[int], lattice: PlaneLattice) -> list[Slab]:
        """The slabs centred on planes of ``lattice.centres``."""
        ...

    def clear(self) -> None:
        """Let go of all slices."""
        ...


class SliceResampler:
    """Brings slices to the grid in their own plane. Not thread-safe: one per stream or thread."""

    def __init__(self, grid: PatientGrid) -> None:
        """Plans are made on first use and kept for one slice size, spacing and orientation."""
        self._grid = grid
        self._key: tuple[int | float | bool, ...] | None = None
        self._native: _native.SliceResampler | None = None

    def stored(self, image: Slice) -> StoredPixels:
        """See `Resampler.stored`."""
        return image.host_pixels

    def __call__(self, image: Slice, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """Resample one slice.

        Args:
            image: The slice; its pixels are only read.
            out: (rows, cols) int16 of the grid to write to; made when not given.

        Returns:
            ``out``: 1/8 HU, rows to the back, columns to the patient's left, air outside the image.

        Raises:
            InputError: The pixels lie on a GPU.
        """
        grid = self._grid
        if out is None:
            out = np.empty((grid.rows, grid.cols), np.int16)
        low, high = image.padding or (1, 0)
        self._plan(image.geometry).run(
            image.host_pixels, image.rescale_slope, image.rescale_intercept, low, high, out
        )
        return out

    def _plan(self, geometry: SliceGeometry) -> _native.SliceResampler:
        transposed, flip_rows, flip_cols = orientation(geometry)
        key = (
            geometry.rows,
            geometry.cols,
            geometry.row_spacing_mm,
            geometry.col_spacing_mm,
            transposed,
            flip_rows,
            flip_cols,
        )
        if self._native is None or key != self._key:
            self._native = _native.SliceResampler(
                rows=geometry.rows,
                cols=geometry.cols,
                row_spacing=geometry.row_spacing_mm,
                col_spacing=geometry.col_spacing_mm,
                transpose=transposed,
                flip_rows=flip_rows,
                flip_cols=flip_cols,
                out_rows=self._grid.rows,
                out_cols=self._grid.cols,
                out_spacing=self._grid.spacing_mm,
            )
            self._key = key
        return self._native


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AxisWeights:
    """How the samples of one axis of the grid are made from one axis of a slice.

    Sample ``i`` is the sum over taps ``t`` of ``weight[t, i]`` times input ``start[i] + t``.

    Attributes:
        start: (samples,) int32.
        weight: (taps, samples) float32.
        first: The samples before it lie outside the slice: air.
        last: So do this one and those after it.
    """

    start: NDArray[np.int32]
    weight: NDArray[np.float32]
    first: int
    last: int

    @classmethod
    def of(cls, in_size: int, in_spacing_mm: float, out_size: int, out_spacing_mm: float) -> Self:
        """For axes centred on the same point, as `SliceResampler` uses them."""
        start, weight, first, last = _native.axis_weights(
            in_size, in_spacing_mm, out_size, out_spacing_mm
        )
        return cls(start=start, weight=weight, first=first, last=last)


def orientation(geometry: SliceGeometry) -> tuple[bool, bool, bool]:
    """What turns a slice upright: whether to transpose it, then flip its rows, and its columns."""
    left, back = geometry.row_direction, geometry.col_direction
    if geometry.transposed:
        left, back = back, left
    return geometry.transposed, back[1] < 0, left[0] < 0


class SliceStore(Generic[Resampled]):
    """Resampled slices by position. One thread may `put` while others read."""

    def __init__(self) -> None:
        """Start empty."""
        self._positions_um: tuple[int, ...] = ()  # replaced, never changed: readers keep theirs
        self._slices: dict[int, Resampled] = {}

    @property
    def positions_um(self) -> Sequence[int]:
        """Ascending positions of the slices held."""
        return self._positions_um

    def __contains__(self, position_um: int) -> bool:
        """Whether a slice lies exactly there."""
        return position_um in self._slices

    def put(self, position_um: int, resampled: Resampled) -> None:
        """Add a slice, or replace the one at the same position."""
        self._slices[position_um] = resampled
        at = bisect_left(self._positions_um, position_um)
        if self._positions_um[at : at + 1] != (position_um,):
            self._positions_um = (
                *self._positions_um[:at],
                position_um,
                *self._positions_um[at:],
            )

    def clear(self) -> None:
        """Let go of all slices."""
        self._positions_um = ()
        self._slices = {}


class Volume(SliceStore[NDArray[np.int16]]):
    """The resampled slices of one study, and the planes and slabs made of them.

    One thread may `put` slices while another makes planes and slabs that those slices do not
    change.
    """

    def __init__(self, grid: PatientGrid, measure: PlaneMeasure | None = None) -> None:
        """Start empty; ``measure`` is for the middle planes of slabs that pass the gate."""
        super().__init__()
        self._grid = grid
        self._measure = measure
        self._planes: dict[int, NDArray[np.float32]] = {}

    def clear(self) -> None:
        """Let go of all slices and planes."""
        super().clear()
        self._planes = {}

    def forget_planes(self) -> None:
        """Make planes anew: slices were put that change some of them."""
        self._planes.clear()

    def plane(self, plane_um: int, lattice: PlaneLattice) -> NDArray[np.float32]:
        """(rows, cols) float32 HU of one plane; do not write to it."""
        plane = self._planes.get(plane_um)
        if plane is None:
            positions = self._positions_um
            first, weights = lattice.contributors(positions, plane_um)
            sources = [self._slices[p] for p in positions[first : first + len(weights)]]
            plane = np.empty((self._grid.rows, self._grid.cols), np.float32)
            _native.gather_plane(sources, weights, plane)
            if len(self._planes) >= CACHED_PLANES:
                del self._planes[next(iter(self._planes))]
            self._planes[plane_um] = plane
        return plane

    def slab(self, centre_um: int, lattice: PlaneLattice) -> Slab:
        """The slab centred on a plane of ``lattice.centres``."""
        grid = self._grid
        tensor = np.empty((grid.channels, grid.rows, grid.cols), np.float32)
        channel = 0
        for plane_um in lattice.slab_planes(self._positions_um, centre_um):
            hu = self.plane(plane_um, lattice)
            for window in grid.windows:
                _native.window_plane(hu, window.low_hu, window.high_hu, tensor[channel])
                channel += 1
        unseen = grid.gate is None and self._measure is None
        middle = None if unseen else self.plane(centre_um, lattice)
        return Slab.judged(centre_um, tensor, grid, middle, self._measure)

    def slabs(self, centres_um: Sequence[int], lattice: PlaneLattice) -> list[Slab]:
        """See `SlabMaker.slabs`."""
        return [self.slab(centre, lattice) for centre in centres_um]


def volume_of(
    slices: Iterable[Slice], grid: PatientGrid, measure: PlaneMeasure | None = None
) -> tuple[Volume, PlaneLattice, list[int]]:
    """Resample a whole study.

    Args:
        slices: In any order, one per position.
        grid: The grid to bring them to.
        measure: For the middle planes of slabs that pass the gate.

    Returns:
        The volume, where its planes lie, and the ascending centres of its whole slabs.

    Raises:
        SeriesError: There is no slice, or two lie at one position.
    """
    images = list(slices)
    if not images:
        raise SeriesError("no slices: pass at least one", code=Code.TOO_FEW_SLICES)
    lattice = lattice_for(grid, (image.geometry.thickness_mm for image in images))
    volume = Volume(grid, measure)
    resample = SliceResampler(grid)
    for image in images:
        if image.position_um in volume:
            raise SeriesError(
                f"{image.source}: a second slice at {image.position_um / 1000:.3f} mm; "
                "pass one slice per position",
                code=Code.DUPLICATE_POSITION,
            )
        volume.put(image.position_um, resample(image))
    return volume, lattice, lattice.centres(volume.positions_um)


def slabs(
    slices: Iterable[Slice], grid: PatientGrid, measure: PlaneMeasure | None = None
) -> Iterator[Slab]:
    """All whole slabs of a study, gated ones too, in ascending position. See `volume_of`."""
    volume, lattice, centres = volume_of(slices, grid, measure)
    for centre in centres:
        yield volume.slab(centre, lattice)


def planes(
    slices: Iterable[Slice], grid: PatientGrid
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All planes between the first and the last slice.

    Returns:
        Positions (n,) int64 in micrometres, ascending, and HU (n, rows, cols) float32.
    """
    volume, lattice, centres = volume_of(slices, replace(grid, planes_per_slab=1, slab_step=1))
    hu = np.empty((len(centres), grid.rows, grid.cols), np.float32)
    for index, centre in enumerate(centres):
        hu[index] = volume.plane(centre, lattice)
    return np.array(centres, np.int64), hu
