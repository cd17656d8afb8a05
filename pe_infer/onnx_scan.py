"""What an ONNX file says of its tensors, read from the wire format, without the onnx package.

Two things are needed at run time. ONNX lets a tensor keep its values in a file beside the model
(onnx.proto, ``TensorProto.data_location``); runtimes follow such a path wherever it leads, OpenVINO
even when the model comes as bytes, so a bundle may not contain any. And OpenVINO may know an input
or output by several names, so the declared ones are read here.
"""

from collections.abc import Iterator
from typing import Final

# message -> field number -> message of that field, for every way to a TensorProto (onnx.proto)
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_MODEL_GRAPH: Final = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_VALUE_NAME: Final = 1
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 8, 13, 14
_MAX_DEPTH: Final = 64
_VARINT, _DELIMITED = 0, 2  # wire types (protobuf encoding)
_FIXED_SIZES: Final = {1: 8, 5: 4}
_VARINT_BITS, _CONTINUED = 64, 0x80


class NotOnnxError(ValueError):
    """The bytes are not an ONNX model."""


def external_tensors(model: bytes) -> list[str]:
    """Names of the tensors whose values lie outside the model.

    Raises:
        NotOnnxError: The bytes are not a protobuf message, or hold no graph.
    """
    view = memoryview(model)
    if not any(number == _MODEL_GRAPH for number, _ in _fields(view)):
        raise NotOnnxError("it holds no graph")
    return list(_external(view, "Model", 0))


def declared_names(model: bytes) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs, without those that have an initial value, and of its outputs.

    Raises:
        NotOnnxError: The bytes are not a protobuf message.
    """
    found: dict[int, list[str]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: [], _GRAPH_INITIALIZER: []}
    for number, graph in _fields(memoryview(model)):
        if number == _MODEL_GRAPH and isinstance(graph, memoryview):
            for field, message in _fields(graph):
                if field in found and isinstance(message, memoryview):
                    wanted = _TENSOR_NAME if field == _GRAPH_INITIALIZER else _VALUE_NAME
                    found[field].append(_text(message, wanted))
    initial = set(found[_GRAPH_INITIALIZER])
    return [name for name in found[_GRAPH_INPUT] if name not in initial], found[_GRAPH_OUTPUT]


def _text(message: memoryview, wanted: int) -> str:
    values = [v for n, v in _fields(message) if n == wanted and isinstance(v, memoryview)]
    return bytes(values[-1]).decode("utf-8", "replace") if values else ""


def _external(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise NotOnnxError("graphs are nested too deep")
    if kind == "Tensor":
        name, external = "", False
        for number, value in _fields(message):
            if number == _TENSOR_NAME and isinstance(value, memoryview):
                name = bytes(value).decode("utf-8", "replace")
            external |= number == _TENSOR_EXTERNAL_DATA or (
                number == _TENSOR_DATA_LOCATION and value != 0
            )
        if external:
            yield name
        return
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        if number in children and isinstance(value, memoryview):
            yield from _external(value, children[number], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values: a view for delimited fields, a number for varints, else 0."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _DELIMITED:
            size, at = _varint(message, at)
            if at + size > end:
                raise NotOnnxError("it is cut short")
            yield number, message[at : at + size]
            at += size
        elif wire in _FIXED_SIZES:
            at += _FIXED_SIZES[wire]
            if at > end:
                raise NotOnnxError("it is cut short")
            yield number, 0
        else:
            raise NotOnnxError(f"wire type {wire} is not protobuf")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < _VARINT_BITS:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < _CONTINUED:
            return value, at
        shift += 7
    raise NotOnnxError("it is cut short")
