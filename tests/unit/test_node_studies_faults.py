"""The node's studies when it is killed, stopped, has no disk left or a slow engine."""

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from dicom_files import changed, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_bench import DEADLINE_S, Bench, FakeObjects, alerting, make_files, until

from pe_infer import Detector
from pe_infer.dicom.results.envelope import write_bytes
from pe_infer.errors import Code, NodeError
from pe_infer.executor import Executor
from pe_infer.node.capacity import RESULT_BYTES
from pe_infer.node.ledger import Ledger
from pe_infer.node.parcels import Packer
from pe_infer.stream import Stream


class KilledError(BaseException):
    """Nothing catches this."""


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """Alerts at the first slab, and finds everything negative."""
    with alerting(tmp_path_factory.mktemp("toy"), threshold=1.0) as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path, detector: Detector) -> Iterator[Bench]:
    with Bench(tmp_path / "state", {"toy": detector}) as made:
        yield made


Patch = Callable[[pytest.MonkeyPatch], None]


def killing(owner: type, name: str, *, after: int = 0, done: bool = False) -> Patch:
    """Kill the thread in its n-th call of a method, before it is done or thereafter."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        method, calls = getattr(owner, name), iter(range(10**6))

        def die(*args: Any, **kwargs: Any) -> Any:
            if next(calls) < after:
                return method(*args, **kwargs)
            if done:
                method(*args, **kwargs)
            raise KilledError

        patch.setattr(owner, name, die)

    return apply


MOMENTS = {
    "before routing": killing(Ledger, "route"),
    "routed": killing(Ledger, "route", done=True),
    "half pushed": killing(Stream, "push_slices", after=8),
    "alert made": killing(Ledger, "alert"),
    "alert entered": killing(Ledger, "alert", done=True),
    "finished": killing(Packer, "withdrawal"),
    "withdrawal made": killing(Packer, "withdrawal", done=True),
    "parcel made": killing(Ledger, "conclude"),
    "entered": killing(Ledger, "conclude", done=True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_node_that_is_killed_goes_on_and_says_the_same_once(
    bench: Bench,
    detector: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    files = make_files(tmp_path)
    expected = detector.detect(files)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as patch:
        MOMENTS[moment](patch)
        bench.studies.start()
        bench.send(*files[:10])

        def killed() -> bool:
            bench.clock.now += 0.1
            return not bench.studies.healthy

        until(lambda: bench.waiting() == 0 or not bench.studies.healthy)
        bench.send(*files[10:])
        until(killed, what="the kill")
        bench.studies.stop(DEADLINE_S)
    bench.new_studies().start()
    bench.settle()
    (result,) = bench.results()
    assert (result.version, result.verdict) == (1, "negative")
    assert bench.document(result)["result"]["probability"] == expected.probability
    assert sum(made.kind == "alert" for made in bench.parcels()) <= 1
    kinds = [made.kind for made in bench.parcels()]
    assert ("alert" in kinds) == ("withdrawal" in kinds)
    on_disk = {path.name for path in bench.parcels_folder.iterdir()}
    assert on_disk == {made.folder for made in bench.parcels()}
    assert bench.waiting() == 0


def test_the_second_making_of_a_parcel_gives_the_same_identities(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    conclude, seen = Ledger.conclude, []

    def die_once(ledger: Ledger, series_id: int, **fields: Any) -> Any:
        folder = fields["folder"]
        made = bench.parcels_folder / folder
        seen.append(((made / "document.json").read_text(), (made / "contents.json").read_text()))
        if len(seen) == 1:
            raise KilledError
        return conclude(ledger, series_id, **fields)

    monkeypatch.setattr(Ledger, "conclude", die_once)
    files = make_files(tmp_path)
    bench.studies.start()
    bench.send(*files, expected=len(files))
    until(lambda: not bench.studies.healthy)
    bench.restart()
    bench.settle()
    (first, contents), (second, again) = seen
    assert contents == again
    start = first.index('"event_id"')
    assert first[: start + 60] == second[: start + 60]


def test_what_is_in_progress_goes_on_after_a_stop(
    bench: Bench, detector: Detector, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.studies.start()
    bench.send(*files[:6])
    bench.restart()
    bench.send(*files[6:9])
    bench.studies.stop(DEADLINE_S)
    for file in files[9:]:
        bench.keep(file)  # nobody was told
    bench.new_studies().start()
    bench.settle()
    (result,) = bench.results()
    assert bench.document(result)["result"]["probability"] == detector.detect(files).probability
    bench.restart()
    assert bench.waiting() == 0
    bench.settle()
    assert len(bench.results()) == 1


def test_a_series_whose_bundle_is_gone_is_routed_anew(tmp_path: Path, detector: Detector) -> None:
    files = make_files(tmp_path)
    with Bench(tmp_path / "state", {"old": detector}) as before:
        before.studies.start()
        before.send(*files[:6])
        until(lambda: before.waiting() == 0)
        assert before.series()[0].bundle == "old"
    with Bench(tmp_path / "state", {"new": detector}) as after:
        after.studies.start()
        after.send(*files[6:])
        after.settle()
        assert after.series()[0].bundle == "new"
        assert '"bundle_gone"' in after.log.getvalue()
        assert after.results()[0].version == 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_slice_that_was_not_entered_does_not_decide_who_judges(
    tmp_path: Path, detector: Detector, first: int
) -> None:
    """Its file does not say who sent it; the sender comes again, with it or after it."""
    files = make_files(tmp_path)
    rules = {
        "rules": [{"bundle": "toy", "calling_ae_title": "CT_*"}],
        "otherwise": "ignore",
    }
    with Bench(tmp_path / "state", {"toy": detector}, routing=rules) as bench:
        bench.keep(files[0], calling_ae_title="")  # as `Inbox.recover` does
        bench.studies.start()
        until(lambda: bench.series()[0].state == "ignored")
        bench.send(*files[first:], calling_ae_title="CT_1")
        until(lambda: bench.series()[0].state == "receiving")
        bench.settle()
        (result,) = bench.results()
        assert bench.document(result)["result"]["coverage"]["slices"] == len(files)


@pytest.mark.parametrize("owner", [Ledger, Packer])
def test_a_disk_that_is_full_delays_a_result(
    bench: Bench,
    detector: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
) -> None:
    """And a slice that comes meanwhile is in it."""
    files = make_files(tmp_path)
    image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer = changed(pydicom.dcmread(files[0]), ImageType=image_type, SOPInstanceUID="1.2.8")
    name = {Ledger: "conclude", Packer: "pack"}[owner]
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> Any:
            raise NodeError("full", code=Code.NODE_FULL)

        patch.setattr(owner, name, full)
        bench.studies.start()
        bench.send(save(localizer, tmp_path / "localizer.dcm"), *files[:-1])
        bench.quiet()
        until(lambda: '"study_delayed"' in bench.log.getvalue())
        bench.clock.now += 1  # and fails once more
        until(lambda: bench.log.getvalue().count('"study_delayed"') > 1)
        bench.send(files[-1])
    bench.settle()
    (result,) = bench.results()
    assert bench.document(result)["result"]["coverage"]["slices"] == len(files)
    assert '"study_failed"' not in bench.log.getvalue()
    assert bench.document(result)["result"]["probability"] == detector.detect(files).probability
    assert bench.studies.healthy


def test_objects_that_find_the_disk_full_are_made_when_there_is_room(
    bench: Bench, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the alert too: neither a refusal nor a parcel without objects goes out instead."""
    if not (full := Path("/dev/full")).exists():
        pytest.skip("/dev/full is not there")
    files = make_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FakeObjects, "__call__", lambda *_, **__: write_bytes(full, b"object"))
        bench.studies.start()
        bench.send(*files)

        def alerted() -> bool:
            bench.clock.now += 0.001  # slabs are looked at from time to time
            return '"alert_delayed"' in bench.log.getvalue()

        until(alerted, what="the alert")
        bench.quiet()
        until(lambda: '"study_delayed"' in bench.log.getvalue())
        bench.clock.now += 1  # and fails once more
        until(lambda: bench.log.getvalue().count('"study_delayed"') > 1)
        assert bench.parcels() == []
        assert list(bench.parcels_folder.iterdir()) == []
    bench.settle()
    (result,) = bench.results()
    assert bench.document(result)["result"]["probability"] == detector.detect(files).probability
    assert all(bench.objects_of(made) for made in bench.parcels() if made.kind != "withdrawal")
    assert '"study_failed"' not in bench.log.getvalue()


def test_results_leave_room_for_the_ledger_and_for_deleting(
    tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    limits = {"free_disk_bytes": 800}
    with Bench(tmp_path / "state", {"toy": detector}, limits=limits) as bench:
        bench.studies.start()
        bench.send(*make_files(tmp_path))
        for free in (0, 99):
            disk.free = free
            bench.quiet()
            seen = bench.log.getvalue().count('"study_delayed"')
            until(lambda seen=seen: bench.log.getvalue().count('"study_delayed"') > seen)  # type: ignore[misc]
        assert bench.results() == []
        assert '"code": "node.full"' in bench.log.getvalue()
        disk.free = 100
        bench.settle()
        assert [made.version for made in bench.results()] == [1]


def test_room_is_kept_for_the_results_of_many_small_series(bench: Bench, tmp_path: Path) -> None:
    bench.studies.start()
    for number in range(1, 21):
        bench.send(*make_files(tmp_path, number=number, positions_um=[0]))
    assert bench.studies.owed_bytes() == 20 * RESULT_BYTES
    bench.restart()
    assert bench.studies.owed_bytes() == 20 * RESULT_BYTES
    bench.settle()
    until(lambda: bench.studies.owed_bytes() == 0)
    assert {made.verdict for made in bench.results()} == {"not_processed"}
    assert len(bench.results()) == 20


def test_a_series_that_cannot_even_be_refused_waits_longer_each_time(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(times: int) -> None:
        def failed() -> bool:
            bench.clock.now += 60
            return bench.log.getvalue().count('"study_failed"') >= times

        until(failed)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "pack", lambda *_, **__: 1 / 0)
        patch.setattr(Packer, "withdrawal", lambda *_, **__: 1 / 0)
        bench.studies.start()
        files = make_files(tmp_path)
        bench.send(*files, expected=len(files))
        waits(12)
        assert max(bench.studies._waits.values()) == 60
    bench.settle()
    assert bench.results()[-1].verdict == "not_processed"
    assert bench.studies.healthy


def test_objects_that_cannot_be_made_make_the_series_not_processed(
    bench: Bench, tmp_path: Path
) -> None:
    bench.studies.start()
    files = make_files(tmp_path)
    bench.send(*files[:1])
    until(lambda: bench.waiting() == 0)
    bench.objects.failures = [ValueError("odd")] * 100
    bench.send(*files[1:], expected=len(files))
    bench.settle()
    result = bench.results()[-1]
    assert result.verdict == "not_processed"
    assert bench.document(result)["not_processed"]["code"] == "engine.failed"
    assert bench.objects_of(result) == []
    assert '"objects_failed"' in bench.log.getvalue()


def test_a_slow_engine_leaves_no_room_until_it_has_caught_up(
    tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_files(tmp_path, positions_um=range(0, 300_000, 4000))
    expected = detector.detect(files).probability
    released = threading.Event()
    push = Executor.push

    def slow(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        assert released.wait(DEADLINE_S)
        return push(executor, *args, **kwargs)

    monkeypatch.setattr(Executor, "push", slow)
    limits = {"waiting_slices": 10}
    with Bench(tmp_path / "state", {"toy": detector}, limits=limits) as bench:
        bench.studies.start()
        assert bench.studies.room()
        bench.send(*files)
        until(lambda: not bench.studies.room())
        assert bench.waiting() >= 10
        released.set()
        until(bench.studies.room, what="room")
        bench.settle()
        assert bench.document(bench.results()[0])["result"]["probability"] == expected


def test_a_stop_does_not_wait_for_a_slow_engine(
    tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_files(tmp_path)
    released = threading.Event()
    conclude = Stream._conclude

    def slow(stream: Stream) -> None:
        assert released.wait(DEADLINE_S)
        conclude(stream)

    monkeypatch.setattr(Stream, "_conclude", slow)
    with Bench(tmp_path / "state", {"toy": detector}) as bench:
        bench.studies.start()
        bench.send(*files, expected=len(files))
        until(lambda: bench.waiting() == 0)
        bench.studies.stop(DEADLINE_S)
        assert not any("studies" in thread.name for thread in threading.enumerate())
        released.set()
        bench.new_studies().start()
        bench.settle()
        assert [made.version for made in bench.results()] == [1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6)
@given(shuffle=st.randoms(use_true_random=False), says_how_many=st.booleans())
def test_every_history_ends_with_the_verdicts_of_detect(
    tmp_path_factory: pytest.TempPathFactory,
    detector: Detector,
    shuffle: random.Random,
    says_how_many: bool,
) -> None:
    """Two series in any order, with duplicates, restarts and pauses that end them too early."""
    folder = tmp_path_factory.mktemp("history")
    studies = [make_files(folder, number=number) for number in (1, 2)]
    steps: list[Path | str] = [file for files in studies for file in files]
    steps += shuffle.sample(steps, 4)
    steps += ["restart"] * 2 + ["pause"] * 2
    shuffle.shuffle(steps)
    with Bench(folder / "state", {"toy": detector}) as bench:
        bench.studies.start()
        for step in steps:
            if step == "restart":
                bench.restart()
            elif step == "pause":
                bench.clock.now += 100
            else:
                bench.send(Path(step), expected=len(studies[0]) if says_how_many else None)
        bench.settle()
        for entry in bench.series():
            results = [made for made in bench.results() if made.series_id == entry.id]
            assert [made.version for made in results] == list(range(1, len(results) + 1))
            document = bench.document(results[-1])
            number = int(document["series_instance_uid"].rpartition(".")[2])
            expected = detector.detect(studies[number - 1])
            assert document["result"]["probability"] == expected.probability
            assert entry.state == "concluded"
        for made in bench.parcels():
            if made.kind == "withdrawal":
                assert ("alert", made.version) in {
                    (other.kind, other.version)
                    for other in bench.parcels()
                    if other.series_id == made.series_id
                }
        assert bench.waiting() == 0
