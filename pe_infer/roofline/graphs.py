"""What a graph costs on a GPU: its kernels, their floating-point operations and bytes.

Static: from operators and shapes, never from values or from a clock. Conventions:

- A multiply-add is two operations. Convolutions and matrix products are counted so, without their
  bias; a pool or a mean counts one per value that it reads, batch normalisation two per value, and
  every other arithmetic operator one per value that it writes, tanh and sigmoid too. Casts, slices
  and the like count none.
- What a compiler fuses is modelled by three rules. A convolution, a matrix product, a pool or a
  reduction (`_anchored`) begins a kernel. Pointwise operators join the kernel that makes the last
  of what they read, where that is pointwise itself or makes values of the same shape; otherwise
  they begin a pointwise kernel. Views (reshape, identity) cost nothing.
- A kernel reads every tensor from outside once, weights once per run whatever the batch, and writes
  what others read. All of it counts as traffic to memory, as if no cache held a result until the
  next kernel; so the bytes are too many rather than too few where a result fits into a cache.
- Products of float16 tensors are for tensor cores (`Kernel.tensor_flops`); all else is float32
  arithmetic.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pe_infer.errors import EngineError
from pe_infer.half import PRODUCTS
from pe_infer.onnx_vendor import onnx_module

if TYPE_CHECKING:
    from pe_infer.onnx_vendor import ModelProto, NodeProto

_POOLS: Final = frozenset({"MaxPool", "AveragePool"})
_REDUCTIONS: Final = frozenset(
    {
        *("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax"),
        *("ReduceMin", "Softmax", "LogSoftmax"),
    }
)
_VIEWS: Final = frozenset({"Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_MOVES: Final = frozenset(
    {
        *("Cast", "Concat", "Split", "Slice", "Gather", "Pad", "Tile", "Expand", "Transpose"),
        *("DepthToSpace", "SpaceToDepth"),
    }
)
_ARITHMETIC: Final = {
    "BatchNormalization": 2,
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Exp", "Log", "Pow", "Erf"),
            *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
            *("Sum", "Max", "Min", "Where"),
        ),
        1,
    ),
}
_FLOATS: Final = {"FLOAT": 4, "FLOAT16": 2}  # bytes; what is not a float is never counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch.

    Attributes:
        name: Operators in it, in order.
        tensor_flops: Operations of products of float16 tensors.
        float_flops: All others.
        weight_bytes: Constants read.
        read_bytes: Other tensors read.
        written_bytes: Tensors written.
        copied_bytes: Moved between host and device instead; such a launch does nothing else.
    """

    name: str
    tensor_flops: int = 0
    float_flops: int = 0
    weight_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    copied_bytes: int = 0

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.tensor_flops + self.float_flops

    @property
    def memory_bytes(self) -> int:
        """Traffic to the device's memory."""
        return self.weight_bytes + self.read_bytes + self.written_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCost:
    """One run of a graph.

    Attributes:
        kernels: In a working order.
        weight_bytes: All float constants of the graph.
        scratch_bytes: The most that intermediate tensors take at once, inputs and outputs of the
            graph not among them.
        bound_bytes: Inputs and outputs of the graph.
    """

    kernels: tuple[Kernel, ...]
    weight_bytes: int
    scratch_bytes: int
    bound_bytes: int


def graph_cost(graph: bytes, *, name: str, batch: int = 1) -> GraphCost:
    """Count one run of a graph.

    Args:
        graph: The ONNX file's contents, as it will run: see `pe_infer.half.half_graph`.
        name: For messages.
        batch: What the symbolic sizes of its inputs and outputs become.

    Raises:
        EngineError: The onnx package is not installed (``engine.unavailable``); or an operator is
            not one that is counted here, or a shape cannot be told (``engine.failed``).
    """
    onnx = onnx_module("FLOPs and bytes")
    try:
        model: ModelProto = onnx.load_model_from_string(graph)
        _fix_batch(model, batch)
        model = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
        return _Count(onnx, model, name).run()
    except EngineError:
        raise
    except Exception as exc:
        raise EngineError(f"{name} cannot be counted: {exc}") from exc


def _fix_batch(model: "ModelProto", batch: int) -> None:
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = batch


@dataclass(slots=True, eq=False)
class _Group:
    """A kernel while it grows."""

    anchored: bool
    shape: tuple[int, ...]  # of what the anchor makes
    operators: list[str] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    makes: set[str] = field(default_factory=set)
    tensor_flops: int = 0
    float_flops: int = 0


class _Count:
    """One graph, node after node in its own order, which is topological."""

    def __init__(self, onnx: Any, model: "ModelProto", name: str) -> None:
        """Learn types, shapes and constants."""
        self._onnx = onnx
        self._graph = model.graph
        self._name = name
        self._types: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._learn()
        self._constant = {tensor.name for tensor in model.graph.initializer}
        self._root: dict[str, str] = {}  # of a view: what it is a view of
        self._maker: dict[str, int] = {}  # tensor to the index of its group
        self._groups: list[_Group] = []
        self._beside: dict[int, int] = {}  # group to the pointwise group that it feeds

    def run(self) -> GraphCost:
        """Count."""
        for node in self._graph.node:
            self._take(node)
        outputs = [self._rooted(value.name) for value in self._graph.output]
        last_read = {
            name: index for index, group in enumerate(self._groups) for name in group.reads
        }
        kernels = []
        for index, group in enumerate(self._groups):
            written = {name for name in group.makes if last_read.get(name, index) > index}
            kernels.append(
                Kernel(
                    name="+".join(group.operators),
                    tensor_flops=group.tensor_flops,
                    float_flops=group.float_flops,
                    weight_bytes=self._bytes(group.reads & self._constant),
                    read_bytes=self._bytes(group.reads - self._constant),
                    written_bytes=self._bytes(written - set(outputs))
                    + self._bytes(name for name in outputs if name in group.makes),
                )
            )
        used = {name for group in self._groups for name in group.reads}
        inputs = [value.name for value in self._graph.input if value.name not in self._constant]
        return GraphCost(
            kernels=tuple(kernels),
            weight_bytes=self._bytes(used & self._constant),
            scratch_bytes=self._scratch(last_read, {*inputs, *outputs}),
            bound_bytes=self._bytes([*inputs, *outputs]),
        )

    def _learn(self) -> None:
        for tensor in self._graph.initializer:
            self._types[tensor.name] = tensor.data_type
            self._shapes[tensor.name] = tuple(tensor.dims)
        for value in (*self._graph.input, *self._graph.value_info, *self._graph.output):
            kind = value.type.tensor_type
            self._types[value.name] = kind.elem_type
            sizes = kind.shape.dim
            if all(size.HasField("dim_value") for size in sizes):
                self._shapes[value.name] = tuple(size.dim_value for size in sizes)

    def _take(self, node: "NodeProto") -> None:
        reads = [name for name in node.input if name]
        makes = [name for name in node.output if name]
        if node.op_type == "Constant" or self._constant.issuperset(reads):
            self._constant.update(makes)  # folded when the engine is built
            return
        if node.op_type in _VIEWS:
            self._root[makes[0]] = self._rooted(reads[0])
            return
        roots = {self._rooted(name) for name in reads}
        index = self._place(node, max(self._maker.get(name, -1) for name in roots))
        group = self._groups[index]
        group.operators.append(node.op_type)
        group.reads |= {
            name for name in roots if self._maker.get(name) != index and self._is_float(name)
        }
        group.makes |= set(makes)
        self._maker.update(dict.fromkeys(makes, index))
        flops = self._flops(node)
        if node.op_type in PRODUCTS and self._type(reads[0]) == "FLOAT16":
            group.tensor_flops += flops
        else:
            group.float_flops += flops

    def _place(self, node: "NodeProto", last: int) -> int:
        """Index of the group that the node joins or begins; ``last`` makes what it reads."""
        shape = self._shape(node.output[0])
        if not _anchored(node.op_type):
            if last >= 0:
                before = self._groups[last]
                if not before.anchored or before.shape == shape:
                    return last
            if last in self._beside:
                return self._beside[last]
            self._beside[last] = len(self._groups)
        self._groups.append(_Group(_anchored(node.op_type), shape))
        return len(self._groups) - 1

    def _flops(self, node: "NodeProto") -> int:
        made = math.prod(self._shape(node.output[0]))
        read = self._shape(node.input[0])
        options = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        kind = node.op_type
        flops = 0
        if kind in _ARITHMETIC:
            flops = _ARITHMETIC[kind] * made
        elif kind in _REDUCTIONS:
            flops = math.prod(read)
        elif kind in _POOLS:
            flops = made * math.prod(options["kernel_shape"])
        elif kind in PRODUCTS:
            if kind == "MatMul":
                added = read[-1]
            elif kind == "Gemm":
                added = read[0 if options.get("transA") else 1]
            else:
                added = math.prod(self._shape(node.input[1])[1:])
            flops = 2 * added * (math.prod(read) if kind == "ConvTranspose" else made)
        elif kind not in _MOVES:
            self._refuse(f"operator {kind} {node.name!r} is not one whose operations are known")
        return flops

    def _scratch(self, last_read: Mapping[str, int], bound: set[str]) -> int:
        """The largest moment, kernel after kernel."""
        live, most = 0, 0
        for index, group in enumerate(self._groups):
            kept = {n for n in group.makes - bound if last_read.get(n, index) > index}
            live += self._bytes(kept)
            most = max(most, live)
            done = {n for n in group.reads - bound - self._constant if last_read[n] == index}
            live -= self._bytes(done)
        return most

    def _rooted(self, name: str) -> str:
        return self._root.get(name, name)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(
            math.prod(self._shape(name)) * _FLOATS[self._type(name)]
            for name in names
            if self._is_float(name)
        )

    def _is_float(self, name: str) -> bool:
        return self._type(name) in _FLOATS

    def _type(self, name: str) -> str:
        kind: str = self._onnx.TensorProto.DataType.Name(self._types.get(name, 0))
        return kind

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            self._refuse(f"the shape of tensor {name!r} is not known")
        return self._shapes[name]

    def _refuse(self, problem: str) -> NoReturn:
        raise EngineError(f"{self._name} cannot be counted: {problem}")


def _anchored(kind: str) -> bool:
    return not (kind in _MOVES or kind in _ARITHMETIC)
