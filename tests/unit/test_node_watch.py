"""Logs and metrics: what they say, and that they hold no patient data."""

import json
import threading
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import pytest

from pe_infer.errors import Code, DicomError
from pe_infer.node.watch import Watch

UID = "1.2.840.113619.2.1"
LABELS = {"outcome", "status", "bundle", "verdict", "destination", "le"}


def lines(output: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_every_event_is_a_line_of_json() -> None:
    output = StringIO()
    Watch(b"key", output=output).log.info("slice_taken", bytes=5, error="two\nlines")
    (line,) = lines(output)
    made = datetime.fromisoformat(line.pop("timestamp"))
    assert abs(made - datetime.now(UTC)).total_seconds() < 60
    assert line == {"event": "slice_taken", "level": "info", "bytes": 5, "error": "two\nlines"}


@pytest.mark.parametrize(
    ("level", "written"),
    [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)],
)
def test_less_severe_lines_are_left_out(level: Any, written: int) -> None:
    output = StringIO()
    log = Watch(b"key", level=level, output=output).log
    for say in (log.debug, log.info, log.warning, log.error):
        say("said")
    assert len(lines(output)) == written


def test_as_text_a_value_cannot_look_like_another_line() -> None:
    output = StringIO()
    Watch(b"key", form="text", output=output).log.warning("rejected", ae_title="CT\n2026 forged")
    assert len(output.getvalue().splitlines()) == 1
    assert "rejected" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_an_alias_is_the_same_for_a_uid_and_a_key_and_for_no_other() -> None:
    watch = Watch(b"key")
    assert watch.alias(UID) == Watch(b"key").alias(UID)
    assert watch.alias(UID) != watch.alias(UID + "1")
    assert watch.alias(UID) != Watch(b"other").alias(UID)
    assert len(watch.alias(UID)) == 12
    assert UID not in watch.alias(UID)


def failing(error: Exception) -> None:
    raise error


def logged_failure(error: Exception) -> dict[str, Any]:
    output = StringIO()
    try:
        failing(error)
    except type(error) as exc:
        Watch(b"key", output=output).failed("slice_lost", exc, destination="pacs")
    (line,) = lines(output)
    return line


def test_an_unexpected_exception_is_logged_with_its_place_and_without_its_message() -> None:
    line = logged_failure(ValueError("Family^Given"))
    assert line["event"] == "slice_lost"
    assert line["level"] == "error"
    assert line["error"] == "ValueError"
    assert line["code"] is None
    assert line["destination"] == "pacs"
    assert [place.split()[1] for place in line["places"]] == ["logged_failure", "failing"]
    assert line["places"][0].startswith("test_node_watch.py:")
    assert "Family" not in json.dumps(line)


def test_an_error_raised_on_purpose_is_logged_with_its_code() -> None:
    line = logged_failure(DicomError(f"/slices/{UID}: damaged", code=Code.UNREADABLE_FILE))
    assert line["code"] == "dicom.unreadable_file"
    assert UID not in json.dumps(line)


class Full(StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_log_that_cannot_be_written_stops_nothing(form: Any) -> None:
    Watch(b"key", form=form, output=Full()).log.error("said")
    closed = StringIO()
    closed.close()
    Watch(b"key", form=form, output=closed).log.error("said")


def test_lines_of_several_threads_do_not_mix() -> None:
    output = StringIO()
    log = Watch(b"key", output=output).log
    threads = [
        threading.Thread(target=lambda n=n: [log.info("said", n=n) for _ in range(100)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["n"] for line in lines(output)) == sorted([0, 1, 2, 3] * 100)


def test_a_line_is_written_in_one_piece_with_its_end() -> None:
    """Else a kill leaves half a line, which the next process goes on with."""

    class Pieces(StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    pieces: list[str] = []
    log = Watch(b"key", output=Pieces()).log
    log.info("first")
    log.info("second")
    assert [piece[-1] for piece in pieces] == ["\n", "\n"]


def test_two_nodes_of_a_process_count_for_themselves() -> None:
    one, other = Watch(b"key"), Watch(b"key")
    one.slices.labels("0x0000").inc()
    labels = {"status": "0x0000"}
    assert one.registry.get_sample_value("pe_infer_node_slices_total", labels) == 1
    assert other.registry.get_sample_value("pe_infer_node_slices_total", labels) is None


def test_metrics_are_named_after_the_node_explained_and_hold_no_patient_data() -> None:
    watch = Watch(b"key")
    families = list(watch.registry.collect())
    assert len(families) > 10
    for family in families:
        assert family.name.startswith("pe_infer_node_")
        assert family.documentation
        for sample in family.samples:
            assert set(sample.labels) <= LABELS
    for metric in (watch.associations, watch.slices, watch.results, watch.alerts, watch.deliveries):
        assert set(metric._labelnames) <= LABELS
