"""Float16 graphs: which node computes in what, and how far the values are from float32."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import toy_bundles as toy
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

from pe_infer.bundle import Bundle, shipped
from pe_infer.errors import Code, EngineError
from pe_infer.half import FOLLOWERS, PRODUCTS, half_graph
from pe_infer.manifest import Precision
from pe_infer.program import Program

Arrays = Mapping[str, NDArray[Any]]
FORMS = [False, True]  # as converted, and rounded in float32
TOLERANCE = 0.01  # 20 roundings to 11 bits in a row; a fifth of what the slab logit may err
SHIPPED = [
    (name, node.name)
    for name in shipped()
    for node in Program(Bundle.load(name).manifest).graph_nodes
]


def run(graph: bytes, inputs: Arrays) -> dict[str, NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def random_inputs(graph: bytes, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.random(
            [size.dim_value or 1 for size in value.type.tensor_type.shape.dim], np.float32
        )
        for value in onnx.load_from_string(graph).graph.input
    }


def computed_in(graph: bytes) -> dict[str, str]:
    """Output of every node, Casts apart, to the type of what it writes."""
    model = shape_inference.infer_shapes(onnx.load_from_string(graph), check_type=True)
    types = {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    return {
        node.output[0].removesuffix("_half"): types[node.output[0]]
        for node in model.graph.node
        if node.op_type != "Cast"
    }


def single(
    nodes: Sequence[NodeProto], constants: Mapping[str, NDArray[Any]] | None = None
) -> bytes:
    """A graph from x (N,2) to y (N,2)."""
    return toy.graph(nodes, {"x": ["N", 2]}, {"y": ["N", 2]}, constants)


def product(source: str, target: str) -> NodeProto:
    return helper.make_node("MatMul", [source, "w"], [target])


WEIGHT = {"w": np.eye(2, dtype=np.float16)}


@pytest.mark.parametrize("rounded", FORMS)
@pytest.mark.parametrize(("bundle", "node"), SHIPPED)
def test_shipped_graphs_stay_near_float32(bundle: str, node: str, *, rounded: bool) -> None:
    loaded = Bundle.load(bundle)
    spec = next(n for n in Program(loaded.manifest).graph_nodes if n.name == node)
    graph = loaded.graph(spec)
    precision: Precision = "mixed" if spec.kind == "scan" else "reduced"
    inputs = random_inputs(graph)

    converted = half_graph(graph, name=node, precision=precision, rounded=rounded)
    expected, found = run(graph, inputs), run(converted, inputs)

    assert half_graph(graph, name=node, precision=precision, rounded=rounded) == converted
    assert found.keys() == expected.keys()
    for name, values in found.items():
        scale = max(1.0, float(np.abs(expected[name]).max()))
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], atol=TOLERANCE * scale)


@pytest.mark.parametrize("precision", ["reduced", "mixed"])
@pytest.mark.parametrize("kind", [toy.pe_like, toy.radnet_like])
def test_inputs_and_outputs_stay_as_they_are(kind: toy.Kind, precision: Precision) -> None:
    for name, graph in kind()[1].items():
        old = onnx.load_from_string(graph).graph
        new = onnx.load_from_string(half_graph(graph, name=name, precision=precision)).graph
        assert list(new.input) == list(old.input)
        assert list(new.output) == list(old.output)
        assert "FLOAT16" in computed_in(half_graph(graph, name=name, precision=precision)).values()


def test_a_mixed_scan_multiplies_in_float16_and_carries_states_in_float32() -> None:
    types = computed_in(half_graph(toy.recurrence(4), name="cell", precision="mixed"))
    assert types.pop("r") == "FLOAT16"
    assert set(types.values()) == {"FLOAT"}


def test_a_state_accumulates_small_increments() -> None:
    graph = half_graph(toy.recurrence(4), name="cell", precision="mixed", rounded=True)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    steps, growth = 400, 2.0**-12  # lost if added to 1 in float16
    gates = np.zeros((1, 4, 4, 4), np.float32)
    gates[:, :2], gates[:, 2:] = 30.0, growth  # forget nothing; add a little
    hidden, state = np.zeros((1, 2, 4, 4), np.float32), np.ones((1, 2, 4, 4), np.float32)
    for _ in range(steps):
        (state,) = session.run(["c_next"], {"x": gates, "h": hidden, "c": state})

    np.testing.assert_allclose(state, 1.0 + steps * np.tanh(growth), rtol=1e-4)


def test_the_rounded_form_rounds_between_neighbours() -> None:
    nodes = [product("x", "a")]
    nodes += [helper.make_node("Add", [a, "d"], [b]) for a, b in [("a", "b"), ("b", "y")]]
    graph = single(nodes, {**WEIGHT, "d": np.full(2, 2.0**-12, np.float16)})
    x = np.ones((1, 2), np.float32)

    rounded = run(half_graph(graph, name="g", precision="reduced", rounded=True), {"x": x})["y"]

    np.testing.assert_array_equal(rounded, x)  # as float16 arithmetic has it
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], x + 2 * 2.0**-12)


def test_weights_are_used_as_they_are_stored() -> None:
    graph = toy.encoder()
    new = onnx.load_from_string(half_graph(graph, name="encoder", precision="reduced")).graph
    stored = {t.name: t for t in new.initializer}
    old = {t.name: t for t in onnx.load_from_string(graph).graph.initializer}

    assert {t.data_type for t in stored.values()} == {TensorProto.FLOAT16}
    for node in new.node:
        assert node.op_type != "Cast" or node.input[0] not in stored
        if node.op_type == "Conv":
            np.testing.assert_array_equal(
                numpy_helper.to_array(stored[node.input[1]]),
                numpy_helper.to_array(old[node.input[1]]),
            )


def test_means_are_computed_in_float32_until_the_next_product() -> None:
    types = computed_in(half_graph(toy.encoder(), name="encoder", precision="reduced"))
    assert types == {
        "c": "FLOAT16",
        "features": "FLOAT16",
        "attention": "FLOAT16",
        "pooled": "FLOAT",
        "logit": "FLOAT",
    }


@pytest.mark.parametrize("kind", ["Softmax", "Exp", "Sqrt"])
def test_what_float16_does_badly_is_an_island(kind: str) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["before"]),
        product("before", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(kind, ["b"], ["c"]),
        helper.make_node("Mul", ["b", "c"], ["d"]),
        product("d", "e"),
        helper.make_node("Tanh", ["e"], ["y"]),
    ]
    types = computed_in(half_graph(single(nodes, WEIGHT), name="g", precision="reduced"))
    assert [name for name, kind in types.items() if kind == "FLOAT"] == ["before", "c", "d"]
    mixed = computed_in(half_graph(single(nodes, WEIGHT), name="g", precision="mixed"))
    assert [name for name, kind in mixed.items() if kind == "FLOAT16"] == ["a", "e"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_only_products_round_what_was_computed_in_float32(first: str) -> None:
    """A product's Cast of it is the product's own, whichever reader comes first."""
    readers = {"a": product("s", "a"), "b": helper.make_node("Mul", ["s", "s"], ["b"])}
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"]),
        *(readers.pop(name) for name in (first, *readers.keys() - {first})),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    types = computed_in(half_graph(single(nodes, WEIGHT), name="g", precision="reduced"))
    assert types == {"s": "FLOAT", "a": "FLOAT16", "b": "FLOAT", "y": "FLOAT"}


@pytest.mark.parametrize(
    ("value", "kind"), [(1e5, "FLOAT"), (1e-9, "FLOAT"), (0.0, "FLOAT16"), (0.5, "FLOAT16")]
)
def test_a_constant_that_float16_cannot_hold_keeps_its_node_in_float32(
    value: float, kind: str
) -> None:
    constant = helper.make_node("Constant", [], ["k"], value_floats=[value, value])
    nodes = [constant, product("x", "a"), helper.make_node("Add", ["a", "k"], ["y"])]
    graph = half_graph(single(nodes, WEIGHT), name="g", precision="reduced")

    assert computed_in(graph)["y"] == kind
    found = run(graph, {"x": np.ones((1, 2), np.float32)})["y"]
    np.testing.assert_allclose(found, 1.0 + value, rtol=1e-3)


def test_a_weight_may_be_needed_in_both_types() -> None:
    nodes = [
        product("x", "a"),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Exp", ["w"], ["v"]),
        helper.make_node("Add", ["c", "v"], ["y"]),
    ]
    graph = toy.graph(nodes, {"x": [2, 2]}, {"y": [2, 2]}, WEIGHT)
    x = {"x": np.ones((2, 2), np.float32)}
    for rounded in FORMS:
        found = run(half_graph(graph, name="g", precision="reduced", rounded=rounded), x)
        np.testing.assert_allclose(found["y"], run(graph, x)["y"], rtol=1e-3)


def test_an_output_may_be_a_constant_or_be_read_again() -> None:
    nodes = [
        product("x", "y"),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Exp", ["y"], ["e"]),
    ]
    graph = toy.graph(
        nodes, {"x": [2, 2]}, {"y": [2, 2], "z": [2, 2], "e": [2, 2], "w": [2, 2]}, WEIGHT
    )
    x = {"x": np.ones((2, 2), np.float32)}
    for rounded in FORMS:
        found = run(half_graph(graph, name="g", precision="reduced", rounded=rounded), x)
        for name, values in run(graph, x).items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3)


def test_names_that_are_taken_are_not_used_again() -> None:
    nodes = [product("x", "x_half"), product("x_half", "y_half"), product("y_half", "y")]
    graph = single(nodes, WEIGHT)
    found = run(half_graph(graph, name="g", precision="mixed"), {"x": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(found["y"], np.ones((1, 2), np.float32))


def test_float32_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert half_graph(b"anything", name="g", precision="float32") == b"anything"


def test_names_the_extra_when_onnx_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineError, match=r"pe-infer\[tensorrt-rtx\]") as caught:
        half_graph(toy.encoder(), name="g", precision="reduced")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def branching() -> bytes:
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 2])
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "body", [], [value])
    condition = numpy_helper.from_array(np.array([True])[0], "")
    nodes = [
        helper.make_node("Constant", [], ["which"], value=condition),
        helper.make_node("If", ["which"], ["y"], then_branch=body, else_branch=body),
    ]
    return toy.graph(nodes, {"x": [1, 2]}, {"y": [1, 2]})


def foreign() -> bytes:
    model = onnx.load_from_string(single([product("x", "a"), product("a", "y")], WEIGHT))
    model.graph.node[1].domain = "elsewhere"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("graph", "named"),
    [(b"junk", "g cannot be converted"), (branching(), "holds a graph"), (foreign(), "'a'")],
)
def test_refuses_what_it_cannot_convert(graph: bytes, named: str) -> None:
    with pytest.raises(EngineError, match=named) as caught:
        half_graph(graph, name="g", precision="reduced")
    assert caught.value.code == Code.ENGINE_FAILED


@pytest.mark.parametrize("kind", sorted(PRODUCTS | FOLLOWERS))
def test_what_is_converted_has_a_float16_form_in_onnx(kind: str) -> None:
    schema = onnx.defs.get_schema(kind, 18)
    types = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    assert "tensor(float16)" in types[schema.outputs[0].type_str]
