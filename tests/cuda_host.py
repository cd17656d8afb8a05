"""The CUDA kernels as a library for the CPU, from ``cpp_ext/cuda/host_launch.cpp``."""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCES = Path(__file__).parents[1] / "cpp_ext"


def build(folder: Path) -> "HostKernels":
    """Compile for this processor. Contraction is off, as it is on the GPU (``--fmad=false``)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    library = folder / "libcuda_host.so"
    command = [*compiler.split(), "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    sources = [SOURCES / "cuda" / "host_launch.cpp", SOURCES / "src" / "resample.cpp"]
    command += ["-I", str(SOURCES / "include"), *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True)
    return HostKernels(ctypes.CDLL(str(library)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """``pe_infer::AxisWeights``: start (out,) int32, weight (taps, out) float32."""

    start: NDArray[np.int32]
    weight: NDArray[np.float32]
    first: int
    last: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the resampling kernels take them."""
        taps, first, last = np.int32(len(self.weight)), np.int32(self.first), np.int32(self.last)
        return self.start, self.weight, taps, first, last


class HostKernels:
    """Launches kernels by name. Arguments: NumPy arrays (their address) and NumPy scalars."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.pe_launch_on_host.restype = ctypes.c_bool

    def launch(
        self, kernel: str, threads: tuple[int, int], block: tuple[int, int], *args: Any
    ) -> None:
        """Run at least ``threads`` (x, y) in whole blocks."""
        scalars = [np.uintp(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args]
        held = [np.array(scalar) for scalar in scalars]
        addresses = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
        grid = [ctypes.c_uint(-(-t // b)) for t, b in zip(threads, block, strict=True)]
        sizes = [ctypes.c_uint(b) for b in block]
        count = ctypes.c_int(len(held))
        if not self._library.pe_launch_on_host(kernel.encode(), *grid, *sizes, addresses, count):
            raise LookupError(f"no kernel {kernel} takes {len(held)} arguments")

    def axis(self, in_size: int, in_spacing: float, out_size: int, out_spacing: float) -> Axis:
        """Weights of one axis, made by the C++ core."""
        first, last = ctypes.c_int(), ctypes.c_int()
        start = np.empty(out_size, np.int32)
        weight = np.empty((in_size, out_size), np.float32)
        taps = self._library.pe_axis_weights(
            ctypes.c_int(in_size),
            ctypes.c_double(in_spacing),
            ctypes.c_int(out_size),
            ctypes.c_double(out_spacing),
            ctypes.byref(first),
            ctypes.byref(last),
            start.ctypes.data_as(ctypes.c_void_p),
            weight.ctypes.data_as(ctypes.c_void_p),
        )
        return Axis(start=start, weight=weight[:taps], first=first.value, last=last.value)
