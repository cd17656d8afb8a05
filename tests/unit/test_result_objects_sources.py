"""Result objects of the series that scanners really send."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import outcomes
import pydicom
import pytest
from dicom_files import FRAME_OF_REFERENCE, SERIES, STUDY, ct_dataset, save
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000

from pe_infer.dicom import convert
from pe_infer.dicom.results import ResultObject, write_results
from pe_infer.dicom.results.sources import OPTIONAL_KEYWORDS, REQUIRED_KEYWORDS
from pe_infer.errors import DicomError
from pe_infer.result import StudyResult

Change = Callable[[Dataset], None]


def altered(folder: Path, change: Change) -> list[Path]:
    """The usual series, each file changed."""
    paths = outcomes.write(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values are meant
        for path in paths:
            dataset = pydicom.dcmread(path)
            change(dataset)
            dataset.save_as(path)
    return paths


def written(
    folder: Path, sources: list[Path], outcome: StudyResult | None = None
) -> list[ResultObject]:
    outcome = outcomes.result() if outcome is None else outcome
    return write_results(outcome, sources, folder / "objects", made_at=outcomes.MADE_AT)


def setting(**values: object) -> Change:
    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return change


def test_a_source_that_says_nothing_of_patient_and_study(tmp_path: Path) -> None:
    def bare(dataset: Dataset) -> None:
        for keyword in (*REQUIRED_KEYWORDS, *OPTIONAL_KEYWORDS, "BodyPartExamined"):
            if keyword in dataset:
                delattr(dataset, keyword)

    for item in written(tmp_path, altered(tmp_path / "source", bare)):
        dataset = pydicom.dcmread(item.path)
        for keyword in REQUIRED_KEYWORDS:
            assert not dataset[keyword].value
        for keyword in OPTIONAL_KEYWORDS:
            assert keyword not in dataset
        assert "BodyPartExamined" not in dataset
        assert ("Laterality" in dataset) == (item.kind in {"key_image", "attention"})


@pytest.mark.parametrize(
    ("character_set", "name", "description"),
    [
        ("ISO_IR 100", "Müller^Jürgen", "Schädel"),
        ("ISO_IR 192", "Müller^Jürgen", "Schädel"),
        ("ISO_IR 144", "Щукин^Юлий", "Лёгкие"),
        (["ISO 2022 IR 6", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "頭部"),
        ("GB18030", "Wang^XiaoDong=王^小东", "头部"),
    ],
)
def test_names_keep_their_letters(
    character_set: str, name: str, description: str, tmp_path: Path
) -> None:
    procedure = Dataset()
    procedure.CodeValue, procedure.CodingSchemeDesignator = "1", "99LOCAL"
    procedure.CodeMeaning = description
    change = setting(
        SpecificCharacterSet=character_set,
        PatientName=name,
        StudyDescription=description,
        ProcedureCodeSequence=[procedure],
    )
    for item in written(tmp_path, altered(tmp_path / "source", change)):
        dataset = pydicom.dcmread(item.path)
        assert dataset.SpecificCharacterSet == "ISO_IR 192"
        assert str(dataset.PatientName) == name
        assert dataset.StudyDescription == description
        assert dataset.ProcedureCodeSequence[0].CodeMeaning == description


def test_a_name_in_an_undeclared_character_set_is_no_error(tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    for path in paths:
        data = path.read_bytes().replace(b"ISO_IR 192", b"ISO_IR 6  ")
        path.write_bytes(data.replace(b"PHANTOM^SYNTHETIC", b"PHANTOM^SYNTH\xc4TIC"))
    dataset = pydicom.dcmread(written(tmp_path, paths)[0].path)
    assert str(dataset.PatientName).startswith("PHANTOM^SYNTH")
    assert str(dataset.PatientName).endswith("TIC")


def test_odd_values_are_taken_as_they_are(tmp_path: Path) -> None:
    odd = {
        "PatientName": "JOHN DOE WITHOUT CARETS",
        "PatientSex": "U",
        "PatientID": "A/B 17",
        "PatientAge": "042Y",
        "StudyDate": "20260229",  # no such day
        "StudyTime": "2561",
    }
    dataset = pydicom.dcmread(written(tmp_path, altered(tmp_path / "s", setting(**odd)))[0].path)
    assert {keyword: str(dataset[keyword].value) for keyword in odd} == odd


def test_a_value_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    paths = altered(tmp_path / "source", setting(PatientWeight="70", StudyID="17"))
    for path in paths:
        data = path.read_bytes()
        assert b"DS\x02\x0070" in data
        path.write_bytes(data.replace(b"DS\x02\x0070", b"FD\x02\x0070"))  # which has 8 bytes
    dataset = pydicom.dcmread(written(tmp_path, paths)[0].path)
    assert "PatientWeight" not in dataset
    assert dataset.StudyID == "17"


@pytest.mark.parametrize(("method", "kept"), [("", False), ("by hand", True)])
def test_removed_identity_is_only_said_with_its_method(
    method: str, kept: bool, tmp_path: Path
) -> None:
    change = setting(PatientIdentityRemoved="YES", DeidentificationMethod=method)
    dataset = pydicom.dcmread(written(tmp_path, altered(tmp_path / "source", change))[0].path)
    assert ("PatientIdentityRemoved" in dataset) == kept
    assert ("DeidentificationMethod" in dataset) == kept


def test_nothing_private_is_copied(tmp_path: Path) -> None:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99LOCAL", "chest"
    code.private_block(0x0011, "VENDOR", create=True).add_new(1, "LO", "SECRET OF THE VENDOR")
    sources = altered(tmp_path / "source", setting(ProcedureCodeSequence=[code]))
    for item in written(tmp_path, sources):
        data = item.path.read_bytes()
        assert b"99LOCAL" in data
        assert b"VENDOR" not in data


@pytest.mark.parametrize(
    ("body_part", "stated"),
    [("CHEST", False), ("HEAD", False), ("LUNG", True), ("KNEE", True), ("LOCAL_NAME", True)],
)
def test_the_side_of_what_may_be_one_of_a_pair_is_not_known(
    body_part: str, stated: bool, tmp_path: Path
) -> None:
    sources = altered(tmp_path / "source", setting(BodyPartExamined=body_part, Laterality="L"))
    for item in written(tmp_path, sources):
        if item.kind in {"key_image", "attention"}:
            dataset = pydicom.dcmread(item.path)
            assert dataset.BodyPartExamined == body_part
            assert ("Laterality" in dataset) == stated
            assert dataset.get("Laterality", "") == ""


TRIAL = {"ClinicalTrialSponsorName": "A", "ClinicalTrialProtocolID": "B"}


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ({**TRIAL, "ClinicalTrialSubjectID": "C"}, True),
        ({**TRIAL, "ClinicalTrialSubjectReadingID": "C"}, True),
        (TRIAL, False),
        ({"ClinicalTrialSubjectID": "C"}, False),
    ],
)
def test_a_clinical_trial_is_said_as_a_whole_or_not_at_all(
    stated: dict[str, str], kept: bool, tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(written(tmp_path, altered(tmp_path / "s", setting(**stated)))[0].path)
    required = {"ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName"}
    found = {keyword for keyword in dataset.dir() if keyword.startswith("ClinicalTrial")}
    assert found == ({*stated, *required} if kept else set())
    assert all(dataset[keyword].value == stated.get(keyword, "") for keyword in found)


def test_a_frame_of_reference_that_is_no_uid_is_none(tmp_path: Path) -> None:
    sources = altered(tmp_path / "source", setting(FrameOfReferenceUID="not a UID"))
    made = written(tmp_path, sources)
    assert "attention" not in [item.kind for item in made]
    assert all(b"not a UID" not in item.path.read_bytes() for item in made)


def test_a_file_that_was_replaced_gives_no_other_patient(tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    sources = [source for path in paths if (source := convert(path).source) is not None]
    other = outcomes.renamed(outcomes.slices(1), study_instance_uid="2.25.9")
    other = [replace(image, sop_instance_uid="2.25.99") for image in other]
    (paths[0],) = outcomes.write(tmp_path / "other", other)
    paths[0].replace(sources[0].path)
    with pytest.raises(DicomError, match="holds another image than before") as caught:
        write_results(outcomes.result(), sources, tmp_path / "x", made_at=outcomes.MADE_AT)
    assert "2.25" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_nothing_of_the_patient_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change = setting(PatientName="JOHN SECRET", PatientID="SECRET-ID", StudyTime="SECRET")
    sources = altered(tmp_path / "source", change)
    with caplog.at_level(logging.INFO):
        written(tmp_path, sources)
    assert "SECRET" not in caplog.text
    assert outcomes.STUDY not in caplog.text


def test_localizers_in_the_series_are_not_referenced(tmp_path: Path) -> None:
    sources = outcomes.write(tmp_path / "source")
    localizer = pydicom.dcmread(sources[0])
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SOPInstanceUID = localizer.file_meta.MediaStorageSOPInstanceUID = "2.25.99"
    localizer.save_as(tmp_path / "source" / "localizer.dcm")
    for item in written(tmp_path, [*sources, tmp_path / "source" / "localizer.dcm"]):
        assert b"2.25.99\0" not in item.path.read_bytes()


def test_one_instance_in_two_files_is_referenced_once(tmp_path: Path) -> None:
    sources = outcomes.write(tmp_path / "source")
    twice = outcomes.write(tmp_path / "again")
    document = pydicom.dcmread(written(tmp_path, [*sources, *twice])[0].path)
    (study,) = document.CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 12


def test_a_refusal_of_a_series_without_slices_references_what_there_is(tmp_path: Path) -> None:
    sources = altered(tmp_path / "source", setting(ImageType=["DERIVED", "PRIMARY", "MIP"]))
    (tmp_path / "source" / "broken.dcm").write_bytes(b"no DICOM")
    given = [*sources, tmp_path / "source" / "broken.dcm"]
    (item,) = write_results(
        outcomes.unjudged(), given, tmp_path / "objects", made_at=outcomes.MADE_AT
    )
    (study,) = pydicom.dcmread(item.path).CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 12


def test_a_refusal_of_files_that_nothing_can_be_read_of_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"no DICOM")
    with pytest.raises(DicomError, match=r"broken\.dcm"):
        write_results(outcomes.unjudged(), [broken], tmp_path / "x", made_at=outcomes.MADE_AT)


def test_an_unreadable_file_is_no_source_of_a_result(tmp_path: Path) -> None:
    sources = outcomes.write(tmp_path / "source")
    sources[3].write_bytes(b"no DICOM")
    with pytest.raises(DicomError, match=r"00004\.dcm"):
        written(tmp_path, sources)


def test_without_a_frame_of_reference_there_is_no_map(tmp_path: Path) -> None:
    def lost(dataset: Dataset) -> None:
        del dataset.FrameOfReferenceUID

    kinds = [item.kind for item in written(tmp_path, altered(tmp_path / "source", lost))]
    assert "attention" not in kinds
    assert kinds.count("key_image") == 3


def test_a_compressed_source_is_said_to_be_one(tmp_path: Path) -> None:
    sources = altered(tmp_path / "source", setting(LossyImageCompression="01"))
    for item in written(tmp_path, sources):
        dataset = pydicom.dcmread(item.path)
        if item.kind in {"key_image", "attention"}:
            assert dataset.LossyImageCompression == "01"
    plain = written(tmp_path / "plain", outcomes.write(tmp_path / "lossless"))
    assert pydicom.dcmread(plain[-1].path).LossyImageCompression == "00"


def test_a_transfer_syntax_with_loss_counts_too(tmp_path: Path) -> None:
    def encoded(dataset: Dataset) -> None:
        del dataset.LossyImageCompression
        dataset.compress(JPEG2000, j2k_cr=[5], generate_instance_uid=False)

    sources = altered(tmp_path / "source", encoded)
    item = written(tmp_path, sources)[-1]
    assert pydicom.dcmread(item.path).LossyImageCompression == "01"


def test_frames_of_an_enhanced_image_are_referenced(tmp_path: Path) -> None:
    sources, outcome = outcomes.multi_frame(tmp_path / "source")
    objects = written(tmp_path, sources, outcome)
    by_kind = {item.kind: pydicom.dcmread(item.path) for item in objects}
    assert by_kind["report"].StudyInstanceUID == STUDY
    (study,) = by_kind["report"].CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES
    assert len(series.ReferencedSOPSequence) == 1
    key = by_kind["key_image"]  # the last
    shown = key.SourceImageSequence[0].ReferencedFrameNumber
    document = by_kind["key_object_selection"]
    images = [item for item in document.ContentSequence if item.ValueType == "IMAGE"]
    assert len(images) == 3
    assert images[-1].ReferencedSOPSequence[0].ReferencedFrameNumber == shown
    assert "window C 60 W 360" in key.DerivationDescription
    attention = by_kind["attention"]
    assert attention.FrameOfReferenceUID == FRAME_OF_REFERENCE
    frames = [
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        for group in attention.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(frames) == list(range(3, 13))


def test_a_thousand_slices_are_all_referenced(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    sources = [
        save(
            ct_dataset(0.5 * number, InstanceNumber=number, SOPInstanceUID=f"2.25.5{number:04d}"),
            folder / f"{number:04d}.dcm",
        )
        for number in range(1, 1001)
    ]
    base = outcomes.result(positive=False, attention=False)
    made = base.provenance.model_copy(
        update={"study_instance_uid": STUDY, "series_instance_uid": SERIES}
    )
    outcome = base.model_copy(update={"provenance": made, "evidence": ()})
    document = pydicom.dcmread(written(tmp_path, sources, outcome)[0].path)
    (study,) = document.CurrentRequestedProcedureEvidenceSequence
    references = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [r.ReferencedSOPInstanceUID for r in references] == [
        f"2.25.5{number:04d}" for number in range(1, 1001)
    ]


@pytest.mark.parametrize(
    ("made_at", "offset", "expected"),
    [
        (datetime(2026, 11, 22, 1, 0, 0, 500000, UTC), "-0500", ("20261121", "200000.500000")),
        (datetime(2026, 11, 22, 1, tzinfo=UTC), "+0530", ("20261122", "063000.000000")),
        (datetime(2026, 11, 22, 1), "+0530", ("20261122", "010000.000000")),  # noqa: DTZ001
        (
            datetime(2026, 11, 22, 1, tzinfo=timezone(timedelta(hours=1))),
            "odd",
            ("20261122", "000000.000000"),
        ),
        (datetime(2026, 11, 22, 1, tzinfo=UTC), "0110", ("20261122", "010000.000000")),
        (datetime(2026, 11, 22, 1, tzinfo=UTC), "+2400", ("20261122", "010000.000000")),
    ],
)
def test_times_are_in_the_zone_of_the_study(
    made_at: datetime, offset: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    sources = altered(tmp_path / "source", setting(TimezoneOffsetFromUTC=offset))
    made = write_results(outcomes.result(), sources, tmp_path / "x", made_at=made_at)
    for item in made:
        dataset = pydicom.dcmread(item.path)
        assert (dataset.ContentDate, dataset.ContentTime) == expected
        assert dataset.TimezoneOffsetFromUTC == offset
