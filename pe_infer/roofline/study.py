"""Where the time of a study would go on a GPU: operations and bytes against peak rates.

Computed, never measured. A kernel takes at least as long as its operations at the GPU's peak rate
and its bytes at the bandwidth of its memory; the longer of the two bounds it (Williams et al. 2009,
the roofline). Kernels follow each other, and each adds the time of a launch. Not in it: what the
host does (Python, decoding, the gate's search for the body, reductions), waiting for it, the small
tables that tell kernels what to read, and that kernels stay below the peak, small ones far below.

What is counted is a study at the bundle's grid (`StudyShape`), with FP16 engines as the program's
plan runs them; what its preprocessing does is the arithmetic of
``cpp_ext/cuda/preprocess.cu``.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from pe_infer.bundle import Bundle
from pe_infer.geometry import PatientGrid
from pe_infer.half import half_graph
from pe_infer.lattice import lattice_for
from pe_infer.manifest import SLAB, Direction, GraphNode, ReduceNode, ScanNode
from pe_infer.program import FLOAT_BYTES, Plan, Program
from pe_infer.roofline.gpus import Gpu
from pe_infer.roofline.graphs import GraphCost, Kernel, graph_cost

Bound: TypeAlias = Literal["compute", "memory", "launch", "copy"]
Kind: TypeAlias = Literal[
    "copies", "preprocessing", "encoder", "projections", "recurrences", "heads"
]
KINDS: Final[tuple[Kind, ...]] = (
    "copies",
    "preprocessing",
    "encoder",
    "projections",
    "recurrences",
    "heads",
)
_STEP_BYTES: Final = 2  # a stored value, and one of a resampled slice
_TAP_FLOPS: Final = 6  # rescale, clamp to both sides, multiply, add
_WINDOW_FLOPS: Final = 4  # subtract, scale, clamp to both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyShape:
    """A study of equally spaced slices that lie around the grid's centre.

    Attributes:
        slices: How many.
        spacing_um: From slice to slice, which is also their thickness.
        rows: Of a slice; as many columns.
        pixel_mm: Spacing in the plane.
    """

    slices: int
    spacing_um: int
    rows: int
    pixel_mm: float


CHEST: Final = StudyShape(slices=300, spacing_um=1000, rows=512, pixel_mm=0.7)
HEAD: Final = StudyShape(slices=40, spacing_um=5000, rows=512, pixel_mm=0.45)
STUDIES: Final[Mapping[str, StudyShape]] = {"chest": CHEST, "head": HEAD}  # by anatomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something that runs several times over.

    Attributes:
        kind: The stage that it belongs to.
        name: A node of the program, or a kernel of the preprocessing.
        kernels: Of one run.
        runs: How often.
    """

    kind: Kind
    name: str
    kernels: tuple[Kernel, ...]
    runs: int


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, by what bounds the kernels that they are spent in."""

    compute: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    copy: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.memory + self.launch + self.copy

    @property
    def bound(self) -> Bound:
        """What most of the time is due to."""
        parts: dict[Bound, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "launch": self.launch,
            "copy": self.copy,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: "Time") -> "Time":
        """One after the other."""
        return Time(
            self.compute + other.compute,
            self.memory + other.memory,
            self.launch + other.launch,
            self.copy + other.copy,
        )

    def __mul__(self, runs: int) -> "Time":
        """Again and again."""
        return Time(self.compute * runs, self.memory * runs, self.launch * runs, self.copy * runs)


def kernel_time(kernel: Kernel, gpu: Gpu) -> Time:
    """One launch at peak rates; tensor cores, float units and memory work side by side."""
    if kernel.copied_bytes:
        return Time(launch=gpu.launch_s, copy=gpu.copy_s(kernel.copied_bytes))
    compute = max(kernel.tensor_flops / gpu.tensor_flops, kernel.float_flops / gpu.float_flops)
    memory = kernel.memory_bytes / gpu.memory_bandwidth
    if compute > memory:
        return Time(compute=compute, launch=gpu.launch_s)
    return Time(memory=memory, launch=gpu.launch_s)


def steps_time(steps: Iterable[Step], gpu: Gpu) -> Time:
    """Steps one after the other."""
    total = Time()
    for step in steps:
        for kernel in step.kernels:
            total += kernel_time(kernel, gpu) * step.runs
    return total


def times_by_kind(steps: Iterable[Step], gpu: Gpu) -> dict[Kind, Time]:
    """The time of every stage that the steps have, in the order of ``KINDS``."""
    found: dict[Kind, Time] = {}
    for step in steps:
        found[step.kind] = found.get(step.kind, Time()) + steps_time([step], gpu)
    return {kind: found[kind] for kind in KINDS if kind in found}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Device memory of one stream, in bytes. The driver, the runtime and their code come on top.

    Attributes:
        weights: Of all engines.
        slices: Resampled, kept for the study.
        sequences: Kept for the study, and recurrent states, for the worse direction of arrival.
        buffers: Slabs and sequences that are not kept, for one batch, for the worse direction.
        contexts: Intermediate tensors of every node's largest run: each has a context of its own.
    """

    weights: int
    slices: int
    sequences: int
    buffers: int
    contexts: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.slices + self.sequences + self.buffers + self.contexts


class StudyCost:
    """What a study costs with one bundle."""

    def __init__(self, bundle: Bundle, shape: StudyShape) -> None:
        """Read the graphs.

        Raises:
            BundleError: The bundle's dataflow is not valid.
            EngineError: The onnx package is not installed (``engine.unavailable``), or a graph
                cannot be counted (``engine.failed``).
        """
        self.program = Program(bundle.manifest)
        self.shape = shape
        self._grid = bundle.manifest.grid
        self._graphs: dict[str, bytes] = {
            node.name: half_graph(bundle.graph(node), name=node.graph, precision=node.precision)
            for node in self.program.graph_nodes
        }
        self._files = {node.name: node.graph for node in self.program.graph_nodes}
        self._costs: dict[tuple[str, int], GraphCost] = {}
        self._slabs = _slabs(self._grid, shape)

    @property
    def slabs(self) -> int:
        """How many slabs the study has."""
        return len(self._slabs)

    def node(self, node: GraphNode, batch: int = 1) -> GraphCost:
        """One run of a node's graph."""
        key = (node.name, batch)
        if key not in self._costs:
            self._costs[key] = graph_cost(
                self._graphs[node.name], name=self._files[node.name], batch=batch
            )
        return self._costs[key]

    def kind(self, node: GraphNode) -> Kind:
        """The stage that a node belongs to."""
        if isinstance(node, ScanNode):
            return "recurrences"
        if SLAB in node.inputs.values():
            return "encoder"
        written = set(node.outputs.values())
        scans = (n for n in self.program.graph_nodes if isinstance(n, ScanNode))
        read = any(not written.isdisjoint(scan.inputs.values()) for scan in scans)
        return "projections" if read else "heads"

    def slab_steps(self, arrival: Direction | None = None) -> list[Step]:
        """One more slab while slices arrive: its share of the slices, and the online nodes."""
        middle = self._slabs[len(self._slabs) // 2]
        arriving = round(self.shape.slices / self.slabs)
        return [
            *self._slice_steps(arriving),
            *self._slab_steps([middle]),
            *self._online_steps(self.program.plan(arrival), 1),
        ]

    def last_slice_steps(self, arrival: Direction) -> list[Step]:
        """From the last slice to the result: one slice, the last slab, and what was deferred."""
        plan = self.program.plan(arrival)
        return [
            *self._slice_steps(1),
            *self._slab_steps([self._slabs[-1 if arrival == "up" else 0]]),
            *self._online_steps(plan, 1),
            *self._deferred_steps(plan),
        ]

    def study_steps(self) -> list[Step]:
        """A whole study that is already there, in batches."""
        plan = self.program.plan()
        return [
            *self._slice_steps(self.shape.slices),
            *self._slab_steps(self._slabs),
            *self._online_steps(plan, self.slabs),
            *self._deferred_steps(plan),
        ]

    def memory(self) -> Memory:
        """What one stream needs on the device."""
        nodes = self.program.graph_nodes
        largest = [self.node(node, self.program.max_batch(node)) for node in nodes]
        chunk = max(self.program.max_batch(node) for node in nodes)
        weights = {self._files[node.name]: self.node(node).weight_bytes for node in nodes}
        directions: tuple[Direction, ...] = ("down", "up")
        return Memory(
            weights=sum(weights.values()),
            slices=self.shape.slices * self._grid.rows * self._grid.cols * _STEP_BYTES,
            sequences=max(self.program.memory_bytes(self.slabs, arrival) for arrival in directions),
            buffers=chunk * max(self._passing_bytes(arrival) for arrival in directions),
            contexts=sum(cost.scratch_bytes for cost in largest),
        )

    def _passing_bytes(self, arrival: Direction) -> int:
        """One slab's share of what the executor keeps for a batch only."""
        plan = self.program.plan(arrival)
        sweeps = (plan.online, *plan.deferred)
        written = {name for s in sweeps for node in s.nodes for name in node.outputs.values()}
        kept = {name for sweep in sweeps for name in sweep.kept}
        return sum(self._sequence_bytes(name) for name in {SLAB, *written} - kept)

    def _sequence_bytes(self, name: str) -> int:
        """One value of a sequence."""
        return math.prod(self.program.specs[name].shape) * FLOAT_BYTES

    def _online_steps(self, plan: Plan, slabs: int) -> list[Step]:
        """The online nodes; what they put out is fetched slab by slab."""
        back = plan.online.kept & set(self.program.outputs.values())
        return [
            *self._node_steps(plan.online.nodes, slabs),
            self._copies("outputs back", back, runs=slabs),
        ]

    def _deferred_steps(self, plan: Plan) -> list[Step]:
        """What waits for the last slab. The host reduces, and is given what it needs for that."""
        program = self.program
        reduced = {name for node in plan.study for name in node.inputs.values()}
        back = {n for n in reduced | {*program.outputs.values()} if program.sequences[n] == "slab"}
        steps = [
            *(s for sweep in plan.deferred for s in self._node_steps(sweep.nodes, self.slabs)),
            self._copies("results back", back, slabs=self.slabs),
        ]
        for node in plan.study:
            if not isinstance(node, ReduceNode):
                steps += [
                    self._copies("reduced to device", node.inputs.values()),
                    *self._node_steps([node], 1),
                    self._copies("results back", node.outputs.values()),
                ]
        return steps

    def _copies(
        self, name: str, sequences: Iterable[str], *, slabs: int = 1, runs: int = 1
    ) -> Step:
        kernels = tuple(
            Kernel(name=sequence, copied_bytes=slabs * self._sequence_bytes(sequence))
            for sequence in sorted(sequences)
        )
        return Step(kind="copies", name=name, kernels=kernels, runs=runs)

    def _node_steps(self, nodes: Iterable[GraphNode], slabs: int) -> list[Step]:
        """Maps in batches as large as they may be, scans slab by slab."""
        return [
            Step(
                kind=self.kind(node),
                name=node.name,
                kernels=self.node(node, batch).kernels,
                runs=runs,
            )
            for node in nodes
            for batch, runs in batches(slabs, self.program.max_batch(node)).items()
        ]

    def _slice_steps(self, slices: int) -> list[Step]:
        """Slices copied to the device and resampled there."""
        grid, shape = self._grid, self.shape
        in_reach = min(shape.rows, math.ceil(grid.rows * grid.spacing_mm / shape.pixel_mm))
        taps = math.floor(2 * max(grid.spacing_mm, shape.pixel_mm) / shape.pixel_mm) + 1
        copy = Kernel(name="slice to device", copied_bytes=shape.rows**2 * _STEP_BYTES)
        pixels = grid.rows * grid.cols
        resample = Kernel(
            name="resample",
            float_flops=pixels * (taps * taps * _TAP_FLOPS + 2 * taps),
            read_bytes=in_reach**2 * _STEP_BYTES,
            written_bytes=pixels * _STEP_BYTES,
        )
        return [
            Step(kind="copies", name=copy.name, kernels=(copy,), runs=slices),
            Step(kind="preprocessing", name=resample.name, kernels=(resample,), runs=slices),
        ]

    def _slab_steps(self, slabs: Iterable["_SlabSources"]) -> list[Step]:
        """Slabs gathered; where there is a gate, its plane too, which the host judges."""
        grid = self._grid
        pixels = grid.rows * grid.cols
        steps = []
        for sources, runs in Counter(slabs).items():
            gather = Kernel(
                name="gather slab",
                float_flops=pixels
                * (
                    2 * sources.entries
                    + grid.planes_per_slab * (1 + _WINDOW_FLOPS * len(grid.windows))
                ),
                read_bytes=sources.slices * pixels * _STEP_BYTES,
                written_bytes=grid.channels * pixels * FLOAT_BYTES,
            )
            steps.append(Step(kind="preprocessing", name=gather.name, kernels=(gather,), runs=runs))
            if grid.gate is None:
                continue
            plane = Kernel(
                name="gather gate",
                float_flops=pixels * (2 * sources.middle_entries + 1),
                read_bytes=sources.middle_entries * pixels * _STEP_BYTES,
                written_bytes=pixels * FLOAT_BYTES,
            )
            back = Kernel(name="gate plane back", copied_bytes=pixels * FLOAT_BYTES)
            steps += [
                Step(kind="preprocessing", name=plane.name, kernels=(plane,), runs=runs),
                Step(kind="copies", name=back.name, kernels=(back,), runs=runs),
            ]
        return steps


def batches(slabs: int, most: int) -> Mapping[int, int]:
    """Batch size to how often it runs: the largest first, the rest in powers of two."""
    runs: Counter[int] = Counter()
    while slabs:
        size = most if slabs >= most else 1 << (slabs.bit_length() - 1)
        runs[size] += slabs // size
        slabs %= size
    return runs


def totals(kernels: Iterable[Kernel]) -> Kernel:
    """All of some kernels as one."""
    found = list(kernels)
    return Kernel(
        name=f"{len(found)} kernels",
        tensor_flops=sum(kernel.tensor_flops for kernel in found),
        float_flops=sum(kernel.float_flops for kernel in found),
        weight_bytes=sum(kernel.weight_bytes for kernel in found),
        read_bytes=sum(kernel.read_bytes for kernel in found),
        written_bytes=sum(kernel.written_bytes for kernel in found),
        copied_bytes=sum(kernel.copied_bytes for kernel in found),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlabSources:
    """How many slices go into a slab.

    Attributes:
        entries: Over its planes, one after the other.
        slices: Different ones.
        middle_entries: Into its middle plane.
    """

    entries: int
    slices: int
    middle_entries: int


def _slabs(grid: PatientGrid, shape: StudyShape) -> list[_SlabSources]:
    positions = range(0, shape.slices * shape.spacing_um, shape.spacing_um)
    lattice = lattice_for(grid, [shape.spacing_um / 1000])
    found = []
    for centre in lattice.centres(positions):
        planes = lattice.slab_planes(positions, centre)
        parts = [lattice.contributors(positions, plane) for plane in planes]
        found.append(
            _SlabSources(
                entries=sum(len(weights) for _, weights in parts),
                slices=len({first + i for first, weights in parts for i in range(len(weights))}),
                middle_entries=len(parts[len(parts) // 2][1]),
            )
        )
    return found
