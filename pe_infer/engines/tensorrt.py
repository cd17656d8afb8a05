"""TensorRT and TensorRT for RTX: engines run by a study's CUDA stream, with no host in between.

A session sets addresses and queues a run; it allocates nothing, copies nothing and waits for
nothing. Deserialising an engine runs what its bytes say: they come from an `EngineFolder`, which
vouches for them, or from the builder in this process.

TensorRT for RTX finishes an engine for the GPU that is there when its first context is made, which
takes seconds. A kernel for every batch size is compiled when it is first run, which
`pe_infer.engines.base.warm_up` sees to, and not behind a study's back: one set of kernels computes
a study. All engines of a runtime share what was compiled, and `pe_infer.engine_store` keeps it.

None of this has run on a GPU yet: see docs/gpu.md.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, cast

from pe_infer.cuda.device import DeviceStream, device_name, require
from pe_infer.engine_manifest import EngineEntry
from pe_infer.engines.base import Engine, EngineOptions, Session, TensorSpec, check_tensors
from pe_infer.engines.lane import CudaLane, Lane, Tensor
from pe_infer.engines.tensorrt_build import build_engine, tensor_dtype
from pe_infer.engines.tensorrt_types import (
    CudaEngine,
    ExecutionContext,
    RuntimeCache,
    TrtRuntime,
)
from pe_infer.engines.tensorrt_vendor import Vendor
from pe_infer.errors import Code, EngineError
from pe_infer.half import half_graph
from pe_infer.machine import device_capability
from pe_infer.manifest import Precision

ALIGNMENT: Final = 256  # bytes: that of memory from CUDA, which kernels may count on


class TensorRtSession:
    """An IExecutionContext, used in one lane.

    Arrays may be dropped while the GPU still uses them: their memory is handed out again to later
    work of the same stream only. When the session is gone its context is handed on, so a new study
    finds its memory allocated and its kernels compiled; the GPU, not the host, then waits for what
    the old stream had queued. That stream is never destroyed (`DeviceStream`).
    """

    def __init__(self, engine: "TensorRtEngine", lane: Lane) -> None:
        """Take a context that no other session uses."""
        if lane.stream is None:
            raise EngineError(
                f"{engine.name} runs on a GPU and was given a lane of the host: use Runtime.lane()",
                code=Code.ENGINE_INPUT,
            )
        self._engine = engine
        self._lane = lane
        self._stream = lane.stream
        self._context = engine.take_context(self._stream)
        self._batch = 0  # that the context is set to; 0: not known
        self._buffers: dict[tuple[str, int], Tensor] = {}
        # Not when Python ends: the driver may be gone by then, and everything goes with it.
        handle = self._stream.handle
        weakref.finalize(self, engine.give_back, self._context, handle).atexit = False

    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """See `pe_infer.engines.base.Session.run`."""
        engine, lane, given = self._engine, self._lane, out or {}
        for name, array in (*inputs.items(), *given.items()):
            if not lane.holds(array):
                check_tensors(engine, inputs, given)  # what else is wrong with it
                raise EngineError(
                    f"{engine.name}: tensor {name!r} does not lie in device memory: copy it there "
                    "(Lane.copy)",
                    code=Code.ENGINE_INPUT,
                )
        batch = check_tensors(engine, inputs, given)
        results = {
            name: given[name] if name in given else self._buffer(name, batch)
            for name in engine.outputs
        }
        with engine.vendor.translated(f"run {engine.name}"):
            if batch != self._batch:
                self._set_batch(batch)
            written = []
            for name, array in inputs.items():
                aligned = self._aligned(name, array)
                if aligned is not array:
                    lane.copy(array, aligned)
                self._bind(name, aligned)
            for name, array in results.items():
                aligned = self._aligned(name, array)
                if aligned is not array:
                    written.append((aligned, array))
                self._bind(name, aligned)
            if not self._context.execute_async_v3(self._stream.handle):
                raise engine.vendor.failure(f"run {engine.name}")
            for aligned, array in written:
                lane.copy(aligned, array)
        return results

    def _set_batch(self, batch: int) -> None:
        self._batch = 0
        for name, spec in self._engine.inputs.items():
            if spec.shape[0] is None and not self._context.set_input_shape(
                name, spec.of_batch(batch)
            ):
                raise self._engine.vendor.failure(f"take a batch of {batch} for {name!r}")
        self._batch = batch

    def _bind(self, name: str, array: Tensor) -> None:
        if not self._context.set_tensor_address(name, _address(array)):
            raise self._engine.vendor.failure(f"bind {name!r} of {self._engine.name}")

    def _aligned(self, name: str, array: Tensor) -> Tensor:
        """The array, or a buffer for it where its address is not one that TensorRT may be given.

        Rows of small sequences, such as one logit per slab, lie at any multiple of four bytes.
        """
        return array if _address(array) % ALIGNMENT == 0 else self._buffer(name, len(array))

    def _buffer(self, name: str, batch: int) -> Tensor:
        if (name, batch) not in self._buffers:
            engine = self._engine
            spec = engine.inputs.get(name) or engine.outputs[name]
            self._buffers[name, batch] = self._lane.empty(spec.of_batch(batch))
        return self._buffers[name, batch]


class TensorRtEngine:
    """An ICudaEngine, and the contexts that no session uses at the moment.

    A context has device memory of its own for the largest batch. There are as many as there were
    studies at once.
    """

    def __init__(
        self,
        *,
        name: str,
        runtime: "TensorRtRuntime",
        cuda: CudaEngine,
        create: Callable[[], ExecutionContext | None],
        precision: str,
        max_batch: int,
    ) -> None:
        """Read the tensors of the engine.

        Raises:
            EngineError: Its profile does not reach from 1 to ``max_batch`` (``engine.untrusted``).
        """
        self.name = name
        self.vendor = runtime.vendor
        self.precision = precision
        self._runtime = runtime  # outlives its engines
        self._cuda = cuda
        self._create = create
        self._idle: list[tuple[ExecutionContext, int]] = []  # and the stream it was used on
        mode = runtime.vendor.trt.TensorIOMode
        with self.vendor.translated(f"describe {name}"):
            self.inputs = self._specs(mode.INPUT)
            self.outputs = self._specs(mode.OUTPUT)
            free = [n for n, spec in self.inputs.items() if spec.shape and spec.shape[0] is None]
            ranges = [cuda.get_tensor_profile_shape(n, 0) for n in free]
        if any(least[0] != 1 or most[0] < max_batch for least, _, most in ranges):
            raise EngineError(
                f"{name}: the engine takes batches of {[(r[0][0], r[2][0]) for r in ranges]}, "
                f"expected 1 to {max_batch}: build it again (pe-infer build)",
                code=Code.ENGINE_UNTRUSTED,
            )
        self.batch_sizes = batches_up_to(max_batch if free else 1)

    def session(self, lane: Lane | None = None) -> Session:
        """A session with a context that is idle, or a new one."""
        return TensorRtSession(self, lane or self._runtime.lane())

    def take_context(self, stream: DeviceStream) -> ExecutionContext:
        """A context for one session. Thread-safe.

        Args:
            stream: Where it will be used.

        Raises:
            EngineError: A new one cannot be made, most likely for want of memory.
        """
        try:
            context, before = self._idle.pop()
        except IndexError:
            with self.vendor.translated(f"create a context of {self.name}"), stream:
                made = self._create()
                if made is None:
                    raise self.vendor.failure(f"create a context of {self.name}") from None
                return made
        if before != stream.handle:
            stream.after(before)
        return context

    def give_back(self, context: ExecutionContext, handle: int) -> None:
        """Take a context back from a session that used it on a stream. Thread-safe."""
        self._idle.append((context, handle))

    def _specs(self, mode: Any) -> Mapping[str, TensorSpec]:
        cuda, specs = self._cuda, {}
        for name in map(cuda.get_tensor_name, range(cuda.num_io_tensors)):
            if cuda.get_tensor_mode(name) == mode:
                shape = tuple(None if n < 0 else int(n) for n in cuda.get_tensor_shape(name))
                dtype = tensor_dtype(cuda.get_tensor_dtype(name))
                specs[name] = TensorSpec(name=name, shape=shape, dtype=dtype)
        return MappingProxyType(specs)


class TensorRtRuntime:
    """One of NVIDIA's libraries on the first GPU."""

    def __init__(self, target: str, options: EngineOptions) -> None:
        """Load the library and find the GPU.

        Raises:
            EngineError: A library or the GPU is not there (``engine.unavailable``).
        """
        self.name = target
        self.options = options
        require()
        self.vendor = Vendor(target)
        self.version = self.vendor.version
        self.device = device_name()
        self._compiling = threading.Lock()
        self._kernels: RuntimeCache | None = None  # made with the first engine
        self._kept = b""  # what it begins with
        with self.vendor.translated("start"):
            self._runtime: TrtRuntime = self.vendor.trt.Runtime(self.vendor.logger)

    @property
    def own_capability(self) -> tuple[str, ...]:
        """What to build engines for: this GPU, where the library builds for a GPU that is named."""
        own = device_capability()
        return tuple(known for known in self.vendor.flavour.capabilities if known == own)

    def lane(self) -> Lane:
        """A CUDA stream."""
        return CudaLane()

    def compile(
        self, graph: bytes, *, name: str, precision: Precision = "float32", max_batch: int = 1
    ) -> Engine:
        """Build an engine for this GPU and load it; takes seconds to minutes, and keeps nothing.

        See `pe_infer.engines.base.Runtime.compile`; `pe_infer.engine_store` keeps what it builds.
        """
        reduced = self.options.precision == "default"
        if reduced:
            graph = half_graph(graph, name=name, precision=precision)
        largest = min(max_batch, self.options.max_batch or max_batch)
        built = build_engine(
            self.vendor,
            graph,
            name=name,
            max_batch=largest,
            capabilities=self.own_capability,
        )
        return self._load(built.data, name, _arithmetic(precision, reduced=reduced), largest)

    def load(self, data: bytes, entry: EngineEntry, *, name: str, reduced: bool) -> Engine:
        """Load an engine that was built before.

        Args:
            data: Of `EngineFolder.read`, and from nowhere else.
            entry: What its manifest says of it.
            name: For messages.
            reduced: Whether it computes as the bundle's node allows, or in float32.

        Raises:
            EngineError: The library refuses it (``engine.failed``), or it is not what the manifest
                says (``engine.untrusted``).
        """
        largest = min(entry.max_batch, self.options.max_batch or entry.max_batch)
        precision = _arithmetic(entry.precision, reduced=reduced)
        engine = self._load(data, name, precision, largest)
        expected = {
            **{tensor: spread.max for tensor, spread in entry.inputs.items()},
            **entry.outputs,
        }
        found = {
            tensor: spec.of_batch(entry.max_batch)
            for tensor, spec in {**engine.inputs, **engine.outputs}.items()
        }
        if found != expected:
            raise EngineError(
                f"{entry.file}: the engine's tensors are {found}, engines.json says {expected}: "
                "build it again (pe-infer build)",
                code=Code.ENGINE_UNTRUSTED,
            )
        return engine

    def begin_with(self, kernels: bytes) -> None:
        """Use kernels that were compiled earlier; before anything is loaded.

        Args:
            kernels: Of `kernels`, read from an `EngineFolder`, and from nowhere else.
        """
        self._kept = kernels

    def kernels(self) -> bytes:
        """What was compiled for this GPU so far; empty where nothing is compiled at run time."""
        if self._kernels is None:
            return b""
        with self.vendor.translated("serialise compiled kernels"):
            return bytes(self._kernels.serialize())

    def _load(self, data: bytes, name: str, precision: str, max_batch: int) -> "TensorRtEngine":
        with self.vendor.translated(f"load {name}"):
            cuda = self._runtime.deserialize_cuda_engine(data)
            if cuda is None:
                raise self.vendor.failure(f"load {name}")
            create = self._creator(cuda)
        return TensorRtEngine(
            name=name,
            runtime=self,
            cuda=cuda,
            create=create,
            precision=precision,
            max_batch=max_batch,
        )

    def _creator(self, cuda: CudaEngine) -> Callable[[], ExecutionContext | None]:
        """How contexts of an engine are made."""
        if not self.vendor.flavour.compiles_at_load:
            return cuda.create_execution_context
        config = cuda.create_runtime_config()
        strategies = self.vendor.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        with self._compiling:
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                if self._kept:  # what is refused is compiled anew
                    self._kernels.deserialize(self._kept)
        if not config.set_runtime_cache(self._kernels):
            raise self.vendor.failure("share compiled kernels")
        return lambda: cuda.create_execution_context(config)


def runtime(name: str, options: EngineOptions) -> TensorRtRuntime:
    """The entry point of `pe_infer.engines.base.select`."""
    return TensorRtRuntime(name, options)


def batches_up_to(largest: int) -> tuple[int, ...]:
    """Powers of two and the largest: few runs for any number of slabs, few shapes to warm up."""
    powers = (1 << bit for bit in range(largest.bit_length()))
    return tuple(sorted({*powers, largest}))


def _arithmetic(precision: Precision, *, reduced: bool) -> str:
    return "float16" if reduced and precision != "float32" else "float32"


def _address(array: Tensor) -> int:
    return int(cast("Any", array).data.ptr)
