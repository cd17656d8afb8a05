"""The trained networks as ONNX graphs, one per node of the study program.

A recurrent layer becomes two nodes: its input projection, a ``map`` over all slabs, and its
recurrence, a ``scan`` of one slab (T = 1, batch 1, no loop inside). A norm or pool that follows a
recurrent layer is part of the next map.

Graphs compute in float32. Arrays of at least ``MIN_HALF_VALUES`` weights are stored as float16 with
a Cast behind them; smaller ones (biases, norms) stay float32. Batch norms of the encoder are folded
into its convolutions; those of the recurrent net stay, because zero padding comes after them.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.models.stage1 import NO_PE, PE, TOTAL_STRIDE, BasicBlock, SlabClassifier
from export.models.stage2 import ConvLstmCell, SequenceNorm, StudyNet
from pe_infer.manifest import Precision

OPSET = 18
MIN_HALF_VALUES = 1024  # smaller arrays stay float32: they hold nothing worth saving
SLAB = "slab"


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


class EncoderGraph(nn.Module):
    """Stage 1 with its batch norms folded into the convolutions."""

    def __init__(self, model: SlabClassifier) -> None:
        """Copy and fold; the argument is not changed."""
        super().__init__()
        folded = copy.deepcopy(model).eval().float()
        folded.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        folded.stem = fuse_conv_bn_eval(folded.stem, folded.stem_norm)
        folded.stem_norm = nn.Identity()  # type: ignore[assignment]
        for block in folded.blocks:
            if not isinstance(block, BasicBlock):
                raise TypeError(type(block))
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
            block.norm1 = block.norm2 = nn.Identity()  # type: ignore[assignment]
            if isinstance(block.shortcut, nn.Sequential):
                conv, norm = block.shortcut
                block.shortcut = fuse_conv_bn_eval(conv, norm)  # type: ignore[arg-type, type-var]
        self.model = folded

    def forward(self, slab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, planes, H, W) to features, raw attention of the PE class and stage-1 logit."""
        features = self.model.encode(slab)
        head = self.model.head
        maps = functional.conv2d(features, head.weight[:, :, None, None], head.bias)
        means = maps.mean(dim=(2, 3))
        logit = means[:, PE : PE + 1] - means[:, NO_PE : NO_PE + 1]
        return features, maps[:, PE : PE + 1], logit


class ProjectionGraph(nn.Module):
    """Norm and pool that end the layer before, and the input projection of a ConvLSTM."""

    def __init__(self, project: nn.Conv2d, norm: SequenceNorm | None, *, pool: bool) -> None:
        """Keep the modules."""
        super().__init__()
        self.norm = norm or nn.Identity()
        self.pool = pool
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 4 * filters, H or H/2, W or W/2)."""
        x = self.norm(x)
        if self.pool:
            x = functional.max_pool2d(x, 2)
        y: Tensor = self.project(x)
        return y


class ScanGraph(nn.Module):
    """One slab through the recurrence of a ConvLSTM."""

    def __init__(self, cell: ConvLstmCell) -> None:
        """Keep the cell."""
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates (1, 4 * filters, H, W) and states to output, next hidden and next cell state."""
        h_next, c_next = self.cell(x, h, c)
        return h_next.clone(), h_next, c_next


class ScoreGraph(nn.Module):
    """Last norm, pool and dense layer, slab by slab: the mean over slabs commutes with it."""

    def __init__(self, norm: SequenceNorm, dense: nn.Linear) -> None:
        """Keep the modules."""
        super().__init__()
        self.norm = norm
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        """(N, filters, H, W) to (N, 1)."""
        y: Tensor = self.dense(functional.max_pool2d(self.norm(x), 2).flatten(1))
        return y


def encoder_node(stage1: SlabClassifier, size: int) -> GraphNode:
    """The map that turns slabs of ``size`` rows and columns into features; ``stage1`` is copied."""
    return GraphNode(
        name="encoder",
        kind="map",
        module=EncoderGraph(stage1),
        inputs={"slab": SLAB},
        outputs={"features": "features", "attention": "attention", "stage1_logit": "stage1_logit"},
        shapes={"slab": (stage1.in_channels, size, size)},
    )


def graph_nodes(stage1: SlabClassifier, stage2: StudyNet, size: int) -> list[GraphNode]:
    """The map and scan nodes of the PE system, in order of computation.

    Args:
        stage1: Encoder; copied.
        stage2: Recurrent net over its features; copied.
        size: Rows and columns of a slab.
    """
    net = copy.deepcopy(stage2).eval().float()
    first, second = net.filters
    cells = size // TOTAL_STRIDE
    half = cells // 2
    nodes = [encoder_node(stage1, size)]

    def recurrent(
        layer: str, source: str, norm: SequenceNorm | None, channels: int, side: int, *, pool: bool
    ) -> None:
        lstm = getattr(net, layer)
        filters, out = lstm.filters, side // 2 if pool else side
        nodes.append(
            GraphNode(
                name=f"project_{layer}",
                kind="map",
                module=ProjectionGraph(lstm.project, norm, pool=pool).eval(),
                inputs={"x": source},
                outputs={"y": f"gates_{layer}"},
                shapes={"x": (channels, side, side)},
            )
        )
        state = (filters, out, out)
        nodes.append(
            GraphNode(
                name=layer,
                kind="scan",
                module=ScanGraph(lstm.cell).eval(),
                inputs={"x": f"gates_{layer}"},
                outputs={"y": f"hidden_{layer}"},
                shapes={"x": (4 * filters, out, out), "h": state, "c": state},
                direction="down" if lstm.downwards else "up",
                states={"h": "h_next", "c": "c_next"},
                precision="mixed",
            )
        )

    recurrent("down1", "features", None, stage1.feature_channels, cells, pool=False)
    recurrent("up1", "hidden_down1", net.norm_down1, first, cells, pool=False)
    recurrent("down2", "hidden_up1", net.norm_up1, first, cells, pool=True)
    recurrent("up2", "hidden_down2", net.norm_down2, second, half, pool=False)
    nodes.append(
        GraphNode(
            name="score",
            kind="map",
            module=ScoreGraph(net.norm_up2, net.dense).eval(),
            inputs={"x": "hidden_up2"},
            outputs={"y": "score"},
            shapes={"x": (second, half, half)},
        )
    )
    return nodes


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
