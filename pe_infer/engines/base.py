"""The seam between study programs and inference runtimes.

::

    Runtime   one vendor library with one set of options      makes engines
    Engine    one compiled graph: immutable, shared           makes sessions
    Session   one stream's use of an engine: not thread-safe  runs

Every tensor is a C-contiguous float32 array whose first axis is the batch, in memory of the lane
that the session was made for: NumPy's on a CPU (`pe_infer.engines.lane`). Engines hold no study
state. A runtime module is imported when it is selected; importing `pe_infer` imports no vendor
library.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np

from pe_infer.engines.lane import HostLane, Lane, Tensor
from pe_infer.errors import Code, ConfigurationError, EngineError
from pe_infer.manifest import Precision

AUTO: Final = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How graphs are compiled.

    Attributes:
        precision: ``"default"`` leaves the type inside nodes that the bundle marks ``reduced`` or
            ``mixed`` to the runtime (bfloat16 on CPUs that are fast in it); ``"float32"`` computes
            everything in float32.
        threads: Threads of one inference; ``None`` is one per available core.
        cache_dir: Where the runtime may keep compiled graphs, for runtimes that can. Its files are
            trusted as much as this package's own: only this user may write there.
        max_batch: Slabs per run of a map; ``None`` is the runtime's own choice, never more than the
            bundle allows.
    """

    precision: Literal["default", "float32"] = "default"
    threads: int | None = None
    cache_dir: Path | None = None
    max_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below one and unknown precisions."""
        if self.precision not in {"default", "float32"}:
            raise ConfigurationError(f"precision={self.precision!r} must be 'default' or 'float32'")
        for name, value in (("threads", self.threads), ("max_batch", self.max_batch)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} must be at least 1, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, type and shape of a graph's input or output.

    Attributes:
        name: Name in the graph.
        shape: ``None`` for an axis whose size is free.
        dtype: NumPy name of the type; graphs of a bundle have float32 only.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def of_batch(self, batch: int) -> tuple[int, ...]:
        """The shape with ``batch`` for every free axis."""
        return tuple(batch if size is None else size for size in self.shape)


class Session(Protocol):
    """One stream's use of an engine. Not thread-safe, but independent of other sessions."""

    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """Run the graph once. On a device: queue it in the session's lane and return.

        Args:
            inputs: Every input of the graph, float32, C-contiguous, all with the same batch. Only
                read.
            out: Where to write outputs, of the shape they will have; may name only some. None of
                them may overlap an input.

        Returns:
            Every output. Those not in ``out`` lie in buffers of the session: valid until its next
            run.

        Raises:
            EngineError: Names, types, layout or shapes are not the graph's, or the batch is none of
                `Engine.batch_sizes` (``engine.invalid_input``); the runtime failed
                (``engine.failed``). The session can be used again. What fails on a device after it
                was queued is raised by `Lane.fetch`.
        """
        ...


class Engine(Protocol):
    """A compiled graph: immutable and shared by all streams."""

    @property
    def name(self) -> str:
        """What it was compiled from, for messages."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs, as the graph declares them."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs, as the graph declares them."""
        ...

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches that run without compiling anything anew: ascending, the first is 1."""
        ...

    @property
    def precision(self) -> str:
        """The type in which it computes, as the runtime reports it: float32, bfloat16, float16.

        Of a ``mixed`` node, the type of its products: all else is float32.
        """
        ...

    def session(self, lane: Lane | None = None) -> Session:
        """A new session. Thread-safe.

        Args:
            lane: Whose arrays it will be given; ``None`` is one of its own.
        """
        ...


class Runtime(Protocol):
    """A vendor library with options. Thread-safe."""

    @property
    def name(self) -> str:
        """As given to `select`."""
        ...

    @property
    def version(self) -> str:
        """Of the vendor library."""
        ...

    @property
    def device(self) -> str:
        """The processor it runs on, in words."""
        ...

    @property
    def options(self) -> EngineOptions:
        """The options it was selected with."""
        ...

    def compile(
        self, graph: bytes, *, name: str, precision: Precision = "float32", max_batch: int = 1
    ) -> Engine:
        """Compile an ONNX graph.

        Args:
            graph: The file's contents.
            name: For messages.
            precision: What the bundle allows; `EngineOptions.precision` can be stricter.
            max_batch: The largest batch the program may use; the engine chooses its batch sizes up
                to that.

        Raises:
            EngineError: The runtime refuses the graph.
        """
        ...

    def lane(self) -> Lane:
        """A new lane, for one study.

        Raises:
            EngineError: The device has no room for another.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    module: str  # ours, imported late; it has a ``runtime(name, options)``
    vendors: tuple[str, ...]  # the import names of the libraries that it needs
    install: str
    on_cpu: bool = True


RUNTIMES: Final[Mapping[str, _Entry]] = {
    "openvino": _Entry(
        module="pe_infer.engines.openvino", vendors=("openvino",), install="openvino"
    ),
    "onnxruntime": _Entry(
        module="pe_infer.engines.onnxruntime", vendors=("onnxruntime",), install="onnxruntime"
    ),
    "tensorrt": _Entry(
        module="pe_infer.engines.tensorrt",
        vendors=("tensorrt", "cupy"),
        install="'pe-infer[tensorrt]'",
        on_cpu=False,
    ),
    "tensorrt-rtx": _Entry(
        module="pe_infer.engines.tensorrt",
        vendors=("tensorrt_rtx", "cupy"),
        install="'pe-infer[tensorrt-rtx]' (proprietary licence)",
        on_cpu=False,
    ),
}
_AUTO_ORDER: Final = ("openvino", "onnxruntime")


def installed() -> tuple[str, ...]:
    """Names of the CPU runtimes whose library is installed, best first. Imports none of them.

    These are what needs neither a GPU nor engines that take minutes to build; TensorRT has to be
    asked for by name.
    """
    return tuple(name for name, entry in RUNTIMES.items() if entry.on_cpu and not missing(name))


def missing(name: str) -> tuple[str, ...]:
    """Import names of the libraries that a runtime needs and that are not installed."""
    return tuple(v for v in RUNTIMES[name].vendors if importlib.util.find_spec(v) is None)


def select(name: str = AUTO, options: EngineOptions | None = None) -> Runtime:
    """The runtime of that name.

    Args:
        name: One of `RUNTIMES`: that one or an error. ``"auto"``: the first installed of OpenVINO
            and ONNX Runtime, never TensorRT. It is chosen by what is installed, not by what works:
            a library that is there but fails to load is an error.
        options: How graphs will be compiled.

    Raises:
        ConfigurationError: There is no runtime of that name.
        EngineError: Its library is not installed or cannot be loaded, or there is no GPU where it
            needs one (``engine.unavailable``).
    """
    if name != AUTO and name not in RUNTIMES:
        raise ConfigurationError(f"engine={name!r} is unknown, expected one of {[AUTO, *RUNTIMES]}")
    if name == AUTO:
        present = installed()
        name = next(
            (candidate for candidate in _AUTO_ORDER if candidate in present), _AUTO_ORDER[0]
        )
    entry = RUNTIMES[name]
    if absent := missing(name):
        raise EngineError(
            f"engine {name!r} needs {' and '.join(absent)}, which "
            f"{'is' if len(absent) == 1 else 'are'} not installed: pip install {entry.install}",
            code=Code.ENGINE_UNAVAILABLE,
        )
    module = importlib.import_module(entry.module)
    runtime: Runtime = module.runtime(name, options or EngineOptions())
    return runtime


def check_tensors(engine: Engine, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> int:
    """Compare what a session was given with what the graph takes.

    Returns:
        The batch.

    Raises:
        EngineError: See `Session.run` (``engine.invalid_input``).
    """
    if inputs.keys() != engine.inputs.keys():
        raise _invalid(
            engine, f"inputs {sorted(inputs)} were given, expected {sorted(engine.inputs)}"
        )
    if not out.keys() <= engine.outputs.keys():
        raise _invalid(
            engine, f"outputs {sorted(out)} were asked for, there are {sorted(engine.outputs)}"
        )
    batch = 0
    for specs, arrays in ((engine.inputs, inputs), (engine.outputs, out)):
        for name, array in arrays.items():
            spec = specs[name]
            if array.dtype != np.float32 or not array.flags.c_contiguous or not array.ndim:
                raise _invalid(
                    engine,
                    f"tensor {name!r} is {array.dtype} {array.shape} with strides {array.strides}, "
                    "expected "
                    f"C-contiguous float32 {_shown(spec)}",
                )
            batch = batch or len(array)
            if array.shape != spec.of_batch(batch):
                raise _invalid(
                    engine,
                    f"tensor {name!r} has the shape {array.shape}, expected {_shown(spec)}, N = "
                    f"{batch}",
                )
            # arrays of a device can always be written, and have no such flag
            if specs is engine.outputs and not getattr(array.flags, "writeable", True):
                raise _invalid(
                    engine, f"tensor {name!r} is to be written, but the array is read-only"
                )
    if batch not in engine.batch_sizes:
        raise _invalid(
            engine, f"a batch of {batch} was given, it was compiled for {list(engine.batch_sizes)}"
        )
    return batch


def warm_up(engine: Engine, lane: Lane | None = None) -> None:
    """Run once at every batch size: the first slab should be no slower. Thread-safe.

    Args:
        engine: Whose sessions will be as fast as they can be.
        lane: Of its runtime; nobody else may be using it.
    """
    lane = lane or HostLane()
    session = engine.session(lane)
    with lane:
        for batch in engine.batch_sizes:
            session.run(zeros(engine, batch, lane))
    lane.wait()


def zeros(engine: Engine, batch: int, lane: Lane | None = None) -> dict[str, Tensor]:
    """Inputs of the right shapes, all zero."""
    lane = lane or HostLane()
    inputs = {name: lane.empty(spec.of_batch(batch)) for name, spec in engine.inputs.items()}
    for array in inputs.values():
        array.fill(0.0)
    return inputs


def batch_sizes(wanted: int, max_batch: int) -> tuple[int, ...]:
    """Batch sizes of an engine that would like ``wanted`` where the bundle allows ``max_batch``."""
    return tuple(sorted({1, min(wanted, max_batch)}))


def _shown(spec: TensorSpec) -> str:
    return f"({', '.join('N' if size is None else str(size) for size in spec.shape)})"


def _invalid(engine: Engine, problem: str) -> EngineError:
    return EngineError(f"{engine.name}: {problem}", code=Code.ENGINE_INPUT)
