"""From one ONNX graph to one serialised engine. Nothing is deserialised, nothing runs."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pe_infer.engines.base import TensorSpec
from pe_infer.engines.tensorrt_vendor import Vendor
from pe_infer.errors import EngineError

Progress = Callable[[str, int, int], None]
"""Takes what the builder is doing, the steps done and the steps in all. Must not block."""

_DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A serialised engine and its tensors.

    Attributes:
        data: To be deserialised by the same library and version.
        inputs: As the library sees them.
        outputs: The same.
        timing_cache: What the library measured, for the next build, where it measures.
    """

    data: bytes
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    timing_cache: bytes | None = None


def build_engine(
    vendor: Vendor,
    graph: bytes,
    *,
    name: str,
    max_batch: int,
    capabilities: tuple[str, ...] = (),
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine for batches of 1 to ``max_batch``, in the types that the graph says.

    Args:
        vendor: The library.
        graph: The ONNX file's contents.
        name: For messages.
        max_batch: What free first axes range up to; the engine is optimised for that size.
        capabilities: Of the GPUs to build for, ascending; empty: the library's own choice.
        timing_cache: Of an earlier build with this library on this machine.
        progress: Told what the builder is doing.

    Raises:
        EngineError: The library cannot read or build the graph; the message holds what it says.
        KeyboardInterrupt: The user stopped the build.
    """
    monitor = _monitor(vendor.trt, progress)

    def build() -> BuiltEngine:
        return _build(vendor, graph, name, max_batch, capabilities, timing_cache, monitor)

    # Python raises an interrupt in the main thread only, and the library swallows what is raised in
    # a callback: so the builder and its callbacks have a thread of their own.
    with vendor.translated(f"build {name}"), ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(build)
        try:
            return future.result()
        except KeyboardInterrupt as interrupt:
            monitor.interrupted = interrupt  # the builder stops at its next step
            raise


def _build(
    vendor: Vendor,
    graph: bytes,
    name: str,
    max_batch: int,
    capabilities: tuple[str, ...],
    timing_cache: bytes | None,
    monitor: Any,
) -> BuiltEngine:
    trt = vendor.trt
    builder = trt.Builder(vendor.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, vendor.logger)
    if not parser.parse(graph):
        raise vendor.failure(f"read {name}", _parser_errors(parser))
    inputs = _specs(network.num_inputs, network.get_input)
    outputs = _specs(network.num_outputs, network.get_output)

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if capabilities:
        _set_capabilities(trt, config, capabilities)
    if any(None in spec.shape for spec in inputs.values()):
        config.add_optimization_profile(_profile(builder, name, inputs, max_batch))
    cache = None
    if vendor.flavour.times_tactics:
        cache = config.create_timing_cache(timing_cache or b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):  # of another machine
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
    config.progress_monitor = monitor
    serialised = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise monitor.interrupted
    if serialised is None:
        raise vendor.failure(f"build {name}")
    return BuiltEngine(
        data=bytes(serialised),
        inputs=inputs,
        outputs=outputs,
        timing_cache=bytes(cache.serialize()) if cache is not None else None,
    )


def profile_shapes(
    spec: TensorSpec, max_batch: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, best and largest shape of an input."""
    return spec.of_batch(1), spec.of_batch(max_batch), spec.of_batch(max_batch)


def tensor_dtype(dtype: Any) -> str:
    """NumPy's name of a type, as far as there is one."""
    return _DTYPES.get(dtype.name, str(dtype.name))


def _profile(builder: Any, name: str, inputs: Mapping[str, TensorSpec], max_batch: int) -> Any:
    profile = builder.create_optimization_profile()
    for spec in inputs.values():
        if None in spec.shape[1:]:
            raise EngineError(
                f"{name}: input {spec.name!r} has the shape {spec.shape}: only the first axis may "
                "be free"
            )
        if spec.shape[0] is None:
            profile.set_shape(spec.name, *profile_shapes(spec, max_batch))
    return profile


def _set_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise EngineError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability "
                f"{capability}"
            )


def _specs(count: int, get: Callable[[int], Any]) -> dict[str, TensorSpec]:
    specs = {}
    for tensor in map(get, range(count)):
        shape = tuple(None if size < 0 else int(size) for size in tensor.shape)
        dtype = tensor_dtype(tensor.dtype)
        specs[str(tensor.name)] = TensorSpec(name=str(tensor.name), shape=shape, dtype=dtype)
    return specs


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"{error.node_operator()} {error.node_name()!r}: {error.desc()}"
        if error.node_operator()
        else str(error.desc())
        for error in errors
    )


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """An IProgressMonitor. Nothing may be raised through the library: it is kept for later."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._lock = threading.Lock()  # phases may run in threads of the library

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            del parent
            self._tell(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1, None)
            return self.interrupted is None

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._steps.pop(phase, None)

        def _tell(self, phase: str, done: int, steps: int | None) -> None:
            try:
                with self._lock:
                    total = self._steps.setdefault(phase, steps or 0)
                if progress:
                    progress(phase, done, max(total, done))
            except BaseException as exc:  # noqa: BLE001  an interrupt must not cross C++
                self.interrupted = exc

    return Monitor()
