"""What cannot be judged: skipped, refused and said so, or set aside; nothing disturbs another."""

import os
import shutil
from pathlib import Path
from typing import Any

import node_bench
import pydicom
import pytest
from dicom_files import changed, save
from node_bench import EVERY_4_MM, Bench, make_files, until
from toy_bundles import make

from pe_infer import Detector, dicom
from pe_infer.errors import EngineError
from pe_infer.executor import Executor
from pe_infer.node.entries import Parcel
from pe_infer.node.objects import Unjudged
from pe_infer.result import Flag

detector = pytest.fixture(scope="module")(node_bench.plain_detector)
bench = pytest.fixture(node_bench.running_bench)


def altered(file: Path, **changes: object) -> Path:
    """A copy with other attributes; ``None`` removes one."""
    dataset = changed(pydicom.dcmread(file), **changes)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return save(dataset, file.with_name(f"altered {len(list(file.parent.iterdir()))}.dcm"))


def localizer(file: Path, number: int) -> Path:
    return altered(
        file, SOPInstanceUID=f"1.2.8.{number}", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )


def refusal_of(bench: Bench, parcel: Parcel) -> tuple[str, str]:
    assert parcel.verdict == "not_processed"
    said = bench.document(parcel)["not_processed"]
    return said["code"], said["message"]


def only_refusal(bench: Bench) -> tuple[str, str]:
    bench.quiet()
    bench.until_settled()
    (parcel,) = bench.results()
    assert isinstance(bench.objects.written[-1][0], Unjudged)
    assert bench.objects_of(parcel) != []
    return refusal_of(bench, parcel)


def test_localizers_are_skipped_and_counted(
    bench: Bench, detector: Detector, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    extra = [localizer(files[0], number) for number in (1, 2)]
    bench.send(extra[0], *files, extra[1])
    bench.quiet()
    bench.until_results(1)
    result = bench.objects.written[0][0]
    assert not isinstance(result, Unjudged)
    assert getattr(result, "probability", None) == detector.detect(files).probability
    skipped = next(f for f in getattr(result, "quality", ()) if f.flag is Flag.FILES_SKIPPED)
    assert skipped.values == {"other_kind": 2}
    assert len(bench.objects.written[0][1]) == len(files)


def test_a_series_of_localizers_has_no_result_until_a_slice_comes(
    bench: Bench, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.send(localizer(files[0], 1), localizer(files[0], 2))
    bench.quiet()
    bench.until_settled()
    (entry,) = bench.series()
    assert (entry.state, entry.version, entry.bundle) == ("concluded", 0, None)
    assert entry.reason is not None
    assert "no axial CT image" in entry.reason
    assert bench.parcels() == []
    bench.send(*files)
    bench.quiet()
    assert bench.until_results(1)[0].version == 1
    assert len(bench.objects.written[0][1]) == len(files)


def test_a_slice_that_cannot_be_decoded_makes_the_series_not_processed(
    bench: Bench, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    short = altered(files[5], PixelData=b"\0\0")
    bench.send(*files[:5], short, *files[6:])
    code, message = only_refusal(bench)
    assert code == "dicom.undecodable_pixels"
    assert "instance 1.2.3.1.6" in message
    assert str(tmp_path) not in message


def test_a_series_of_which_no_slice_can_be_decoded_is_routed_by_its_headers(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(*(altered(file, PixelData=b"\0\0") for file in make_files(tmp_path)[:3]))
    assert only_refusal(bench)[0] == "dicom.undecodable_pixels"
    assert bench.series()[0].bundle == "toy"


def test_a_series_that_says_nothing_of_itself_is_set_aside_with_the_reason(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(*(altered(file, PixelSpacing=None) for file in make_files(tmp_path)[:3]))
    bench.quiet()
    bench.until_settled()
    (entry,) = bench.series()
    assert (entry.state, entry.version) == ("concluded", 0)
    assert entry.reason is not None
    assert entry.reason.startswith("dicom.missing_attribute: instance 1.2.3.1.1: PixelSpacing")
    assert bench.parcels() == []


def test_a_series_that_no_reader_survives_is_set_aside(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its slices would count as waiting for ever."""

    def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of a library")

    monkeypatch.setattr(dicom, "convert", crash)
    monkeypatch.setattr(dicom, "survey", crash)
    bench.send(*make_files(tmp_path)[:3])
    bench.quiet()
    bench.until_settled()
    (entry,) = bench.series()
    assert (entry.state, entry.version) == ("concluded", 0)
    assert entry.reason is not None
    assert entry.reason.startswith("engine.failed")
    assert bench.waiting() == 0
    assert '"header_unreadable"' in bench.log.getvalue()


def other_pixels(file: Path) -> Path:
    pixels = bytearray(pydicom.dcmread(file).PixelData)
    pixels[0] ^= 1
    return altered(file, PixelData=bytes(pixels))


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("series.conflicting_duplicate", lambda files: [*files, other_pixels(files[3])]),
        (
            "series.foreign_slice",
            lambda files: [*files[:-1], altered(files[-1], FrameOfReferenceUID="1.7")],
        ),
        ("series.gap", lambda files: [*files[:3], *files[8:]]),
        ("series.too_few_slices", lambda files: files[:1]),
        ("dicom.missing_attribute", lambda files: [*files[1:], altered(files[0], Rows=None)]),
    ],
)
def test_what_detect_refuses_is_not_processed(
    bench: Bench, detector: Detector, tmp_path: Path, code: str, spoil: Any
) -> None:
    """And the series beside it is not disturbed."""
    others = make_files(tmp_path, number=2)
    bench.send(*others[:5])
    bench.send(*spoil(make_files(tmp_path)))
    bench.send(*others[5:])
    bench.quiet()
    bench.until_results(2)
    bench.until_settled()
    by_series = {bench.document(made)["series_instance_uid"]: made for made in bench.results()}
    assert refusal_of(bench, by_series["1.2.3.1"])[0] == code
    good = bench.document(by_series["1.2.3.2"])["result"]
    assert good["probability"] == detector.detect(others).probability


def test_a_missing_slice_that_comes_later_makes_a_verdict(
    bench: Bench, detector: Detector, tmp_path: Path
) -> None:
    files = make_files(tmp_path)
    bench.send(*files[:3], *files[8:])
    assert only_refusal(bench)[0] == "series.gap"
    bench.send(*files[3:8])
    bench.quiet()
    _, second = bench.until_results(2)
    assert second.verdict in {"positive", "negative"}
    expected = detector.detect(files).probability
    assert bench.document(second)["result"]["probability"] == expected


def test_a_rule_for_a_bundle_that_refuses_the_series_is_not_overruled(
    tmp_path: Path, detector: Detector
) -> None:
    rules = [{"bundle": "toy", "description": "*"}]
    routing = {"bundles": ["toy"], "rules": rules}
    with Bench(tmp_path / "state", {"toy": detector}, routing=routing) as bench:
        bench.studies.start()
        bench.send(*make_files(tmp_path, body_part_examined="KNEE"))
        assert only_refusal(bench)[0] == "scope.mismatch"


def test_too_few_slabs_are_not_processed(tmp_path: Path) -> None:
    folder = make(tmp_path / "bundle", min_slabs=50)
    with (
        Detector(folder, engine="onnxruntime", cache_dir=None) as demanding,
        Bench(tmp_path / "state", {"toy": demanding}) as bench,
    ):
        bench.studies.start()
        bench.send(*make_files(tmp_path))
        assert only_refusal(bench)[0] == "series.too_few_slabs"


class FailingEngine:
    """Fails so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, error: Exception) -> None:
        self.left = times
        push = Executor.push

        def fail(executor: Executor, *args: Any, **kwargs: Any) -> Any:
            if self.left:
                self.left -= 1
                raise error
            return push(executor, *args, **kwargs)

        monkeypatch.setattr(Executor, "push", fail)


@pytest.mark.parametrize("error", [EngineError("made to fail"), ZeroDivisionError("a bug")])
def test_an_engine_that_fails_once_is_tried_again(
    bench: Bench,
    detector: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    files = make_files(tmp_path)
    expected = detector.detect(files).probability
    FailingEngine(monkeypatch, 1, error)
    bench.send(*files)
    bench.quiet()
    (parcel,) = bench.until_results(1)
    assert bench.document(parcel)["result"]["probability"] == expected
    assert '"study_failed"' in bench.log.getvalue()


def test_an_engine_that_goes_on_failing_makes_series_not_processed_and_the_node_stays_up(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = FailingEngine(monkeypatch, 2, EngineError("made to fail"))
    bench.send(*make_files(tmp_path), expected=len(EVERY_4_MM))
    assert only_refusal(bench)[0] == "engine.failed"
    assert failing.left == 0
    bench.send(*make_files(tmp_path, number=2))
    bench.quiet()
    _, second = bench.until_results(2)
    assert second.verdict in {"positive", "negative"}
    assert bench.studies.healthy


def test_a_bug_in_the_reading_of_a_slice_is_tried_again_and_said(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_files(tmp_path)
    monkeypatch.setattr("pe_infer.dicom.convert", lambda _path: 1 / 0)
    bench.send(*files)
    assert only_refusal(bench)[0] == "engine.failed"


def test_slices_that_are_gone_make_the_series_not_processed(bench: Bench, tmp_path: Path) -> None:
    files = make_files(tmp_path)
    kept = [bench.keep(file) for file in files]
    gone = kept[4]
    assert gone is not None
    os.unlink(bench.inbox.path(gone))  # noqa: PTH108  a disk's doing
    for instance in kept:
        assert instance is not None
        bench.studies.offer(instance)
    assert only_refusal(bench)[0] == "dicom.unreadable_file"


def test_a_series_that_is_purged_while_it_is_open_is_forgotten(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(*make_files(tmp_path)[:5])
    until(lambda: bench.waiting() == 0)
    bench.ledger._connection.execute("DELETE FROM series")
    shutil.rmtree(tmp_path / "state" / "slices")
    bench.quiet()
    until(lambda: bench.watch.registry.get_sample_value("pe_infer_node_open_studies") == 0)
    bench.send(*make_files(tmp_path, number=2))
    bench.quiet()
    bench.until_results(1)
