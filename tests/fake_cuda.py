"""Stands in for CuPy: as much of it as is used, on memory of this process, as late as CUDA may.

Nothing that is queued happens before somebody waits for it: a staging buffer that is filled again
too early, a result that is read too early, or a stream that does not wait for another one changes
what comes out. Memory that is handed out is overwritten first, in the order of the stream. What
nobody should call (`Stream.synchronize`, `Device.synchronize`) is not there.
"""

import ctypes
import importlib.machinery
import itertools
import sys
import threading
import time
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Self

import cuda_host
import numpy as np
import pytest

UNIT = 512  # CuPy's pools round sizes up to it, and their addresses are multiples of it
GARBAGE = 0xA5
Work = Callable[[], None]


class CUDARuntimeError(RuntimeError):
    """As CuPy raises it."""


class Pool:
    """Memory that is kept for ever, and handed out again for sizes of the same magnitude."""

    def __init__(self, gpu: "FakeGpu") -> None:
        self.gpu = gpu
        self.blocks: list[tuple[int, int]] = []  # address and size
        self.free: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by stream

    def take(self, size: int, owner: int = 0) -> tuple[int, int]:
        size = -(-max(size, 1) // UNIT) * UNIT
        fitting = [block for block in self.free[owner] if size <= block[1] <= 2 * size]
        if fitting:
            self.free[owner].remove(found := min(fitting, key=lambda block: block[1]))
            return found
        raw = np.full(size + UNIT, GARBAGE, np.uint8)
        self.gpu.keep.append(raw)
        self.gpu.allocations += 1
        self.blocks.append(block := (-(-raw.ctypes.data // UNIT) * UNIT, size))
        return block

    def holds(self, address: int, size: int) -> bool:
        return any(a <= address and address + size <= a + n for a, n in self.blocks)


class FakeGpu:
    """What happened, and what to make happen.

    Attributes:
        allocations: Blocks of device and page-locked memory that the pools had to ask CUDA for.
        waits: Times that the host waited for work that was not done yet.
        launched: Names of the kernels queued so far.
        error: When set, what every call to CUDA fails with.
        latency_s: How long waiting takes at least, while other threads go on.
        device: Number of the current device, by thread.
    """

    def __init__(self, devices: int = 2) -> None:
        self.devices = devices
        self.allocations = 0
        self.waits = 0
        self.launched: list[str] = []
        self.error = ""
        self.latency_s = 0.0
        self.keep: list[np.ndarray[Any, Any]] = []
        self.lock = threading.RLock()  # the kernels run one at a time
        self.memory, self.pinned = Pool(self), Pool(self)
        self.owners: dict[int, int] = {}  # address of a block to device
        self.handles = itertools.count(0x1000, 0x10)
        self.streams: dict[int, Stream] = {}
        self.events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self.local = threading.local()
        self.module = make_module(self)

    @property
    def device(self) -> int:
        return getattr(self.local, "device", 0)

    def remove(self) -> None:
        """Take the GPU out."""
        self.devices = 0

    def check(self) -> None:
        if self.devices == 0:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        if self.error:
            raise CUDARuntimeError(self.error)

    def enqueue(self, handle: int, work: Work) -> None:
        """Queue something on a stream."""
        with self.lock:
            self.stream(handle).queue.append(work)

    def finish(self, handle: int) -> None:
        """Let everything be done that is queued on a stream."""
        with self.lock:
            self.stream(handle).run_to(self.stream(handle).queued)

    def stream(self, handle: int) -> "Stream":
        if handle in {0, 1} and handle not in self.streams:
            Stream(self, null=True)
        return self.streams[handle]

    @property
    def current(self) -> "Stream":
        """Of this thread."""
        return (getattr(self.local, "streams", None) or [self.stream(0)])[-1]


class Stream:
    def __init__(self, gpu: FakeGpu, *, null: bool = False, non_blocking: bool = False) -> None:
        gpu.check()
        assert null or non_blocking, "it would wait for the default stream, and that for it"
        self.gpu = gpu
        self.ptr = 0 if null else next(gpu.handles)
        self.device_id = gpu.device
        self.queue: deque[Work] = deque()
        self.done = 0
        gpu.streams[self.ptr] = self
        if null:
            gpu.streams[1] = self

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> Self:
        if self.device_id != self.gpu.device:
            raise RuntimeError("The device that the stream is created on does not match")
        if not hasattr(self.gpu.local, "streams"):
            self.gpu.local.streams = []
        self.gpu.local.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.gpu.local.streams.pop() is self

    def wait_event(self, event: "Event") -> None:
        self.gpu.check()
        stream, count = event.stream, event.count
        if stream is not None:
            self.gpu.enqueue(self.ptr, lambda: stream.run_to(count))

    @property
    def queued(self) -> int:
        """How much was ever queued."""
        return self.done + len(self.queue)

    def run_to(self, count: int) -> None:
        """Do what was queued, up to the ``count``-th work ever."""
        while self.done < count:
            self.queue.popleft()()
            self.done += 1


class Event:
    def __init__(self, gpu: FakeGpu, block: bool = False, disable_timing: bool = False) -> None:
        gpu.check()
        assert disable_timing
        self.gpu = gpu
        self.block = block
        self.stream: Stream | None = None
        self.count = 0
        gpu.events[self.ptr] = self

    ptr = property(id)

    def record(self, stream: Stream) -> None:
        self.gpu.check()
        with self.gpu.lock:
            self.stream, self.count = stream, stream.queued

    def synchronize(self) -> None:
        self.gpu.check()
        assert self.block, "a core would spin"
        time.sleep(self.gpu.latency_s)
        with self.gpu.lock:
            if self.stream is not None and self.stream.done < self.count:
                self.gpu.waits += 1
                self.stream.run_to(self.count)


class Device:
    def __init__(self, gpu: FakeGpu, number: int | None = None) -> None:
        self.gpu = gpu
        self.id = gpu.device if number is None else number
        self.before: list[int] = []

    def __enter__(self) -> Self:
        self.gpu.check()
        self.before.append(self.gpu.device)
        self.gpu.local.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.local.device = self.before.pop()


class Memory:
    """A block of device memory; goes back to the stream that it was taken for."""

    def __init__(self, gpu: FakeGpu, size: int) -> None:
        gpu.check()
        with gpu.lock:
            stream = gpu.current
            block = gpu.memory.take(size, stream.ptr)
            gpu.owners[block[0]] = gpu.device
            self.ptr, self.size = block
            self.device_id = gpu.device
            gpu.enqueue(stream.ptr, lambda: overwrite(block))
        weakref.finalize(self, gpu.memory.free[stream.ptr].append, block).atexit = False


def overwrite(block: tuple[int, int]) -> None:
    ctypes.memset(block[0], GARBAGE, block[1])


class UnownedMemory:
    def __init__(self, gpu: FakeGpu, ptr: int, size: int, owner: object) -> None:
        inside = [at for at, n in gpu.memory.blocks if at <= ptr and ptr + size <= at + n]
        if not inside:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        self.ptr, self.size, self.owner = ptr, size, owner
        self.device_id = gpu.owners[inside[0]]


class MemoryPointer:
    def __init__(self, gpu: FakeGpu, memory: Any, offset: int) -> None:
        self.gpu = gpu
        self.mem = memory
        self.ptr = memory.ptr + offset
        self.device_id = memory.device_id

    def copy_from_host_async(self, mem: int, size: int, stream: Stream) -> None:
        self._copy(self.ptr, mem, size, stream, mem)

    def copy_to_host_async(self, mem: int, size: int, stream: Stream) -> None:
        self._copy(mem, self.ptr, size, stream, mem)

    def _copy(self, to: int, source: int, size: int, stream: Stream, host: int) -> None:
        self.gpu.check()
        assert self.gpu.pinned.holds(host, size), "the copy would not be asynchronous"

        def work() -> None:
            ctypes.memmove(to, source, size)

        self.gpu.enqueue(stream.ptr, work)


class Array:
    """A view of device memory. Nothing of it can be read but through a copy."""

    def __init__(self, gpu: FakeGpu, memory: Any, view: np.ndarray[Any, Any]) -> None:
        self._gpu = gpu
        self._memory = memory
        self._view = view
        self.data = MemoryPointer(gpu, memory, view.ctypes.data - memory.ptr)
        self.shape, self.dtype, self.strides = view.shape, view.dtype, view.strides
        self.size, self.nbytes, self.ndim = view.size, view.nbytes, view.ndim
        self.itemsize = view.itemsize
        self.flags = types.SimpleNamespace(c_contiguous=view.flags.c_contiguous)

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, key: Any) -> "Array":
        view = self._view[key]
        assert isinstance(view, np.ndarray), "reading a value would wait for the device"
        return Array(self._gpu, self._memory, view)

    def __setitem__(self, key: Any, value: Any) -> None:
        assert not isinstance(value, np.ndarray), "this copy would wait for the device"
        target = self._view[key]
        assert isinstance(target, np.ndarray)
        source = value._view if isinstance(value, Array) else value
        self._gpu.enqueue(self._gpu.current.ptr, lambda: np.copyto(target, source))

    def fill(self, value: float) -> None:
        self[...] = value

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.data.ptr, False),
            "strides": None if self.flags.c_contiguous else self.strides,
            "version": 3,
            "stream": self._gpu.current.ptr or 1,
        }


def array_over(gpu: FakeGpu, shape: Any, dtype: Any, pointer: MemoryPointer) -> Array:
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer.ptr)
    return Array(gpu, pointer.mem, np.frombuffer(raw, dtype, count).reshape(shape))


def empty(gpu: FakeGpu, shape: Any, dtype: Any = np.float32) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return array_over(gpu, shape, dtype, MemoryPointer(gpu, Memory(gpu, size), 0))


def pinned(gpu: FakeGpu, size: int) -> Any:
    """Page-locked memory; like CuPy's it is an object with a buffer and ``ptr``."""
    gpu.check()
    with gpu.lock:
        block = gpu.pinned.take(size)
    kind = type("PinnedMemoryPointer", (ctypes.c_uint8 * block[1],), {"ptr": block[0]})
    memory = kind.from_address(block[0])  # type: ignore[attr-defined]
    overwrite(block)
    weakref.finalize(memory, gpu.pinned.free[0].append, block).atexit = False
    return memory


class RawModule:
    def __init__(
        self, gpu: FakeGpu, code: str = "", path: str = "", options: tuple[str, ...] = ()
    ) -> None:
        self.gpu = gpu
        self.code, self.path, self.options = code, path, options
        if not path:
            assert "__global__" in code
            assert '#include "' not in code, "CuPy would not notice a change of the header"
            assert "--fmad=false" in options

    def get_function(self, name: str) -> Any:
        return Kernel(self.gpu, name)


class Kernel:
    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu = gpu
        self.name = name

    def compile(self) -> None:
        self.gpu.check()

    def __call__(self, grid: tuple[int, int], block: tuple[int, int], args: Any) -> None:
        self.gpu.check()
        assert all(isinstance(arg, Array | np.generic) for arg in args)
        values = [np.uintp(a.data.ptr) if isinstance(a, Array) else a for a in args]
        threads = (grid[0] * block[0], grid[1] * block[1])

        def work() -> None:
            host = cuda_host.kernels()
            with host.flushing_subnormals():
                host.launch(self.name, threads, block, *values)

        self.gpu.launched.append(self.name)
        self.gpu.enqueue(self.gpu.current.ptr, work)


def make_module(gpu: FakeGpu) -> types.ModuleType:
    def bound(kind: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: kind(gpu, *args, **kwargs)

    def count() -> int:
        gpu.check()
        return gpu.devices

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    runtime = types.SimpleNamespace(
        getDeviceCount=count,
        getDevice=lambda: gpu.device,
        getDeviceProperties=lambda number: {"name": f"Fake GPU {number}".encode()},
        eventRecord=lambda event, handle: gpu.events[event].record(gpu.stream(handle)),
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=bound(Device),
        Stream=bound(Stream),
        Event=bound(Event),
        UnownedMemory=bound(UnownedMemory),
        MemoryPointer=bound(MemoryPointer),
        alloc_pinned_memory=bound(pinned),
    )
    contents = {
        "cuda": cuda,
        "empty": bound(empty),
        "ndarray": bound(array_over),
        "RawModule": bound(RawModule),
        "from_dlpack": lambda array: array.__dlpack__(stream=gpu.current.ptr),
    }
    vars(cupy).update(contents)
    return cupy


def install(monkeypatch: pytest.MonkeyPatch, devices: int = 2) -> FakeGpu:
    """Make this the machine's CuPy, with nothing left of an earlier one."""
    gpu = FakeGpu(devices)
    monkeypatch.setitem(sys.modules, "cupy", gpu.module)
    monkeypatch.setattr("pe_infer.cuda.device._idle", defaultdict(list))
    return gpu
