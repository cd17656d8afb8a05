"""A bundle's graphs on one runtime: compiled once, checked, shared by all streams."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, Self

from pe_infer.bundle import Bundle
from pe_infer.engines.base import Engine, EngineOptions, Runtime, TensorSpec, warm_up
from pe_infer.engines.lane import Lane
from pe_infer.errors import BundleError, Code
from pe_infer.executor import Executor
from pe_infer.manifest import Direction, GraphNode, Precision, ScanNode
from pe_infer.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What computed a result, for its provenance.

    Attributes:
        name: Runtime.
        version: Of the runtime.
        device: The processor, in words.
        precision: Node to the type it computes in, as the runtime reports it.
    """

    name: str
    version: str
    device: str
    precision: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompiledProgram:
    """A program and an engine for each of its graph nodes. Immutable and thread-safe.

    Attributes:
        bundle: Where it comes from.
        program: The checked dataflow.
        engines: By node name.
        info: What will compute.
        options: How it was compiled.
    """

    bundle: Bundle
    program: Program
    engines: Mapping[str, Engine]
    info: EngineInfo
    options: EngineOptions
    runtime: Runtime

    @classmethod
    def compile(
        cls,
        bundle: Bundle,
        runtime: Runtime,
        load: Callable[[GraphNode], Engine] | None = None,
    ) -> Self:
        """Check the dataflow, compile every graph, and check every graph against the manifest.

        Args:
            bundle: What to compile.
            runtime: On what.
            load: Gives a node's engine where the runtime need not compile it.

        Raises:
            BundleError: The dataflow is not valid (``bundle.invalid``), or a graph does not have
                the tensors that the manifest says (``bundle.graph_mismatch``).
            EngineError: The runtime refuses a graph.
        """
        program = Program(bundle.manifest)
        compiled: dict[tuple[str, Precision, int], Engine] = {}
        engines: dict[str, Engine] = {}
        for node in program.graph_nodes:
            key = (node.graph, node.precision, program.max_batch(node))
            if key not in compiled:
                compiled[key] = (
                    load(node)
                    if load
                    else runtime.compile(
                        bundle.graph(node),
                        name=f"{bundle.manifest.name}/{node.graph}",
                        precision=key[1],
                        max_batch=key[2],
                    )
                )
            check_graph(program, node, compiled[key], f"{bundle.folder / node.graph}")
            engines[node.name] = compiled[key]
        info = EngineInfo(
            name=runtime.name,
            version=runtime.version,
            device=runtime.device,
            precision=MappingProxyType(
                {name: engine.precision for name, engine in engines.items()}
            ),
        )
        return cls(
            bundle=bundle,
            program=program,
            engines=MappingProxyType(engines),
            info=info,
            options=runtime.options,
            runtime=runtime,
        )

    def executor(self, arrival: Direction | None = None, lane: Lane | None = None) -> Executor:
        """An executor for one study; see `Executor`.

        Args:
            arrival: Order in which slabs will come.
            lane: Of `Runtime.lane`, where the slabs are made too; ``None`` is a new one.
        """
        lane = lane or self.runtime.lane()
        return Executor(self.program, self.engines, arrival=arrival, lane=lane)

    def warm_up(self) -> None:
        """Run every engine once, so that the first slab takes as long as the next."""
        lane = self.runtime.lane()
        for engine in dict.fromkeys(self.engines.values()):
            warm_up(engine, lane)


def check_graph(program: Program, node: GraphNode, engine: Engine, source: str) -> None:
    """Compare a graph's tensors with what the manifest says of its node.

    Raises:
        BundleError: Names, types or shapes differ (``bundle.graph_mismatch``).
    """
    reads = {tensor: program.specs[name].shape for tensor, name in node.inputs.items()}
    writes = {tensor: program.specs[name].shape for tensor, name in node.outputs.items()}
    if isinstance(node, ScanNode):
        reads.update({state.input: state.shape for state in node.states})
        writes.update({state.output: state.shape for state in node.states})
    for role, expected, found in (
        ("input", reads, engine.inputs),
        ("output", writes, engine.outputs),
    ):
        if expected.keys() != found.keys():
            _refuse(
                source,
                node,
                f"the {role}s of the graph are {sorted(found)}, the manifest names "
                f"{sorted(expected)}",
            )
        for tensor, shape in expected.items():
            _check_tensor(
                source, node, f"{role} {tensor!r}", found[tensor], shape, program.max_batch(node)
            )


def _check_tensor(
    source: str,
    node: GraphNode,
    what: str,
    spec: TensorSpec,
    shape: tuple[int, ...],
    max_batch: int,
) -> None:
    if spec.dtype != "float32":
        _refuse(source, node, f"{what} of the graph is {spec.dtype}, expected float32")
    if not spec.shape or spec.shape[1:] != shape:
        expected = ", ".join(map(str, ("N", *shape)))
        _refuse(
            source,
            node,
            f"{what} of the graph has the shape {spec.shape}, the manifest says ({expected})",
        )
    batch = spec.shape[0]
    if isinstance(node, ScanNode):
        fits, needed = batch == 1, "1"
    else:
        fits = batch is None or batch == max_batch == 1
        needed = f"free, for batches up to {max_batch}"
    if not fits:
        _refuse(
            source, node, f"the first axis of {what} of the graph is {batch}, expected {needed}"
        )


def _refuse(source: str, node: GraphNode, problem: str) -> NoReturn:
    raise BundleError(
        f"{source} does not fit node {node.name!r}: {problem}. Export graph and manifest together.",
        code=Code.BUNDLE_GRAPH,
    )
