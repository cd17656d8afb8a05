"""Series through the node's threads: same verdict as `Detector.detect`, whatever way they come."""

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import node_bench
import pytest
from node_bench import EVERY_4_MM, Bench, make_files, until
from phantoms import coarse_phantom

from pe_infer import Detector, StudyResult
from pe_infer.dicom import write_series
from pe_infer.node.objects import Unjudged
from pe_infer.result import Flag
from pe_infer.stream import Stream

detector = pytest.fixture(scope="module")(node_bench.plain_detector)
bench = pytest.fixture(node_bench.running_bench)


def outcome(bench: Bench, index: int = -1) -> Any:
    return bench.objects.written[index][0]


def assert_is(found: StudyResult, expected: StudyResult) -> None:
    assert found.probability == expected.probability
    assert found.positive == expected.positive
    assert found.coverage == expected.coverage
    assert [e.position_mm for e in found.evidence] == [e.position_mm for e in expected.evidence]


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_a_series_gets_the_verdict_of_detect_in_any_order(
    bench: Bench, detector: Detector, tmp_path: Path, order: str
) -> None:
    files = make_files(tmp_path)
    expected = detector.detect(files)
    sent = {"ascending": files, "descending": files[::-1]}.get(order) or random.Random(4).sample(
        files, len(files)
    )
    bench.send(*sent)
    bench.quiet()
    (parcel,) = bench.until_results(1)
    assert_is(outcome(bench), expected)
    assert parcel.version == 1
    assert parcel.verdict == ("positive" if expected.positive else "negative")
    document = bench.document(parcel)
    assert document["event"] == "result"
    assert document["result"]["probability"] == expected.probability
    assert document["series_instance_uid"] == "1.2.3.1"
    assert document["supersedes"] is None
    assert bench.objects.follows == [(1, None, None)]
    assert len(bench.objects.written[0][1]) == len(files)
    until(lambda: bench.entered == 1)


def result_of(bench: Bench, series_instance_uid: str) -> StudyResult:
    """The newest result of a series."""
    found = [
        result
        for result, _ in bench.objects.written
        if isinstance(result, StudyResult)
        and result.provenance.series_instance_uid == series_instance_uid
    ]
    return found[-1]


@pytest.mark.parametrize("open_studies", [1, 8])
def test_interleaved_series_get_the_verdicts_of_separate_ones(
    tmp_path: Path, detector: Detector, open_studies: int
) -> None:
    studies = [make_files(tmp_path, number=number) for number in (1, 2, 3)]
    expected = [detector.detect(files) for files in studies]
    limits = {"open_studies": open_studies}
    with Bench(tmp_path / "state", {"toy": detector}, limits=limits) as bench:
        bench.studies.start()
        for files in zip(*studies, strict=True):
            bench.send(*files, expected=len(studies[0]))
        bench.until_results(3)
        bench.until_settled()
        for number, verdict in enumerate(expected, start=1):
            assert_is(result_of(bench, f"1.2.3.{number}"), verdict)
        assert len(bench.results()) == 3
        assert bench.waiting() == 0
        assert bench.watch.registry.get_sample_value("pe_infer_node_open_studies") == 0


def test_series_beyond_those_in_memory_wait_and_are_taken_up_oldest_first(
    tmp_path: Path, detector: Detector
) -> None:
    studies = [make_files(tmp_path, number=number) for number in (1, 2, 3)]
    with Bench(tmp_path / "state", {"toy": detector}, limits={"open_studies": 1}) as bench:
        bench.studies.start()
        bench.send(studies[0][0])
        until(lambda: bench.waiting() == 0)  # it has the place
        for files in (studies[1], studies[2], studies[0][1:]):
            bench.send(*files)
        until(lambda: bench.waiting() == 2 * len(EVERY_4_MM))
        assert bench.results() == []
        assert bench.watch.registry.get_sample_value("pe_infer_node_open_studies") == 1
        bench.clock.now += 100
        bench.until_results(3)
        order = [bench.document(made)["series_instance_uid"] for made in bench.results()]
        assert order == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]


def test_a_series_that_says_how_many_slices_it_has_ends_with_the_last_one(
    bench: Bench, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.send(*files, expected=len(files))
    bench.until_results(1)
    bench.until_settled()
    assert outcome(bench).coverage.slices == len(files)


def test_a_series_with_more_slices_than_it_says_ends_when_it_is_quiet(
    bench: Bench, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.send(*files[:10], expected=10)
    bench.until_results(1)
    for file in files[10:]:
        bench.send(file, expected=10)
        until(lambda: bench.waiting() == 0)
    assert len(bench.results()) == 1
    bench.quiet()
    bench.until_results(2)
    bench.until_settled()
    assert [made.version for made in bench.results()] == [1, 2]
    assert outcome(bench).coverage.slices == len(files)


@pytest.mark.parametrize("count", ["grows", "stays"])
def test_a_count_that_was_wrong_ends_a_series_once(
    bench: Bench, tmp_path: Path, count: str
) -> None:
    """Also after a restart. Else every slice makes a version, of all slices judged once more."""
    files = make_files(tmp_path)
    for number, file in enumerate(files, start=1):
        bench.send(file, expected=number if count == "grows" else 1)
        until(lambda: bench.waiting() == 0)
        if number == 1:
            bench.until_results(1)
        if number == len(files) // 2:
            bench.restart()
    bench.quiet()
    bench.until_settled()
    assert [made.version for made in bench.results()] == [1, 2]
    assert outcome(bench).coverage.slices == len(files)


def test_slices_that_disagree_on_their_number_are_not_believed(
    bench: Bench, tmp_path: Path
) -> None:
    """Each acquisition of a series may count its own."""
    files = make_files(tmp_path)
    bench.send(*files[:8], expected=13)
    bench.send(*files[8:12], expected=7)
    bench.send(files[12], expected=13)
    until(lambda: bench.waiting() == 0)
    bench.clock.now += 0.9 * bench.settings.studies.quiet_s
    bench.send(files[13])
    bench.quiet()
    bench.until_settled()
    assert [made.version for made in bench.results()] == [1]
    assert outcome(bench).coverage.slices == len(files)


def test_a_series_that_does_not_say_ends_when_it_has_been_quiet_for_long_enough(
    bench: Bench, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    quiet_s = bench.settings.studies.quiet_s
    for file in files:
        bench.send(file)
        until(lambda: bench.waiting() == 0)
        bench.clock.now += 0.9 * quiet_s
    bench.clock.now += 0.2 * quiet_s
    bench.until_results(1)
    bench.until_settled()
    assert len(bench.results()) == 1
    assert outcome(bench).coverage.slices == len(files)


def test_a_late_slice_makes_a_second_version_and_a_duplicate_nothing(
    bench: Bench, detector: Detector, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.send(*files[:-1])
    bench.quiet()
    bench.until_settled()
    bench.send(*files[:-1])  # all of them again
    assert [entry.state for entry in bench.series()] == ["concluded"]
    bench.send(files[-1])
    bench.quiet()
    first, second = bench.until_results(2)
    bench.until_settled()
    assert (first.version, second.version) == (1, 2)
    assert bench.document(second)["supersedes"] == 1
    assert bench.objects.follows == [(1, None, None), (2, 1, None)]
    assert bench.objects_of(first) != bench.objects_of(second)
    assert bench.document(first)["event_id"] != bench.document(second)["event_id"]
    assert_is(outcome(bench), detector.detect(files))


def test_a_series_that_another_process_reopens_gets_a_new_version(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(*make_files(tmp_path))
    bench.quiet()
    bench.until_settled()
    bench.ledger.reopen(bench.series()[0].id)
    bench.clock.now += 1  # the ledger is asked again
    until(lambda: bench.series()[0].bundle == "toy")
    bench.quiet()
    first, second = bench.until_results(2)
    assert (first.verdict, second.version) == (second.verdict, 2)


def test_an_alert_is_sent_once_and_confirmed_by_a_positive_result(
    tmp_path: Path, alarming: Detector
) -> None:
    files = make_files(tmp_path)
    with Bench(tmp_path / "state", {"toy": alarming}, destinations=DESTINATIONS) as bench:
        bench.studies.start()
        bench.send(*files[:10])
        until_alerted(bench)
        bench.send(*files[10:])
        bench.quiet()
        bench.until_results(1)
        alert, result = bench.parcels()
        assert (alert.kind, result.kind, result.verdict) == ("alert", "result", "positive")
        document = bench.document(alert)
        assert document["event"] == "provisional_alert"
        assert document["alert"]["provisional"] is True
        assert 0 < document["alert"]["slices"] <= 10
        assert bench.objects_of(alert) != bench.objects_of(result)
        assert bench.objects.follows == [(1, None, None), (1, None, 1)]
        assert receivers(bench) == {"alert": {"console"}, "result": {"pacs", "console"}}
        until(lambda: alerts(bench, "confirmed") == alerts(bench, "raised") == 1)


def test_an_alert_is_withdrawn_before_a_negative_result(
    tmp_path: Path, crying_wolf: Detector
) -> None:
    files = make_files(tmp_path)
    with Bench(tmp_path / "state", {"toy": crying_wolf}, destinations=DESTINATIONS) as bench:
        bench.studies.start()
        bench.send(*files[:10])
        until_alerted(bench)
        bench.restart()
        bench.send(*files[10:])
        bench.quiet()
        bench.until_results(1)
        kinds = [(made.kind, made.version, made.verdict) for made in bench.parcels()]
        assert kinds == [("alert", 1, None), ("withdrawal", 1, None), ("result", 1, "negative")]
        assert bench.document(bench.parcels()[1])["event"] == "alert_withdrawn"
        assert bench.objects_of(bench.parcels()[1]) == []
        assert receivers(bench)["withdrawal"] == {"console"}
        until(lambda: alerts(bench, "withdrawn") == alerts(bench, "raised") == 1)


def test_a_refused_series_takes_its_alert_back(tmp_path: Path, alarming: Detector) -> None:
    files = make_files(tmp_path, positions_um=[*EVERY_4_MM, 100_000])
    with Bench(tmp_path / "state", {"toy": alarming}) as bench:
        bench.studies.start()
        bench.send(*files[:10])
        until_alerted(bench)
        bench.send(files[-1])  # far away: slices are missing
        bench.quiet()
        bench.until_results(1)
        kinds = [(made.kind, made.verdict) for made in bench.parcels()]
        assert kinds == [("alert", None), ("withdrawal", None), ("result", "not_processed")]
        assert bench.document(bench.parcels()[-1])["not_processed"]["code"] == "series.gap"


def until_alerted(bench: Bench) -> None:
    """Time passes slowly while the last slabs are made."""

    def alerted() -> bool:
        bench.clock.now += 0.01
        return bool(bench.parcels())

    until(alerted, what="the alert")


DESTINATIONS = [
    {
        "kind": "dicom",
        "name": "pacs",
        "host": "127.0.0.1",
        "port": 4242,
        "ae_title": "PACS",
        "alerts": False,
    },
    {"kind": "webhook", "name": "console", "url": "http://127.0.0.1:1/"},
]


@pytest.fixture(scope="module")
def alarming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """Alerts at the first slab, and finds everything positive."""
    with node_bench.alerting(tmp_path_factory.mktemp("toy"), threshold=0.0) as made:
        yield made


@pytest.fixture(scope="module")
def crying_wolf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """Alerts at the first slab, and finds everything negative."""
    with node_bench.alerting(tmp_path_factory.mktemp("toy"), threshold=1.0) as made:
        yield made


def receivers(bench: Bench) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for delivery in bench.ledger.deliveries():
        found.setdefault(delivery.parcel.kind, set()).add(delivery.destination)
    return found


def alerts(bench: Bench, what: str) -> float | None:
    labels = {"bundle": "toy", "outcome": what}
    return bench.watch.registry.get_sample_value("pe_infer_node_alerts_total", labels)


def test_streams_are_gone_after_their_conclusion(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Stream]] = []
    opening = Detector.open

    def open_and_remember(detector: Detector, **options: Any) -> Stream:
        stream = opening(detector, **options)
        opened.append(weakref.ref(stream))
        return stream

    monkeypatch.setattr(Detector, "open", open_and_remember)
    bench.send(*make_files(tmp_path))
    bench.quiet()
    bench.until_results(1)
    bench.until_settled()

    def gone() -> bool:
        gc.collect()
        return opened[0]() is None

    until(gone, what="the end of the stream")


def test_logs_hold_no_identity_of_a_study(bench: Bench, tmp_path: Path) -> None:
    bench.send(*make_files(tmp_path))
    bench.send(*make_files(tmp_path, number=2, positions_um=[0, 50_000]))
    bench.quiet()
    bench.until_results(2)
    log = bench.log.getvalue()
    assert '"event": "result"' in log
    assert "refused" in log or "not_processed" in log
    assert "1.2.3" not in log
    assert str(tmp_path) not in log
    assert "SYNTHETIC" not in log
    assert bench.watch.alias("1.2.3.1") in log


def test_the_result_says_how_its_bundle_was_chosen(bench: Bench, tmp_path: Path) -> None:
    bench.send(*make_files(tmp_path))
    bench.quiet()
    bench.until_results(1)
    chosen = next(flag for flag in outcome(bench).quality if flag.flag is Flag.BUNDLE_CHOSEN)
    assert "BodyPartExamined 'CHEST'" in chosen.message
    assert bench.series()[0].bundle == "toy"


def test_a_series_for_no_bundle_is_ignored_and_holds_nothing_up(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(*make_files(tmp_path, body_part_examined="KNEE"))
    bench.send(*make_files(tmp_path, number=2))
    bench.quiet()
    bench.until_results(1)
    bench.until_settled()
    ignored, judged = bench.series()
    assert (ignored.state, ignored.bundle) == ("ignored", None)
    assert ignored.reason is not None
    assert ignored.reason.startswith("scope.mismatch")
    assert judged.state == "concluded"
    until(lambda: bench.waiting() == 0)
    assert not isinstance(outcome(bench), Unjudged)


def test_rules_know_who_sent_a_series_after_a_restart_too(
    tmp_path: Path, detector: Detector
) -> None:
    rules = [{"bundle": "ignore", "calling_ae_title": "RESEARCH*"}]
    routing = {"bundles": ["toy"], "rules": rules}
    with Bench(tmp_path / "state", {"toy": detector}, routing=routing) as bench:
        bench.send(*make_files(tmp_path), calling_ae_title="RESEARCH_1")
        bench.send(*make_files(tmp_path, number=2), calling_ae_title="CT_1")
        bench.new_studies().start()
        bench.settle()
        assert [(entry.state, entry.bundle) for entry in bench.series()] == [
            ("ignored", None),
            ("concluded", "toy"),
        ]
        assert '"why": "rule 1 of routing.rules"' in bench.log.getvalue()


@pytest.mark.slow
def test_a_shipped_bundle_judges_a_phantom_as_detect_does(tmp_path: Path) -> None:
    files = write_series(
        coarse_phantom("chest").generate(7, positive=True).slices[20:36], tmp_path / "phantom"
    )
    with (
        Detector("pe", cache_dir=None) as shipped,
        Bench(tmp_path / "state", {"pe": shipped}, routing={}) as bench,
    ):
        expected = shipped.detect(files)
        bench.studies.start()
        bench.send(*files[::-1], expected=len(files))
        bench.until_results(1)
        assert outcome(bench).positive == expected.positive
        assert outcome(bench).probability == pytest.approx(expected.probability, abs=1e-4)
