"""Studies through the public API: order, concurrency, back-pressure, failure, refusals."""

import gc
import json
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import REGULAR, body, positions, study
from toy_bundles import make

from pe_infer import (
    Detector,
    EngineError,
    Flag,
    ScopeError,
    SeriesError,
    Slice,
    StreamCancelledError,
    StreamError,
    StreamTimeoutError,
    StudyResult,
    preprocess,
)
from pe_infer.dicom import write_series
from pe_infer.errors import Code
from pe_infer.executor import Executor
from pe_infer.preprocess import SliceResampler
from pe_infer.result import result_schema
from pe_infer.stream import MAX_PENDING_SLABS, Stream


def detector_of(folder: Path, **options: Any) -> Detector:
    return Detector(folder, precision="float32", cache_dir=None, **options)


@pytest.fixture(scope="session", params=["onnxruntime", "openvino"])
def detector(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Detector]:
    folder = make(tmp_path_factory.mktemp("toy") / "bundle")
    with detector_of(folder, engine=request.param) as made:
        yield made


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """A bundle with a gate and a minimum: an organ between -950 and -500 HU."""
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}
    folder = make(tmp_path_factory.mktemp("gated") / "bundle", grid={"gate": gate}, min_slabs=2)
    with detector_of(folder, engine="onnxruntime") as made:
        yield made


def streamed(detector: Detector, images: list[Slice]) -> StudyResult:
    with detector.open() as stream:
        for image in images:
            stream.push(image)
        return stream.finish(timeout=60)


def assert_same(a: StudyResult, b: StudyResult) -> None:
    assert a.probability == pytest.approx(b.probability, abs=1e-5)
    assert [e.position_mm for e in a.evidence] == [e.position_mm for e in b.evidence]
    for left, right in zip(a.evidence, b.evidence, strict=True):
        assert left.probability == pytest.approx(right.probability, abs=1e-5)
        assert left.sop_instance_uid == right.sop_instance_uid
        if left.attention is not None and right.attention is not None:
            np.testing.assert_allclose(left.attention.values, right.attention.values, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(positions(), st.randoms(use_true_random=False))
def test_streaming_in_any_order_equals_the_whole_study(
    detector: Detector, where: list[int], shuffle: random.Random
) -> None:
    images = study(where)
    if not (where[-1] // 2500 - -(-where[0] // 2500)) >= 8:
        return  # too short for a slab at every phase
    whole = detector.detect(images)
    for order in (images, images[::-1], shuffle.sample(images, len(images))):
        assert_same(streamed(detector, order), whole)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(positions(), st.randoms(use_true_random=False))
def test_slabs_of_a_stream_have_the_same_bits_in_any_order(
    gated: Detector, where: list[int], shuffle: random.Random
) -> None:
    images = study(where)
    grid = replace(gated.bundle.manifest.grid, gate=None)
    expected = {slab.position_um: slab.tensor for slab in preprocess.slabs(images, grid)}
    if len(expected) < 2:
        return
    made: dict[int, Any] = {}
    slab_of = preprocess.Volume.slab

    def recorded(volume: preprocess.Volume, centre_um: int, lattice: Any) -> preprocess.Slab:
        slab = slab_of(volume, centre_um, lattice)
        made[centre_um] = slab.tensor  # what is made anew takes the place of what was dropped
        return slab

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess.Volume, "slab", recorded)
        for order in (images, images[::-1], shuffle.sample(images, len(images))):
            made.clear()
            streamed(gated, order)
            assert made.keys() == expected.keys()
            for position, tensor in made.items():
                np.testing.assert_array_equal(tensor, expected[position])


def test_interleaved_streams_equal_separate_ones(detector: Detector) -> None:
    studies = [study(REGULAR, seed=seed) for seed in range(4)]
    separate = [streamed(detector, images) for images in studies]
    streams = [detector.open() for _ in studies]
    for images in zip(*studies, strict=True):
        for stream, image in zip(streams, images, strict=True):
            stream.push(image)
    for stream, expected in zip(streams, separate, strict=True):
        assert_same(stream.finish(timeout=60), expected)


def test_streams_in_threads_equal_separate_ones(detector: Detector) -> None:
    studies = [study(REGULAR, seed=seed) for seed in range(4)]
    separate = [streamed(detector, images) for images in studies]
    found: dict[int, StudyResult] = {}

    def run(index: int) -> None:
        found[index] = streamed(detector, studies[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, expected in enumerate(separate):
        assert_same(found[index], expected)


def test_updates_come_while_slices_arrive_and_cover_every_slab(detector: Detector) -> None:
    updates = []
    with detector.open() as stream:
        for image in study(REGULAR)[::-1]:
            updates += stream.push(image)
            time.sleep(0.001)
        early = len(updates)
        result = stream.finish(timeout=60)
        updates += stream.updates()
    assert early > 0
    assert [u.position_mm for u in updates] == [e.position_mm for e in result.evidence][::-1]
    assert [u.slabs for u in updates] == list(range(1, len(updates) + 1))
    running = [u.running_maximum for u in updates]
    assert running == sorted(running)
    assert running[-1] == max(e.probability for e in result.evidence)


def test_the_result_validates_against_its_schema_and_pins_its_keys(detector: Detector) -> None:
    result = detector.detect(study(REGULAR))
    document = json.loads(result.to_json())
    jsonschema.validate(document, result_schema())
    assert {"probability", "positive", "evidence", "quality", "provenance"} <= document.keys()
    assert document["positive"] == (document["probability"] >= 0.5)
    assert document["provenance"]["bundle_hash"] == detector.bundle.sha256
    assert set(document["provenance"]["precision"].values()) == {"float32"}
    bare = json.loads(result.to_json(attention_maps=False))
    assert bare["evidence"][0]["attention"]["values"] == []
    assert bare["evidence"][0]["attention"]["peak"] == document["evidence"][0]["attention"]["peak"]


def test_attention_is_placed_in_the_patient(detector: Detector) -> None:
    """The map covers the plane: corner cells lie half a cell inside its corners."""
    images = study(REGULAR, tilt=0.2)
    attention = detector.detect(images).evidence[3].attention
    affine = np.array(attention.patient_affine)
    rows, cols = attention.values.shape
    grid = detector.bundle.manifest.grid
    centre = affine @ [(cols - 1) / 2, (rows - 1) / 2, 0, 1]
    position = detector.detect(images).evidence[3].position_mm
    expected = images[0].geometry.centre_mm
    np.testing.assert_allclose(
        centre[:3], [expected[0], expected[1] + 0.2 * position, position], atol=1e-6
    )
    corner = affine @ [-0.5, -0.5, 0, 1]
    np.testing.assert_allclose(
        (centre - corner)[:2], [grid.cols * grid.spacing_mm / 2, grid.rows * grid.spacing_mm / 2]
    )
    row, col = np.unravel_index(np.argmax(attention.values), attention.values.shape)
    np.testing.assert_allclose(attention.peak_mm, (affine @ [col, row, 0, 1])[:3])
    assert attention.peak == attention.values.max()


def test_a_gated_slab_does_not_exist_for_the_network(gated: Detector) -> None:
    result = gated.detect(body(study(REGULAR), range(30_000, 70_001)))
    gates = {e.position_mm: e.gated for e in result.evidence}
    assert gates[50.0] is False
    assert gates[10.0] is True
    assert all(
        (e.probability is None) == e.gated and (e.attention is None) == e.gated
        for e in result.evidence
    )
    assert result.coverage.complete
    assert Flag.INCOMPLETE_COVERAGE not in {q.flag for q in result.quality}
    only = gated.detect(body(study(list(range(24_000, 76_000, 1000))), range(30_000, 70_001)))
    assert only.probability == pytest.approx(result.probability, abs=1e-6)


def test_a_study_without_the_organ_is_not_processed_and_never_negative(gated: Detector) -> None:
    for organ in (range(0), range(50_000, 52_001)):  # none, or less than min_slabs
        result = gated.detect(body(study(REGULAR), organ))
        assert result.status == "not_processed"
        assert result.positive is None
        assert result.probability is None
        assert result.not_processed.code == "gate.no_organ"
        jsonschema.validate(json.loads(result.to_json()), result_schema())


def test_coverage_is_incomplete_where_the_organ_reaches_the_end_of_the_scan(
    gated: Detector,
) -> None:
    result = gated.detect(body(study(REGULAR), range(50_000, 200_000)))
    assert not result.coverage.complete
    assert Flag.INCOMPLETE_COVERAGE in {q.flag for q in result.quality}


def test_too_few_slabs_are_refused_and_the_stream_stays_open(gated: Detector) -> None:
    images = body(study(REGULAR), range(200_000))
    with gated.open() as stream:
        for image in images[:8]:
            stream.push(image)
        with pytest.raises(SeriesError, match="at least 2") as caught:
            stream.finish()
        assert caught.value.code is Code.TOO_FEW_SLABS
        for image in images[8:]:
            stream.push(image)
        assert stream.finish(timeout=60).status == "processed"


def test_a_missing_slice_is_asked_for_and_can_still_come(detector: Detector) -> None:
    images = study(list(range(0, 100_000, 5000)))
    with detector.open() as stream:
        for image in [*images[:9], *images[11:]]:
            stream.push(image)
        with pytest.raises(SeriesError, match="missing") as caught:
            stream.finish()
        assert caught.value.code is Code.GAP
        for image in images[9:11]:
            stream.push(image)
        late = stream.finish(timeout=60)
    assert_same(late, detector.detect(images))


def test_late_slices_are_counted(detector: Detector) -> None:
    images = study([*REGULAR, 20_500])
    with detector.open() as stream:
        updates = [update for image in images[:60] for update in stream.push(image)]
        while not any(update.position_mm >= 25 for update in updates):
            time.sleep(0.01)
            updates += stream.updates()
        for image in [images[100], *images[60:100]]:
            stream.push(image)
        late = stream.finish(timeout=60)
    assert_same(late, detector.detect(images))
    assert late.timings.recomputed_slabs > 0
    assert Flag.OUT_OF_ORDER in {q.flag for q in late.quality}


def test_a_refused_slice_changes_nothing(detector: Detector) -> None:
    images = study(REGULAR)
    foreign = replace(images[50], series=replace(images[50].series, series_instance_uid="9"))
    with detector.open() as stream:
        for image in images[:50]:
            stream.push(image)
        with pytest.raises(SeriesError):
            stream.push(foreign)
        for image in images[50:]:
            stream.push(image)
        assert_same(stream.finish(timeout=60), detector.detect(images))


def test_a_series_outside_the_scope_is_refused(detector: Detector) -> None:
    head = [replace(i, series=replace(i.series, body_part_examined="HEAD")) for i in study(REGULAR)]
    with detector.open() as stream, pytest.raises(ScopeError, match="BodyPartExamined is 'HEAD'"):
        stream.push(head[0])
    chest = [
        replace(i, series=replace(i.series, body_part_examined="Chest")) for i in study(REGULAR)
    ]
    assert Flag.SCOPE_UNCONFIRMED not in {q.flag for q in detector.detect(chest).quality}
    assert Flag.SCOPE_UNCONFIRMED in {q.flag for q in detector.detect(study(REGULAR)).quality}


class Blocked:
    """Holds the worker inside `Executor.push` until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        push = Executor.push

        def slow(executor: Executor, *args: Any, **kwargs: Any) -> Any:
            self.entered.set()
            assert self.released.wait(30)
            return push(executor, *args, **kwargs)

        monkeypatch.setattr(Executor, "push", slow)


def test_push_waits_when_the_worker_is_behind(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked(monkeypatch)
    images = study(list(range(0, 400_000, 1000)))
    with detector.open() as stream:
        taken = 0
        with pytest.raises(StreamTimeoutError, match="not taken"):
            for image in images:
                stream.push(image, timeout=0.05)
                taken += 1
        assert 5 * MAX_PENDING_SLABS <= taken < len(images)
        assert len(stream._pending) + stream._working <= MAX_PENDING_SLABS + 1
        with pytest.raises(StreamTimeoutError):
            stream.finish(timeout=0.01)
        blocked.released.set()
        # The refused finish has ended the study: what was pushed is what is judged.
        result = stream.finish(timeout=60)
    assert_same(result, detector.detect(images[:taken]))


def test_a_late_slice_waits_for_the_slabs_it_changes_or_is_not_taken(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = study([*REGULAR, 5_500])
    blocked = Blocked(monkeypatch)
    with detector.open() as stream:
        for image in images[:40]:
            stream.push(image)
        assert blocked.entered.wait(10)
        with pytest.raises(StreamTimeoutError, match="came late"):
            stream.push(images[100], timeout=0.05)
        blocked.released.set()
        for image in images[40:]:
            stream.push(image)
        late = stream.finish(timeout=60)
    assert_same(late, detector.detect(images))
    assert late.timings.recomputed_slabs > 0


def test_every_thread_that_finishes_a_study_gets_its_result(detector: Detector) -> None:
    found: list[StudyResult] = []
    with detector.open() as stream:
        for image in study(REGULAR):
            stream.push(image)
        stream._pushing.acquire()  # both are past the first look when the turn comes
        threads = [
            threading.Thread(target=lambda: found.append(stream.finish(timeout=60)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        stream._pushing.release()
        for thread in threads:
            thread.join(60)
    assert len(found) == 2
    assert found[0] is found[1]


def test_a_study_cancelled_during_a_push_takes_nothing(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = detector.open()

    class CancelledMeanwhile(SliceResampler):
        def __call__(self, image: Slice, out: Any = None) -> Any:
            stream.cancel()
            return super().__call__(image, out)

    resample = CancelledMeanwhile(detector.bundle.manifest.grid)
    monkeypatch.setattr(stream, "_resample", resample)
    with pytest.raises(StreamCancelledError):
        stream.push(study(REGULAR)[0])
    assert not stream._volume.positions_um


@pytest.mark.parametrize(("method", "output"), [("push", "slab_logit"), ("finish", "study_logit")])
def test_what_is_not_a_number_is_an_error_and_never_a_negative(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, method: str, output: str
) -> None:
    original = getattr(Executor, method)

    def broken(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        found = original(executor, *args, **kwargs)
        (found if method == "push" else found.study)[output][...] = np.nan
        return found

    monkeypatch.setattr(Executor, method, broken)
    with pytest.raises(EngineError, match=f"{output}.* not finite"):
        detector.detect(study(REGULAR))


def test_a_failed_study_lets_go_of_its_memory_and_remembers_why(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Executor, "push", fail)
    images = study(REGULAR)
    with (
        pytest.raises(EngineError, match="ZeroDivisionError") as first,
        detector.open() as stream,
    ):
        for image in images:
            stream.push(image)
        stream.finish(timeout=60)
    assert not stream._volume.positions_um
    assert stream._executor is None
    with pytest.raises(EngineError, match="ZeroDivisionError") as again:  # though cancelled on exit
        stream.push(images[0])
    assert again.value is not first.value  # each caller has a traceback of its own


def test_a_detector_lives_as_long_as_its_streams_and_its_worker_no_longer(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    made = detector_of(make(tmp_path / "b"), engine="onnxruntime")
    (worker,) = (t for t in set(threading.enumerate()) - before if t.name == "pe_infer worker")
    stream = made.open()
    del made
    gc.collect()
    for image in study(REGULAR):
        stream.push(image)
    assert stream.finish(timeout=60).status == "processed"
    del stream
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


def test_python_ends_cleanly_while_a_study_is_open(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from strategies import REGULAR, study
from pe_infer import Detector
stream = Detector({str(folder)!r}, engine="onnxruntime", cache_dir=None).open()
for image in study(REGULAR):
    stream.push(image)
raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_cancel_ends_a_study_at_once(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(monkeypatch)
    stream = detector.open()
    for image in study(REGULAR[:40]):
        stream.push(image)
    assert blocked.entered.wait(10)
    stream.cancel()
    with pytest.raises(StreamCancelledError):
        stream.push(study(REGULAR)[41])
    with pytest.raises(StreamCancelledError):
        stream.finish()
    blocked.released.set()
    assert_same(detector.detect(study(REGULAR)), detector.detect(study(REGULAR)))


def test_leaving_the_block_cancels_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    made = detector_of(make(tmp_path / "b"), engine="onnxruntime")
    with made.open() as stream:
        stream.push(study(REGULAR)[0])
    with pytest.raises(StreamCancelledError):
        stream.finish()
    open_stream = made.open()
    made.close()
    made.close()
    with pytest.raises(StreamCancelledError):
        open_stream.push(study(REGULAR)[0])
    with pytest.raises(StreamError, match="closed"):
        made.open()


def test_a_failing_engine_ends_its_study_and_no_other(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = study(REGULAR)
    healthy = detector.open()
    for image in images[:50]:
        healthy.push(image)
    expected = detector.detect(images)
    push, victims = Executor.push, []

    def fail(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        if not victims or executor is victims[0]:
            victims[:1] = [executor]
            raise EngineError("the engine broke")
        return push(executor, *args, **kwargs)

    time.sleep(0.3)  # the healthy study's executor must have been made and used before
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="broke"):
        patch.setattr(Executor, "push", fail)
        streamed(detector, images)
    for image in images[50:]:
        healthy.push(image)
    assert_same(healthy.finish(timeout=60), expected)


def test_a_finished_study_takes_no_more_slices_and_keeps_its_result(detector: Detector) -> None:
    stream = detector.open()
    for image in study(REGULAR):
        stream.push(image)
    result = stream.finish(timeout=60)
    assert stream.finish() is result
    with pytest.raises(StreamError, match="finished"):
        stream.push(study(REGULAR)[0])
    stream.cancel()
    assert stream.finish() is result


@pytest.mark.parametrize(
    ("extent_um", "step_um"),
    [(400_000, 1000), (60_000, 1000), (200_000, 10_000)],  # long; short; fewer slices than slabs
)
def test_memory_of_a_stream_stays_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extent_um: int, step_um: int
) -> None:
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    calls, sizes = 0, []

    def held() -> int:
        traces = tracemalloc.take_snapshot().filter_traces([arrays])
        return sum(statistic.size for statistic in traces.statistics("filename"))

    def sampled(_: Stream) -> None:  # before every run of an engine
        nonlocal calls
        calls += 1
        if calls % 23 == 0:
            sizes.append(held())

    monkeypatch.setattr(Stream, "_stop_if_cancelled", sampled)
    with detector_of(make(tmp_path / "b"), engine="onnxruntime") as detector:
        images = study(list(range(0, extent_um + 1, step_um)))
        bound = detector.memory_bound_bytes(slices=len(images), extent_mm=extent_um / 1000)
        for order in (images, images[::-1]):
            tracemalloc.start()
            with detector.open() as stream:
                for image in order:
                    stream.push(image)
                result = stream.finish(timeout=60)
            kept = sum(e.attention.values.nbytes for e in result.evidence)
            assert held() <= kept + 10_000  # the attention maps are in the result
            tracemalloc.stop()
            assert max(sizes) <= bound
            assert max(sizes) >= bound / 10  # and the bound says something
            sizes.clear()


def test_reading_a_folder_equals_passing_its_slices(tmp_path: Path, detector: Detector) -> None:
    images = study(REGULAR)
    write_series(images, tmp_path / "series")
    counted: list[tuple[int, int]] = []
    from_files = detector.detect(
        tmp_path / "series", on_slice=lambda n, total: counted.append((n, total))
    )
    assert from_files.probability == pytest.approx(detector.detect(images).probability, abs=1e-6)
    assert counted[-1] == (100, 100)
