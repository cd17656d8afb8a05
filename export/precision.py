"""One study through a bundle's float32 graphs and through its float16 graphs, side by side.

Both variants run in ONNX Runtime on the CPU through the product's own executor, over the same
slabs. The float16 graphs are those of ``pe-infer build --precision fp16`` with every float16 value
rounded (``half_graph(rounded=True)``): what a GPU computes that adds up products in float32.

What is measured, per output tensor of every node: its own error, given what the float32 variant
reads and its states, and the accumulated one. A node that reads nothing but slabs reads the same in
both variants, so for it both errors are one and it is run only once more.
"""

import importlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import onnx

from export.spread import Spread
from pe_infer.bundle import Bundle
from pe_infer.certificate import FLOAT16_SMALLEST_NORMAL, STEPS
from pe_infer.compiled import CompiledProgram
from pe_infer.engines.base import Engine, Runtime, Session
from pe_infer.engines.lane import Lane, Tensor
from pe_infer.errors import Code, InputError
from pe_infer.executor import Executor, StudyOutputs
from pe_infer.half import half_graph
from pe_infer.manifest import SLAB, GraphNode, MapNode, Precision, ScanNode

LAST_STEPS: Final = 10  # whose error is that of a number of steps

Tensors: TypeAlias = Mapping[str, Tensor]
Key: TypeAlias = tuple[str, str]  # node, tensor


@dataclass(kw_only=True)
class TensorSpreads:
    """Magnitudes (in float32) and errors of one output tensor of a node.

    Attributes:
        half_largest: Largest finite magnitude of the float16 variant.
    """

    half_largest: float = 0.0
    magnitude: Spread = field(default_factory=Spread)
    own: Spread = field(default_factory=Spread)
    accumulated: Spread = field(default_factory=Spread)


@dataclass(kw_only=True)
class Inside:
    """What is rounded to float16 inside a node's graph.

    Attributes:
        largest: Tensor of the graph to its largest finite magnitude, before it is rounded.
        values: How many values are not zero.
        subnormal: How many of these are smaller than float16's normal numbers.
    """

    largest: dict[str, float] = field(default_factory=dict)
    values: int = 0
    subnormal: int = 0

    def add(self, name: str, values: Tensor) -> None:
        """Look at one tensor."""
        self.largest[name] = max(self.largest.get(name, 0.0), _largest(values))
        sizes = np.abs(values)
        nonzero = int(np.count_nonzero(sizes))
        self.values += nonzero
        below = int(np.count_nonzero(sizes < FLOAT16_SMALLEST_NORMAL))
        self.subnormal += below - (sizes.size - nonzero)


@dataclass(kw_only=True)
class Details:
    """What is measured on some studies only.

    Attributes:
        inside: By node; nodes without float16 have none.
        growth: By node, tensor and number of steps.
    """

    inside: dict[str, Inside]
    growth: dict[tuple[str, str, int], Spread]


@dataclass(kw_only=True)
class Measured:
    """What one study gave.

    Attributes:
        exact: Outputs of the float32 variant.
        half: Outputs of the float16 variant.
        tensors: By node and tensor.
        details: If they were asked for.
    """

    exact: StudyOutputs
    half: StudyOutputs
    tensors: dict[Key, TensorSpreads]
    details: Details | None


class _RoundedRuntime:
    """A runtime that compiles a graph's rounded float16 form."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name, self.version = runtime.name, runtime.version
        self.device, self.options = runtime.device, runtime.options

    def compile(
        self, graph: bytes, *, name: str, precision: Precision = "float32", max_batch: int = 1
    ) -> Engine:
        rounded = half_graph(graph, name=name, precision=precision, rounded=True)
        return self._runtime.compile(rounded, name=name, max_batch=max_batch)

    def lane(self) -> Lane:
        return self._runtime.lane()


class _Watched:
    """An engine that shows what its sessions read and write."""

    def __init__(self, engine: Engine, watch: Callable[[Tensors, Tensors], None]) -> None:
        self._engine, self._watch = engine, watch
        self.name, self.precision = engine.name, engine.precision
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.batch_sizes = engine.batch_sizes

    def session(self, lane: Lane | None = None) -> Session:
        return _WatchedSession(self._engine.session(lane), self._watch)


class _WatchedSession:
    def __init__(self, session: Session, watch: Callable[[Tensors, Tensors], None]) -> None:
        self._session, self._watch = session, watch

    def run(self, inputs: Tensors, out: Tensors | None = None) -> Tensors:
        results = self._session.run(inputs, out)
        self._watch(inputs, results)
        return results


class Probe:
    """A node's rounded graph with all that it rounds among its outputs."""

    def __init__(self, graph: bytes, threads: int | None) -> None:
        """Make the graph and compile it; ONNX Runtime has been loaded by its owner in pe_infer."""
        onnxruntime = importlib.import_module("onnxruntime")  # not earlier: telemetry is off now
        model = onnx.load_from_string(graph)
        given = {value.name for value in model.graph.input}
        rounded = [
            node.input[0]
            for node in model.graph.node
            if node.op_type == "Cast"
            and any(a.name == "to" and a.i == onnx.TensorProto.FLOAT16 for a in node.attribute)
        ]
        put_out = {value.name for value in model.graph.output}
        self.read = [name for name in dict.fromkeys(rounded) if name in given]
        self.inside = [name for name in dict.fromkeys(rounded) if name not in given]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in self.inside
            if name not in put_out
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4  # fatal: what fails is raised
        self._session: Any = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Tensors) -> Iterator[tuple[str, Tensor]]:
        """What is rounded, by name, before it is."""
        yield from ((name, inputs[name]) for name in self.read)
        if self.inside:
            yield from zip(self.inside, self._session.run(self.inside, dict(inputs)), strict=True)


class Comparison:
    """A bundle in both variants, compiled once. Not thread-safe."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Compile.

        Args:
            bundle: What to measure.
            runtime: That computes in float32.

        Raises:
            BundleError: A graph does not fit the manifest.
            EngineError: A graph cannot be converted or compiled.
        """
        self._bundle = bundle
        self._runtime = runtime
        self._exact = CompiledProgram.compile(bundle, runtime)
        self._half = CompiledProgram.compile(bundle, _RoundedRuntime(runtime))
        self._program = self._exact.program
        self._nodes = {node.name: node for node in self._program.graph_nodes}
        self._sessions = {name: engine.session() for name, engine in self._half.engines.items()}
        self._probes: dict[str, Probe] = {}

    def run(self, slabs: Sequence[tuple[int, Tensor]], *, details: bool = False) -> Measured:
        """Measure one study.

        Args:
            slabs: Position in micrometres and tensor of every slab that passed the gate, ascending.
            details: Also look inside the graphs, and drive the recurrences on.

        Raises:
            InputError: There are none.
            EngineError: ONNX Runtime failed.
        """
        if not slabs:
            raise InputError("no slab passed the gate", code=Code.TOO_FEW_SLABS)
        study = _Study(
            sessions=self._sessions, probes=self._all_probes() if details else {}, details=details
        )
        exact = self._through(self._exact, study.see_exact, slabs)
        half = self._through(self._half, study.see_half, slabs)
        study.check_seen()
        found = None
        if details:
            growth: dict[tuple[str, str, int], Spread] = {}
            for node in self._nodes.values():
                if isinstance(node, ScanNode):
                    growth |= self._growth(node, study.read[node.name])
            found = Details(inside=study.inside, growth=growth)
        return Measured(exact=exact, half=half, tensors=study.tensors, details=found)

    def _through(
        self,
        compiled: CompiledProgram,
        see: Callable[[GraphNode, Tensors, Tensors], None],
        slabs: Sequence[tuple[int, Tensor]],
    ) -> StudyOutputs:
        engines = {
            name: _Watched(engine, partial(see, self._nodes[name]))
            for name, engine in compiled.engines.items()
        }
        executor = Executor(self._program, engines, lane=compiled.runtime.lane())
        for slab in slabs if executor.plan.arrival == "up" else reversed(slabs):
            executor.push([slab])
        return executor.finish()

    def _growth(
        self, node: ScanNode, read: Sequence[Tensors]
    ) -> dict[tuple[str, str, int], Spread]:
        """Both variants of a scan over one study's input, forth and back."""
        sessions = [c.engines[node.name].session() for c in (self._exact, self._half)]
        first = {
            state.input: np.full((1, *state.shape), state.initial, np.float32)
            for state in node.states
        }
        states = [dict(first), dict(first)]
        found: dict[tuple[str, str, int], Spread] = {}
        there_and_back = itertools.cycle([*read, *read[-2:0:-1]])
        for step, inputs in enumerate(itertools.islice(there_and_back, max(STEPS)), start=1):
            exact, half = (
                {name: values.copy() for name, values in session.run({**inputs, **old}).items()}
                for session, old in zip(sessions, states, strict=True)
            )
            states = [{s.input: new[s.output] for s in node.states} for new in (exact, half)]
            for steps in STEPS:
                if steps - LAST_STEPS < step <= steps:
                    for tensor, values in exact.items():
                        spread = found.setdefault((node.name, tensor, steps), Spread())
                        spread.add(_apart(values, half[tensor]))
        return found

    def _all_probes(self) -> dict[str, Probe]:
        if not self._probes:
            for node in self._nodes.values():
                if node.precision == "float32":
                    continue
                graph = half_graph(
                    self._bundle.graph(node),
                    name=node.graph,
                    precision=node.precision,
                    rounded=True,
                )
                self._probes[node.name] = Probe(graph, self._runtime.options.threads)
        return self._probes


class _Study:
    """What is seen of one study: first all of the float32 variant, then the other."""

    def __init__(
        self, *, sessions: Mapping[str, Session], probes: Mapping[str, Probe], details: bool
    ) -> None:
        self.tensors: dict[Key, TensorSpreads] = {}
        self.inside: dict[str, Inside] = {}
        self.read: dict[str, list[Tensors]] = {}
        self._sessions = sessions
        self._probes = probes
        self._details = details
        self._expected: dict[str, deque[Tensors]] = {}

    def see_exact(self, node: GraphNode, inputs: Tensors, outputs: Tensors) -> None:
        kept = {name: values.copy() for name, values in outputs.items()}
        self._expected.setdefault(node.name, deque()).append(kept)
        for tensor, values in kept.items():
            self._spreads(node, tensor).magnitude.add(values)
        if not _reads_slabs_only(node):
            for tensor, values in self._sessions[node.name].run(inputs).items():
                self._spreads(node, tensor).own.add(_apart(kept[tensor], values))
        if self._details and isinstance(node, ScanNode):
            self.read.setdefault(node.name, []).append(
                {tensor: inputs[tensor].copy() for tensor in node.inputs}
            )

    def see_half(self, node: GraphNode, inputs: Tensors, outputs: Tensors) -> None:
        expected = self._expected[node.name].popleft()
        for tensor, values in outputs.items():
            spreads, error = self._spreads(node, tensor), _apart(expected[tensor], values)
            spreads.half_largest = max(spreads.half_largest, _largest(values))
            spreads.accumulated.add(error)
            if _reads_slabs_only(node):
                spreads.own.add(error)
        if probe := self._probes.get(node.name):
            inside = self.inside.setdefault(node.name, Inside())
            for tensor, values in probe.run(inputs):
                inside.add(tensor, values)

    def check_seen(self) -> None:
        if left := {name: len(seen) for name, seen in self._expected.items() if seen}:
            raise RuntimeError(f"the float16 variant did not run {left}")

    def _spreads(self, node: GraphNode, tensor: str) -> TensorSpreads:
        return self.tensors.setdefault((node.name, tensor), TensorSpreads())


def _reads_slabs_only(node: GraphNode) -> bool:
    return isinstance(node, MapNode) and set(node.inputs.values()) == {SLAB}


def _apart(exact: Tensor, half: Tensor) -> Tensor:
    with np.errstate(invalid="ignore", over="ignore"):  # counted as the largest float32
        difference: Tensor = exact - half
        return difference


def _largest(values: Tensor) -> float:
    """The largest finite magnitude."""
    if not math.isfinite(largest := float(np.abs(values).max(initial=0.0))):
        finite = values[np.isfinite(values)]
        largest = float(np.abs(finite).max(initial=0.0))
    return largest
