"""ONNX Runtime on the CPU: runs anywhere, always float32. The only module that imports onnxruntime.

As with OpenVINO, a larger batch is no faster per slab on a CPU, so it runs one slab at a time
unless `EngineOptions.max_batch` asks for more.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from pe_infer.engines.base import (
    Engine,
    EngineOptions,
    Session,
    TensorSpec,
    batch_sizes,
    check_tensors,
)
from pe_infer.engines.lane import HostLane, Lane, Tensor
from pe_infer.engines.processor import processor
from pe_infer.errors import Code, EngineError
from pe_infer.manifest import Precision

_TELEMETRY_SWITCH: Final = "ORT_DISABLE_TELEMETRY"
_PROVIDERS: Final = ["CPUExecutionProvider"]
_ERRORS_ONLY: Final = 3
_FATAL_ONLY: Final = 4
_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}


class OnnxRuntimeSession:
    """An IOBinding to the caller's arrays."""

    def __init__(self, engine: "OnnxRuntimeEngine", inference: Any) -> None:
        """Own a binding of the shared InferenceSession."""
        self._engine = engine
        self._inference = inference
        self._options = _vendor().RunOptions()
        self._options.log_severity_level = _FATAL_ONLY  # failures are raised, not printed
        self._binding = inference.io_binding()
        self._buffers: dict[int, dict[str, Tensor]] = {}

    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """See `pe_infer.engines.base.Session.run`."""
        given = out or {}
        batch = check_tensors(self._engine, inputs, given)
        results = {
            name: given[name] if name in given else self._buffer(name, batch)
            for name in self._engine.outputs
        }
        binding = self._binding
        with _translated(f"run {self._engine.name}"):
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            for name, array in results.items():
                binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            self._inference.run_with_iobinding(binding, self._options)
        return results

    def _buffer(self, name: str, batch: int) -> Tensor:
        buffers = self._buffers.setdefault(batch, {})
        if name not in buffers:
            buffers[name] = np.empty(self._engine.outputs[name].of_batch(batch), np.float32)
        return buffers[name]


class OnnxRuntimeEngine:
    """An InferenceSession, which is thread-safe and holds no state of ours."""

    precision = "float32"

    def __init__(self, *, name: str, inference: Any, sizes: tuple[int, ...]) -> None:
        """Read the specs of the graph."""
        self.name = name
        self.inputs: Mapping[str, TensorSpec] = _specs(inference.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = _specs(inference.get_outputs())
        self.batch_sizes = sizes
        self._inference = inference

    def session(self, lane: Lane | None = None) -> Session:
        """A new IOBinding."""
        del lane
        with _translated(f"create a session of {self.name}"):
            return OnnxRuntimeSession(self, self._inference)


class OnnxRuntimeRuntime:
    """ONNX Runtime's CPU provider with one set of options; ``cache_dir`` has no effect."""

    name = "onnxruntime"

    def __init__(self, options: EngineOptions) -> None:
        """Load the library.

        Raises:
            EngineError: It cannot be loaded (``engine.unavailable``).
        """
        self.options = options
        self._onnxruntime = _vendor()
        self.version = str(self._onnxruntime.__version__)
        self.device = processor().name

    def compile(
        self, graph: bytes, *, name: str, precision: Precision = "float32", max_batch: int = 1
    ) -> Engine:
        """See `pe_infer.engines.base.Runtime.compile`; always computes in float32."""
        del precision
        with _translated(f"compile {name}"):
            settings = self._onnxruntime.SessionOptions()
            settings.intra_op_num_threads = self.options.threads or _available_cores()
            settings.inter_op_num_threads = 1
            settings.log_severity_level = _FATAL_ONLY
            # every session has its own threads: they must not spin while another one works
            settings.add_session_config_entry("session.force_spinning_stop", "1")
            inference = self._onnxruntime.InferenceSession(graph, settings, providers=_PROVIDERS)
            return OnnxRuntimeEngine(
                name=name,
                inference=inference,
                sizes=batch_sizes(self.options.max_batch or 1, max_batch),
            )

    def lane(self) -> Lane:
        """Plain memory."""
        return HostLane()


def runtime(name: str, options: EngineOptions) -> OnnxRuntimeRuntime:
    """The entry point of `pe_infer.engines.base.select`."""
    del name
    return OnnxRuntimeRuntime(options)


def _available_cores() -> int:
    """What to ask for: ONNX Runtime's own default pins threads, which is slow on shared cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _specs(arguments: Any) -> Mapping[str, TensorSpec]:
    specs = {}
    for argument in arguments:
        shape = tuple(size if isinstance(size, int) else None for size in argument.shape or ())
        name = str(argument.name)
        specs[name] = TensorSpec(
            name=name, shape=shape, dtype=_TYPES.get(argument.type, argument.type)
        )
    return MappingProxyType(specs)


@cache
def _vendor() -> Any:
    """Import onnxruntime with its telemetry off.

    From version 1.29 the Linux wheels report sessions, models and errors to Microsoft unless this
    variable is set before the import (onnxruntime/Privacy.md). A value that the user has set is
    left as it is. The variable stays set: the library reads it when it makes its environment.
    """
    os.environ.setdefault(_TELEMETRY_SWITCH, "1")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except Exception as exc:
        raise EngineError(
            f"ONNX Runtime is installed but cannot be loaded: {exc}", code=Code.ENGINE_UNAVAILABLE
        ) from exc
    if os.environ[_TELEMETRY_SWITCH] == "1":
        onnxruntime.disable_telemetry_events()  # should it have been imported before
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime


@contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as exc:
        raise EngineError(f"ONNX Runtime failed to {action}: {exc}") from exc
