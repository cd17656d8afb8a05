"""The CUDA kernels compile for every target without spills; build/cuda-report.txt says how.

No GPU is needed. nvcc comes with the CUDA toolkit, NVRTC (what CuPy compiles with) in a wheel.
"""

import ctypes
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from pe_infer.cuda.preprocess import OPTIONS, source

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "cpp_ext" / "cuda" / "preprocess.cu"
REPORT = ROOT / "build" / "cuda-report.txt"
TARGETS = (75, 80, 86, 87, 89, 90, 100, 120)
KERNELS = {
    "pe_resample_i16",
    "pe_resample_u16",
    "pe_gather_slab_f32",
    "pe_gather_slab_f16",
    "pe_gather_hu",
}

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What ``ptxas -v`` says of one kernel on one target; bytes per thread."""

    compiler: str
    target: int
    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @classmethod
    def all_in(cls, log: str, compiler: str) -> list[Self]:
        found = re.findall(
            r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
            r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers",
            log,
            re.DOTALL,
        )
        return [
            cls(
                compiler=compiler,
                target=int(target),
                kernel=kernel,
                registers=int(registers),
                stack=int(stack),
                spill_stores=int(stores),
                spill_loads=int(loads),
            )
            for kernel, target, stack, stores, loads, registers in found
        ]


@pytest.fixture(scope="module")
def report() -> Iterator[list[Usage]]:
    """Collect every test's findings and write them down together."""
    found: list[Usage] = []
    yield found
    if found:
        lines = [f"{'compiler':12} {'target':8} {'kernel':20} registers  stack  spilled out, in"]
        lines += [
            f"{u.compiler:12} sm_{u.target:<5} {u.kernel:20} {u.registers:9}  {u.stack:5}  "
            f"{u.spill_stores:11}, {u.spill_loads}"
            for u in sorted(found, key=lambda u: (u.compiler, u.target, u.kernel))
        ]
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("\n".join(lines) + "\n")


def assert_nothing_is_spilled(found: list[Usage], targets: tuple[int, ...]) -> None:
    assert {(u.target, u.kernel) for u in found} == {(t, k) for t in targets for k in KERNELS}
    assert [u for u in found if u.stack or u.spill_stores or u.spill_loads] == []


def assert_nothing_is_contracted(ptx: bytes) -> None:
    """PTX rounds after every operation; what says ``.rn`` stays apart in machine code too."""
    assert re.search(rb"mul\.rn(\.ftz)?\.f32", ptx)
    assert not re.search(rb"fma\.|(mad|mul|add)(\.ftz)?\.f32", ptx)


def test_the_build_with_nvcc(tmp_path: Path, report: list[Usage]) -> None:
    """``-DPE_INFER_CUDA=ON`` makes one file for all targets."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: install a CUDA toolkit, 12.8 or newer")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("no cmake: run make test-cpp, which installs it")
    options = ["-DPE_INFER_CUDA=ON", "-DPE_INFER_PYTHON=OFF"]
    subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, *options], check=True, stdout=subprocess.DEVNULL
    )
    build = [cmake, "--build", tmp_path, "--target", "pe_infer_cuda"]
    ran = subprocess.run(
        build, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, ran.stdout
    found = Usage.all_in(ran.stdout, "nvcc")
    report += found
    assert_nothing_is_spilled(found, TARGETS)
    assert_nothing_is_contracted((tmp_path / "preprocess.fatbin").read_bytes())


class Nvrtc:
    """NVRTC from a wheel, through its C interface."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        libraries = [p for f in folders for p in Path(f).glob("*/lib/libnvrtc.so.*")]
        if not libraries:
            pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")
        self._library = ctypes.CDLL(str(max(libraries)))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.name = f"NVRTC {major.value}.{minor.value}"

    def compile(self, architecture: str) -> tuple[int, str, bytes]:
        """Return status, log and PTX."""
        program = ctypes.c_void_p()
        source, name = SOURCE.read_bytes(), SOURCE.name.encode()
        self._library.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None)
        options = [
            "--std=c++17",
            "--fmad=false",
            f"--include-path={ROOT / 'cpp_ext' / 'include'}",
            f"--gpu-architecture={architecture}",
            "--ptxas-options=-v",
        ]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._library.nvrtcCompileProgram(program, len(options), encoded)
        log, ptx = (self._text(program, part) for part in ("ProgramLog", "PTX"))
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, log.decode(), ptx

    def _text(self, program: ctypes.c_void_p, part: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(max(size.value, 1))
        getattr(self._library, f"nvrtcGet{part}")(program, text)
        return text.value


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    return Nvrtc()


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_with_nvrtc(nvrtc: Nvrtc, target: int, report: list[Usage]) -> None:
    status, log, _ = nvrtc.compile(f"sm_{target}")
    assert status == 0, log
    found = Usage.all_in(log, nvrtc.name)
    report += found
    assert_nothing_is_spilled(found, (target,))


def test_ptx_with_nvrtc(nvrtc: Nvrtc) -> None:
    status, log, ptx = nvrtc.compile(f"compute_{TARGETS[0]}")
    assert status == 0, log
    assert_nothing_is_contracted(ptx)


ADDED_BY_CUPY = ("-ftz=true", "--device-as-default-execution-space", "--pch")


def with_cupy(architecture: str, method: str) -> bytes:
    """As CuPy 14 compiles a ``RawModule``, by its own hands as far as they need no GPU."""
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    program = compiler._NVRTCProgram(source(), "preprocess.cu", method=method)
    compiled, _ = program.compile((*OPTIONS, *ADDED_BY_CUPY, f"-arch={architecture}"))
    return bytes(compiled)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_with_cupy(target: int) -> None:
    """One text, without an include path."""
    code = with_cupy(f"sm_{target}", "cubin")
    assert all(kernel.encode() in code for kernel in KERNELS)


def test_cupy_contracts_nothing() -> None:
    assert_nothing_is_contracted(with_cupy(f"compute_{TARGETS[0]}", "ptx"))


def test_cupy_has_all_that_is_used_of_it() -> None:
    """What can be seen without a GPU: the names, and the arguments that are passed by name."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    cuda = cupy.cuda
    for owner, names in {
        cupy: "RawModule empty from_dlpack ndarray",
        cupy.RawKernel: "__call__ compile",
        cupy.RawModule: "get_function",
        cuda: "Device Event MemoryPointer Stream UnownedMemory alloc_pinned_memory",
        cuda.Event: "record synchronize",
        cuda.MemoryPointer: "copy_from_host_async copy_to_host_async device_id ptr",
        cuda.PinnedMemoryPointer: "ptr",
        cuda.Stream: "__cuda_stream__ __enter__ __exit__ wait_event",
        cuda.runtime: "eventRecord getDevice getDeviceCount getDeviceProperties",
        cuda.Device: "__enter__ __exit__ id",
    }.items():
        assert not [name for name in names.split() if not hasattr(owner, name)], owner
    assert {"block", "disable_timing"} <= inspect.signature(cuda.Event).parameters.keys()
    assert "non_blocking" in inspect.signature(cuda.Stream).parameters
    assert issubclass(cuda.runtime.CUDARuntimeError, RuntimeError)
