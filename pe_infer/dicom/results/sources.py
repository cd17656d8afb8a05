"""The series that an outcome is about, as far as objects have to repeat or reference it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.headers import check_ct_slice, image_headers, is_lossy
from pe_infer.dicom.reading import Quiet, read_header, stated_transfer_syntax
from pe_infer.errors import Code, ConfigurationError, DicomError, InputError

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
_DEIDENTIFICATION = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceInstance:
    """One instance of the series.

    Attributes:
        path: File.
        header: Attributes of ``reading.HEADER_KEYWORDS``.
        sop_class_uid: SOPClassUID.
        sop_instance_uid: SOPInstanceUID.
    """

    path: Path
    header: Dataset
    sop_class_uid: str
    sop_instance_uid: str

    def reference(self, frame_number: int | None = None) -> Dataset:
        """Return an item that references this instance, or one frame of it."""
        item = Dataset()
        item.ReferencedSOPClassUID = self.sop_class_uid
        item.ReferencedSOPInstanceUID = self.sop_instance_uid
        if frame_number is not None:
            item.ReferencedFrameNumber = frame_number
        return item


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceSeries:
    """The series that was judged.

    Attributes:
        study_instance_uid: Its study.
        series_instance_uid: Its UID.
        frame_of_reference_uid: Its frame of reference, ``None`` if it does not say.
        body_part_examined: As it says, if that is a valid code string.
        lossy: Whether an image of it has ever been compressed with loss.
        patient_and_study: Attributes of these modules, in UTF-8.
        instances: By InstanceNumber. Localizers and the like are left out where there are slices.
    """

    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str | None
    body_part_examined: str | None
    lossy: bool
    patient_and_study: Dataset
    instances: tuple[SourceInstance, ...]

    def find(self, sop_instance_uid: str) -> SourceInstance:
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

    def nearest(self, position_mm: float) -> tuple[SourceInstance, int | None] | None:
        """Return the image nearest to a position along the slice normal, and its frame.

        ``None`` if no instance says where it lies.
        """
        best: tuple[float, SourceInstance, int | None] | None = None
        for instance in self.instances:
            try:
                headers = image_headers(instance.header, str(instance.path))
            except InputError:
                continue
            for header in headers:
                distance = abs(header.geometry.position_mm - position_mm)
                if best is None or distance < best[0]:
                    best = (distance, instance, header.frame_number)
        return None if best is None else best[1:]

    def evidence(self, instances: Sequence[SourceInstance]) -> Dataset:
        """Return an item of CurrentRequestedProcedureEvidenceSequence (PS3.3 C.17.2)."""
        item = Dataset()
        item.StudyInstanceUID = self.study_instance_uid
        item.ReferencedSeriesSequence = [self.references(instances, "ReferencedSOPSequence")]
        return item

    def references(self, instances: Sequence[SourceInstance], keyword: str) -> Dataset:
        """Return an item that references instances of this series in a sequence ``keyword``."""
        item = Dataset()
        item.SeriesInstanceUID = self.series_instance_uid
        setattr(item, keyword, [instance.reference() for instance in instances])
        return item

    def stand_in(self, instance: SourceInstance) -> Dataset:
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


@Quiet()
def read_sources(
    paths: Sequence[Path],
    *,
    study_instance_uid: str,
    series_instance_uid: str,
    skip_unreadable: bool,
) -> SourceSeries:
    """Read the headers of a series.

    Args:
        paths: Its files, in any order.
        study_instance_uid: The study that they should be of.
        series_instance_uid: The series that they should be of.
        skip_unreadable: Whether a file that is no DICOM is left out, as long as others remain.

    Raises:
        ConfigurationError: There is no file, or one is of another study or series.
        DicomError: A file cannot be read.
    """
    found: dict[str, SourceInstance] = {}
    refusal: DicomError | None = None
    for path in sorted(paths):
        try:
            instance = _instance(path, study_instance_uid, series_instance_uid)
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
    instances = [i for i in instances if _is_ct_slice(i)] or instances
    first = Attributes(instances[0].header, str(instances[0].path))
    return SourceSeries(
        study_instance_uid=study_instance_uid,
        series_instance_uid=series_instance_uid,
        frame_of_reference_uid=first.text("FrameOfReferenceUID"),
        body_part_examined=_code_string(first.text("BodyPartExamined")),
        lossy=any(_is_lossy(instance) for instance in instances),
        patient_and_study=_patient_and_study(instances[0].path),
        instances=tuple(instances),
    )


def _instance(path: Path, study_instance_uid: str, series_instance_uid: str) -> SourceInstance:
    header = read_header(path)
    a = Attributes(header, str(path))
    for keyword, expected in (
        ("StudyInstanceUID", study_instance_uid),
        ("SeriesInstanceUID", series_instance_uid),
    ):
        if a.required_text(keyword) != expected:
            raise ConfigurationError(
                f"{path}: {keyword} is not that of the outcome. Give the files of the series that "
                "was judged."
            )
    return SourceInstance(
        path=path,
        header=header,
        sop_class_uid=a.required_text("SOPClassUID"),
        sop_instance_uid=a.required_text("SOPInstanceUID"),
    )


def _order(instance: SourceInstance) -> tuple[int, str]:
    number = Attributes(instance.header, str(instance.path)).harmless_whole("InstanceNumber")
    return (number or 0, instance.sop_instance_uid)


def _is_ct_slice(instance: SourceInstance) -> bool:
    try:
        check_ct_slice(instance.header, str(instance.path))
    except DicomError:
        return False
    return True


def _is_lossy(instance: SourceInstance) -> bool:
    declared = Attributes(instance.header, str(instance.path)).text("LossyImageCompression")
    return is_lossy(stated_transfer_syntax(instance.header) or ExplicitVRLittleEndian, declared)


def _code_string(text: str | None) -> str | None:
    """Return a valid value of VR CS (PS3.5 6.2), or ``None``."""
    if text is None or len(text) > 16:  # noqa: PLR2004  what the VR allows
        return None
    allowed = all(c.isascii() and (c.isupper() or c.isdigit() or c in " _") for c in text)
    return text if allowed else None


def _patient_and_study(path: Path) -> Dataset:
    """Return the attributes of patient and study, without those that cannot be written again."""
    keywords = (*REQUIRED_KEYWORDS, *OPTIONAL_KEYWORDS)
    try:
        source = pydicom.dcmread(
            path,
            force=True,
            stop_before_pixels=True,
            specific_tags=["SpecificCharacterSet", *keywords],
        )
    except Exception as exc:  # noqa: BLE001  damaged files raise almost anything
        # Without what pydicom says of it, which may quote a value.
        raise DicomError(
            f"{path}: patient and study cannot be read ({type(exc).__name__}). Send the image "
            "again from the scanner or the archive.",
            code=Code.UNREADABLE_FILE,
        ) from None
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
    return kept


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
