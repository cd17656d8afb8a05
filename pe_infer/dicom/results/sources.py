"""The series that an outcome is about, as far as objects have to repeat or reference it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.reading import Quiet, uid_of
from pe_infer.dicom.source_file import SourceFile, read_source_file
from pe_infer.errors import Code, ConfigurationError, DicomError

UTF_8 = "ISO_IR 192"

# Patient, Clinical Trial Subject, General Study and Patient Study modules (PS3.3 C.7.1, C.7.2).
# Attributes of type 2, which are written empty where the source does not have them:
REQUIRED_KEYWORDS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
OPTIONAL_KEYWORDS = (
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ProcedureCodeSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "TimezoneOffsetFromUTC",  # what the times of the study are in
)
# Clinical Trial Subject module (PS3.3 C.7.1.3): it is there as a whole or not at all.
_TRIAL = tuple(keyword for keyword in OPTIONAL_KEYWORDS if keyword.startswith("ClinicalTrial"))
_TRIAL_STATED = ("ClinicalTrialSponsorName", "ClinicalTrialProtocolID")  # type 1
_TRIAL_SUBJECT = ("ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID")  # one of them
_TRIAL_PRESENT = ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName")
_DEIDENTIFICATION = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceSeries:
    """The series that was judged.

    Attributes:
        study_instance_uid: Its study.
        series_instance_uid: Its UID.
        frame_of_reference_uid: Its frame of reference, ``None`` if it states no valid UID.
        body_part_examined: As it says, if that is a valid code string.
        lossy: Whether an image of it has ever been compressed with loss.
        patient_and_study: Attributes of these modules, in UTF-8; none that are private.
        instances: By InstanceNumber. Localizers and the like are left out where there are slices.
    """

    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str | None
    body_part_examined: str | None
    lossy: bool
    patient_and_study: Dataset
    instances: tuple[SourceFile, ...]

    def find(self, sop_instance_uid: str) -> SourceFile:
        """Return the instance with this UID.

        Raises:
            ConfigurationError: It is not there.
        """
        for instance in self.instances:
            if instance.sop_instance_uid == sop_instance_uid:
                return instance
        raise ConfigurationError(
            f"{len(self.instances)} source files were given, and not the one of a slice that the "
            "result names. Give all files of the series that was judged."
        )

    def nearest(self, position_mm: float) -> tuple[SourceFile, int | None] | None:
        """Return the image nearest to a position along the slice normal, and its frame.

        ``None`` if no instance says where it lies.
        """
        best: tuple[float, SourceFile, int | None] | None = None
        for instance in self.instances:
            for index, own_mm in enumerate(instance.positions_mm):
                distance = abs(own_mm - position_mm)
                if best is None or distance < best[0]:
                    best = (distance, instance, instance.frame_number(index))
        return None if best is None else best[1:]

    def evidence(self, instances: Sequence[SourceFile]) -> Dataset:
        """Return an item of CurrentRequestedProcedureEvidenceSequence (PS3.3 C.17.2)."""
        item = Dataset()
        item.StudyInstanceUID = self.study_instance_uid
        item.ReferencedSeriesSequence = [self.references(instances, "ReferencedSOPSequence")]
        return item

    def references(self, instances: Sequence[SourceFile], keyword: str) -> Dataset:
        """Return an item that references instances of this series in a sequence ``keyword``."""
        item = Dataset()
        item.SeriesInstanceUID = self.series_instance_uid
        setattr(item, keyword, [reference_to(instance) for instance in instances])
        return item

    def stand_in(self, instance: SourceFile) -> Dataset:
        """Return what highdicom may see of an image: nothing of the patient.

        It logs names and UIDs, and refuses values that scanners do write. The attributes of patient
        and study are added to its objects afterwards, as they are.
        """
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = instance.sop_instance_uid
        dataset.StudyInstanceUID = self.study_instance_uid
        dataset.SeriesInstanceUID = self.series_instance_uid
        dataset.Modality = "CT"
        dataset.Rows = dataset.Columns = 1
        if self.frame_of_reference_uid is not None:
            dataset.FrameOfReferenceUID = self.frame_of_reference_uid
        for keyword in REQUIRED_KEYWORDS:
            setattr(dataset, keyword, "")
        return dataset


def reference_to(instance: SourceFile, frame_number: int | None = None) -> Dataset:
    """Return an item that references an instance, or one frame of it."""
    item = Dataset()
    item.ReferencedSOPClassUID = instance.sop_class_uid
    item.ReferencedSOPInstanceUID = instance.sop_instance_uid
    if frame_number is not None:
        item.ReferencedFrameNumber = frame_number
    return item


@Quiet()
def read_sources(
    sources: Sequence[Path | SourceFile],
    *,
    study_instance_uid: str,
    series_instance_uid: str,
    skip_unreadable: bool,
) -> SourceSeries:
    """Collect a series.

    Of files that are described already, one is read: its first, for patient and study.

    Args:
        sources: Its files, in any order.
        study_instance_uid: The study that they should be of.
        series_instance_uid: The series that they should be of.
        skip_unreadable: Whether a file that is no DICOM is left out, as long as others remain.

    Raises:
        ConfigurationError: There is no file, or one is of another study or series.
        DicomError: A file cannot be read.
    """
    found: dict[str, SourceFile] = {}
    refusal: DicomError | None = None
    for source in sorted(sources, key=_path_of):
        try:
            instance = source if isinstance(source, SourceFile) else read_source_file(source)
            _check_series(instance, study_instance_uid, series_instance_uid)
        except DicomError as exc:
            if not skip_unreadable:
                raise
            refusal = refusal or exc
            continue
        found.setdefault(instance.sop_instance_uid, instance)
    if not found:
        raise refusal or ConfigurationError(
            "no source files were given, expected those of the series that was judged"
        )
    instances = sorted(found.values(), key=_order)
    instances = [i for i in instances if i.ct_slice] or instances
    first = instances[0]
    return SourceSeries(
        study_instance_uid=study_instance_uid,
        series_instance_uid=series_instance_uid,
        frame_of_reference_uid=_valid_uid(first.frame_of_reference_uid),
        body_part_examined=_code_string(first.body_part_examined),
        lossy=any(instance.lossy for instance in instances),
        patient_and_study=_patient_and_study(first),
        instances=tuple(instances),
    )


def _path_of(source: Path | SourceFile) -> Path:
    return source.path if isinstance(source, SourceFile) else source


def _check_series(instance: SourceFile, study_instance_uid: str, series_instance_uid: str) -> None:
    for keyword, stated, expected in (
        ("StudyInstanceUID", instance.study_instance_uid, study_instance_uid),
        ("SeriesInstanceUID", instance.series_instance_uid, series_instance_uid),
    ):
        if not stated:
            raise DicomError(
                f"{instance.path}: {keyword} is missing. Send the image again from the scanner or "
                "the archive.",
                code=Code.MISSING_ATTRIBUTE,
            )
        if stated != expected:
            raise ConfigurationError(
                f"{instance.path}: {keyword} is not that of the outcome. Give the files of the "
                "series that was judged."
            )


def _order(instance: SourceFile) -> tuple[int, str]:
    return (instance.instance_number or 0, instance.sop_instance_uid)


def _code_string(text: str | None) -> str | None:
    """Return a valid value of VR CS (PS3.5 6.2), or ``None``."""
    if text is None or len(text) > 16:  # noqa: PLR2004  what the VR allows
        return None
    allowed = all(c.isascii() and (c.isupper() or c.isdigit() or c in " _") for c in text)
    return text if allowed else None


def _valid_uid(text: str | None) -> str | None:
    return text if text is not None and uid_of(text).is_valid else None


def _patient_and_study(instance: SourceFile) -> Dataset:
    """Return the attributes of patient and study, without those that cannot be written again."""
    path = instance.path
    keywords = (*REQUIRED_KEYWORDS, *OPTIONAL_KEYWORDS)
    try:
        source = pydicom.dcmread(
            path,
            force=True,
            stop_before_pixels=True,
            specific_tags=["SpecificCharacterSet", "SOPInstanceUID", *keywords],
        )
    except Exception as exc:  # noqa: BLE001  damaged files raise almost anything
        # Without what pydicom says of it, which may quote a value.
        raise DicomError(
            f"{path}: patient and study cannot be read ({type(exc).__name__}). Send the image "
            "again from the scanner or the archive.",
            code=Code.UNREADABLE_FILE,
        ) from None
    if Attributes(source, str(path)).text("SOPInstanceUID") != instance.sop_instance_uid:
        raise DicomError(
            f"{path}: holds another image than before, perhaps of another patient. Do not change "
            "files while they are read.",
            code=Code.UNREADABLE_FILE,
        )
    kept = Dataset()
    for keyword in keywords:
        if keyword in REQUIRED_KEYWORDS:
            setattr(kept, keyword, "")
        if keyword not in source:
            continue
        try:
            element = _in_utf_8(source, keyword)
        except Exception:  # noqa: BLE001, S112  damaged values raise almost anything
            continue
        if not element.is_empty:
            kept.add(element)
    if not any(keyword in kept for keyword in _DEIDENTIFICATION):
        kept.pop("PatientIdentityRemoved", None)  # which may not be said without saying how
    _complete_trial(kept)
    kept.remove_private_tags()  # within items, which are copied whole
    return kept


def _complete_trial(dataset: Dataset) -> None:
    """Remove a Clinical Trial Subject module that does not name trial and subject."""
    if not any(keyword in dataset for keyword in _TRIAL):
        return
    named = all(keyword in dataset for keyword in _TRIAL_STATED)
    if named and any(keyword in dataset for keyword in _TRIAL_SUBJECT):
        for keyword in _TRIAL_PRESENT:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
    else:
        for keyword in _TRIAL:
            dataset.pop(keyword, None)


def _in_utf_8(source: Dataset, keyword: str) -> DataElement:
    """Return an attribute that can be written in UTF-8, as is tried here."""
    single = Dataset()
    single.add(source[keyword])
    single.SpecificCharacterSet = source.get("SpecificCharacterSet", "")
    single.decode()
    single.SpecificCharacterSet = UTF_8
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, single)
    return single[keyword]
