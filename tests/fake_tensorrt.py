"""Stands in for TensorRT: as much of its API as building needs, over a graph's declared tensors."""

import enum
import os
import signal
import time
import types
from contextlib import suppress
from typing import Any

import onnx


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


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
        self.graph = onnx.GraphProto()

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
            self.network.graph = onnx.load_from_string(graph).graph
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


class FakeTensorRt(types.ModuleType):
    """The module. ``built`` holds network and settings of every build; ``fail`` makes it fail.

    With ``interrupted`` set, the user presses Ctrl-C while the builder logs: the real bindings
    swallow what is raised there, and so does this.
    """

    def __init__(self, version: str = "10.3.0.26") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.built: list[tuple[Network, Config]] = []
        self.fail = ""
        self.interrupted = False
        self.ILogger = type("ILogger", (), {"Severity": Severity, "__init__": lambda _: None})
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda _: None})
        self.NetworkDefinitionCreationFlag = Flag
        self.BuilderFlag = Flag
        self.OnnxParser = OnnxParser
        self.Builder = lambda logger: Builder(self, logger)


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
        return b"plan of " + network.graph.SerializeToString(deterministic=True)
