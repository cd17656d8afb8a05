"""The executor on a fake engine that counts, and on the real ones."""

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import toy_bundles as toy
from fake_engine import FakeRuntime
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_infer.bundle import Bundle
from pe_infer.compiled import CompiledProgram
from pe_infer.engines.base import EngineOptions, installed, select
from pe_infer.engines.lane import HostLane, Tensor
from pe_infer.errors import Code, ConfigurationError, EngineError, StreamError
from pe_infer.executor import Executor, StudyOutputs, batches
from pe_infer.manifest import Direction

COUNT = 7


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def compiled(bundle: Bundle, runtime: FakeRuntime) -> CompiledProgram:
    return CompiledProgram.compile(bundle, runtime)


def in_order(arrival: Direction, count: int = COUNT, seed: int = 0) -> list[tuple[int, Tensor]]:
    slabs = toy.slabs(count, seed)
    return slabs if arrival == "up" else slabs[::-1]


def push_all(executor: Executor, slabs: Sequence[tuple[int, Tensor]], at_once: int = 1) -> None:
    for start in range(0, len(slabs), at_once):
        executor.push(slabs[start : start + at_once])


def run(compiled: CompiledProgram, arrival: Direction, at_once: int = 1) -> StudyOutputs:
    executor = compiled.executor(arrival)
    push_all(executor, in_order(arrival), at_once)
    return executor.finish()


def assert_same(found: StudyOutputs, expected: StudyOutputs, atol: float = 0.0) -> None:
    np.testing.assert_array_equal(found.positions_um, expected.positions_um)
    for a, b in ((found.slabs, expected.slabs), (found.study, expected.study)):
        assert a.keys() == b.keys()
        for name, values in a.items():
            np.testing.assert_allclose(values, b[name], rtol=0, atol=atol)


def test_arrival_does_not_change_a_bit(compiled: CompiledProgram) -> None:
    down, up = run(compiled, "down"), run(compiled, "up")

    assert_same(down, up)
    assert down.positions_um.tolist() == [5000 * i for i in range(COUNT)]
    assert down.study["study_logit"].shape == (1,)
    assert down.slabs["attention"].shape == (COUNT, 1, 4, 4)
    assert np.isfinite(down.study["study_logit"]).all()


def test_agrees_with_the_program_written_out_by_hand(
    compiled: CompiledProgram, bundle: Bundle
) -> None:
    graphs = {n.name: compiled.engines[n.name].session() for n in compiled.program.graph_nodes}
    slabs = toy.slabs(COUNT)
    gates, logits = [], []
    for _, slab in slabs:
        found = graphs["encoder"].run({"slab": slab[np.newaxis]})
        logits.append(float(found["logit"][0, 0]))
        gates.append(graphs["project_down"].run({"x": found["features"]})["y"].copy())

    def scan(name: str, xs: list[Tensor], initial: float) -> list[Tensor]:
        h, c = np.zeros((1, 2, 4, 4), np.float32), np.full((1, 2, 4, 4), initial, np.float32)
        ys = []
        for x in xs:
            found = {k: v.copy() for k, v in graphs[name].run({"x": x, "h": h, "c": c}).items()}
            h, c = found["h_next"], found["c_next"]
            ys.append(found["y"])
        return ys

    down = scan("down", gates[::-1], 0.0)[::-1]
    gates_up = [graphs["project_up"].run({"x": y})["y"].copy() for y in down]
    scores = [graphs["score"].run({"x": y})["logit"].copy() for y in scan("up", gates_up, 0.25)]

    outputs = run(compiled, "down")

    np.testing.assert_array_equal(outputs.slabs["slab_logit"][:, 0], np.float32(logits))
    np.testing.assert_allclose(outputs.study["study_logit"], np.mean(scores), rtol=1e-6)


@pytest.mark.parametrize("at_once", [2, 3, COUNT])
@pytest.mark.parametrize("arrival", ["down", "up"])
def test_pushing_several_at_once_changes_nothing(
    compiled: CompiledProgram, arrival: Direction, at_once: int
) -> None:
    assert_same(run(compiled, arrival, at_once), run(compiled, arrival))


@pytest.mark.parametrize("arrival", ["down", "up"])
def test_no_work_is_done_twice(
    compiled: CompiledProgram, runtime: FakeRuntime, arrival: Direction
) -> None:
    run(compiled, arrival)

    done: Counter[str] = Counter()
    for graph, batch in runtime.runs:
        done[graph] += batch
    graphs = {node.graph for node in compiled.program.graph_nodes}
    assert done == {f"toy/{graph}": COUNT for graph in graphs}


def test_online_work_is_done_by_push(compiled: CompiledProgram, runtime: FakeRuntime) -> None:
    executor = compiled.executor("down")
    slabs = in_order("down")
    for slab in slabs:
        runtime.runs.clear()
        executor.push([slab])
        assert [graph.partition("/")[2] for graph, _ in runtime.runs] == [
            f"{name}.onnx" for name in ("encoder", "project_down", "down", "project_up")
        ]
    runtime.runs.clear()
    executor.finish()
    assert {graph for graph, _ in runtime.runs} == {"toy/up.onnx", "toy/score.onnx"}


@pytest.mark.parametrize("arrival", ["down", "up"])
def test_maps_are_batched_and_the_values_are_the_same(
    bundle: Bundle, compiled: CompiledProgram, arrival: Direction
) -> None:
    runtime = FakeRuntime(EngineOptions(max_batch=4))
    batched = CompiledProgram.compile(bundle, runtime)

    found = run(batched, arrival, COUNT)

    assert_same(found, run(compiled, arrival), atol=1e-6)
    by_graph = {graph: [b for g, b in runtime.runs if g == graph] for graph, _ in runtime.runs}
    assert by_graph["toy/encoder.onnx"] == [4, 1, 1, 1]
    assert by_graph["toy/score.onnx"] == [4, 1, 1, 1]
    assert by_graph["toy/up.onnx"] == [1] * COUNT


def test_push_returns_the_online_outputs_of_the_new_slabs(compiled: CompiledProgram) -> None:
    executor = compiled.executor("down")
    slabs = in_order("down")

    first, rest = executor.push(slabs[:1]), executor.push(slabs[1:])
    outputs = executor.finish()

    assert first.keys() == {"slab_logit", "attention"}
    for name, values in outputs.slabs.items():
        np.testing.assert_array_equal(np.concatenate([first[name], rest[name]])[::-1], values)


def test_outputs_belong_to_the_caller(compiled: CompiledProgram) -> None:
    executor = compiled.executor("down")
    slabs = in_order("down")
    pushed = executor.push(slabs[:1])
    pushed["slab_logit"][:] = 99
    executor.push(slabs[1:])

    assert_same(executor.finish(), run(compiled, "down"))


def test_a_bidirectional_program_needs_both_ways(both_ways: Bundle, runtime: FakeRuntime) -> None:
    compiled = CompiledProgram.compile(both_ways, runtime)
    down, up = run(compiled, "down"), run(compiled, "up")

    assert_same(down, up)
    assert down.study == {}
    executor = compiled.executor("up")
    assert executor.push(in_order("up")[:1]).keys() == {"attention"}  # the logit needs all slabs


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_truncating_is_as_if_the_slabs_had_never_come(
    compiled_once: CompiledProgram, data: st.DataObject
) -> None:
    arrival: Direction = data.draw(st.sampled_from(["down", "up"]))
    slabs = in_order(arrival)
    executor = compiled_once.executor(arrival)
    wrong = in_order(arrival, seed=1)
    for _ in range(data.draw(st.integers(1, 3))):
        keep = data.draw(st.integers(0, executor.slab_count))
        executor.truncate(keep)
        stop = data.draw(st.integers(keep, COUNT))
        executor.push(slabs[keep:stop])  # right again from where it was right
        executor.push(wrong[stop : data.draw(st.integers(stop, COUNT))])
        executor.truncate(min(stop, executor.slab_count))
    executor.push(slabs[executor.slab_count :])

    assert_same(executor.finish(), run(compiled_once, arrival))


@pytest.fixture(scope="module")
def compiled_once(bundle: Bundle) -> CompiledProgram:
    return CompiledProgram.compile(bundle, FakeRuntime())


@pytest.mark.parametrize("slab_count", [-1, COUNT + 1])
def test_cannot_truncate_to_what_was_never_there(
    compiled: CompiledProgram, slab_count: int
) -> None:
    executor = compiled.executor("down")
    push_all(executor, in_order("down"))
    with pytest.raises(ConfigurationError, match=f"slab_count={slab_count}"):
        executor.truncate(slab_count)


@pytest.mark.parametrize("arrival", ["down", "up"])
def test_slabs_out_of_order_are_refused_and_change_nothing(
    compiled: CompiledProgram, arrival: Direction
) -> None:
    executor = compiled.executor(arrival)
    slabs = in_order(arrival)
    executor.push(slabs[:3])
    for bad in (slabs[2:4], slabs[1:2], slabs[4:2:-1]):
        with pytest.raises(ConfigurationError, match=f"arrival '{arrival}'"):
            executor.push(bad)
    push_all(executor, slabs[3:])
    assert_same(executor.finish(), run(compiled, arrival))


@pytest.mark.parametrize(
    "tensor", [np.zeros((1, 8, 8), np.float32), np.zeros((3, 8, 8)), np.zeros((3, 8), np.float32)]
)
def test_slabs_of_another_shape_or_type_are_refused(
    compiled: CompiledProgram, tensor: Tensor
) -> None:
    executor = compiled.executor("down")
    with pytest.raises(
        EngineError, match=r"slab at 0 um .* expected float32 \(3, 8, 8\)"
    ) as caught:
        executor.push([(0, tensor)])
    assert caught.value.code == Code.ENGINE_INPUT
    assert executor.slab_count == 0


@pytest.mark.parametrize("arrival", ["down", "up"])
@pytest.mark.parametrize("at", range(4))
def test_a_failed_push_leaves_the_executor_as_it_was(
    compiled: CompiledProgram, runtime: FakeRuntime, arrival: Direction, at: int
) -> None:
    slabs = in_order(arrival)
    executor = compiled.executor(arrival)
    executor.push(slabs[:2])
    seconds = dict(executor.seconds_by_node)
    runtime.fail_at(at)
    with pytest.raises(EngineError, match="made to fail"):
        executor.push(slabs[2:5])
    assert executor.slab_count == 2
    assert dict(executor.seconds_by_node) == seconds

    push_all(executor, slabs[2:])
    assert_same(executor.finish(), run(compiled, arrival))


@pytest.mark.parametrize("arrival", ["down", "up"])
@pytest.mark.parametrize("at", [0, COUNT - 1, COUNT + 2])
def test_a_failed_finish_can_be_repeated_or_the_study_continued(
    compiled: CompiledProgram, runtime: FakeRuntime, arrival: Direction, at: int
) -> None:
    expected = run(compiled, arrival)
    slabs = in_order(arrival)
    for pushed_before in (COUNT, COUNT - 1):
        executor = compiled.executor(arrival)
        push_all(executor, slabs[:pushed_before])
        runtime.fail_at(at)
        with pytest.raises(EngineError, match="made to fail"):
            executor.finish()
        push_all(executor, slabs[pushed_before:])
        assert_same(executor.finish(), expected)


def test_a_checkpoint_can_stop_any_step(compiled: CompiledProgram) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop() -> None:
        raise Stop

    executor = compiled.executor("down")
    slabs = in_order("down")
    with pytest.raises(Stop):
        executor.push(slabs, checkpoint=stop)
    assert executor.slab_count == 0
    calls: list[int] = []
    push_all(executor, slabs)
    with pytest.raises(Stop):
        executor.finish(checkpoint=stop)
    assert_same(executor.finish(checkpoint=lambda: calls.append(1)), run(compiled, "down"))
    assert len(calls) == 2 * COUNT  # every step of the deferred scan and every score


def test_a_finished_study_takes_nothing_more(compiled: CompiledProgram) -> None:
    executor = compiled.executor("down")
    push_all(executor, in_order("down"))
    executor.finish()
    for action in (executor.finish, lambda: executor.push([]), lambda: executor.truncate(0)):
        with pytest.raises(StreamError, match="finished") as caught:
            action()
        assert caught.value.code == Code.STREAM_CLOSED


def test_a_study_without_slabs_has_no_answer(compiled: CompiledProgram) -> None:
    with pytest.raises(ConfigurationError, match="no slab was pushed"):
        compiled.executor("down").finish()


def test_streams_do_not_see_each_other(compiled: CompiledProgram) -> None:
    expected = {arrival: run(compiled, arrival) for arrival in ("down", "up")}
    executors = {arrival: compiled.executor(arrival) for arrival in ("down", "up")}
    orders = {arrival: in_order(arrival) for arrival in ("down", "up")}
    for i in range(COUNT):
        for arrival, executor in executors.items():
            executor.push([orders[arrival][i]])
    for arrival, executor in executors.items():
        assert_same(executor.finish(), expected[arrival])


def test_sequences_are_freed_after_their_last_reader(
    compiled: CompiledProgram, runtime: FakeRuntime
) -> None:
    made: list[tuple[tuple[int, ...], weakref.ref[Tensor]]] = []

    class Tracked(HostLane):
        def empty(self, shape: tuple[int, ...]) -> Tensor:
            array = np.empty(shape, np.float32)
            made.append((shape, weakref.ref(array)))
            return array

    def alive(shape: tuple[int, ...]) -> int:
        return sum(1 for s, ref in made if s == shape and ref() is not None)

    executor = Executor(compiled.program, compiled.engines, arrival="up", lane=Tracked())
    push_all(executor, in_order("up"))
    assert not any(shape[1:] == (4, 4, 4) and shape[0] == COUNT for shape, _ in made)
    made.clear()
    hidden, gates, score = (COUNT, 2, 4, 4), (COUNT, 4, 4, 4), (COUNT, 1)
    seen: dict[str, tuple[int, ...]] = {}

    def look(name: str, _batch: int) -> None:
        seen[name] = (alive(hidden), alive(gates), alive(score))

    runtime.before_run = look
    gc.disable()  # by reference counts alone
    try:
        executor.finish()
        assert not any(ref() is not None for _, ref in made)
    finally:
        gc.enable()
    assert seen == {
        "toy/down.onnx": (1, 0, 0),
        "toy/project_up.onnx": (1, 0, 1),  # its output lives for one batch
        "toy/up.onnx": (1, 0, 1),  # and so does hidden_up
        "toy/score.onnx": (1, 0, 1),
    }


def test_online_sequences_that_nobody_needs_later_are_not_kept(
    compiled: CompiledProgram,
) -> None:
    made: list[int] = []

    class Counted(HostLane):
        def empty(self, shape: tuple[int, ...]) -> Tensor:
            if shape[1:] == (4, 4, 4) and shape[0] <= 1:  # features and gates_down: a batch each
                made.append(shape[0])
            return np.empty(shape, np.float32)

    executor = Executor(compiled.program, compiled.engines, arrival="down", lane=Counted())
    push_all(executor, in_order("down"))
    assert made.count(1) == 2


def test_time_is_accounted_to_nodes(compiled: CompiledProgram) -> None:
    executor = compiled.executor("down")
    push_all(executor, in_order("down"))
    executor.finish()
    assert set(executor.seconds_by_node) == {node.name for node in compiled.program.nodes}
    assert all(seconds > 0 for seconds in executor.seconds_by_node.values())


def test_more_slabs_than_were_first_made_room_for(compiled: CompiledProgram) -> None:
    count = 150
    found = []
    for arrival in ("down", "up"):
        executor = compiled.executor(arrival)
        push_all(executor, in_order(arrival, count))
        found.append(executor.finish())
    assert_same(found[0], found[1])
    assert len(found[0].positions_um) == count


def with_head(tmp_path: Path, reducer: str) -> Bundle:
    """The reduction moved before the last graph, which then runs once per study."""
    document, files = toy.pe_like()
    by_name = {node["name"]: node for node in document["nodes"]}
    by_name["study_logit"].update(
        reducer=reducer, inputs={"x": "hidden_up"}, outputs={"y": "pooled"}
    )
    by_name["score"].update(inputs={"x": "pooled"}, outputs={"logit": "study_logit"})
    return toy.build_bundle(tmp_path / reducer, document, files, toy.golden_slabs())


def test_a_graph_may_follow_the_reduction(
    tmp_path: Path, compiled: CompiledProgram, runtime: FakeRuntime
) -> None:
    after = CompiledProgram.compile(with_head(tmp_path, "mean"), runtime)
    runtime.runs.clear()

    found = run(after, "down")

    assert runtime.runs.count(("toy/score.onnx", 1)) == 1
    np.testing.assert_allclose(  # the mean and the dense layer commute
        found.study["study_logit"], run(compiled, "down").study["study_logit"], rtol=1e-5
    )


def test_the_maximum_is_another_reduction(tmp_path: Path, runtime: FakeRuntime) -> None:
    compiled = CompiledProgram.compile(with_head(tmp_path, "max"), runtime)
    assert_same(run(compiled, "down"), run(compiled, "up"))


def test_batches_are_cut_largest_first() -> None:
    assert list(batches(11, (1, 4))) == [(0, 4), (4, 8), (8, 9), (9, 10), (10, 11)]
    assert list(batches(3, (1,))) == [(0, 1), (1, 2), (2, 3)]
    assert list(batches(0, (1, 4))) == []


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("arrival", ["down", "up"])
def test_real_engines_agree_with_numpy(
    bundle: Bundle, compiled: CompiledProgram, name: str, arrival: Direction
) -> None:
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    options = EngineOptions(precision="float32", threads=1)
    real = CompiledProgram.compile(bundle, select(name, options))
    assert_same(run(real, arrival), run(compiled, arrival), atol=1e-5)
