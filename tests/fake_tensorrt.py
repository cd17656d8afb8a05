"""Stands in for TensorRT: as much of its API as is used to build engines and to run them.

An engine is the ONNX graph it was built from. A context runs it with ONNX Runtime on the memory at
the addresses that were bound, when the stream gets there: `FakeTensorRt.queue` says when that is.
"""

import ctypes
import enum
import hashlib
import importlib.machinery
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

PLAN = b"plan of "
ALIGNMENT = 256


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Mode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class Flag(enum.IntEnum):
    TF32, STRONGLY_TYPED = 3, 1


class Tensor:
    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.shape = tuple(size.dim_value or -1 for size in kind.shape.dim)
        self.dtype = types.SimpleNamespace(name=onnx.TensorProto.DataType.Name(kind.elem_type))


class Network:
    def __init__(self, flags: int) -> None:
        self.strongly_typed = bool(flags & 1 << Flag.STRONGLY_TYPED)
        self.model = onnx.ModelProto()
        self.graph = self.model.graph

    num_inputs = property(lambda self: len(self.graph.input))
    num_outputs = property(lambda self: len(self.graph.output))

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.graph.input[index])

    def get_output(self, index: int) -> Tensor:
        return Tensor(self.graph.output[index])


class ParserError:
    def desc(self) -> str:
        return "no importer for this operator"

    def node_operator(self) -> str:
        return "Exotic"

    def node_name(self) -> str:
        return "exotic_1"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Network, logger: Any) -> None:  # noqa: ARG002  as the vendor names it
        self.network = network

    def parse(self, graph: bytes) -> bool:
        try:
            self.network.model = onnx.load_from_string(graph)
            self.network.graph = self.network.model.graph
        except Exception:  # noqa: BLE001  protobuf's own
            return False
        return True

    def get_error(self, index: int) -> ParserError:  # noqa: ARG002
        return ParserError()


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"measured"


class Config:
    progress_monitor: Any = None
    cache: TimingCache | None = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self.flags = {Flag.TF32}
        self.profiles: list[Profile] = []

    def set_compute_capability(self, capability: str, index: int) -> bool:
        assert index < self.num_compute_capabilities
        return capability.startswith("SM")

    def clear_flag(self, flag: Flag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, *, ignore_mismatch: bool) -> bool:
        if cache.data == b"of another machine" and not ignore_mismatch:
            return False
        self.cache = cache
        return True


class Named:
    """Every attribute is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeTensorRt(types.ModuleType):
    """The module.

    Attributes:
        built: Network and settings of every build.
        fail: Makes builds and runs fail: it is what the library logs, ``"raise"`` raises.
        contexts: Every context made.
        compiled: How many kernels were compiled at run time, as TensorRT for RTX does.
        interrupted: The user presses Ctrl-C while the builder logs: the real bindings swallow what
            is raised there, and so does this.
        queue: Takes the handle of a stream and what is to be done on it; does it at once.
    """

    def __init__(self, version: str = "10.3.0.26", name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = version
        self.built: list[tuple[Network, Config]] = []
        self.contexts: list[Context] = []
        self.compiled = 0
        self.fail = ""
        self.interrupted = False
        self.queue: Callable[[int, Callable[[], None]], None] = lambda _, work: work()
        self.ILogger = type("ILogger", (), {"Severity": Severity, "__init__": lambda _: None})
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda _: None})
        self.NetworkDefinitionCreationFlag = Flag
        self.BuilderFlag = Flag
        self.TensorIOMode = Mode
        self.ComputeCapability = Named()
        self.DynamicShapesKernelSpecializationStrategy = Named()
        self.OnnxParser = OnnxParser
        self.Builder = lambda logger: Builder(self, logger)
        self.Runtime = lambda logger: Runtime(self, logger)


def install(
    monkeypatch: pytest.MonkeyPatch, module: FakeTensorRt, capability: str = "8.6"
) -> FakeTensorRt:
    """Make it the library of this machine, beside a GPU."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    versions = {module.__name__.replace("_", "-"): module.__version__}
    monkeypatch.setattr("pe_infer.machine._package_version", versions.get)
    for user in ("machine", "engine_build", "engines.tensorrt"):
        monkeypatch.setattr(f"pe_infer.{user}.device_capability", lambda: capability)
    return module


class Builder:
    def __init__(self, module: FakeTensorRt, logger: Any) -> None:
        self.module = module
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        self.logger.log(Severity.INFO, "building")
        self.logger.log(Severity.VERBOSE, "a thousand details")
        if self.module.fail == "raise":
            raise RuntimeError("cuda is gone")
        if self.module.fail:
            self.logger.log(Severity.ERROR, self.module.fail)
            return None
        monitor = config.progress_monitor
        if self.module.interrupted:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        self.module.built.append((network, config))
        head = json.dumps([profile.shapes for profile in config.profiles])
        return PLAN + head.encode() + b"\n" + network.model.SerializeToString(deterministic=True)


class Runtime:
    def __init__(self, module: FakeTensorRt, logger: Any) -> None:
        self.module = module
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        if not plan.startswith(PLAN):
            self.logger.log(Severity.ERROR, "serialized engine: magic tag does not match")
            return None
        head, _, model = plan.removeprefix(PLAN).partition(b"\n")
        return Engine(self.module, self.logger, json.loads(head), model)


class RuntimeCache:
    """Names of kernels; only the GPU that made them takes them back."""

    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps([self.module.__version__, *sorted(self.kernels)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        version, *kernels = json.loads(blob)
        if version == self.module.__version__:
            self.kernels |= set(kernels)
        return bool(version == self.module.__version__)


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "LAZY"
    cache: RuntimeCache | None = None

    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.module)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(
        self, module: FakeTensorRt, logger: Any, profiles: list[dict[str, Any]], model: bytes
    ) -> None:
        self.module = module
        self.logger = logger
        self.profile = profiles[0] if profiles else {}
        self.key = hashlib.sha256(model).hexdigest()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load_from_string(model).graph
        self.inputs = {value.name: Tensor(value) for value in graph.input}
        self.outputs = {value.name: Tensor(value) for value in graph.output}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> Sequence[Sequence[int]]:
        assert profile == 0
        shapes: Sequence[Sequence[int]] = self.profile[name]
        return shapes

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module)

    def create_execution_context(self, config: RuntimeConfig | None = None) -> "Context | None":
        context = Context(self, config)
        self.module.contexts.append(context)
        return context


class Context:
    """Remembers shapes and addresses, as the real one does, and the streams it ran on."""

    def __init__(self, engine: Engine, config: RuntimeConfig | None) -> None:
        self.engine = engine
        self.config = config
        self.shapes = {n: t.shape for n, t in engine.inputs.items() if -1 not in t.shape}
        self.addresses: dict[str, int] = {}
        self.handles: list[int] = []
        self.done = 0
        self.shapes_set = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profile[name]
        if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return self._refuse(f"{name}: {shape} is outside the profile")
        self.shapes[name] = shape
        self.shapes_set += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors or address % ALIGNMENT:
            return self._refuse(f"{name}: address {address:#x} is not aligned")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        module, engine = self.engine.module, self.engine
        if module.fail == "raise":
            raise RuntimeError("out of memory")
        if module.fail:
            return self._refuse(module.fail)
        if self.addresses.keys() != engine.tensors.keys():
            return self._refuse("not all tensors have an address")
        if self.shapes.keys() != engine.inputs.keys():
            return self._refuse("not all inputs have a shape")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self._compile(shapes)
        run = len(self.handles) + 1

        def work() -> None:
            self.done += 1
            assert self.done == run, "its memory was still in use on another stream"
            feeds = {n: memory(addresses[n], shape).copy() for n, shape in shapes.items()}
            for name, values in zip(
                engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True
            ):
                memory(addresses[name], values.shape)[...] = values

        module.queue(handle, work)
        self.handles.append(handle)
        return True

    def _compile(self, shapes: dict[str, Any]) -> None:
        if self.config and self.config.cache:
            kernel = f"{self.engine.key} {sorted(shapes.items())}"
            if kernel not in self.config.cache.kernels:
                self.config.cache.kernels.add(kernel)
                self.engine.module.compiled += 1

    def _refuse(self, reason: str) -> bool:
        self.engine.logger.log(Severity.ERROR, reason)
        return False


def memory(address: int, shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Fake device memory is memory of this process."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
