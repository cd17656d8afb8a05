"""Health of the studies: an engine that hangs, one that fails for good, steps that take long."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deliveries import Clock
from node_bench import DEADLINE_S, Bench, make_files, until
from prometheus_client import Gauge
from toy_bundles import make

from pe_infer import Detector, dicom
from pe_infer.executor import Executor
from pe_infer.node.entries import Instance
from pe_infer.node.progress import Progress
from pe_infer.node.study import Study, Taken
from pe_infer.stream import Stream

METRIC = "pe_infer_node_step_seconds"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    folder = make(tmp_path_factory.mktemp("toy") / "bundle")
    with Detector(folder, engine="onnxruntime", precision="float32", cache_dir=None) as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path, detector: Detector) -> Iterator[Bench]:
    with Bench(tmp_path / "state", {"toy": detector}, studies={"stuck_s": 120.0}) as made:
        made.studies.start()
        yield made


def until_a_problem(bench: Bench) -> str:
    """A minute passes each time that somebody looks."""

    def found() -> bool:
        bench.clock.now += 60.0
        return bool(bench.studies.problems())

    until(found, what="a problem")
    (problem,) = bench.studies.problems()
    return problem


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is not set, no engine answers."""
    released = threading.Event()
    for owner, name in ((Executor, "push"), (Stream, "_conclude")):
        method = getattr(owner, name)

        def wait(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
            assert released.wait(DEADLINE_S)
            return _method(*args, **kwargs)

        monkeypatch.setattr(owner, name, wait)
    yield released
    released.set()


def test_an_engine_that_hangs_at_the_end_of_a_series_is_a_problem_until_it_goes_on(
    bench: Bench, tmp_path: Path, hung: threading.Event
) -> None:
    files = make_files(tmp_path)
    bench.send(*files, expected=len(files))
    problem = until_a_problem(bench)
    assert f"series {bench.watch.alias('1.2.3.1')}" in problem
    assert "longer than 120 s" in problem
    assert "1.2.3" not in problem.replace("studies", "")
    shown = bench.watch.registry.get_sample_value(METRIC)
    assert shown is not None
    assert shown > 120
    hung.set()
    bench.settle()
    until(lambda: bench.studies.problems() == [])
    until(lambda: bench.watch.registry.get_sample_value(METRIC) == 0)


def test_an_engine_that_hangs_while_slices_arrive_is_a_problem(
    bench: Bench, tmp_path: Path, hung: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same slice is offered again and again."""
    take = Study.take
    refused = 0

    def count(study: Study, instance: Instance) -> Taken:
        nonlocal refused
        if (taken := take(study, instance)) is Taken.BUSY:
            refused += 1
        return taken

    monkeypatch.setattr(Study, "take", count)
    bench.send(*make_files(tmp_path, positions_um=range(0, 300_000, 4000)))
    for minutes in range(3):
        seen = refused
        until(lambda seen=seen: refused >= seen + 2, what="two more offers")
        assert bench.studies.problems() == [], minutes
        bench.clock.now += 60.0
    bench.clock.now += 1.0
    (problem,) = bench.studies.problems()
    assert "longer than 120 s" in problem
    assert bench.waiting() > 0
    hung.set()
    bench.settle()
    until(lambda: bench.studies.problems() == [])


def test_a_series_whose_slices_are_slow_is_not_stuck(
    tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, problems = dicom.convert, []
    with Bench(tmp_path / "state", {"toy": detector}, studies={"quiet_s": 1e5}) as bench:

        def slowly(path: Path) -> dicom.Conversion:
            bench.clock.now += 100.0
            problems.extend(bench.studies.problems())
            return convert(path)

        monkeypatch.setattr(dicom, "convert", slowly)
        files = make_files(tmp_path)
        bench.send(*files, expected=len(files))
        bench.studies.start()
        bench.until_results(1)
    assert problems == []


@pytest.mark.usefixtures("hung")
def test_a_series_that_waits_for_slices_or_for_room_is_not_stuck(
    tmp_path: Path, detector: Detector
) -> None:
    told = {"limits": {"open_studies": 1}, "studies": {"quiet_s": 1000.0, "stuck_s": 1.0}}
    with Bench(tmp_path / "state", {"toy": detector}, **told) as bench:
        bench.studies.start()
        for number in (1, 2):
            bench.send(*make_files(tmp_path, number=number)[:2])
        until(lambda: bench.waiting() == 2)
        bench.clock.now += 100.0
        until(lambda: bench.studies.problems() == [])


def test_an_engine_that_fails_for_one_series_after_the_other_is_a_problem_until_it_works(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(number: int, **options: Any) -> str | None:
        files = make_files(tmp_path, number=number, **options)
        bench.send(*files, expected=len(files))
        bench.settle()
        return bench.results()[-1].verdict

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "push", lambda *_, **__: 1 / 0)
        assert judge(1) == "not_processed"
        assert bench.studies.problems() == []
        assert judge(2) == "not_processed"
    (problem,) = bench.studies.problems()
    assert "engine of bundle 'toy' has failed for 2 series or more" in problem
    assert judge(3, positions_um=[0, 50_000]) == "not_processed"  # slices are missing
    assert bench.studies.problems() == [problem]
    assert judge(4) != "not_processed"
    until(lambda: bench.studies.problems() == [])


# without studies


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    gauge = Gauge("step_seconds", "Longest step", registry=None)
    return Progress(100.0, clock, step_seconds=gauge, alias=str)


def test_many_steps_that_get_on_are_no_problem_however_long_they_take_together(
    progress: Progress, clock: Clock
) -> None:
    progress.begin(1)
    for _ in range(5):
        clock.now += 99.0
        progress.moved(1)
    assert progress.problems() == []


def test_a_step_that_is_tried_again_without_an_end_is_one_step(
    progress: Progress, clock: Clock
) -> None:
    for _ in range(2):
        progress.begin(1)
        clock.now += 51.0
    assert len(progress.problems()) == 1
    progress.end(1)
    progress.begin(1)
    assert progress.problems() == []


def test_a_series_that_an_engine_fails_for_again_and_again_is_one_series(
    progress: Progress,
) -> None:
    for _ in range(5):
        progress.failed(1, "toy")
    assert progress.problems() == []


def test_a_bundle_that_works_says_nothing_of_another_one(progress: Progress) -> None:
    for series_id in (1, 2):
        progress.failed(series_id, "toy")
    progress.judged("other")
    assert len(progress.problems()) == 1
    progress.judged("toy")
    assert progress.problems() == []
