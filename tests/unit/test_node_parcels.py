"""Parcels: whole or not there, the same each time, without patient data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from node_bench import FakeObjects
from toy_bundles import make

from pe_infer.bundle import Bundle
from pe_infer.errors import NodeError
from pe_infer.node.entries import Parcel, SeriesEntry
from pe_infer.node.objects import Alert
from pe_infer.node.parcels import DOCUMENT, Packer, Subject, read_contents
from pe_infer.result import NotProcessed

REASON = NotProcessed(code="series.gap", message="slices are missing")


SERIES = SeriesEntry(
    id=7,
    study_instance_uid="1.2",
    series_instance_uid="1.2.3",
    state="receiving",
    bundle="toy",
    reason=None,
    version=0,
    expected=None,
    first_at=0.0,
    last_at=0.0,
    instances=1,
)


def alert_in(folder: str) -> Parcel:
    return Parcel(
        id=1, series_id=7, kind="alert", version=1, verdict=None, folder=folder, made_at=0.0
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(make(tmp_path_factory.mktemp("toy") / "bundle"))


@pytest.fixture
def objects() -> FakeObjects:
    return FakeObjects()


@pytest.fixture
def packer(tmp_path: Path, objects: FakeObjects) -> Packer:
    return Packer(tmp_path / "parcels", tmp_path / "packing", objects)


def subject(toy: Bundle, version: int = 1) -> Subject:
    return Subject(
        series_id=7,
        study_instance_uid="1.2",
        series_instance_uid="1.2.3",
        version=version,
        bundle=toy,
    )


def document(tmp_path: Path, folder: str) -> dict[str, object]:
    read: dict[str, object] = json.loads((tmp_path / "parcels" / folder / DOCUMENT).read_text())
    return read


def test_a_refusal_says_why_and_what_it_is_about(
    packer: Packer, toy: Bundle, tmp_path: Path
) -> None:
    folder = packer.pack(subject(toy, 3), subject(toy, 3).unjudged(REASON), [])
    said = document(tmp_path, folder)
    assert said.pop("made_at")
    assert said.pop("event_id")
    assert said == {
        "event": "result",
        "study_instance_uid": "1.2",
        "series_instance_uid": "1.2.3",
        "version": 3,
        "supersedes": 2,
        "bundle": "toy",
        "bundle_version": "0.1.0",
        "bundle_hash": toy.sha256,
        "not_processed": {"code": "series.gap", "message": "slices are missing"},
    }


def test_an_alert_is_marked_as_provisional_and_never_says_positive(
    packer: Packer, toy: Bundle, tmp_path: Path, objects: FakeObjects
) -> None:
    alert = subject(toy).alert(probability=0.9, position_mm=12.5, slices=40)
    folder = packer.pack(subject(toy), alert, [])
    said = document(tmp_path, folder)
    assert said["event"] == "provisional_alert"
    assert str(said["notice"]).startswith("provisional")
    assert said["alert"] == {
        "provisional": True,
        "probability": 0.9,
        "position_mm": 12.5,
        "slices": 40,
    }
    assert "positive" not in json.dumps(said)
    written = objects.written[0][0]
    assert isinstance(written, Alert)
    assert written.finding == toy.manifest.finding


def test_events_have_identities_of_their_own_that_stay_the_same(
    packer: Packer, toy: Bundle, tmp_path: Path
) -> None:
    def identities() -> list[object]:
        alert = subject(toy).alert(probability=0.9, position_mm=12.5, slices=40)
        folders = [
            packer.pack(subject(toy), subject(toy).unjudged(REASON), []),
            packer.pack(subject(toy, 2), subject(toy, 2).unjudged(REASON), []),
            packer.pack(subject(toy), alert, []),
            packer.withdrawal(SERIES, alert_in("7-1-provisional_alert")),
        ]
        return [document(tmp_path, folder)["event_id"] for folder in folders]

    first = identities()
    assert len(set(first)) == 4
    assert identities() == first


def test_a_withdrawal_names_the_bundle_that_raised_the_alert(
    packer: Packer, toy: Bundle, tmp_path: Path
) -> None:
    alert = subject(toy).alert(probability=0.9, position_mm=12.5, slices=40)
    raised = alert_in(packer.pack(subject(toy), alert, []))
    said = document(tmp_path, packer.withdrawal(SERIES, raised))
    assert said["event"] == "alert_withdrawn"
    assert (said["bundle"], said["bundle_hash"]) == ("toy", toy.sha256)
    assert (said["series_instance_uid"], said["version"]) == ("1.2.3", 1)
    assert read_contents(tmp_path / "parcels" / "7-1-alert_withdrawn").objects == ()


def test_an_alert_whose_parcel_is_damaged_can_still_be_withdrawn(
    packer: Packer, toy: Bundle, tmp_path: Path
) -> None:
    gone = alert_in("not there")
    assert packer.raised_by(gone) is None
    said = document(tmp_path, packer.withdrawal(SERIES, gone))
    assert (said["bundle"], said["series_instance_uid"]) == (None, "1.2.3")


def test_objects_point_only_to_those_that_the_same_bundle_has_made(
    packer: Packer, toy: Bundle, tmp_path: Path, objects: FakeObjects
) -> None:
    other = replace(subject(toy, 3), bundle=Bundle.load(make(tmp_path / "other", min_slabs=2)))
    packer.pack(subject(toy, 1), subject(toy, 1).unjudged(REASON), None)  # has no objects
    packer.pack(subject(toy, 2), subject(toy, 2).unjudged(REASON), [])
    packer.pack(other, other.unjudged(REASON), [])
    packer.pack(subject(toy, 3), subject(toy, 3).unjudged(REASON), [], alerted=True)
    assert objects.follows == [(2, None, None), (3, None, None), (3, 2, None)]


def test_a_parcel_that_was_not_entered_is_made_anew(
    packer: Packer, toy: Bundle, tmp_path: Path, objects: FakeObjects
) -> None:
    folder = packer.pack(subject(toy), subject(toy).unjudged(REASON), [])
    (tmp_path / "parcels" / folder / "left over").touch()
    again = packer.pack(subject(toy), subject(toy).unjudged(REASON), [])
    assert again == folder
    names = {path.name for path in (tmp_path / "parcels" / folder).iterdir()}
    assert names == {"contents.json", "document.json", "report.dcm"}


def test_a_parcel_whose_objects_cannot_be_made_is_not_there(
    packer: Packer, toy: Bundle, tmp_path: Path, objects: FakeObjects
) -> None:
    objects.failures = [ValueError("odd"), OSError(28, "No space left on device")]
    with pytest.raises(ValueError, match="odd"):
        packer.pack(subject(toy), subject(toy).unjudged(REASON), [])
    with pytest.raises(NodeError, match="Free some space"):
        packer.pack(subject(toy), subject(toy).unjudged(REASON), [])
    assert list((tmp_path / "parcels").iterdir()) == []
    assert list((tmp_path / "packing").iterdir()) == []
    bare = packer.pack(subject(toy), subject(toy).unjudged(REASON), None)
    assert read_contents(tmp_path / "parcels" / bare).objects == ()


def test_what_the_ledger_does_not_name_goes_at_the_start(
    packer: Packer, toy: Bundle, tmp_path: Path, objects: FakeObjects
) -> None:
    known = packer.pack(subject(toy), subject(toy).unjudged(REASON), [])
    packer.pack(subject(toy, 2), subject(toy, 2).unjudged(REASON), [])
    (tmp_path / "packing" / "half").mkdir()
    later = Packer(tmp_path / "parcels", tmp_path / "packing", objects)
    assert later.remove_others({known}) == 1
    assert [path.name for path in (tmp_path / "parcels").iterdir()] == [known]
    assert list((tmp_path / "packing").iterdir()) == []
    assert (tmp_path / "parcels").stat().st_mode & 0o077 == 0
