"""Outcomes into DICOM objects: what each says, and how they are identified."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import outcomes
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, Comprehensive3DSRStorage

from pe_infer.dicom.results import Outcome, ResultObject, write_results
from pe_infer.dicom.results.envelope import write_bytes
from pe_infer.errors import ConfigurationError
from pe_infer.result import OperatingPoint, StudyResult

POSITIVE = ["report", "key_image", "key_image", "key_image", "key_object_selection", "attention"]
sources = pytest.fixture(scope="module")(outcomes.made_sources)
written = pytest.fixture(scope="module")(outcomes.made_objects)


def items(dataset: Dataset) -> Iterator[Dataset]:
    """Every content item of a document."""
    for item in dataset.get("ContentSequence", ()):
        yield item
        yield from items(item)


def named(dataset: Dataset, meaning: str) -> list[Dataset]:
    return [
        item
        for item in items(dataset)
        if "ConceptNameCodeSequence" in item
        and item.ConceptNameCodeSequence[0].CodeMeaning == meaning
    ]


def value(dataset: Dataset, meaning: str) -> str | None:
    found = named(dataset, meaning)
    if not found:
        return None
    (item,) = found
    if item.ValueType == "NUM":
        return str(item.MeasuredValueSequence[0].NumericValue)
    return str(item.ConceptCodeSequence[0].CodeMeaning)


def texts(dataset: Dataset) -> str:
    return "\n".join(item.TextValue for item in items(dataset) if item.ValueType == "TEXT")


def report(objects: list[ResultObject]) -> Dataset:
    return pydicom.dcmread(objects[0].path)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("positive", POSITIVE),
        ("negative", ["report", "attention"]),
        ("not_processed", ["report"]),
        ("unjudged", ["report"]),
        ("alert", ["report"]),
    ],
)
def test_each_outcome_has_its_objects(
    name: str, kinds: list[str], written: dict[str, list[ResultObject]]
) -> None:
    assert [item.kind for item in written[name]] == kinds


def test_file_names_say_what_they_are(written: dict[str, list[ResultObject]]) -> None:
    names = [item.path.name for item in written["positive"]]
    keys = [f"key-image-{number}.dcm" for number in (1, 2, 3)]
    assert names == ["report.dcm", *keys, "key-objects.dcm", "attention.dcm"]
    folder = written["positive"][0].path.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "summary", "presence", "certainty"),
    [
        ("positive", "All algorithms succeeded; with findings", "Present", "97.1"),
        ("negative", "All algorithms succeeded; without findings", "Absent", "3.1"),
        ("not_processed", "No algorithms succeeded; without findings", None, None),
        ("unjudged", "No algorithms succeeded; without findings", None, None),
        ("alert", None, None, "98.7"),
    ],
)
def test_the_report_says_what_was_found(
    name: str,
    summary: str | None,
    presence: str | None,
    certainty: str | None,
    written: dict[str, list[ResultObject]],
) -> None:
    document = report(written[name])
    assert document.SOPClassUID == Comprehensive3DSRStorage
    assert value(document, "Finding") == "Pulmonary embolism"
    assert value(document, "Finding Site") == "Pulmonary artery"
    assert value(document, "CAD Processing and Findings Summary") == summary
    assert value(document, "Pulmonary embolism") == presence
    assert value(document, "Certainty of Finding") == certainty
    assert named(document, "Algorithm Name")[0].TextValue == "pe_infer toy"
    assert named(document, "Algorithm Version")[0].TextValue == "1.2.0"
    assert outcomes.INTENDED_USE in texts(document)
    assert "not for diagnosis" in texts(document)
    assert document.VerificationFlag == "UNVERIFIED"
    provisional = name == "alert"
    assert document.PreliminaryFlag == ("PRELIMINARY" if provisional else "FINAL")
    assert document.CompletionFlag == ("PARTIAL" if provisional else "COMPLETE")


@pytest.mark.parametrize(
    ("probability", "percent", "words"),
    [
        (0.9996, "99.96", "Probability 0.9996, threshold 0.9997 (balanced)"),
        (1 - 2.0**-53, "99.9999", "Probability 0.999999, threshold 0.9997 (balanced)"),
        (0.0004, "0.04", "Probability 0.0004, threshold 0.9997 (balanced)"),
        (1e-40, "0.0001", "Probability 0.000001, threshold 0.9997 (balanced)"),
        (1.0, "100.0", "Probability 1.000, threshold 0.9997 (balanced)"),
        (0.0, "0.0", "Probability 0.000, threshold 0.9997 (balanced)"),
    ],
)
def test_what_is_almost_certain_is_not_said_to_be_certain(
    probability: float, percent: str, words: str, sources: list[Path], tmp_path: Path
) -> None:
    point = OperatingPoint(name="balanced", threshold=0.9997)
    update = {"probability": probability, "operating_point": point}
    made = write_results(
        outcomes.result(positive=False).model_copy(update=update),
        sources,
        tmp_path / "x",
        made_at=outcomes.MADE_AT,
    )
    document = report(made)
    assert value(document, "Certainty of Finding") == percent
    assert words in texts(document)
    parameters = [item.TextValue for item in named(document, "Algorithm Parameters")]
    assert "operating point: balanced, threshold 99.97 %" in parameters


def test_an_alert_that_is_almost_certain_is_not_said_to_be_certain(
    sources: list[Path], tmp_path: Path
) -> None:
    alert = replace(outcomes.alert(), probability=0.99996)
    document = report(write_results(alert, sources, tmp_path / "x", made_at=outcomes.MADE_AT))
    assert value(document, "Certainty of Finding") == "99.996"
    assert "probability of this part of the series, 0.99996." in texts(document)


def test_an_alert_is_called_provisional_and_gives_no_verdict(
    written: dict[str, list[ResultObject]],
) -> None:
    document = report(written["alert"])
    assert document.SeriesDescription.startswith("PROVISIONAL")
    assert "PROVISIONAL ALERT while slices still arrive" in texts(document)
    everything = str(document).lower()
    for word in ("positive", "negative", "present", "absent"):
        assert word not in everything


def test_quality_and_reasons_are_told_in_words(written: dict[str, list[ResultObject]]) -> None:
    assert "Quality: the gantry was tilted by 3.0 degrees." in texts(report(written["positive"]))
    assert "POSITIVE. Probability 0.971, threshold 0.418" in texts(report(written["positive"]))
    assert "NEGATIVE. Probability 0.031" in texts(report(written["negative"]))
    for name, code in (("not_processed", "gate.no_organ"), ("unjudged", "series.gap")):
        text = texts(report(written[name]))
        assert "NOT PROCESSED, neither present nor absent" in text
        assert code in text
        assert "NEGATIVE" not in text
        assert "POSITIVE" not in text


def test_the_report_points_at_the_slices(
    written: dict[str, list[ResultObject]], sources: list[Path]
) -> None:
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in sources]
    for objects in written.values():
        document = report(objects)
        (library,) = named(document, "Image Library Group")
        images = [item for item in library.ContentSequence if item.ValueType == "IMAGE"]
        assert [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in images] == uids
        (study,) = document.CurrentRequestedProcedureEvidenceSequence
        (series,) = study.ReferencedSeriesSequence
        assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (
            outcomes.STUDY,
            outcomes.SERIES,
        )
        assert [i.ReferencedSOPInstanceUID for i in series.ReferencedSOPSequence] == uids
    key = named(report(written["alert"]), "Source of Measurement")
    assert [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in key] == [uids[5]]


@pytest.mark.parametrize("name", outcomes.OUTCOMES)
def test_objects_are_of_the_study_and_say_what_made_them(
    name: str, written: dict[str, list[ResultObject]]
) -> None:
    for item in written[name]:
        dataset = pydicom.dcmread(item.path)
        assert dataset.StudyInstanceUID == outcomes.STUDY
        assert dataset.SeriesInstanceUID != outcomes.SERIES
        assert dataset.PatientName == "PHANTOM^SYNTHETIC"
        assert dataset.PatientID == "PHANTOM"
        assert dataset.StudyDescription == "Synthetic CT"
        (equipment,) = dataset.ContributingEquipmentSequence
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        assert equipment.Manufacturer == dataset.Manufacturer == "pe_infer"
        assert equipment.ManufacturerModelName == "pe_infer toy"
        assert equipment.DeviceUID.startswith("2.25.")
        assert "toy 1.2.0" in equipment.SoftwareVersions
        assert (dataset.SOPClassUID, dataset.SOPInstanceUID) == (
            item.sop_class_uid,
            item.sop_instance_uid,
        )
        assert dataset.file_meta.TransferSyntaxUID == item.transfer_syntax_uid
        assert "highdicom" not in item.path.read_bytes().decode("latin-1").lower()
        for keyword in ("InstanceCreationDate", "ContentDate", "DateOfSecondaryCapture"):
            assert dataset.get(keyword, "20261122") == "20261122"


def test_series_hold_one_kind_and_one_instance_number_each(
    written: dict[str, list[ResultObject]],
) -> None:
    datasets = [pydicom.dcmread(item.path) for item in written["positive"]]
    assert len({d.SOPInstanceUID for d in datasets}) == 6
    assert len({d.SeriesInstanceUID for d in datasets}) == 4
    assert len({(d.SeriesInstanceUID, d.SOPClassUID) for d in datasets}) == 4
    assert len({d.SeriesNumber for d in datasets}) == 4
    assert len({(d.SeriesInstanceUID, d.InstanceNumber) for d in datasets}) == 6


@pytest.mark.parametrize("name", outcomes.OUTCOMES)
def test_the_same_outcome_gives_the_same_bytes(
    name: str, written: dict[str, list[ResultObject]], sources: list[Path], tmp_path: Path
) -> None:
    shuffled = random.Random(1).sample(sources, len(sources))
    again = write_results(
        outcomes.OUTCOMES[name], shuffled, tmp_path / "x", made_at=outcomes.MADE_AT
    )
    assert [item.path.read_bytes() for item in again] == [
        item.path.read_bytes() for item in written[name]
    ]


def identities(objects: list[ResultObject]) -> set[str]:
    """UIDs that the objects bring into the world."""
    datasets = [pydicom.dcmread(item.path) for item in objects]
    found = {uid for d in datasets for uid in (d.SOPInstanceUID, d.SeriesInstanceUID)}
    assert all(UID(uid).is_valid and uid.startswith("2.25.") for uid in found)
    return found


def device(objects: list[ResultObject]) -> str:
    return str(report(objects).ContributingEquipmentSequence[0].DeviceUID)


def test_versions_alerts_and_other_weights_have_uids_of_their_own(
    written: dict[str, list[ResultObject]], sources: list[Path], tmp_path: Path
) -> None:
    outcome = outcomes.result()
    other = outcomes.of_other_weights(outcome)
    at = outcomes.MADE_AT
    later = write_results(outcome, sources, tmp_path / "later", version=2, made_at=at)
    elsewhere = write_results(other, sources, tmp_path / "other", made_at=at)
    several = [written["positive"], written["alert"], later, elsewhere]
    found = [identities(objects) for objects in several]
    assert len(set().union(*found)) == sum(map(len, found))
    assert device(later) == device(written["positive"]) == device(written["alert"])
    assert device(elsewhere) != device(written["positive"])


def test_a_time_changes_no_uid(
    written: dict[str, list[ResultObject]], sources: list[Path], tmp_path: Path
) -> None:
    again = write_results(
        outcomes.result(), sources, tmp_path / "x", made_at=datetime(2027, 1, 1, tzinfo=UTC)
    )
    assert identities(again) == identities(written["positive"])


def predecessors(document: Dataset) -> list[tuple[str, str]]:
    (study,) = document.PredecessorDocumentsSequence
    assert study.StudyInstanceUID == outcomes.STUDY
    return [
        (s.SeriesInstanceUID, s.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for s in study.ReferencedSeriesSequence
    ]


def test_a_new_version_names_the_report_and_the_alert_that_it_replaces(
    written: dict[str, list[ResultObject]], sources: list[Path], tmp_path: Path
) -> None:
    later = write_results(
        outcomes.result(positive=False),
        sources,
        tmp_path / "later",
        version=2,
        made_at=outcomes.MADE_AT,
        supersedes=1,
        after_alert=1,
    )
    replaced = [report(written[name]) for name in ("positive", "alert")]
    document = report(later)
    assert predecessors(document) == [(d.SeriesInstanceUID, d.SOPInstanceUID) for d in replaced]
    assert "Replaces version 1" in texts(document)
    assert "WITHDRAWN" in texts(document)


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (outcomes.result(), "confirmed"),
        (outcomes.result(positive=False), "WITHDRAWN: the whole series does not bear it out"),
        (outcomes.result(positive=None), "neither confirmed nor excluded"),
        (outcomes.unjudged(), "neither confirmed nor excluded"),
        (outcomes.alert(), "Takes the place of an earlier provisional alert"),
    ],
)
def test_a_report_tells_what_became_of_the_alert(
    outcome: Outcome, word: str, sources: list[Path], tmp_path: Path
) -> None:
    made = write_results(
        outcome, sources, tmp_path / "x", version=2, made_at=outcomes.MADE_AT, after_alert=1
    )
    said = texts(report(made))
    assert word in said
    assert said.index(word) < said.index("Research use only")
    if "Seen:" in said:
        assert said.index(word) < said.index("Seen:")  # it follows the verdict


@pytest.mark.parametrize(
    "versions",
    [{"version": 0}, {"supersedes": 1}, {"version": 2, "supersedes": 0}, {"after_alert": 0}],
)
def test_versions_that_make_no_sense_are_refused(
    versions: dict[str, int], sources: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="versions count from 1"):
        write_results(
            outcomes.result(), sources, tmp_path / "x", made_at=outcomes.MADE_AT, **versions
        )
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_files_is_refused(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds files already"):
        write_results(outcomes.result(), sources, tmp_path, made_at=outcomes.MADE_AT)
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_a_folder_that_cannot_be_made_is_refused(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        write_results(outcomes.result(), sources, tmp_path / "file", made_at=outcomes.MADE_AT)


def test_a_disk_that_is_full_is_an_error_of_ours() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not there")
    with pytest.raises(ConfigurationError, match="No space left on device"):
        write_bytes(full, b"x")


@pytest.mark.parametrize("count", [0, 4])
def test_missing_source_files_are_refused(count: int, sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"source files were given"):
        write_results(outcomes.result(), sources[:count], tmp_path / "x", made_at=outcomes.MADE_AT)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("keyword", ["series_instance_uid", "study_instance_uid"])
def test_files_of_another_series_are_refused(keyword: str, tmp_path: Path) -> None:
    images = outcomes.renamed(outcomes.slices(), **{keyword: "2.25.9"})
    other = outcomes.write(tmp_path / "other", images)
    with pytest.raises(ConfigurationError, match="is not that of the outcome") as caught:
        write_results(outcomes.result(), other, tmp_path / "x", made_at=outcomes.MADE_AT)
    assert "2.25." not in str(caught.value)


def test_a_result_without_attention_has_key_images_of_the_likeliest_slabs(
    sources: list[Path], tmp_path: Path
) -> None:
    outcome: StudyResult = outcomes.result(attention=False)
    made = write_results(outcome, sources, tmp_path / "x", made_at=outcomes.MADE_AT)
    assert [item.kind for item in made] == POSITIVE[:-1]
    document = report(made)
    assert "highest probabilities" in texts(document)
    key = pydicom.dcmread(made[1].path)
    assert "probability 0.820, number 1 of 10 slabs; window C 100 W 700 HU; no attention" in (
        key.DerivationDescription
    )
    images = named(document, "Source of Measurement")
    shown = [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in images]
    assert shown == [f"{outcomes.SERIES}.{number}" for number in (12, 10, 8)]


def test_after_warming_up_an_outcome_loads_no_tables(tmp_path: Path) -> None:
    program = """
import pkgutil, sys
from pathlib import Path
import outcomes
from pe_infer.dicom.results import warm_up, write_results

loaded, get_data = [], pkgutil.get_data
pkgutil.get_data = lambda *place: (loaded.append(place[1]), get_data(*place))[1]
warm_up()
warm = len(loaded)
folder = Path(sys.argv[1])
sources = outcomes.write(folder / "source")
write_results(outcomes.result(), sources, folder / "x", made_at=outcomes.MADE_AT)
print(warm > 0, loaded[warm:])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "[]"]
