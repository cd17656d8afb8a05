"""Whether the exported graphs compute what PyTorch computes, node by node and study by study.

Both sides have weights rounded to float16; what the rounding itself does is measured apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.models.stage1 import SlabClassifier
from export.models.stage2 import StudyNet
from export.onnx_export import SLAB, GraphNode, example_inputs

STUDY_TOLERANCE = 1e-3
NODE_TOLERANCE = 1e-3
LENGTHS = (1, 5, 13)  # graphs are traced at 2 slabs

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Largest absolute differences.

    Attributes:
        nodes: Node to the largest difference of its outputs, over the largest absolute value of
            PyTorch's (at least 1).
        studies: Number of slabs to the difference of the study logit, graphs against PyTorch with
            rounded weights.
        rounding: The same, PyTorch with rounded weights against PyTorch with the weights as
            trained.
    """

    nodes: dict[str, float]
    studies: dict[int, float]
    rounding: dict[int, float]

    @property
    def passed(self) -> bool:
        """Whether every difference lies within its tolerance; rounding is not judged."""
        return (
            max(self.nodes.values()) <= NODE_TOLERANCE
            and max(self.studies.values()) <= STUDY_TOLERANCE
        )


def check_parity(
    nodes: Sequence[GraphNode],
    files: Mapping[str, Path],
    stage1: SlabClassifier,
    stage2: StudyNet,
    slabs: Array,
) -> ParityReport:
    """Compare graphs with PyTorch in float32 on the CPU.

    Args:
        nodes: With rounded weights, as exported.
        files: Node name to file.
        stage1: As trained.
        stage2: As trained.
        slabs: (T, planes, H, W) a study; its first slabs make the shorter ones.
    """
    sessions = {name: open_session(path) for name, path in files.items()}
    rng = np.random.default_rng(1)
    per_node: dict[str, float] = {}
    for node in nodes:
        worst = 0.0
        for count in (1, 3):
            given = example_inputs(node, count, rng)
            with torch.inference_mode():
                expected = _tuple(node.module(*given))
            feed = {k: v.numpy() for k, v in zip(node.input_names, given, strict=True)}
            got = sessions[node.name].run(node.output_names, feed)
            for reference, value in zip(expected, got, strict=True):
                scale = max(1.0, float(reference.abs().max()))
                worst = max(worst, float(np.abs(reference.numpy() - value).max()) / scale)
        per_node[node.name] = worst
    studies: dict[int, float] = {}
    rounding: dict[int, float] = {}
    stage1, stage2 = stage1.eval(), stage2.eval()
    for length in sorted({n for n in (*LENGTHS, len(slabs)) if n <= len(slabs)}):
        part = slabs[:length]
        by_graphs = run_graphs(nodes, sessions, part)
        rounded = run_modules(nodes, part)
        with torch.inference_mode():
            features = torch.cat([stage1.encode(torch.from_numpy(s[None])) for s in part])
            trained = float(stage2(features[None]))
        studies[length] = abs(by_graphs - rounded)
        rounding[length] = abs(rounded - trained)
    return ParityReport(nodes=per_node, studies=studies, rounding=rounding)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on the CPU, with its warnings off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_graphs(
    nodes: Sequence[GraphNode],
    sessions: Mapping[str, onnxruntime.InferenceSession],
    slabs: Array,
) -> float:
    """Study logit of slabs (T, planes, H, W) through the graphs."""

    def call(node: GraphNode, values: list[Array]) -> list[Array]:
        feed = dict(zip(node.input_names, values, strict=True))
        outputs: list[Array] = sessions[node.name].run(node.output_names, feed)
        return outputs

    return float(_run(nodes, slabs, call)["score"].mean())


def run_modules(nodes: Sequence[GraphNode], slabs: Array) -> float:
    """Study logit of slabs (T, planes, H, W) through the PyTorch modules of the nodes."""
    return float(sequences_of_modules(nodes, slabs)["score"].mean())


def sequences_of_modules(nodes: Sequence[GraphNode], slabs: Array) -> dict[str, Array]:
    """Every sequence that the nodes' PyTorch modules make of slabs (T, planes, H, W), float32."""

    def call(node: GraphNode, values: list[Array]) -> list[Array]:
        with torch.inference_mode():
            outputs = _tuple(node.module(*(torch.from_numpy(v) for v in values)))
        return [o.numpy() for o in outputs]

    return _run(nodes, slabs, call)


def _run(
    nodes: Sequence[GraphNode], slabs: Array, call: Callable[[GraphNode, list[Array]], list[Array]]
) -> dict[str, Array]:
    sequences: dict[str, Array] = {SLAB: slabs}
    for node in nodes:
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
    return sequences


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
