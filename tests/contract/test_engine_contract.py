"""What every engine must do: run on OpenVINO, ONNX Runtime, and the fakes in tests/.

TensorRT runs on a stand-in for the library and for the GPU; arrays go there and come back.
"""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
import toy_bundles as toy
from device_on_host import HostRuntime
from fake_engine import FakeRuntime
from onnx import TensorProto, helper

from pe_infer.engines.base import (
    Engine,
    EngineOptions,
    Runtime,
    Session,
    TensorSpec,
    installed,
    select,
    warm_up,
    zeros,
)
from pe_infer.engines.lane import Tensor
from pe_infer.errors import Code, EngineError

MakeRuntime = Callable[[EngineOptions], Runtime]
RUNTIMES: dict[str, MakeRuntime] = {
    "openvino": lambda options: select("openvino", options),
    "onnxruntime": lambda options: select("onnxruntime", options),
    "fake": FakeRuntime,
    "tensorrt": lambda options: HostRuntime("tensorrt", options),
    "tensorrt-rtx": lambda options: HostRuntime("tensorrt-rtx", options),
}
LIBRARIES = {
    "tensorrt": ("tensorrt", "10.3.0.26"),
    "tensorrt-rtx": ("tensorrt_rtx", "1.7.1.116"),
}
CELL = ("x", "h", "c")


@pytest.fixture(scope="module", params=RUNTIMES)
def make(request: pytest.FixtureRequest) -> Iterator[MakeRuntime]:
    name = request.param
    if name in {"openvino", "onnxruntime"} and name not in installed():
        pytest.skip(f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if name in LIBRARIES:
            gpu = fake_cuda.install(patch)
            module, version = LIBRARIES[name]
            library = fake_tensorrt.FakeTensorRt(version, module)
            fake_tensorrt.install(patch, library).queue = gpu.enqueue
        yield RUNTIMES[name]


@pytest.fixture(scope="module")
def runtime(make: MakeRuntime) -> Runtime:
    return make(EngineOptions(precision="float32", threads=1))


@pytest.fixture(scope="module")
def cell(runtime: Runtime) -> Engine:
    return runtime.compile(toy.recurrence(4), name="cell")


@pytest.fixture(scope="module")
def encoder(runtime: Runtime) -> Engine:
    return runtime.compile(toy.encoder(), name="encoder", max_batch=4)


def cell_inputs(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (1, 4, 4, 4), "h": (1, 2, 4, 4), "c": (1, 2, 4, 4)}
    return {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in CELL}


def roll(session: Session, seed: int, steps: int) -> Tensor:
    """A scan of random inputs, with outputs in place."""
    shape = (1, 2, 4, 4)
    old = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
    new = [np.empty(shape, np.float32), np.empty(shape, np.float32)]
    hidden = np.empty((steps, *shape), np.float32)
    for step in range(steps):
        session.run(
            {"x": cell_inputs(100 * seed + step)["x"], "h": old[0], "c": old[1]},
            {"y": hidden[step], "h_next": new[0], "c_next": new[1]},
        )
        old, new = new, old
    return hidden


def test_mixed_precision_carries_states_in_float32(make: MakeRuntime) -> None:
    engine = make(EngineOptions(threads=1)).compile(
        toy.recurrence(4), name="cell", precision="mixed"
    )
    session, steps, growth = engine.session(), 400, 2.0**-12  # lost if added to 1 in bfloat16
    gates = np.zeros((1, 4, 4, 4), np.float32)
    gates[:, :2], gates[:, 2:] = 30.0, growth  # forget nothing; add a little
    hidden, state = np.zeros((1, 2, 4, 4), np.float32), np.ones((1, 2, 4, 4), np.float32)
    for _ in range(steps):
        state = session.run({"x": gates, "h": hidden, "c": state})["c_next"].copy()

    np.testing.assert_allclose(state, 1.0 + steps * np.tanh(growth), rtol=1e-4)


def test_describes_itself(runtime: Runtime, encoder: Engine) -> None:
    assert runtime.name
    assert runtime.version
    assert runtime.device
    assert encoder.name == "encoder"
    assert encoder.precision == "float32"
    assert dict(encoder.inputs) == {"slab": TensorSpec(name="slab", shape=(None, 3, 8, 8))}
    assert dict(encoder.outputs) == {
        "features": TensorSpec(name="features", shape=(None, 4, 4, 4)),
        "attention": TensorSpec(name="attention", shape=(None, 1, 4, 4)),
        "logit": TensorSpec(name="logit", shape=(None, 1)),
    }
    assert encoder.batch_sizes[0] == 1


def test_an_input_keeps_its_declared_name_when_the_graph_begins_with_a_no_op(
    runtime: Runtime,
) -> None:
    engine = runtime.compile(toy.score(["x"]), name="score")  # a sum of one

    assert set(engine.inputs) == {"x"}


def test_two_outputs_may_be_the_same_value(runtime: Runtime) -> None:
    nodes = [helper.make_node("Identity", ["a"], [name]) for name in ("b", "d")]
    engine = runtime.compile(
        toy.graph(nodes, {"a": ["N", 2]}, {"d": ["N", 2], "b": ["N", 2]}), name="twice"
    )
    a = np.array([[1.0, 2.0]], np.float32)

    results = engine.session().run({"a": a})

    assert set(results) == {"b", "d"}
    for value in results.values():
        np.testing.assert_array_equal(value, a)


def test_agrees_with_numpy(runtime: Runtime, cell: Engine) -> None:
    reference = FakeRuntime().compile(toy.recurrence(4), name="reference")
    inputs = cell_inputs(1)

    found, expected = cell.session().run(inputs), reference.session().run(inputs)

    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)


def test_writes_outputs_in_place_and_leaves_inputs_alone(cell: Engine) -> None:
    inputs = cell_inputs(2)
    before = {name: values.copy() for name, values in inputs.items()}
    out = {"h_next": np.full((1, 2, 4, 4), np.nan, np.float32)}

    results = cell.session().run(inputs, out)

    assert results["h_next"] is out["h_next"]
    np.testing.assert_allclose(out["h_next"], results["y"])
    for name, values in inputs.items():
        np.testing.assert_array_equal(values, before[name])


def test_outputs_of_the_session_last_until_its_next_run(cell: Engine) -> None:
    session, other = cell.session(), cell.session()
    first = session.run(cell_inputs(1))["y"]
    copy = first.copy()

    other.run(cell_inputs(2))
    np.testing.assert_array_equal(first, copy)

    given = np.empty_like(copy)
    session.run(cell_inputs(1), {"y": given})
    session.run(cell_inputs(2))
    np.testing.assert_array_equal(given, copy)  # what was given stays what it was


def test_takes_slices_of_a_block_and_read_only_arrays(cell: Engine) -> None:
    inputs = cell_inputs(3)
    block = np.zeros((3, 4, 4, 4), np.float32)
    block[1] = inputs["x"][0]
    block.flags.writeable = False
    hidden = np.zeros((3, 2, 4, 4), np.float32)

    cell.session().run({**inputs, "x": block[1:2]}, {"y": hidden[1:2]})

    np.testing.assert_array_equal(hidden[1:2], cell.session().run(inputs)["y"])
    assert not hidden[[0, 2]].any()


def test_interleaved_sessions_do_not_disturb_each_other(cell: Engine) -> None:
    alone = [roll(cell.session(), seed, 4) for seed in (1, 2)]
    sessions = [cell.session(), cell.session()]
    shape = (1, 2, 4, 4)
    states = [[np.zeros(shape, np.float32)] * 2 for _ in sessions]

    for step in range(4):
        for stream, session in enumerate(sessions):
            x = cell_inputs(100 * (stream + 1) + step)["x"]
            results = session.run({"x": x, "h": states[stream][0], "c": states[stream][1]})
            states[stream] = [results["h_next"].copy(), results["c_next"].copy()]
            np.testing.assert_array_equal(results["y"], alone[stream][step])


def test_sessions_run_in_threads(cell: Engine) -> None:
    alone = [roll(cell.session(), seed, 20) for seed in range(4)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = roll(cell.session(), seed, 20)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed, expected in enumerate(alone):
        np.testing.assert_array_equal(found[seed], expected)


def test_starting_over_gives_the_same_values(cell: Engine) -> None:
    session = cell.session()
    np.testing.assert_array_equal(roll(session, 1, 3), roll(session, 1, 3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": None}, "expected ['c', 'h', 'x']"),
        ({"z": np.zeros((1, 1), np.float32)}, "['c', 'h', 'x', 'z']"),
        ({"x": np.zeros((1, 4, 4, 5), np.float32)}, "expected (1, 4, 4, 4)"),
        ({"x": np.zeros((1, 4, 4), np.float32)}, "'x'"),
        ({"x": np.zeros((1, 4, 4, 4))}, "float64"),
        ({"x": np.zeros((4, 4, 4, 2), np.float32)[..., 0][np.newaxis]}, "C-contiguous"),
        ({"x": np.float32(1.0)}, "'x'"),
    ],
)
def test_refuses_inputs_that_do_not_fit(
    cell: Engine, change: dict[str, Tensor], named: str
) -> None:
    session = cell.session()
    good = cell_inputs(1)
    expected = session.run(good)["y"].copy()
    bad = {name: values for name, values in {**good, **change}.items() if values is not None}

    with pytest.raises(EngineError) as caught:
        session.run(bad)

    assert caught.value.code == Code.ENGINE_INPUT
    assert named in str(caught.value)
    assert "cell" in str(caught.value)
    np.testing.assert_array_equal(session.run(good)["y"], expected)  # still usable


@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (2, 2, 4, 4)])
def test_refuses_outputs_that_do_not_fit(cell: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match="'y'") as caught:
        cell.session().run(cell_inputs(1), {"y": np.zeros(shape, np.float32)})
    assert caught.value.code == Code.ENGINE_INPUT


def test_refuses_unknown_and_read_only_outputs(cell: Engine) -> None:
    fixed = np.zeros((1, 2, 4, 4), np.float32)
    fixed.flags.writeable = False
    for out in ({"why": fixed}, {"y": fixed}):
        with pytest.raises(EngineError) as caught:
            cell.session().run(cell_inputs(1), out)
        assert caught.value.code == Code.ENGINE_INPUT


def test_refuses_a_batch_it_was_not_compiled_for(encoder: Engine) -> None:
    with pytest.raises(EngineError, match="batch of 3") as caught:
        encoder.session().run({"slab": np.zeros((3, 3, 8, 8), np.float32)})
    assert caught.value.code == Code.ENGINE_INPUT


@pytest.mark.parametrize(
    ("wanted", "allowed", "sizes"), [(4, 4, (1, 4)), (8, 4, (1, 4)), (4, 1, (1,))]
)
def test_batches_on_request(
    make: MakeRuntime, wanted: int, allowed: int, sizes: tuple[int, ...]
) -> None:
    runtime = make(EngineOptions(precision="float32", threads=1, max_batch=wanted))
    engine = runtime.compile(toy.encoder(), name="encoder", max_batch=allowed)
    warm_up(engine)
    session = engine.session()
    slabs = np.random.default_rng(0).random((4, 3, 8, 8), np.float32)

    assert (engine.batch_sizes[0], engine.batch_sizes[-1]) == (sizes[0], sizes[-1])
    singles = [session.run({"slab": slabs[i : i + 1]})["features"].copy() for i in range(4)]
    if allowed > 1:
        together = session.run({"slab": slabs})["features"]
        np.testing.assert_allclose(together, np.concatenate(singles), atol=1e-6)
        again = session.run({"slab": slabs[:1]})["features"]
        np.testing.assert_array_equal(again, singles[0])


class Broken:
    """Stands in for a vendor object, and fails where it would compute."""

    def __init__(self, real: Any, method: str) -> None:
        self._real = real
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise RuntimeError("out of memory")
        return getattr(self._real, name)


VENDOR_CALLS = {
    "openvino": ("_request", "infer"),
    "onnxruntime": ("_inference", "run_with_iobinding"),
    "fake": ("_evaluator", "run"),
    "tensorrt": ("_context", "execute_async_v3"),
    "tensorrt-rtx": ("_context", "execute_async_v3"),
}


def test_a_run_that_fails_half_way_leaves_the_session_usable(
    runtime: Runtime, cell: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = cell.session()
    expected = {name: values.copy() for name, values in session.run(cell_inputs(1)).items()}
    attribute, method = VENDOR_CALLS[runtime.name]

    with monkeypatch.context() as patch:
        patch.setattr(session, attribute, Broken(getattr(session, attribute), method))
        with pytest.raises(EngineError, match="run cell: out of memory") as caught:
            session.run(cell_inputs(2))
    assert caught.value.code == Code.ENGINE_FAILED
    assert isinstance(caught.value.__cause__, RuntimeError)

    for name, values in session.run(cell_inputs(1)).items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("graph", [b"", b"not an ONNX graph", toy.encoder()[:200]])
def test_refuses_what_is_not_a_graph(runtime: Runtime, graph: bytes) -> None:
    with pytest.raises(EngineError, match="broken"):
        runtime.compile(graph, name="broken")


def test_reports_the_type_of_every_tensor(runtime: Runtime) -> None:
    if runtime.name in LIBRARIES:
        pytest.skip("TensorRT has no float64")
    graph = toy.graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        {"a": ["N", 2]},
        {"b": ["N", 2]},
        dtype=TensorProto.DOUBLE,
    )
    assert runtime.compile(graph, name="double").inputs["a"].dtype == "float64"


def test_warming_up_is_explicit_and_repeatable(encoder: Engine) -> None:
    warm_up(encoder)
    warm_up(encoder)
    assert encoder.session().run(zeros(encoder, 1))["logit"].shape == (1, 1)


def test_runs_with_every_thread_setting(make: MakeRuntime) -> None:
    for threads in (None, 1, os.cpu_count()):
        runtime = make(EngineOptions(precision="float32", threads=threads))
        engine = runtime.compile(toy.recurrence(4), name="cell")
        assert roll(engine.session(), 1, 2).shape == (2, 1, 2, 4, 4)


def test_memory_of_the_runtime_is_usable(runtime: Runtime, cell: Engine) -> None:
    memory = runtime.lane().empty((1, 2, 4, 4))
    assert memory.shape == (1, 2, 4, 4)
    assert memory.dtype == np.float32
    cell.session().run(cell_inputs(1), {"y": memory})
    assert np.isfinite(memory).all()
