"""From a bundle's graph to a strongly typed FP16 graph.

TensorRT 11 and TensorRT for RTX compute in the types that the graph says, so half precision is a
property of the graph. Which node computes in which type follows from four rules:

1. Convolutions and matrix products (`PRODUCTS`) compute in float16.
2. In a node of precision ``reduced``, the operators in `FOLLOWERS` compute in float16 where nothing
   that they read is float32; so float16 begins with the first product and lasts until an operator
   of another kind. In a ``mixed`` node they compute in float32: what a recurrent state is added to
   or multiplied with does.
3. All else (softmax, means, sums, norms and their statistics, exponentials, whatever is not listed)
   computes in float32, and so does what it is joined with, until the next product.
4. A node with a constant that float16 cannot hold (infinite, or all zero) computes in float32.

Inputs and outputs of the graph, recurrent states among them, stay float32 as the manifest says;
casts lie inside. Weights are float16 where they are used as such, with no Cast in front. The same
bytes in give the same bytes out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from pe_infer.errors import EngineError
from pe_infer.manifest import Precision
from pe_infer.onnx_vendor import onnx_module

if TYPE_CHECKING:
    from pe_infer.onnx_vendor import GraphProto, ModelProto, NodeProto, TensorProto

CONVERSION_VERSION: Final = 1  # a change of the rules makes engines that were built before stale
PRODUCTS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FOLLOWERS: Final = frozenset(
    {
        *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sum", "Max", "Min", "Where"),
        *("MaxPool", "AveragePool", "GlobalMaxPool"),
        *("Identity", "Dropout", "Concat", "Split", "Slice", "Gather", "Pad", "Tile", "Expand"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
        *("DepthToSpace", "SpaceToDepth"),
    }
)


def half_graph(graph: bytes, *, name: str, precision: Precision, rounded: bool = False) -> bytes:
    """Convert a graph that computes in float32.

    Args:
        graph: The ONNX file's contents.
        name: For messages.
        precision: What the manifest says of the node; ``float32`` gives the graph back as it is.
        rounded: Compute in float32 and round to float16 what would have been float16: the values
            of tensor cores, which add in float32. Most CPUs have no float16 arithmetic: there ONNX
            Runtime computes neighbouring float16 nodes in float32 and leaves out the rounding
            between them, so it makes a float16 graph more exact than it is on a GPU. This one is
            rounded as on a GPU.

    Returns:
        The contents of a new ONNX file with the same inputs and outputs.

    Raises:
        EngineError: The onnx package is not installed (``engine.unavailable``), or the graph cannot
            be converted (``engine.failed``).
    """
    if precision == "float32":
        return graph
    onnx = onnx_module("float16 graphs")
    with _translated(name):
        model: ModelProto = onnx.load_model_from_string(graph)
        _Conversion(onnx, model, name, mixed=precision == "mixed", rounded=rounded).run()
        onnx.checker.check_model(model, full_check=True)
        converted: bytes = model.SerializeToString(deterministic=True)
        return converted


class _Conversion:
    """One graph, node after node in its own order, which is topological.

    A float tensor of the graph exists as float32, as float16, or as both: ``_float`` and ``_half``
    give the name of each form under the name that the tensor had. Missing forms are cast when they
    are first needed; ``_computed_half`` names what was computed in float16, not cast to it.
    """

    def __init__(
        self, onnx: Any, model: "ModelProto", name: str, *, mixed: bool, rounded: bool
    ) -> None:
        """Learn which tensors are float32, and which of them are constants."""
        _refuse_nested(model, name)
        self._onnx = onnx
        self._graph = model.graph
        self._mixed = mixed
        self._rounded = rounded
        self._types = _float_tensors(onnx, model, name)
        self._constants = _constants(onnx, model.graph)
        self._old = [n for n in self._graph.node if self._constants.keys().isdisjoint(n.output)]
        self._taken = {
            *self._constants,
            *(value.name for value in (*self._graph.input, *self._graph.output)),
            *(tensor for node in self._old for tensor in (*node.input, *node.output)),
        }
        self._float: dict[str, str] = {
            value.name: value.name for value in self._graph.input if value.name in self._types
        }
        self._half: dict[str, str] = {}
        self._computed_half: set[str] = set()
        self._nodes: list[NodeProto] = []
        self._stored: dict[str, TensorProto] = {}
        self._outputs = {value.name for value in self._graph.output}

    def run(self) -> None:
        """Rewrite the graph in place."""
        for node in self._old:
            self._convert(node)
        for name in sorted(self._outputs & self._types):
            self._as_float(name)  # the output may be a constant
        used = {name for node in self._nodes for name in node.input} | self._outputs
        kept = [t for t in self._graph.initializer if t.name in used and t.name not in self._stored]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend([*kept, *self._stored.values()])

    def _convert(self, old: "NodeProto") -> None:
        half = self._is_half(old)
        node: NodeProto = self._onnx.NodeProto()
        node.CopyFrom(old)
        for index, name in enumerate(old.input):
            if name in self._types:
                node.input[index] = self._as_half(name) if half else self._as_float(name)
        self._nodes.append(node)
        for index, name in enumerate(old.output):
            if name not in self._types:
                continue
            if not half:
                self._float[name] = name
                continue
            self._computed_half.add(name)
            if self._rounded:
                node.output[index] = self._new(f"{name}_exact")
                self._round(node.output[index], name)
                self._half[name] = self._float[name] = name
            elif name in self._outputs:
                node.output[index] = self._half[name] = self._new(f"{name}_half")
                self._cast(self._half[name], name, "FLOAT")
                self._float[name] = name
            else:
                self._half[name] = name

    def _is_half(self, node: "NodeProto") -> bool:
        """The four rules."""
        reads = [name for name in node.input if name in self._types]
        if not reads or node.domain not in {"", "ai.onnx"}:
            return False
        if not all(_fits(self._constants[name]) for name in reads if name in self._constants):
            return False
        if node.op_type in PRODUCTS:
            return True
        if self._mixed or node.op_type not in FOLLOWERS:
            return False
        values = [name for name in reads if name not in self._constants]
        return bool(values) and self._computed_half.issuperset(values)

    def _as_float(self, name: str) -> str:
        if name not in self._float:
            if name in self._constants:
                self._float[name] = self._store(self._constants[name], name)
            else:
                self._float[name] = self._new(f"{name}_float")
                self._cast(self._half[name], self._float[name], "FLOAT")
        return self._float[name]

    def _as_half(self, name: str) -> str:
        if name not in self._half:
            self._half[name] = new = self._new(f"{name}_half")
            if name in self._constants:
                values: NDArray[Any] = self._constants[name].astype(np.float16)
                self._store(values.astype(np.float32) if self._rounded else values, new)
            elif self._rounded:
                self._round(self._float[name], new)
            else:
                self._cast(self._float[name], new, "FLOAT16")
        return self._half[name]

    def _store(self, values: NDArray[Any], name: str) -> str:
        self._stored[name] = self._onnx.numpy_helper.from_array(values, name)
        return name

    def _round(self, source: str, target: str) -> None:
        between = self._new(f"{target}_float16")
        self._cast(source, between, "FLOAT16")
        self._cast(between, target, "FLOAT")

    def _cast(self, source: str, target: str, to: str) -> None:
        kind = getattr(self._onnx.TensorProto, to)
        self._nodes.append(
            self._onnx.helper.make_node("Cast", [source], [target], f"cast_{target}", to=kind)
        )

    def _new(self, wanted: str) -> str:
        while wanted in self._taken:
            wanted += "_"
        self._taken.add(wanted)
        return wanted


def _fits(values: NDArray[np.float32]) -> bool:
    """Whether float16 can hold a constant: no value becomes infinite, and not all become zero."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return bool(np.isfinite(half).all() and (half.any() or not values.any()))


def _float_tensors(onnx: Any, model: "ModelProto", name: str) -> frozenset[str]:
    """Names of all float32 tensors.

    Raises:
        EngineError: The type of a tensor cannot be told.
    """
    graph: GraphProto = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        for tensor in node.output:
            if tensor and not types.get(tensor):
                _refuse(
                    name,
                    f"the type of tensor {tensor!r}, written by {node.op_type} {node.name!r}, is "
                    "not known: use standard operators",
                )
    return frozenset(tensor for tensor, kind in types.items() if kind == onnx.TensorProto.FLOAT)


def _constants(onnx: Any, graph: "GraphProto") -> dict[str, NDArray[np.float32]]:
    """Float32 constants: initial values, weights stored as float16 behind a Cast, Constant nodes.

    Initial values that are inputs too are not constant.
    """
    types = onnx.TensorProto
    given = {value.name for value in graph.input}
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
    found = {
        name: onnx.numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if tensor.data_type == types.FLOAT
    }
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            value = attributes.get("value")
            if value is not None and value.data_type == types.FLOAT:
                found[node.output[0]] = onnx.numpy_helper.to_array(value)
            for kind in ("value_float", "value_floats"):
                if kind in attributes:
                    found[node.output[0]] = np.asarray(attributes[kind], np.float32)
        elif node.op_type == "Cast" and attributes["to"] == types.FLOAT:
            tensor = stored.get(node.input[0])
            if tensor is not None and tensor.data_type == types.FLOAT16:
                found[node.output[0]] = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    return found


def _refuse_nested(model: "ModelProto", name: str) -> None:
    if model.functions or model.graph.sparse_initializer:
        _refuse(name, "it holds functions or sparse tensors, which are not converted")
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            _refuse(name, f"{node.op_type} {node.name!r} holds a graph, which is not converted")


def _refuse(name: str, problem: str) -> NoReturn:
    raise EngineError(f"{name} cannot be converted to float16: {problem}")


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as exc:
        raise EngineError(f"{name} cannot be converted to float16: {exc}") from exc
