"""RADnet's graphs with weights of zero: for counting what it costs, not for answers.

Grewal et al. 2017, arXiv 1710.04934: DenseNet-40 with growth 12 over three windows of a head slice,
an auxiliary branch after each dense block, a bidirectional LSTM over the slices. What the paper
does not say, or could not be read, is chosen here:

- DenseNet-40 in its form for small images (Huang et al. 2017, no bottleneck, no compression): 16
  channels and stride 1 in the stem, three blocks of 12 layers, an average pool between them. So the
  first block runs at 256 x 256, which is most of the cost: a stem of stride 2 would quarter it.
- A branch is a 3x3 convolution to 16 channels and one deconvolution to a mask of the image's size.
- The LSTM reads the last block's 448 pooled channels and has 128 channels in each direction.
- A study is 32 slices of 5 mm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pe_infer.bundle import Bundle, write_bundle

SIDE: Final = 256
WINDOWS: Final = (
    {"low_hu": 0, "high_hu": 80},
    {"low_hu": -20, "high_hu": 180},
    {"low_hu": -800, "high_hu": 2000},
)
GROWTH, LAYERS, BLOCKS, STEM = 12, 12, 3, 16
BRANCH: Final = 16
HIDDEN: Final = 128
FEATURES: Final = STEM + BLOCKS * LAYERS * GROWTH
OPSET: Final = 18


class _Graph:
    """Nodes and weights while they are written down; every method names what it makes."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def weight(self, *shape: int, values: Any = None) -> str:
        name = f"weight{len(self._weights)}"
        array = np.zeros(shape, np.float32) if values is None else np.asarray(values, np.int64)
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, reads: int, makes: int, size: int = 3) -> str:
        pads = [size // 2] * 4
        return self.add("Conv", [x, self.weight(makes, reads, size, size)], pads=pads)

    def norm(self, x: str, channels: int) -> str:
        statistics = [self.weight(channels) for _ in range(4)]
        return self.add("Relu", [self.add("BatchNormalization", [x, *statistics])])

    def dense(self, x: str, reads: int, makes: int) -> str:
        return self.add("Gemm", [x, self.weight(reads, makes), self.weight(makes)])

    def rename(self, x: str, name: str) -> None:
        self._nodes.append(helper.make_node("Identity", [x], [name], name))

    def model(
        self,
        inputs: Mapping[str, Sequence[int]],
        outputs: Mapping[str, Sequence[int]],
        batch: int | str = "slabs",
    ) -> bytes:
        def values(shapes: Mapping[str, Sequence[int]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])
                for name, shape in shapes.items()
            ]

        graph = helper.make_graph(
            self._nodes, "radnet", values(inputs), values(outputs), self._weights
        )
        opsets = [helper.make_opsetid("", OPSET)]
        made: bytes = helper.make_model(graph, opset_imports=opsets).SerializeToString()
        return made


def encoder() -> bytes:
    """Slab to pooled features (448) and the three masks (3, 256, 256)."""
    graph = _Graph()
    channels, masks = STEM, []
    parts = [graph.conv("slab", len(WINDOWS), STEM)]
    for block in range(BLOCKS):
        for _ in range(LAYERS):
            joined = graph.add("Concat", parts, axis=1) if len(parts) > 1 else parts[0]
            parts.append(graph.conv(graph.norm(joined, channels), channels, GROWTH))
            channels += GROWTH
        joined = graph.add("Concat", parts, axis=1)
        masks.append(_branch(graph, joined, channels, 2**block))
        x = graph.norm(joined, channels)
        if block < BLOCKS - 1:
            x = graph.conv(x, channels, channels, 1)
            parts = [graph.add("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2])]
    pooled = graph.add("GlobalAveragePool", [x])
    graph.rename(graph.add("Flatten", [pooled]), "features")
    graph.rename(graph.add("Concat", masks, axis=1), "masks")
    return graph.model(
        {"slab": (len(WINDOWS), SIDE, SIDE)},
        {"features": (FEATURES,), "masks": (BLOCKS, SIDE, SIDE)},
    )


def _branch(graph: _Graph, x: str, channels: int, scale: int) -> str:
    y = graph.add("Relu", [graph.conv(x, channels, BRANCH)])
    weight = graph.weight(BRANCH, 1, scale, scale)
    return graph.add("Sigmoid", [graph.add("ConvTranspose", [y, weight], strides=[scale] * 2)])


def projection() -> bytes:
    """Features to what an LSTM adds to its gates."""
    graph = _Graph()
    graph.rename(graph.dense("x", FEATURES, 4 * HIDDEN), "y")
    return graph.model({"x": (FEATURES,)}, {"y": (4 * HIDDEN,)})


def recurrence() -> bytes:
    """One step of an LSTM."""
    graph = _Graph()
    moved = graph.add("MatMul", ["h", graph.weight(HIDDEN, 4 * HIDDEN)])
    gates = graph.add("Add", ["x", moved])
    i, f, g, o = (
        graph.add(
            "Slice",
            [gates, *(graph.weight(values=[at]) for at in (start, start + HIDDEN, 1))],
        )
        for start in range(0, 4 * HIDDEN, HIDDEN)
    )
    kept = graph.add("Mul", [graph.add("Sigmoid", [f]), "c"])
    new = graph.add("Mul", [graph.add("Sigmoid", [i]), graph.add("Tanh", [g])])
    cell = graph.add("Add", [kept, new])
    hidden = graph.add("Mul", [graph.add("Sigmoid", [o]), graph.add("Tanh", [cell])])
    for x, name in ((hidden, "y"), (hidden, "h_next"), (cell, "c_next")):
        graph.rename(x, name)
    state = (HIDDEN,)
    return graph.model(
        {"x": (4 * HIDDEN,), "h": state, "c": state},
        {"y": state, "h_next": state, "c_next": state},
        batch=1,
    )


def score() -> bytes:
    """Hidden states of both directions to the logit of a slice."""
    graph = _Graph()
    joined = graph.add("Concat", ["a", "b"], axis=1)
    graph.rename(graph.dense(joined, 2 * HIDDEN, 1), "y")
    return graph.model({"a": (HIDDEN,), "b": (HIDDEN,)}, {"y": (1,)})


def write_radnet(folder: Path) -> Bundle:
    """The bundle, written to a folder and loaded."""
    sequences = {
        "slab": (len(WINDOWS), SIDE, SIDE),
        "features": (FEATURES,),
        "masks": (BLOCKS, SIDE, SIDE),
        "slab_logit": (1,),
    }
    nodes = [_map("encoder", {"slab": "slab"}, {"features": "features", "masks": "masks"})]
    for name, direction in (("forward", "down"), ("backward", "up")):
        sequences |= {f"gates_{name}": (4 * HIDDEN,), f"hidden_{name}": (HIDDEN,)}
        nodes += [
            _map(f"project_{name}", {"x": "features"}, {"y": f"gates_{name}"}, "project.onnx"),
            {
                **_map(name, {"x": f"gates_{name}"}, {"y": f"hidden_{name}"}, "lstm.onnx"),
                "kind": "scan",
                "direction": direction,
                "precision": "mixed",
                "states": [
                    {"input": state, "output": f"{state}_next", "shape": [HIDDEN]}
                    for state in ("h", "c")
                ],
            },
        ]
    nodes.append(
        _map("score", {"a": "hidden_forward", "b": "hidden_backward"}, {"y": "slab_logit"})
    )
    document = {
        "format_version": 1,
        "name": "radnet",
        "version": "0.0.0",
        "finding": {
            "code": {"value": "1386000", "scheme": "SCT", "meaning": "Intracranial hemorrhage"}
        },
        "scope": {"body_part": ["HEAD"]},
        "intended_use": "Counting operations and bytes: its weights are zero.",
        "preprocessing_version": 1,
        "grid": {
            "rows": SIDE,
            "cols": SIDE,
            "spacing_mm": 1.0,
            "pitch_um": 5000,
            "planes_per_slab": 1,
            "slab_step": 1,
            "windows": WINDOWS,
            "through_plane": "source",
        },
        "batch": {"max": 8},
        "sequences": {
            name: {"shape": shape, "axes": ["values", "rows", "cols"][: len(shape)]}
            for name, shape in sequences.items()
        },
        "nodes": nodes,
        "outputs": {"slab_logit": "slab_logit", "attention": "masks"},
        "operating_points": [{"name": "balanced", "threshold": 0.5}],
        "default_operating_point": "balanced",
        "rule": {"kind": "consecutive", "count": 3},
    }
    graphs = {
        "encoder.onnx": encoder(),
        "project.onnx": projection(),
        "lstm.onnx": recurrence(),
        "score.onnx": score(),
    }
    return write_bundle(folder, document, graphs)


def _map(
    name: str, inputs: Mapping[str, str], outputs: Mapping[str, str], graph: str | None = None
) -> dict[str, Any]:
    return {
        "kind": "map",
        "name": name,
        "graph": graph or f"{name}.onnx",
        "inputs": dict(inputs),
        "outputs": dict(outputs),
    }
