"""Small bundles: a PE-like down-up stack, and a RADnet-like bidirectional one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, checker, helper, numpy_helper

from pe_infer.bundle import Bundle
from pe_infer.bundle_check import build_bundle

SIDE = 8
PLANES = 3
HIDDEN = 2
OPSET = 17

Kind = Callable[[], tuple[dict[str, Any], dict[str, bytes]]]
Weights = Mapping[str, NDArray[Any]]


def weights(seed: int, *shape: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float16)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    halves: Weights | None = None,
    dtype: int = TensorProto.FLOAT,
) -> bytes:
    """An ONNX model; weights are stored in half precision and cast inside the graph."""
    initializers, casts = [], []
    for name, values in (halves or {}).items():
        stored = name if values.dtype.kind == "i" else f"{name}_half"
        initializers.append(numpy_helper.from_array(values, stored))
        if stored != name:
            casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    model = helper.make_model(
        helper.make_graph(
            [*casts, *nodes],
            "toy",
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    checker.check_model(model)
    return model.SerializeToString()


def encoder() -> bytes:
    """slab (N,3,8,8) -> features (N,4,4,4), attention (N,1,4,4), logit (N,1)."""
    return graph(
        [
            helper.make_node("Conv", ["slab", "w1"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["features"]),
            helper.make_node("Conv", ["features", "w2"], ["attention"]),
            helper.make_node("GlobalAveragePool", ["attention"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logit"]),
        ],
        {"slab": ["N", PLANES, SIDE, SIDE]},
        {"features": ["N", 4, 4, 4], "attention": ["N", 1, 4, 4], "logit": ["N", 1]},
        {"w1": weights(1, 4, PLANES, 3, 3), "w2": weights(2, 1, 4, 1, 1)},
    )


def project(seed: int, channels: int, out: int = 2 * HIDDEN) -> bytes:
    """x (N,channels,4,4) -> y (N,out,4,4): the input projection of a recurrent layer."""
    return graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        {"x": ["N", channels, 4, 4]},
        {"y": ["N", out, 4, 4]},
        {"w": weights(seed, out, channels, 3, 3)},
    )


def recurrence(seed: int) -> bytes:
    """x (1,4,4,4), h and c (1,2,4,4) -> y, h_next, c_next: a convolutional cell with two gates."""
    state = [1, HIDDEN, 4, 4]
    return graph(
        [
            helper.make_node("Conv", ["h", "u"], ["r"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["x", "r"], ["gates"]),
            helper.make_node("Split", ["gates"], ["forget", "new"], axis=1),
            helper.make_node("Sigmoid", ["forget"], ["f"]),
            helper.make_node("Tanh", ["new"], ["n"]),
            helper.make_node("Mul", ["f", "c"], ["kept"]),
            helper.make_node("Add", ["kept", "n"], ["c_next"]),
            helper.make_node("Tanh", ["c_next"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y"]),
        ],
        {"x": [1, 2 * HIDDEN, 4, 4], "h": state, "c": state},
        {"y": state, "h_next": state, "c_next": state},
        {"u": weights(seed, 2 * HIDDEN, HIDDEN, 3, 3)},
    )


def score(inputs: Sequence[str]) -> bytes:
    """Each input (N,2,4,4) -> logit (N,1): sum, flatten, dense."""
    nodes = [helper.make_node("Sum", list(inputs), ["s"])]
    return graph(
        [
            *nodes,
            helper.make_node("Flatten", ["s"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logit"]),
        ],
        {name: ["N", HIDDEN, 4, 4] for name in inputs},
        {"logit": ["N", 1]},
        {"w": weights(9, HIDDEN * 16, 1)},
    )


def scan(
    name: str, direction: str, reads: str, writes: str, initial: float = 0.0
) -> dict[str, Any]:
    shape = [HIDDEN, 4, 4]
    return {
        "name": name,
        "kind": "scan",
        "direction": direction,
        "graph": f"{name}.onnx",
        "inputs": {"x": reads},
        "outputs": {"y": writes},
        "states": [
            {"input": "h", "output": "h_next", "shape": shape},
            {"input": "c", "output": "c_next", "shape": shape, "initial": initial},
        ],
        "precision": "mixed",
    }


def map_node(name: str, reads: Mapping[str, str], writes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "map",
        "graph": f"{name}.onnx",
        "inputs": dict(reads),
        "outputs": dict(writes),
        "precision": "reduced",
    }


def base_document() -> dict[str, Any]:
    return {
        "format_version": 1,
        "name": "toy",
        "version": "0.1.0",
        "finding": {
            "code": {"value": "59282003", "scheme": "SCT", "meaning": "Pulmonary embolism"}
        },
        "scope": {"modality": ["CT"], "body_part": ["CHEST"], "contrast": "any"},
        "intended_use": "tests",
        "preprocessing_version": 1,
        "grid": {
            "rows": SIDE,
            "cols": SIDE,
            "spacing_mm": 10.0,
            "pitch_um": 2500,
            "planes_per_slab": PLANES,
            "slab_step": 2,
            "windows": [{"low_hu": -1024, "high_hu": 500}],
        },
        "batch": {"max": 4},
        "operating_points": [{"name": "balanced", "threshold": 0.5}],
        "default_operating_point": "balanced",
        "training": {"source": "none: random weights"},
    }


def pe_like() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Encoder, then a down scan, then an up scan over the down scan's output, then mean."""
    document = {
        **base_document(),
        "nodes": [
            map_node(
                "encoder",
                {"slab": "slab"},
                {"features": "features", "attention": "attention", "logit": "stage1_logit"},
            ),
            map_node("project_down", {"x": "features"}, {"y": "gates_down"}),
            scan("down", "down", "gates_down", "hidden_down"),
            map_node("project_up", {"x": "hidden_down"}, {"y": "gates_up"}),
            scan("up", "up", "gates_up", "hidden_up", initial=0.25),
            map_node("score", {"x": "hidden_up"}, {"logit": "score"}),
            {
                "name": "study_logit",
                "kind": "reduce",
                "reducer": "mean",
                "inputs": {"x": "score"},
                "outputs": {"y": "study_logit"},
            },
        ],
        "outputs": {
            "study_logit": "study_logit",
            "slab_logit": "stage1_logit",
            "attention": "attention",
        },
        "rule": {"kind": "threshold"},
        "provisional_alert": {"slab_probability": 0.98, "consecutive": 3},
    }
    files = {
        "encoder.onnx": encoder(),
        "project_down.onnx": project(3, 4),
        "down.onnx": recurrence(4),
        "project_up.onnx": project(5, HIDDEN),
        "up.onnx": recurrence(6),
        "score.onnx": score(["x"]),
    }
    return document, files


def radnet_like() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Encoder, then both directions side by side, joined per slab; three neighbours decide."""
    document = {
        **base_document(),
        "name": "toy-bidirectional",
        "nodes": [
            map_node(
                "encoder",
                {"slab": "slab"},
                {"features": "features", "attention": "attention", "logit": "unused"},
            ),
            map_node("project", {"x": "features"}, {"y": "gates"}),
            scan("forward", "down", "gates", "hidden_forward"),
            scan("backward", "up", "gates", "hidden_backward"),
            map_node(
                "score", {"a": "hidden_forward", "b": "hidden_backward"}, {"logit": "slab_logit"}
            ),
        ],
        "outputs": {"slab_logit": "slab_logit", "attention": "attention"},
        "rule": {"kind": "consecutive", "count": 3, "gated": "skip", "fewer": "refuse"},
    }
    files = {
        "encoder.onnx": encoder(),
        "project.onnx": project(3, 4),
        "forward.onnx": recurrence(4),
        "backward.onnx": recurrence(6),
        "score.onnx": score(["a", "b"]),
    }
    return document, files


def golden_slabs(count: int = 3) -> NDArray[np.uint8]:
    shape = (count, PLANES, SIDE, SIDE)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def slabs(count: int, seed: int = 0) -> list[tuple[int, NDArray[np.float32]]]:
    """Positions (ascending, um) and tensors."""
    rng = np.random.default_rng(seed)
    return [(5000 * i, rng.random((PLANES, SIDE, SIDE), np.float32)) for i in range(count)]


def write_toy(folder: Path, kind: str = "pe_like") -> Bundle:
    """A complete bundle with golden data."""
    document, files = {"pe_like": pe_like, "radnet_like": radnet_like}[kind]()
    return build_bundle(folder, document, files, golden_slabs())


def make(folder: Path, kind: Kind = pe_like, **changes: Any) -> Path:
    """A toy bundle with other values in its manifest; ``grid`` is merged into the grid."""
    document, files = kind()
    document["grid"] = {**document["grid"], **changes.pop("grid", {})}
    build_bundle(folder, {**document, **changes}, files, golden_slabs())
    return folder
