"""Whether the exported graphs compute what PyTorch computes, node by node and study by study.

Three questions, each with a number of its own:

- Do the nodes, put together as the study program says, make the networks? Asked of the nodes'
  PyTorch modules before anything is rounded (`assembly_differences`).
- Does every graph compute what the module of its node computes? Both with weights rounded to
  float16.
- What does the rounding do to the logits that decide: of the study, or of its slabs?

Graphs run on the product's own ONNX Runtime engine in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.onnx_export import SLAB, Array, GraphNode, StudyGraphs, example_inputs
from pe_infer.engines.base import EngineOptions, Session, select

NODE_TOLERANCE = 1e-3
STUDY_TOLERANCE = 1e-3  # of a logit that decides
ROUNDING_TOLERANCE = 0.04  # of the same: at most 0.01 in uncalibrated probability
LENGTHS = (1, 5, 13)  # graphs are traced at 2 slabs
NODE_COUNTS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Largest absolute differences; one that is not a number passes nothing.

    Attributes:
        nodes: Node to the largest difference of its outputs, over the largest absolute value of
            PyTorch's (at least 1).
        studies: Number of slabs to the difference of the logits that decide (of the study, or of
            its slabs), graphs against the nodes' modules, both with rounded weights.
        assembly: The same, the nodes' modules against the networks, both as trained.
        rounding: The same, the nodes' modules with rounded weights against the networks as trained.
    """

    nodes: dict[str, float]
    studies: dict[int, float]
    assembly: dict[int, float]
    rounding: dict[int, float]

    @property
    def passed(self) -> bool:
        """Whether every difference lies within its tolerance."""
        return all(
            difference <= tolerance
            for differences, tolerance in (
                (self.nodes, NODE_TOLERANCE),
                (self.studies, STUDY_TOLERANCE),
                (self.assembly, STUDY_TOLERANCE),
                (self.rounding, ROUNDING_TOLERANCE),
            )
            for difference in differences.values()
        )


def assembly_differences(graphs: StudyGraphs, slabs: Array) -> dict[int, float]:
    """Number of slabs to the largest difference of the answer, nodes against networks.

    Args:
        graphs: Not rounded for ``ParityReport.assembly``, rounded for ``ParityReport.rounding``.
        slabs: (T, channels, H, W) a study; its first slabs make the shorter ones.
    """
    return {
        length: _largest(
            sequences_of_modules(graphs, slabs[:length])[graphs.answer],
            graphs.reference(slabs[:length]),
        )
        for length in _lengths(slabs)
    }


def check_parity(
    graphs: StudyGraphs,
    files: Mapping[str, Path],
    slabs: Array,
    *,
    assembly: Mapping[int, float],
) -> ParityReport:
    """Compare graphs with PyTorch in float32 on the CPU.

    Args:
        graphs: With rounded weights, as exported.
        files: Node name to file.
        slabs: (T, channels, H, W) a study; its first slabs make the shorter ones.
        assembly: `assembly_differences` of the nodes before they were rounded.

    Raises:
        EngineError: ONNX Runtime cannot be loaded, or refuses a graph.
    """
    sessions = open_sessions(graphs.nodes, files)
    rng = np.random.default_rng(1)
    return ParityReport(
        nodes={
            node.name: _node_difference(node, sessions[node.name], rng) for node in graphs.nodes
        },
        studies={
            length: _largest(
                sequences_of_graphs(graphs, sessions, slabs[:length])[graphs.answer],
                sequences_of_modules(graphs, slabs[:length])[graphs.answer],
            )
            for length in _lengths(slabs)
        },
        assembly=dict(assembly),
        rounding=assembly_differences(graphs, slabs),
    )


def open_sessions(nodes: Sequence[GraphNode], files: Mapping[str, Path]) -> dict[str, Session]:
    """Node name to a session of its graph on ONNX Runtime, float32."""
    most = max(NODE_COUNTS)
    runtime = select("onnxruntime", EngineOptions(precision="float32", max_batch=most))
    return {
        node.name: runtime.compile(
            files[node.name].read_bytes(),
            name=node.file,
            max_batch=most if node.kind == "map" else 1,
        ).session()
        for node in nodes
    }


def sequences_of_graphs(
    graphs: StudyGraphs, sessions: Mapping[str, Session], slabs: Array
) -> dict[str, Array]:
    """Every sequence that the graphs make of slabs (T, channels, H, W), float32."""

    def call(node: GraphNode, values: list[Array]) -> list[Array]:
        return _run_graph(node, sessions[node.name], values)

    return _run(graphs, slabs, call)


def sequences_of_modules(graphs: StudyGraphs, slabs: Array) -> dict[str, Array]:
    """Every sequence that the nodes' PyTorch modules make of slabs (T, channels, H, W), float32."""

    def call(node: GraphNode, values: list[Array]) -> list[Array]:
        with torch.inference_mode():
            outputs = _tuple(node.module(*(torch.from_numpy(v) for v in values)))
        return [o.numpy() for o in outputs]

    return _run(graphs, slabs, call)


def _run(
    graphs: StudyGraphs, slabs: Array, call: Callable[[GraphNode, list[Array]], list[Array]]
) -> dict[str, Array]:
    """Every sequence, one slab at a time; ``call`` takes and gives tensors of batch 1."""
    sequences: dict[str, Array] = {SLAB: slabs}
    for node in graphs.nodes:
        inputs = [sequences[s] for s in node.inputs.values()]
        count = len(inputs[0])
        if node.kind == "map":
            steps = [call(node, [v[i : i + 1] for v in inputs]) for i in range(count)]
        else:
            states = [np.zeros((1, *node.shapes[s]), np.float32) for s in node.states]
            steps = [[]] * count
            for i in reversed(range(count)) if node.direction == "down" else range(count):
                outputs = call(node, [*(v[i : i + 1] for v in inputs), *states])
                steps[i] = outputs[: len(node.outputs)]
                states = outputs[len(node.outputs) :]
        for place, sequence in enumerate(node.outputs.values()):
            sequences[sequence] = np.concatenate([s[place] for s in steps])
    for result, sequence in graphs.means.items():
        sequences[result] = sequences[sequence].mean(axis=0, keepdims=True)
    return sequences


def _largest(values: Array, expected: Array) -> float:
    return float(np.abs(values - expected).max())


def _node_difference(node: GraphNode, session: Session, rng: np.random.Generator) -> float:
    differences: list[float] = []
    for count in NODE_COUNTS if node.kind == "map" else (1,):
        given = example_inputs(node, count, rng)
        with torch.inference_mode():
            expected = _tuple(node.module(*given))
        got = _run_graph(node, session, [v.numpy() for v in given])
        for reference, value in zip(expected, got, strict=True):
            scale = max(1.0, float(reference.abs().max()))
            differences.append(float(np.abs(reference.numpy() - value).max()) / scale)
    return float(np.max(differences))  # unlike max(), it keeps what is not a number


def _run_graph(node: GraphNode, session: Session, values: list[Array]) -> list[Array]:
    """Outputs in the order of the node; copies, as a session uses its buffers again."""
    outputs = session.run(dict(zip(node.input_names, values, strict=True)))
    return [outputs[name].copy() for name in node.output_names]


def _lengths(slabs: Array) -> list[int]:
    return sorted({n for n in (*LENGTHS, len(slabs)) if n <= len(slabs)})


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
