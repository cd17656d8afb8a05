"""Slices to planes to slabs on the GPU: the patient grid, preprocessing version 1.

The kernels are those of ``cpp_ext/cuda/preprocess.cu``; which planes exist, how axes are weighted
and what the gate says are the CPU's, so slabs and decisions are the same bit for bit.

The kernels have run on a CPU only, where tests compare them; on a GPU nothing here has run yet.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from pe_infer.cuda.device import (
    LEGACY_STREAM,
    DeviceArray,
    DeviceStream,
    require,
    stream_handle,
    translated,
)
from pe_infer.errors import Code, InputError
from pe_infer.geometry import PatientGrid, Slice, SliceGeometry
from pe_infer.lattice import PlaneLattice
from pe_infer.pixels import DevicePixels, StoredPixels, on_gpu, refuse_gaps
from pe_infer.preprocess import AxisWeights, PlaneMeasure, Slab, SliceStore, orientation

SLICES_AT_ONCE: Final = 32  # that memory is taken for
SLICE_BLOCK: Final = (32, 8)  # threads along columns and rows
PLANE_BLOCK: Final = (256, 1)  # threads along pixels and planes

# CuPy adds -ftz=true. That changes no bit of a slab, as tests run the kernels: subnormal numbers
# come up nowhere but in HU next to 0 that are rounded to 1/8 HU.
OPTIONS: Final = ("--std=c++17", "--fmad=false")
KERNELS: Final = (
    "pe_resample_i16",
    "pe_resample_u16",
    "pe_gather_hu",
    "pe_gather_slab_f32",
)
_FOLDER: Final = Path(__file__).parent


def source() -> str:
    """The CUDA source, with the header that it includes in its place.

    CuPy keeps what it compiled in ``~/.cupy/kernel_cache`` and knows it by the text of the source
    alone: a header on an include path could change without it.
    """
    header = (_FOLDER / "pixel.h").read_text().replace("#pragma once\n", "")
    return (_FOLDER / "preprocess.cu").read_text().replace('#include "pe_infer/pixel.h"\n', header)


@functools.cache
def _kernels(cupy: Any) -> Mapping[str, Any]:
    """Compiled here, unless that was done beforehand or CuPy remembers an earlier time."""
    built = _FOLDER / "preprocess.fatbin"  # -DPE_INFER_CUDA=ON
    with translated("compile the kernels of preprocess.cu"):
        if built.exists():
            module = cupy.RawModule(path=os.fspath(built))
        else:
            module = cupy.RawModule(code=source(), options=OPTIONS)
        kernels = {name: module.get_function(name) for name in KERNELS}
        for kernel in kernels.values():
            kernel.compile()
    return kernels


@dataclass(frozen=True, slots=True, eq=False)
class _Launcher:
    """Queues kernels of ``preprocess.cu`` for one study."""

    stream: DeviceStream
    kernels: Mapping[str, Any]

    @classmethod
    def on(cls, stream: DeviceStream) -> "_Launcher":
        """Compile the kernels, unless that has been done."""
        with stream:
            return cls(stream, _kernels(require()))

    def __call__(
        self, name: str, threads: tuple[int, int], block: tuple[int, int], *args: Any
    ) -> None:
        """Run a kernel with at least ``threads`` (x, y), in whole blocks.

        ``args`` are arrays, addresses as ``np.uint64``, and NumPy scalars of the kernel's types.
        """
        blocks = (-(-threads[0] // block[0]), -(-threads[1] // block[1]))
        with translated(f"run {name}"), self.stream:
            self.kernels[name](blocks, block, args)

    def on_device(self, host: NDArray[Any]) -> DeviceArray:
        """A copy of an array on the device."""
        device = self.stream.empty(host.shape, host.dtype)
        self.stream.upload(host, device)
        return device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _InPlane:
    """How slices of one size, spacing and orientation are resampled.

    Attributes:
        geometry: What is the same for all of them.
        stored: Room for the stored values of one that comes from the host.
        offset: Index of the first value in patient orientation.
        strides: From there to the next row to the back and column to the left, in values.
        axes: What the kernels take for the rows, and then for the columns.
    """

    geometry: tuple[object, ...]
    stored: DeviceArray
    offset: int
    strides: tuple[np.int64, np.int64]
    axes: tuple[Any, ...]


class DeviceSliceResampler:
    """Brings slices to the grid in their own plane, for a `DeviceVolume` on the same stream.

    A `pe_infer.preprocess.Resampler`.
    """

    def __init__(
        self, grid: PatientGrid, stream: DeviceStream, producer: object | None = None
    ) -> None:
        """Compile the kernels, unless that has been done.

        Args:
            grid: The grid to bring slices to.
            stream: The study's.
            producer: The stream on which slices that lie on the GPU are made, where they do not say
                so themselves (see `stream_handle`); ``None`` is CUDA's default stream.

        Raises:
            ConfigurationError: ``producer`` is no stream.
            EngineError: The kernels cannot be compiled.
        """
        self._grid = grid
        self._stream = stream
        self._producer = LEGACY_STREAM if producer is None else stream_handle(producer)
        self._launch = _Launcher.on(stream)
        self._plan: _InPlane | None = None
        self._room: list[DeviceArray] = []  # for resampled slices

    def stored(self, image: Slice) -> StoredPixels:
        """The stored values on the host; waits for them if they lie on the GPU."""
        if not on_gpu(image.pixels):
            return image.host_pixels
        (host,) = self._stream.fetch([self._borrowed(image, image.pixels)])
        return cast("StoredPixels", host)

    def __call__(self, image: Slice) -> DeviceArray:
        """Queue the resampling of one slice; if it lies on the GPU, wait until it has been read.

        Returns:
            (rows, cols) int16 on the device, in 1/8 HU: see `pe_infer.preprocess.SliceResampler`.
        """
        grid, plan = self._grid, self._in_plane(image.geometry)
        if borrowed := on_gpu(image.pixels):
            stored = self._borrowed(image, image.pixels)
            dtype = stored.dtype
        else:
            stored, dtype = plan.stored, image.host_pixels.dtype
            self._stream.upload(image.host_pixels, stored)
        if not self._room:
            block = self._stream.empty((SLICES_AT_ONCE, grid.rows, grid.cols), np.int16)
            self._room = [block[i] for i in range(SLICES_AT_ONCE)]
        out = self._room.pop()
        low, high = image.padding or (1, 0)
        self._launch(
            "pe_resample_i16" if dtype == np.int16 else "pe_resample_u16",
            (grid.cols, grid.rows),
            SLICE_BLOCK,
            np.uint64(stored.data.ptr + plan.offset * dtype.itemsize),
            *plan.strides,
            np.float32(image.rescale_slope),
            np.float32(image.rescale_intercept),
            np.int32(low),
            np.int32(high),
            *plan.axes,
            np.int32(grid.rows),
            np.int32(grid.cols),
            out,
        )
        if borrowed:
            self._stream.wait()
        return out

    def _borrowed(self, image: Slice, pixels: DevicePixels) -> Any:
        """Pixels on the GPU as CuPy's array, ready on the study's stream."""
        cupy = require()
        # Asked outside the study's stream: CuPy names whichever stream is current.
        interface: Mapping[str, Any] | None = getattr(pixels, "__cuda_array_interface__", None)
        named = None if interface is None else interface.get("stream")
        self._stream.after(self._producer if named is None else named)
        with translated(f"take {image.source} from the GPU"), self._stream:
            if interface is None:  # the exporter makes the current stream wait for its own
                array = cupy.from_dlpack(pixels)
                refuse_gaps(array.shape, array.strides, array.itemsize, image.source)
            else:
                shape, dtype = interface["shape"], np.dtype(interface["typestr"])
                size = shape[0] * shape[1] * dtype.itemsize
                memory = cupy.cuda.UnownedMemory(interface["data"][0], size, pixels)
                array = cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
            if array.data.device_id != self._stream.device_id:
                raise InputError(
                    f"{image.source}: its pixels lie on GPU {array.data.device_id}, the study runs "
                    f"on GPU {self._stream.device_id}: copy them there first",
                    code=Code.ENGINE_INPUT,
                )
        return array

    def _in_plane(self, geometry: SliceGeometry) -> _InPlane:
        rows, cols = geometry.rows, geometry.cols
        spacing_back, spacing_left = geometry.row_spacing_mm, geometry.col_spacing_mm
        transposed, flip_rows, flip_cols = turns = orientation(geometry)
        key = (rows, cols, spacing_back, spacing_left, *turns)
        if self._plan is not None and self._plan.geometry == key:
            return self._plan
        height, width, down, left = rows, cols, cols, 1
        if transposed:
            height, width, down, left = cols, rows, 1, cols
            spacing_back, spacing_left = spacing_left, spacing_back
        offset = (height - 1) * down * flip_rows + (width - 1) * left * flip_cols
        axes: list[Any] = []
        for size, spacing, out_size in (
            (height, spacing_back, self._grid.rows),
            (width, spacing_left, self._grid.cols),
        ):
            axis = AxisWeights.of(size, spacing, out_size, self._grid.spacing_mm)
            axes += [self._launch.on_device(axis.start), self._launch.on_device(axis.weight)]
            axes += [np.int32(n) for n in (len(axis.weight), axis.first, axis.last)]
        self._plan = _InPlane(
            geometry=key,
            stored=self._stream.empty((rows, cols), np.int16),
            offset=offset,
            strides=(
                np.int64(-down if flip_rows else down),
                np.int64(-left if flip_cols else left),
            ),
            axes=tuple(axes),
        )
        return self._plan


class DeviceVolume(SliceStore[DeviceArray]):
    """The resampled slices of one study on the GPU, and the slabs made of them.

    A `pe_infer.preprocess.SlabMaker`. No planes are kept: every slab gathers its own.
    """

    def __init__(
        self, grid: PatientGrid, stream: DeviceStream, measure: PlaneMeasure | None = None
    ) -> None:
        """Start empty. Compile the kernels, unless that has been done.

        Args:
            grid: Of the slabs.
            stream: The study's.
            measure: For the middle planes of slabs that pass the gate, on the host.

        Raises:
            EngineError: The kernels cannot be compiled.
        """
        super().__init__()
        self._grid = grid
        self._stream = stream
        self._measure = measure
        self._launch = _Launcher.on(stream)
        low_hu = np.array([window.low_hu for window in grid.windows], np.float32)
        high_hu = np.array([window.high_hu for window in grid.windows], np.float32)
        self._low_hu = self._launch.on_device(low_hu)
        self._per_hu = self._launch.on_device(np.float32(1) / (high_hu - low_hu))

    def forget_planes(self) -> None:
        """Nothing to do."""

    def slabs(self, centres_um: Sequence[int], lattice: PlaneLattice) -> list[Slab]:
        """Queue the slabs centred on planes of ``lattice.centres``.

        With a gate or a measure, waits for their middle planes, which the CPU judges.

        Returns:
            Slabs whose tensors lie on the device behind each other, in one C-contiguous (slabs,
            channels, rows, cols) float32 block, and are written when the stream gets there.
        """
        grid, count = self._grid, len(centres_um)
        if not count:
            return []
        table, first_of_plane = self._table(centres_um, lattice)
        planes, pixels = len(first_of_plane) - 1, grid.rows * grid.cols
        entries = int(first_of_plane[-1])
        on_device = self._launch.on_device(table)
        slices = on_device.data.ptr
        weights = slices + entries * np.uint64().itemsize
        firsts = weights + entries * np.float32().itemsize

        looked_at = grid.gate is not None or self._measure is not None
        middles = self._stream.empty((count, grid.rows, grid.cols)) if looked_at else None
        if middles is not None:
            each = planes // count
            for index, plane in enumerate(range(each // 2, planes, each)):
                first, last = (int(entry) for entry in first_of_plane[plane : plane + 2])
                self._launch(
                    "pe_gather_hu",
                    (pixels, 1),
                    PLANE_BLOCK,
                    np.uint64(slices + first * np.uint64().itemsize),
                    np.uint64(weights + first * np.float32().itemsize),
                    np.int32(last - first),
                    np.int32(pixels),
                    middles[index],
                )
        tensors = self._stream.empty((count, grid.channels, grid.rows, grid.cols))
        self._launch(
            "pe_gather_slab_f32",
            (pixels, planes),
            PLANE_BLOCK,
            np.uint64(slices),
            np.uint64(weights),
            np.uint64(firsts),
            np.int32(planes),
            np.int32(pixels),
            self._low_hu,
            self._per_hu,
            np.int32(len(grid.windows)),
            tensors,
        )
        judged = [None] * count if middles is None else self._stream.fetch([middles])[0]
        return [
            Slab.judged(
                centre,
                cast("NDArray[np.float32]", tensors[index]),
                grid,
                judged[index],
                self._measure,
            )
            for index, centre in enumerate(centres_um)
        ]

    def _table(
        self, centres_um: Sequence[int], lattice: PlaneLattice
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """What the kernels are told of the planes of all slabs, in one piece of memory.

        Returns:
            The bytes of: addresses of slices (entries,) uint64, their weights (entries,) float32,
            and ``first_of_plane`` (planes + 1,) int32; and the latter, which the host needs too.
        """
        positions = self.positions_um
        planes = [p for centre in centres_um for p in lattice.slab_planes(positions, centre)]
        made_of = {plane: lattice.contributors(positions, plane) for plane in set(planes)}
        addresses: list[int] = []
        weights: list[NDArray[np.float32]] = []
        for plane in planes:
            first, weight = made_of[plane]
            inside = positions[first : first + len(weight)]
            addresses += [self._slices[position].data.ptr for position in inside]
            weights.append(weight)
        first_of_plane = np.cumsum([0, *map(len, weights)], dtype=np.int32)
        parts = (np.array(addresses, np.uint64), np.concatenate(weights), first_of_plane)
        return np.concatenate([part.view(np.uint8) for part in parts]), first_of_plane
