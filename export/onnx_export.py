"""The trained networks as ONNX graphs, one per node of the study program.

A recurrent layer becomes two nodes: its input projection, a ``map`` over all slabs, and its
recurrence, a ``scan`` of one slab (T = 1, batch 1, no loop inside). A norm or pool that follows a
recurrent layer is part of the next map.

Graphs compute in float32. Arrays of at least ``MIN_HALF_VALUES`` weights are stored as float16 with
a Cast behind them; smaller ones (biases, norms) stay float32.

Which nodes a system has is said in ``export.systems``.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from pe_infer.manifest import Precision

OPSET = 18
MIN_HALF_VALUES = 1024  # smaller arrays stay float32: they hold nothing worth saving
SLAB = "slab"

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """One node of the study program, with the module that computes it.

    Attributes:
        name: Name of the node; its file is ``<name>.onnx``.
        kind: ``map`` over slabs, or ``scan``.
        module: Takes and returns tensors in the order of ``inputs`` and ``outputs``; a scan takes
            and returns its states behind them.
        inputs: Graph tensor to sequence.
        outputs: Graph tensor to sequence.
        shapes: Shape of every input and state without the first axis.
        direction: Of a scan.
        states: State tensors of a scan: input to output.
        precision: What an engine may do: see `pe_infer.manifest.Precision`.
    """

    name: str
    kind: Literal["map", "scan"]
    module: nn.Module
    inputs: dict[str, str]
    outputs: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    direction: Literal["down", "up"] | None = None
    states: dict[str, str] = field(default_factory=dict)
    precision: Precision = "reduced"

    @property
    def file(self) -> str:
        """Name of the graph's file."""
        return f"{self.name}.onnx"

    @property
    def input_names(self) -> list[str]:
        """Graph inputs, in order."""
        return [*self.inputs, *self.states]

    @property
    def output_names(self) -> list[str]:
        """Graph outputs, in order."""
        return [*self.outputs, *self.states.values()]


@dataclass(frozen=True, kw_only=True)
class StudyGraphs:
    """A system as a study program, and the networks that it is made of.

    Attributes:
        nodes: Map and scan nodes, in order of computation.
        means: Sequence with a value per study to the sequence that it is the mean of.
        outputs: Output of the bundle to its sequence.
        answer: The sequence that the bundle's rule decides by.
        reference: Slabs (T, channels, rows, cols) to the same values as the networks compute them
            in PyTorch, with the weights that they were trained to.
    """

    nodes: list[GraphNode]
    means: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str]
    answer: str
    reference: Callable[[Array], Array]


class ScanGraph(nn.Module):
    """One slab through a recurrence: ``cell(x, h, c)`` to the next hidden and cell states."""

    def __init__(self, cell: nn.Module) -> None:
        """Keep the cell."""
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates and states to output, next hidden and next cell state; first axes are 1."""
        h_next, c_next = self.cell(x, h, c)
        return h_next.clone(), h_next, c_next


@torch.no_grad()
def round_weights(nodes: list[GraphNode]) -> None:
    """Round to float16, in place, exactly the weights that `store_half` stores as float16."""
    for node in nodes:
        for values in (*node.module.parameters(), *node.module.buffers()):
            if values.is_floating_point() and values.numel() >= MIN_HALF_VALUES:
                values.copy_(values.half().float())


def example_inputs(node: GraphNode, count: int, rng: np.random.Generator) -> list[Tensor]:
    """Random inputs of a node: values in [0, 1], ``count`` slabs for a map."""
    lead = count if node.kind == "map" else 1
    shapes = [node.shapes[name] for name in node.input_names]
    return [torch.from_numpy(rng.random((lead, *s), dtype=np.float32)) for s in shapes]


def export_graph(node: GraphNode) -> onnx.ModelProto:
    """One node as an ONNX model with float16 weight storage.

    Raises:
        onnx.checker.ValidationError: The exporter produced an invalid model.
    """
    arguments = tuple(example_inputs(node, 2, np.random.default_rng(0)))
    shapes = None
    if node.kind == "map":
        dynamic = torch.export.Dim("slabs", min=1, max=4096)
        shapes = tuple({0: dynamic} for _ in arguments)
    with _quiet():
        program = torch.onnx.export(
            node.module,
            arguments,
            input_names=node.input_names,
            output_names=node.output_names,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            external_data=False,
        )
    if program is None:
        raise RuntimeError(node.name)
    model = store_half(program.model_proto)
    model.graph.name = node.name
    model.producer_name, model.producer_version, model.doc_string = "pe_infer.export", "", ""
    _forget_sources(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def store_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store weight arrays as float16 and cast them back in the graph.

    Args:
        model: Changed in place.

    Returns:
        The same model.
    """
    casts: list[onnx.NodeProto] = []
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if initializer.data_type != onnx.TensorProto.FLOAT or values.size < MIN_HALF_VALUES:
            continue
        name = initializer.name
        half = numpy_helper.from_array(values.astype(np.float16), f"{name}_half")
        initializer.CopyFrom(half)
        casts.append(
            onnx.helper.make_node(
                "Cast", [half.name], [name], f"cast_{name}", to=onnx.TensorProto.FLOAT
            )
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    known = {v.name for v in model.graph.initializer}
    kept = [v for v in model.graph.value_info if v.name not in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


def export_graphs(nodes: list[GraphNode], folder: Path) -> Mapping[str, Path]:
    """Write every node to ``folder/<name>.onnx``; returns name to file."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for node in nodes:
        files[node.name] = folder / node.file
        onnx.save(export_graph(node), files[node.name])
    return files


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove stack traces and machine paths that the exporter leaves in the metadata."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    del model.graph.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter prints and logs about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
