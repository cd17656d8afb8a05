"""Engines and sessions on stand-ins for TensorRT and the GPU, whose queue runs late."""

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
import toy_bundles as toy
from fake_tensorrt import FakeTensorRt
from onnx import helper

from pe_infer.engine_manifest import EngineEntry, ShapeRange
from pe_infer.engines.base import Engine, EngineOptions, select, warm_up, zeros
from pe_infer.engines.lane import HostLane, Lane, Tensor
from pe_infer.engines.tensorrt import TensorRtRuntime, batches_up_to
from pe_infer.errors import Code, EngineError

FLOAT32 = EngineOptions(precision="float32")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeGpu:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def trt(gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    library = FakeTensorRt("1.7.1.116", "tensorrt_rtx")
    library.queue = gpu.enqueue
    return fake_tensorrt.install(monkeypatch, library)


@pytest.fixture
def runtime(trt: FakeTensorRt) -> TensorRtRuntime:
    chosen = select("tensorrt-rtx", FLOAT32)
    assert isinstance(chosen, TensorRtRuntime)
    return chosen


def shared(inputs: Mapping[str, Tensor], lane: Lane) -> dict[str, Tensor]:
    there = {name: lane.empty(array.shape) for name, array in inputs.items()}
    for name, array in inputs.items():
        lane.copy(array, there[name])
    return there


def random_slabs(count: int) -> Tensor:
    return np.random.default_rng(0).random((count, toy.PLANES, toy.SIDE, toy.SIDE), np.float32)


def expected_logits(slabs: Tensor) -> Tensor:
    engine = select("onnxruntime", FLOAT32).compile(toy.encoder(), name="encoder")
    session = engine.session()
    found = [session.run({"slab": slab[np.newaxis]})["logit"].copy() for slab in slabs]
    return np.concatenate(found)


def encoder_of(runtime: TensorRtRuntime, max_batch: int = 4) -> Engine:
    return runtime.compile(toy.encoder(), name="encoder", max_batch=max_batch)


def test_a_run_waits_for_nothing_and_allocates_nothing(
    runtime: TensorRtRuntime, gpu: fake_cuda.FakeGpu
) -> None:
    engine, lane = encoder_of(runtime), runtime.lane()
    session = engine.session(lane)
    slabs = random_slabs(4)
    inputs = shared({"slab": slabs}, lane)
    out = shared({"logit": np.zeros((4, 1), np.float32)}, lane)
    session.run(inputs, out)  # the outputs that are not given get their buffers
    waits, allocations = gpu.waits, gpu.allocations

    for _ in range(10):
        session.run(inputs, out)
    assert (gpu.waits, gpu.allocations) == (waits, allocations)

    (logits,) = lane.fetch([out["logit"]])
    np.testing.assert_allclose(logits, expected_logits(slabs), atol=1e-6)
    assert gpu.waits == waits + 1


def test_rows_at_any_address_are_taken(runtime: TensorRtRuntime) -> None:
    """One logit is four bytes; TensorRT takes multiples of 256."""
    engine, lane = encoder_of(runtime), runtime.lane()
    session = engine.session(lane)
    slabs = random_slabs(4)
    there = shared({"slab": slabs}, lane)["slab"]
    logits = lane.empty((4, 1))
    for row in range(4):
        session.run({"slab": there[row : row + 1]}, {"logit": logits[row : row + 1]})
    np.testing.assert_allclose(lane.fetch([logits])[0], expected_logits(slabs), atol=1e-6)

    doubled = runtime.compile(  # and as an input
        toy.graph([helper.make_node("Add", ["a", "a"], ["b"])], {"a": ["N", 1]}, {"b": ["N", 1]}),
        name="double",
    ).session(lane)
    for row in range(4):
        doubled.run({"a": logits[row : row + 1]}, {"b": logits[row : row + 1]})
    np.testing.assert_allclose(lane.fetch([logits])[0], 2 * expected_logits(slabs), atol=1e-6)


def test_shapes_are_set_only_when_the_batch_changes(
    runtime: TensorRtRuntime, trt: FakeTensorRt
) -> None:
    engine, lane = encoder_of(runtime), runtime.lane()
    session = engine.session(lane)
    for batch in (1, 1, 4, 4, 4, 1):
        session.run(zeros(engine, batch, lane))
    (context,) = trt.contexts
    assert context.shapes_set == 3


def test_batches_are_powers_of_two_and_the_largest(runtime: TensorRtRuntime) -> None:
    assert [batches_up_to(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]
    assert encoder_of(runtime).batch_sizes == (1, 2, 4)
    assert runtime.compile(toy.recurrence(4), name="cell").batch_sizes == (1,)


def test_warming_up_runs_every_batch_size_once(runtime: TensorRtRuntime, trt: FakeTensorRt) -> None:
    warm_up(encoder_of(runtime), lane := runtime.lane())
    assert lane.stream is not None
    assert [context.handles for context in trt.contexts] == [[lane.stream.handle] * 3]


def test_a_context_is_handed_on_and_the_gpu_waits_for_its_last_work(
    runtime: TensorRtRuntime, trt: FakeTensorRt, gpu: fake_cuda.FakeGpu
) -> None:
    engine = encoder_of(runtime)
    slabs = random_slabs(1)
    first, second = runtime.lane(), runtime.lane()
    waits = gpu.waits
    session = engine.session(first)
    early = session.run(shared({"slab": slabs}, first))["logit"]
    del session
    later = engine.session(second).run(shared({"slab": slabs}, second))["logit"]
    assert len(trt.contexts) == 1
    assert gpu.waits == waits  # of the host
    (found,) = second.fetch([later])
    np.testing.assert_allclose(found, expected_logits(slabs), atol=1e-6)
    np.testing.assert_array_equal(first.fetch([early])[0], found)


def test_sessions_at_the_same_time_have_contexts_of_their_own(
    runtime: TensorRtRuntime, trt: FakeTensorRt
) -> None:
    engine = encoder_of(runtime)
    lanes = [runtime.lane() for _ in range(2)]
    sessions = [engine.session(lane) for lane in lanes]
    assert len(trt.contexts) == len(sessions)
    caches = {id(context.config.cache) for context in trt.contexts if context.config}
    assert len(caches) == 1  # what one compiles, all use
    assert {c.config.dynamic_shapes_kernel_specialization_strategy for c in trt.contexts} == {
        "EAGER"
    }


def test_tensorrt_itself_compiles_nothing_at_load(
    gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_tensorrt.install(monkeypatch, FakeTensorRt("10.3.0.26"), "8.7")
    engine = select("tensorrt", FLOAT32).compile(toy.encoder(), name="encoder")
    engine.session()
    assert [context.config for context in library.contexts] == [None]


def test_an_array_of_the_host_is_refused(runtime: TensorRtRuntime) -> None:
    engine, lane = encoder_of(runtime), runtime.lane()
    session = engine.session(lane)
    for inputs, out in (
        ({"slab": random_slabs(1)}, {}),
        (zeros(engine, 1, lane), {"logit": np.zeros((1, 1), np.float32)}),
    ):
        with pytest.raises(EngineError, match="does not lie in device memory") as caught:
            session.run(inputs, out)
        assert caught.value.code == Code.ENGINE_INPUT
    with pytest.raises(EngineError, match="lane of the host"):
        engine.session(HostLane())


@pytest.mark.parametrize("fail", ["cudaErrorLaunchFailure", "raise"])
def test_a_run_that_fails_says_what_the_library_logged(
    runtime: TensorRtRuntime, trt: FakeTensorRt, fail: str
) -> None:
    engine, lane = encoder_of(runtime), runtime.lane()
    session = engine.session(lane)
    trt.fail = fail
    said = "out of memory" if fail == "raise" else fail
    with pytest.raises(EngineError, match=f"tensorrt-rtx .* failed to run encoder: {said}") as e:
        session.run(zeros(engine, 1, lane))
    assert e.value.code == Code.ENGINE_FAILED
    trt.fail = ""
    session.run(zeros(engine, 1, lane))


def test_no_room_for_a_context_is_an_error(
    runtime: TensorRtRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = encoder_of(runtime)
    monkeypatch.setattr(fake_tensorrt.Engine, "create_execution_context", lambda *_: None)
    monkeypatch.setattr(engine, "_create", lambda: None)
    with pytest.raises(EngineError, match="failed to create a context of encoder"):
        engine.session()


def test_the_type_of_arithmetic_follows_node_and_options(trt: FakeTensorRt) -> None:
    chosen = select("tensorrt-rtx")
    assert chosen.compile(toy.encoder(), name="e", precision="reduced").precision == "float16"
    assert chosen.compile(toy.recurrence(4), name="c", precision="mixed").precision == "float16"
    assert chosen.compile(toy.encoder(), name="e", precision="float32").precision == "float32"
    exact = select("tensorrt-rtx", FLOAT32)
    assert exact.compile(toy.encoder(), name="e", precision="reduced").precision == "float32"


def entry_of(data: bytes, **changes: Any) -> EngineEntry:
    slab = (toy.PLANES, toy.SIDE, toy.SIDE)
    values: dict[str, Any] = {
        "file": "encoder-0123456789ab.engine",
        "sha256": "0" * 64,
        "bytes": len(data),
        "graph": "encoder.onnx",
        "graph_sha256": "0" * 64,
        "precision": "reduced",
        "max_batch": 4,
        "inputs": {"slab": ShapeRange(min=(1, *slab), best=(4, *slab), max=(4, *slab))},
        "outputs": {"features": (4, 4, 4, 4), "attention": (4, 1, 4, 4), "logit": (4, 1)},
    }
    return EngineEntry(**{**values, **changes})


def plan_of(runtime: TensorRtRuntime, trt: FakeTensorRt) -> bytes:
    plans: list[bytes] = []
    deserialise: Callable[..., Any] = fake_tensorrt.Runtime.deserialize_cuda_engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fake_tensorrt.Runtime,
            "deserialize_cuda_engine",
            lambda self, plan: plans.append(plan) or deserialise(self, plan),
        )
        encoder_of(runtime)
    return plans[0]


def test_an_engine_is_what_its_manifest_says(runtime: TensorRtRuntime, trt: FakeTensorRt) -> None:
    data = plan_of(runtime, trt)
    loaded = runtime.load(data, entry_of(data), name="encoder", reduced=True)
    assert (loaded.batch_sizes, loaded.precision) == ((1, 2, 4), "float16")
    assert runtime.load(data, entry_of(data), name="e", reduced=False).precision == "float32"
    for wrong in (
        {"outputs": {"features": (4, 4, 4, 4), "attention": (4, 1, 4, 4), "logit": (4, 2)}},
        {"outputs": {"logit": (4, 1)}},
        {"max_batch": 8},
    ):
        with pytest.raises(EngineError, match="build it again") as caught:
            runtime.load(data, entry_of(data, **wrong), name="encoder", reduced=True)
        assert caught.value.code == Code.ENGINE_UNTRUSTED


def test_what_is_no_engine_is_refused_with_the_librarys_words(
    runtime: TensorRtRuntime, trt: FakeTensorRt
) -> None:
    with pytest.raises(EngineError, match=r"failed to load e: .*magic tag does not match"):
        runtime.load(b"junk", entry_of(b"junk"), name="e", reduced=True)


def test_the_engines_own_options_limit_batches(trt: FakeTensorRt) -> None:
    chosen = select("tensorrt-rtx", EngineOptions(precision="float32", max_batch=2))
    assert encoder_of(chosen).batch_sizes == (1, 2)


def test_without_cupy_or_the_library_the_extra_is_named(
    trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(EngineError, match=r"needs cupy, .* 'pe-infer\[tensorrt-rtx\]'") as caught:
        select("tensorrt-rtx")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"needs tensorrt and cupy, .* 'pe-infer\[tensorrt\]'"):
        select("tensorrt")


def test_without_a_gpu_it_says_so(
    trt: FakeTensorRt, gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.remove()
    with pytest.raises(EngineError, match="no GPU") as caught:
        select("tensorrt-rtx")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE
    assert caught.value.exit_code == 6


def test_nothing_is_kept_of_a_study_but_its_context(
    runtime: TensorRtRuntime, trt: FakeTensorRt
) -> None:
    engine = encoder_of(runtime)
    for _ in range(5):
        lane = runtime.lane()
        session = engine.session(lane)
        session.run(zeros(engine, 2, lane))
        del session, lane
    gc.collect()
    assert len(trt.contexts) == 1
