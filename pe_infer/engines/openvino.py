"""OpenVINO on the CPU: the default engine. The only module that imports openvino.

Measured on an AVX-512 CPU with bfloat16 (2 cores, the 384 x 384 x 5 encoder): a batch of 8 is no
faster per slab than eight batches of 1, and its values are the same bits. So graphs are compiled
for a batch of 1 unless `EngineOptions.max_batch` asks for more; with a fixed shape everything is
compiled before the first slab.
"""

import fcntl
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
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
from pe_infer.errors import Code, ConfigurationError, EngineError
from pe_infer.manifest import Precision
from pe_infer.onnx_scan import declared_names

_DEVICE: Final = "CPU"
_TELEMETRY: Final = "openvino_telemetry"
_IMPORTING: Final = threading.Lock()
_OTHER_CACHE: Final = "name another folder (XDG_CACHE_HOME for the default one), or None"
_PRECISIONS: Final = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class OpenVinoSession:
    """An InferRequest that is bound to the caller's arrays at every run."""

    def __init__(self, engine: "OpenVinoEngine", request: Any, tensor: Any) -> None:
        """Own the request."""
        self._engine = engine
        self._request = request
        self._tensor = tensor  # openvino.Tensor
        self._inputs = tuple(engine.inputs)
        self._outputs = tuple(engine.outputs)
        self._buffers: dict[int, dict[str, Tensor]] = {}

    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """See `pe_infer.engines.base.Session.run`."""
        given = out or {}
        batch = check_tensors(self._engine, inputs, given)
        results = {
            name: given[name] if name in given else self._buffer(name, batch)
            for name in self._outputs
        }
        request, tensor = self._request, self._tensor
        with _translated(f"run {self._engine.name}"):
            bound = []  # alive for this run and no longer: the request itself does not hold arrays
            for index, name in enumerate(self._inputs):
                array = inputs[name]
                bound.append(
                    view := tensor(
                        array if array.flags.writeable else array.copy(), shared_memory=True
                    )
                )
                request.set_input_tensor(index, view)
            for index, name in enumerate(self._outputs):
                bound.append(view := tensor(results[name], shared_memory=True))
                request.set_output_tensor(index, view)
            request.infer()
        return results

    def _buffer(self, name: str, batch: int) -> Tensor:
        buffers = self._buffers.setdefault(batch, {})
        if name not in buffers:
            buffers[name] = np.empty(self._engine.outputs[name].of_batch(batch), np.float32)
        return buffers[name]


class OpenVinoEngine:
    """A CompiledModel."""

    def __init__(
        self,
        *,
        name: str,
        compiled: Any,
        tensor: Any,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        sizes: tuple[int, ...],
    ) -> None:
        """Take what `OpenVinoRuntime.compile` found out."""
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self.batch_sizes = sizes
        self._compiled = compiled
        self._tensor = tensor
        with _translated(f"ask {name} for its precision"):
            reported = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = _PRECISIONS.get(reported, reported)

    def session(self, lane: Lane | None = None) -> Session:
        """A new InferRequest."""
        del lane
        with _translated(f"create a request of {self.name}"):
            return OpenVinoSession(self, self._compiled.create_infer_request(), self._tensor)


class OpenVinoRuntime:
    """OpenVINO's CPU plugin with one set of options."""

    name = "openvino"

    def __init__(self, options: EngineOptions) -> None:
        """Load the library.

        Raises:
            ConfigurationError: ``options.cache_dir`` cannot be used.
            EngineError: It cannot be loaded (``engine.unavailable``).
        """
        self.options = options
        self._openvino = _vendor()
        self._core = _core()
        with _translated("describe the CPU"):
            self.version = str(self._openvino.__version__).partition("-")[0]
            self.device = str(self._core.get_property(_DEVICE, "FULL_DEVICE_NAME")).strip()
        if options.cache_dir:
            _make_private(options.cache_dir)

    def compile(
        self, graph: bytes, *, name: str, precision: Precision = "float32", max_batch: int = 1
    ) -> Engine:
        """See `pe_infer.engines.base.Runtime.compile`."""
        sizes = batch_sizes(self.options.max_batch or 1, max_batch)
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if self._must_be_float32(precision):
            config["INFERENCE_PRECISION_HINT"] = "f32"
        if self.options.threads:
            config["INFERENCE_NUM_THREADS"] = str(self.options.threads)
        if self.options.cache_dir:
            config["CACHE_DIR"] = str(self.options.cache_dir)
        with _translated(f"compile {name}"), _alone_in(self.options.cache_dir):
            model = self._core.read_model(graph)
            declared_inputs, declared_outputs = declared_names(graph)
            inputs = _specs(model.inputs, declared_inputs)
            outputs = _specs(model.outputs, declared_outputs)
            if sizes == (1,):
                _fix_batch(self._openvino, model, inputs)
            compiled = self._core.compile_model(model, _DEVICE, config)
        return OpenVinoEngine(
            name=name,
            compiled=compiled,
            tensor=self._openvino.Tensor,
            inputs=inputs,
            outputs=outputs,
            sizes=sizes,
        )

    def lane(self) -> Lane:
        """Plain memory."""
        return HostLane()

    def _must_be_float32(self, precision: Precision) -> bool:
        """Whether the plugin's own choice of a type is not what is asked for, or is slow.

        Where that is bfloat16 (x86), it leaves everything behind a graph's last convolution or
        matrix product in float32: a recurrent state too. Where it is float16 (Arm), it does not.
        """
        if "float32" in {precision, self.options.precision}:
            return True
        with _translated("ask for the default precision"):
            chosen = self._core.get_property(_DEVICE, "INFERENCE_PRECISION_HINT").get_type_name()
        if chosen == "bf16":
            return processor().bfloat16_is_slow
        return precision == "mixed"


def runtime(name: str, options: EngineOptions) -> OpenVinoRuntime:
    """The entry point of `pe_infer.engines.base.select`."""
    del name
    return OpenVinoRuntime(options)


def _make_private(cache_dir: Path) -> None:
    """OpenVINO itself would go on without a cache if it cannot write there."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(cache_dir, os.W_OK)
    except OSError as exc:
        raise ConfigurationError(
            f"cache_dir={str(cache_dir)!r} cannot be made: {exc}; {_OTHER_CACHE}"
        ) from exc
    if not writable:
        raise ConfigurationError(
            f"cache_dir={str(cache_dir)!r} cannot be written to: {_OTHER_CACHE}"
        )


@contextmanager
def _alone_in(cache_dir: Path | None) -> Iterator[None]:
    """Keep other processes out of the cache: two that write the same file break each other."""
    if cache_dir is None:
        yield
        return
    with (cache_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, however this process ends
        yield


def _specs(ports: Any, declared: list[str]) -> Mapping[str, TensorSpec]:
    """By declared name, in the order of the ports: a port has every name of merged tensors."""
    specs: dict[str, TensorSpec] = {}
    for port in ports:
        known = port.names
        name = next((n for n in declared if n in known and n not in specs), str(port.any_name))
        shape = tuple(
            None if size.is_dynamic else int(size.get_length()) for size in port.partial_shape
        )
        dtype = np.dtype(port.element_type.to_dtype()).name
        specs[name] = TensorSpec(name=name, shape=shape, dtype=dtype)
    return MappingProxyType(specs)


def _fix_batch(openvino: Any, model: Any, inputs: Mapping[str, TensorSpec]) -> None:
    shapes = {
        index: openvino.PartialShape(
            [1, *(-1 if size is None else size for size in spec.shape[1:])]
        )
        for index, spec in enumerate(inputs.values())
        if spec.shape and spec.shape[0] is None
    }
    if shapes:
        model.reshape(shapes)


@cache
def _core() -> Any:
    with _translated("start"):
        return _vendor().Core()


def _vendor() -> Any:
    """Import openvino with its telemetry off.

    ``import openvino`` also imports its conversion tools, and these report the import to Google
    Analytics from a second process when the package openvino-telemetry is installed, which pip does
    by itself. They work without that package, so it is hidden for the length of the import.
    """
    with _IMPORTING:
        missing = object()
        hidden = sys.modules.get(_TELEMETRY, missing)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes `import openvino_telemetry` raise ImportError
        try:
            return importlib.import_module("openvino")
        except Exception as exc:
            raise EngineError(
                f"OpenVINO is installed but cannot be loaded: {exc}", code=Code.ENGINE_UNAVAILABLE
            ) from exc
        finally:
            if hidden is missing:
                del sys.modules[_TELEMETRY]
            else:
                sys.modules[_TELEMETRY] = hidden  # type: ignore[assignment]


@contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as exc:
        raise EngineError(f"OpenVINO failed to {action}: {exc}") from exc
