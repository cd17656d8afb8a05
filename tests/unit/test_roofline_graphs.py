"""Operations, bytes and kernels of graphs, against counts by hand."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pe_infer.bundle import Bundle, shipped
from pe_infer.errors import Code, EngineError
from pe_infer.geometry import PatientGrid
from pe_infer.half import half_graph
from pe_infer.program import Program
from pe_infer.roofline.graphs import GraphCost, graph_cost

Shapes = Mapping[str, Sequence[int | str]]


def made(
    nodes: Sequence[Any], inputs: Shapes, outputs: Shapes, weights: Mapping[str, Sequence[int]]
) -> bytes:
    def values(shapes: Shapes) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
            for name, shape in shapes.items()
        ]

    constants = [
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()
    ]
    graph = helper.make_graph(nodes, "toy", values(inputs), values(outputs), constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def one(
    kind: str,
    reads: Sequence[int | str],
    makes: Sequence[int | str],
    weight: Sequence[int],
    **options: Any,
) -> bytes:
    node = helper.make_node(kind, ["x", "w"], ["y"], **options)
    return made([node], {"x": reads}, {"y": makes}, {"w": weight})


def cost(graph: bytes, batch: int = 1) -> GraphCost:
    return graph_cost(graph, name="toy", batch=batch)


@pytest.mark.parametrize(
    ("graph", "multiply_adds"),
    [
        (one("Conv", [1, 3, 8, 8], [1, 4, 8, 8], [4, 3, 3, 3], pads=[1] * 4), 4 * 64 * 27),
        (one("Conv", [1, 3, 8, 8], [1, 4, 3, 3], [4, 3, 3, 3], strides=[2, 2]), 4 * 9 * 27),
        (one("Conv", [1, 4, 8, 8], [1, 6, 8, 8], [6, 2, 1, 1], group=2), 6 * 64 * 2),
        (one("ConvTranspose", [1, 5, 4, 4], [1, 2, 8, 8], [5, 2, 2, 2], strides=[2, 2]), 640),
        (one("MatMul", [7, 5], [7, 3], [5, 3]), 7 * 5 * 3),
        (one("Gemm", [7, 5], [7, 3], [3, 5], transB=1), 7 * 5 * 3),
        (one("Gemm", [5, 7], [7, 3], [5, 3], transA=1), 7 * 5 * 3),
    ],
    ids=["conv", "conv stride", "conv groups", "deconv", "matmul", "gemm", "gemm transposed"],
)
def test_a_product_counts_two_operations_per_multiply_add(graph: bytes, multiply_adds: int) -> None:
    (kernel,) = cost(graph).kernels
    assert (kernel.float_flops, kernel.tensor_flops) == (2 * multiply_adds, 0)


def test_float16_products_are_for_tensor_cores() -> None:
    graph = one("Conv", [1, 3, 8, 8], [1, 4, 8, 8], [4, 3, 1, 1])
    found = cost(half_graph(graph, name="toy", precision="reduced"))
    assert [kernel.name for kernel in found.kernels] == ["Cast", "Conv+Cast"]
    assert sum(kernel.tensor_flops for kernel in found.kernels) == 2 * 4 * 64 * 3
    assert found.weight_bytes == 2 * 4 * 3
    # read as float32, cast to float16, read as float16, written as float32
    assert [kernel.read_bytes for kernel in found.kernels] == [4 * 3 * 64, 2 * 3 * 64]
    assert [kernel.written_bytes for kernel in found.kernels] == [2 * 3 * 64, 4 * 4 * 64]


def test_a_larger_batch_reads_the_weights_once() -> None:
    graph = one("Conv", ["n", 3, 8, 8], ["n", 4, 8, 8], [4, 3, 1, 1])
    (single,), (eight,) = cost(graph).kernels, cost(graph, batch=8).kernels
    assert single.weight_bytes == eight.weight_bytes == 4 * 12
    assert (eight.read_bytes, eight.written_bytes) == (8 * 4 * 192, 8 * 4 * 256)
    assert eight.flops == 8 * single.flops


def test_pools_means_and_softmax_count_the_values_that_they_read() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    found = cost(made(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 3, 1, 1]}, {}))
    assert [kernel.float_flops for kernel in found.kernels] == [3 * 64, 3 * 16, 3]


def test_pointwise_operators_join_the_product_that_feeds_them() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    found = cost(made(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, {"w": [4, 4, 1, 1]}))
    (kernel,) = found.kernels
    assert kernel.name == "Conv+Add+Relu"
    assert kernel.flops == 2 * 4 * 64 * 4 + 2 * 256
    assert (kernel.read_bytes, kernel.written_bytes) == (4 * 256, 4 * 256)
    assert (found.scratch_bytes, found.bound_bytes) == (0, 2 * 4 * 256)


def test_what_two_kernels_share_is_written_once_and_read_by_both() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"]),
        helper.make_node("Conv", ["a", "v"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    weights = {"w": [4, 4, 1, 1], "v": [4, 4, 1, 1]}
    found = cost(made(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, weights))
    assert [kernel.name for kernel in found.kernels] == ["Conv", "Conv", "Conv+Add"]
    assert [kernel.read_bytes for kernel in found.kernels] == [1024, 1024, 2048]
    assert [kernel.written_bytes for kernel in found.kernels] == [1024, 1024, 1024]
    assert found.weight_bytes == 2 * 64  # not three: both graphs' uses of w are one constant
    assert found.scratch_bytes == 2 * 1024  # a and b, before c


def test_scratch_holds_what_is_still_read_and_no_more() -> None:
    names = ["x", "a", "b", "c", "y"]
    nodes = [
        helper.make_node("Conv", [read, "w"], [makes]) for read, makes in itertools.pairwise(names)
    ]
    found = cost(made(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, {"w": [4, 4, 1, 1]}))
    assert found.scratch_bytes == 2 * 1024


def test_what_cuts_one_tensor_up_is_one_kernel() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Expand", ["m", "size"], ["y"]),
        helper.make_node("ReduceMax", ["x"], ["r"], keepdims=1),
        helper.make_node("Concat", ["m", "m"], ["z"], axis=1),
    ]
    outputs = {"y": [2, 3], "z": [1, 6], "r": [1, 1]}
    graph = helper.make_model(
        helper.make_graph(
            nodes,
            "toy",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [
                numpy_helper.from_array(np.ones((5, 3), np.float32), "w"),
                numpy_helper.from_array(np.array([2, 3]), "size"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    found = cost(graph.SerializeToString())
    assert [kernel.name for kernel in found.kernels] == ["MatMul", "Expand+Concat", "ReduceMax"]


def test_batch_normalisation_counts_two_operations_per_value() -> None:
    statistics = ["scale", "bias", "mean", "variance"]
    nodes = [helper.make_node("BatchNormalization", ["x", *statistics], ["y"])]
    shape = [1, 4, 8, 8]
    (kernel,) = cost(made(nodes, {"x": shape}, {"y": shape}, {n: [4] for n in statistics})).kernels
    assert (kernel.flops, kernel.weight_bytes) == (2 * 256, 4 * 16)


def test_a_gated_recurrence_by_hand() -> None:
    """A minimal gated unit: h' = h + z * (n - h), with z and n from x + U h."""
    size = 6
    nodes = [
        helper.make_node("MatMul", ["h", "u"], ["uh"]),
        helper.make_node("Add", ["x", "uh"], ["g"]),
        helper.make_node("Split", ["g"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Sigmoid", ["a"], ["z"]),
        helper.make_node("Tanh", ["b"], ["n"]),
        helper.make_node("Sub", ["n", "h"], ["d"]),
        helper.make_node("Mul", ["z", "d"], ["m"]),
        helper.make_node("Add", ["h", "m"], ["h_next"]),
        helper.make_node("Identity", ["h_next"], ["y"]),
    ]
    found = cost(
        made(
            nodes,
            {"x": [1, 2 * size], "h": [1, size]},
            {"h_next": [1, size], "y": [1, size]},
            {"u": [size, 2 * size]},
        )
    )
    product, gates = found.kernels
    assert (product.name, gates.name) == ("MatMul+Add", "Split+Sigmoid+Tanh+Sub+Mul+Add")
    assert product.flops == 2 * size * 2 * size + 2 * size
    assert gates.flops == 5 * size
    assert product.read_bytes == 4 * (size + 2 * size)
    assert gates.read_bytes == 4 * (2 * size + size)
    assert gates.written_bytes == 4 * 2 * size  # the state, and again as the output


def test_constants_behind_a_cast_are_folded() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "v"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    found = cost(made(nodes, {"x": [1, 5]}, {"y": [1, 3]}, {"w": [5, 3]}))
    assert [kernel.name for kernel in found.kernels] == ["Cast", "MatMul+Cast"]
    assert found.weight_bytes == 2 * 15


def test_an_operator_that_is_not_known_is_refused_by_name() -> None:
    node = helper.make_node("CumSum", ["x", "axis"], ["y"], "adder")
    graph = helper.make_graph(
        [node],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.int64(0), "axis")],
    )
    with pytest.raises(EngineError, match="operator CumSum 'adder'") as caught:
        cost(helper.make_model(graph).SerializeToString())
    assert caught.value.code == Code.ENGINE_FAILED


def test_a_file_that_is_no_graph_is_refused() -> None:
    with pytest.raises(EngineError, match="toy cannot be counted"):
        cost(b"\xff")


def resnet_18(grid: PatientGrid, width: float) -> int:
    """Multiply-adds at total stride 16: 3x3 stem of stride 2, four stages of two blocks."""
    stages = [round(width * count) for count in (64, 128, 256, 512)]
    side, channels = grid.rows // 2, stages[0]
    multiply_adds = side**2 * channels * 9 * grid.channels
    for makes in stages:
        for block in range(2):
            shrinks = block == 0 and makes != channels
            side = side // 2 if shrinks else side
            multiply_adds += side**2 * makes * 9 * (channels + makes)
            multiply_adds += side**2 * makes * channels if shrinks else 0
            channels = makes
    return multiply_adds + side**2 * 2 * channels  # class activation maps


def densenet_40(grid: PatientGrid, width: float) -> int:
    """Multiply-adds: stem of stride 2, three blocks of 12 layers of growth 12, three branches."""
    assert width == 1
    side, channels = grid.rows // 2, 16
    multiply_adds = side**2 * channels * 9 * grid.channels
    for block in range(3):
        for _ in range(12):
            multiply_adds += side**2 * 12 * 9 * channels
            channels += 12
        multiply_adds += side**2 * 16 * 9 * channels  # branch: a convolution, and a deconvolution
        multiply_adds += grid.rows**2 * 16 * 4  # in which four pixels reach every one of the mask
        if block < 2:
            side //= 2
            multiply_adds += side**2 * channels**2
    return multiply_adds + channels + 3  # the slice's own logit


ENCODERS = {"pe": resnet_18, "ich": densenet_40}  # counted anew from the architecture


@pytest.mark.parametrize("name", shipped())
def test_the_encoder_costs_what_its_architecture_does(name: str) -> None:
    bundle = Bundle.load(name)
    trained = bundle.manifest.training["stage1"]
    multiply_adds = ENCODERS[name](bundle.manifest.grid, trained.get("width", 1.0))
    node = next(n for n in Program(bundle.manifest).graph_nodes if n.name == "encoder")
    found = cost(half_graph(bundle.graph(node), name="encoder", precision=node.precision))
    assert sum(kernel.tensor_flops for kernel in found.kernels) == 2 * multiply_adds
    rest = sum(kernel.float_flops for kernel in found.kernels)
    assert rest < 0.02 * 2 * multiply_adds
    graph = _parsed(bundle.graph(node))
    norms = {i for n in graph.node if n.op_type == "BatchNormalization" for i in n.input[1:]}
    stored = sum(
        math.prod(tensor.dims) * (4 if tensor.name in norms else 2)  # norms stay float32
        for tensor in graph.initializer
        if tensor.data_type in {TensorProto.FLOAT, TensorProto.FLOAT16}
    )
    assert found.weight_bytes == pytest.approx(stored, rel=1e-3)


def _parsed(graph: bytes) -> Any:
    model = helper.make_model(helper.make_graph([], "", [], []))
    model.ParseFromString(graph)
    return model.graph
