"""The CUDA kernels as a library for the CPU, from ``cpp_ext/cuda/host_launch.cpp``."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = Path(__file__).parents[1] / "cpp_ext"


@functools.cache
def kernels() -> "HostKernels":
    """The kernels; compiled once."""
    with tempfile.TemporaryDirectory() as folder:
        return build(Path(folder))


def build(folder: Path) -> "HostKernels":
    """Compile for this processor. Contraction is off, as it is on the GPU (``--fmad=false``)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    library = folder / "libcuda_host.so"
    command = [*compiler.split(), "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-I", str(SOURCES / "include"), str(SOURCES / "cuda" / "host_launch.cpp")]
    command += ["-o", str(library)]
    subprocess.run(command, check=True)
    return HostKernels(ctypes.CDLL(str(library)))


class HostKernels:
    """Launches kernels by name. Arguments: NumPy arrays (their address) and NumPy scalars."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.pe_launch_on_host.restype = ctypes.c_bool

    @contextmanager
    def flushing_subnormals(self) -> Iterator[None]:
        """Launches compute as CuPy compiles, with ``-ftz=true``: subnormal numbers are zero."""
        self._library.pe_flush_subnormals(ctypes.c_bool(True))
        try:
            yield
        finally:
            self._library.pe_flush_subnormals(ctypes.c_bool(False))

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
