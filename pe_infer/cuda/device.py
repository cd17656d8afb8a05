"""One study's CUDA stream, and the copies that run on it.

No call waits for the whole device, and none but `DeviceStream.fetch` and `DeviceStream.wait` wait
for the GPU at all; those two sleep until their event comes. Nothing is allocated per slab once a
study has run: device memory comes from CuPy's pool, which keeps what was freed for the stream it
was allocated on, and page-locked memory from CuPy's pool for that.
"""

import importlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pe_infer.errors import Code, ConfigurationError, EngineError, PeInferError

INSTALL: Final = "pip install 'pe-infer[gpu]'"
STAGED: Final = 8  # uploads of one study that may be on their way at once
LEGACY_STREAM: Final = 1  # CUDA's name for the default stream, which waits for all blocking ones


class DevicePointer(Protocol):
    """As much of ``cupy.cuda.MemoryPointer`` as is used."""

    @property
    def ptr(self) -> int:
        """Address on the device."""

    def copy_from_host_async(self, mem: int, size: int, stream: Any) -> None:
        """Queue a copy of ``size`` bytes from page-locked memory at ``mem``."""

    def copy_to_host_async(self, mem: int, size: int, stream: Any) -> None:
        """Queue a copy of ``size`` bytes to page-locked memory at ``mem``."""


class DeviceArray(Protocol):
    """As much of ``cupy.ndarray`` as is used; its address is ``array.data.ptr``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy's."""

    @property
    def size(self) -> int:
        """Number of values."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""

    @property
    def data(self) -> DevicePointer:
        """Where the first value lies."""

    def __getitem__(self, key: Any) -> Self:
        """A view."""


def available() -> str | None:
    """Why there is no GPU to work on, or ``None`` if there is one. Loads CuPy."""
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDeviceCount()  # raises if there is no driver or no device
    except ImportError as exc:
        return f"CuPy cannot be loaded ({exc}): {INSTALL}"
    except RuntimeError as exc:
        return f"CUDA finds no GPU: {exc}"
    return None


def require() -> Any:
    """The ``cupy`` module.

    Raises:
        EngineError: CuPy is not installed, or there is no GPU (``engine.unavailable``).
    """
    if (reason := available()) is not None:
        raise EngineError(reason, code=Code.ENGINE_UNAVAILABLE)
    return importlib.import_module("cupy")


def device_name() -> str:
    """The name of CuPy's current device.

    Raises:
        EngineError: There is no CuPy or no GPU (``engine.unavailable``).
    """
    runtime = require().cuda.runtime
    with translated("name the device"):
        name: bytes = runtime.getDeviceProperties(runtime.getDevice())["name"]
    return name.decode()


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Raise what CuPy and CUDA raise as `EngineError`: "CUDA failed to <action>: ...".

    CUDA reports what went wrong in queued work with a later call.
    """
    try:
        yield
    except PeInferError:
        raise
    except Exception as exc:
        raise EngineError(f"CUDA failed to {action}: {exc}") from exc


class _Staging:
    """Page-locked memory that uploads go through, in turn."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()
        self._read = [cupy.cuda.Event(block=True, disable_timing=True) for _ in range(STAGED)]
        self._turn = 0
        self._slot = 0  # bytes
        self._memory: Any = None

    def send(self, host: NDArray[Any], device: DeviceArray, stream: Any) -> None:
        """Queue a copy by way of the next slot, once the GPU has read what was in it."""
        with self._lock:
            if host.nbytes > self._slot:
                self._grow(host.nbytes)
            read = self._read[self._turn]
            read.synchronize()  # returns at once if never recorded
            start = self._turn * self._slot
            staged = np.frombuffer(self._memory, np.uint8, host.nbytes, start)
            staged[:] = host.reshape(-1).view(np.uint8)
            device.data.copy_from_host_async(self._memory.ptr + start, host.nbytes, stream)
            read.record(stream)
            self._turn = (self._turn + 1) % STAGED

    def _grow(self, size: int) -> None:
        for read in self._read:
            read.synchronize()
        self._memory = self._cupy.cuda.alloc_pinned_memory(STAGED * size)
        self._slot = size


class _Resources:
    """A CUDA stream with its staging memory: what one study hands on to the next."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.device_id: int = cupy.cuda.Device().id
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.staging = _Staging(cupy)


class _Entered(threading.local):
    """Devices that this thread has entered: CuPy's own note of it is one for all threads."""

    def __init__(self) -> None:
        self.devices: list[Any] = []


# By device. CuPy's pool keeps freed memory for the stream it was allocated on and never gives it to
# another one: a new stream per study would let the pool grow with every study.
_idle: defaultdict[int, list[_Resources]] = defaultdict(list)


class DeviceStream:
    """One study's CUDA stream: what is queued on it runs in order, beside all other streams.

    Any thread may use it, several at a time; as a context manager it is CuPy's current stream, and
    its device the current device, in the calling thread. It need not be closed: when it is gone,
    the next study goes on with its CUDA stream and the memory that CuPy's pool holds for it.
    """

    def __init__(self) -> None:
        """Take a stream on CuPy's current device.

        Raises:
            EngineError: There is no CuPy or no GPU (``engine.unavailable``).
        """
        cupy = require()
        with translated("create a stream"):
            idle = _idle[cupy.cuda.Device().id]
            try:
                own = idle.pop()
            except IndexError:
                own = _Resources(cupy)
        self._own = own
        self._entered = _Entered()
        weakref.finalize(self, idle.append, own).atexit = False

    @property
    def handle(self) -> int:
        """The ``cudaStream_t``, as TensorRT and others take it."""
        return int(self._own.stream.ptr)

    @property
    def device_id(self) -> int:
        """Number of its device."""
        return self._own.device_id

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the handle."""
        return 0, self.handle

    def __enter__(self) -> Self:
        """Make it current in this thread; may be nested."""
        with translated("select the device"):
            device = self._own.cupy.cuda.Device(self._own.device_id)
            device.__enter__()  # first: CuPy refuses a stream of another device
            self._own.stream.__enter__()
            self._entered.devices.append(device)
        return self

    def __exit__(self, *exc: object) -> None:
        """Make current what was so before."""
        self._own.stream.__exit__(*exc)
        self._entered.devices.pop().__exit__(*exc)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """Device memory of any content, C-contiguous.

        It goes back to the pool when the array is gone, which may be while work that uses it is
        still queued here: whatever gets the memory next is queued behind.
        """
        with translated(f"allocate {shape} {np.dtype(dtype)}"), self:
            array: DeviceArray = self._own.cupy.empty(shape, dtype)
        return array

    def upload(self, host: NDArray[Any], device: DeviceArray) -> None:
        """Queue a copy to the device; ``host`` may be changed as soon as this returns.

        Waits only where ``STAGED`` uploads before this one are still to be done.

        Args:
            host: C-contiguous.
            device: C-contiguous, of at least as many bytes.
        """
        with translated("copy to the device"), self:
            self._own.staging.send(host, device, self._own.stream)

    def fetch(self, arrays: Sequence[DeviceArray]) -> list[NDArray[Any]]:
        """Copy to the host, after all that is queued here, and wait for it without spinning.

        Args:
            arrays: C-contiguous.

        Returns:
            Arrays of the same shapes and types in page-locked memory of their own.
        """
        found: list[NDArray[Any]] = []
        with translated("copy to the host"), self:
            for array in arrays:
                memory = self._own.cupy.cuda.alloc_pinned_memory(max(1, array.nbytes))
                host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
                array.data.copy_to_host_async(memory.ptr, array.nbytes, self._own.stream)
                found.append(host)
            self.wait()
        return found

    def wait(self) -> None:
        """Wait without spinning until what is queued here so far is done."""
        with translated("finish what was queued"), self:
            done = self._own.cupy.cuda.Event(block=True, disable_timing=True)
            done.record(self._own.stream)
            done.synchronize()

    def after(self, producer: object) -> None:
        """Let what is queued here from now on wait for what is queued on another stream so far.

        Args:
            producer: See `stream_handle`.
        """
        cuda = self._own.cupy.cuda
        with translated("wait for another stream"), self:
            event = cuda.Event(disable_timing=True)
            cuda.runtime.eventRecord(event.ptr, stream_handle(producer))
            self._own.stream.wait_event(event)


def stream_handle(stream: object) -> int:
    """The ``cudaStream_t`` of a stream of any library.

    Args:
        stream: A handle (1 is CUDA's default stream, 2 the one of the calling thread), or an object
            that says its own: by ``__cuda_stream__``, as PyCUDA's ``handle``, CuPy's ``ptr`` or
            PyTorch's ``cuda_stream``.

    Raises:
        ConfigurationError: It is none of these.
    """
    told: object = getattr(stream, "__cuda_stream__", None)
    if callable(told):
        told = told()
    handle = told[1] if isinstance(told, tuple) and len(told) == 2 else stream  # noqa: PLR2004 (version, handle)
    for name in ("handle", "ptr", "cuda_stream"):
        handle = getattr(handle, name, handle)
    if not isinstance(handle, int) or handle < 0:
        raise ConfigurationError(
            f"{stream!r} is no CUDA stream: pass an object with __cuda_stream__, a stream of "
            "PyCUDA, CuPy or PyTorch, or a handle as an int"
        )
    return handle
