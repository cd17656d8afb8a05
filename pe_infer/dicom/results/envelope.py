"""What all result objects have alike: patient, study, equipment, times, and the way into a file."""

import copy
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import pydicom
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian

from pe_infer.dicom.results.codes import PROCESSING_EQUIPMENT
from pe_infer.dicom.results.outcome import (
    MANUFACTURER,
    Identity,
    ObjectKind,
    ResultObject,
    software_version,
)
from pe_infer.dicom.results.sources import UTF_8, SourceSeries
from pe_infer.errors import ConfigurationError

RESEARCH_USE: Final = "Research use only, not for diagnosis."
_IMPLEMENTATION_UID: Final = UID("2.25.302873563911839166240325786148265410321")
_SERIES_NUMBERS: Final[Mapping[ObjectKind, int]] = {
    "report": 9201,
    "key_image": 9202,
    "key_object_selection": 9203,
    "attention": 9204,
}
# Those of PS3.16 annex L that a CT of the trunk or the head states, and that are no pair.
_SINGLE_BODY_PARTS: Final = frozenset(
    {
        "ABDOMEN",
        "ABDOMENPELVIS",
        "AORTA",
        "BRAIN",
        "CHEST",
        "CHESTABDOMEN",
        "CHESTABDPELVIS",
        "CSPINE",
        "HEAD",
        "HEADNECK",
        "HEART",
        "LIVER",
        "LSPINE",
        "MEDIASTINUM",
        "NECK",
        "NECKCHEST",
        "NECKCHESTABDOMEN",
        "NECKCHESTABDPELV",
        "PELVIS",
        "SKULL",
        "SPINE",
        "TSPINE",
        "WHOLEBODY",
    }
)
_LONG_STRING: Final = 64  # characters that VR LO holds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Envelope:
    """What all objects of one outcome have alike.

    Attributes:
        identity: Gives UIDs.
        sources: The series that was judged.
        made_at: Goes into every date and time that is not the source's.
        folder: Where the files go.
    """

    identity: Identity
    sources: SourceSeries
    made_at: datetime
    folder: Path

    @property
    def model(self) -> str:
        """ManufacturerModelName."""
        return long_string(f"{MANUFACTURER} {self.identity.bundle}")

    @property
    def serial_number(self) -> str:
        """DeviceSerialNumber: of the weights."""
        return self.identity.bundle_hash[:16] or "unknown"

    @property
    def software_versions(self) -> tuple[str, str]:
        """SoftwareVersions: of pe-infer and of the bundle."""
        bundle = f"{self.identity.bundle} {self.identity.bundle_version}"
        return (long_string(f"{MANUFACTURER} {software_version()}"), long_string(bundle))

    def identifiers(self, kind: ObjectKind, number: int = 1) -> dict[str, Any]:
        """Return the arguments that the constructors of highdicom's objects share."""
        return {
            "series_instance_uid": self.identity.series_uid(kind),
            "series_number": _SERIES_NUMBERS[kind],
            "sop_instance_uid": self.identity.instance_uid(kind, number),
            "instance_number": number,
            "manufacturer": MANUFACTURER,
        }

    def write(
        self, dataset: Dataset, kind: ObjectKind, name: str, description: str
    ) -> ResultObject:
        """Complete an object of highdicom and write it.

        Args:
            dataset: The object.
            kind: What it is.
            name: Of the file.
            description: SeriesDescription.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        complete = Dataset()
        complete.update(dataset)
        complete.SpecificCharacterSet = UTF_8
        for element in copy.deepcopy(self.sources.patient_and_study):
            complete.add(element)
        complete.SeriesDescription = long_string(description)
        self._add_equipment(complete)
        self._add_times(complete)
        complete.file_meta = FileMetaDataset()
        complete.file_meta.MediaStorageSOPClassUID = complete.SOPClassUID
        complete.file_meta.MediaStorageSOPInstanceUID = complete.SOPInstanceUID
        complete.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        complete.file_meta.ImplementationClassUID = _IMPLEMENTATION_UID
        complete.file_meta.ImplementationVersionName = "PE_INFER"
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, complete, enforce_file_format=True)
        path = self.folder / name
        write_bytes(path, buffer.getbuffer())
        return ResultObject(
            kind=kind,
            path=path,
            sop_class_uid=str(complete.SOPClassUID),
            sop_instance_uid=str(complete.SOPInstanceUID),
            transfer_syntax_uid=str(ExplicitVRLittleEndian),
        )

    def complete_image(self, dataset: Dataset) -> None:
        """Add what the General Series and General Image modules of an image take from the source.

        Ratio and method of a compression are not said: they are those of each image.
        """
        dataset.LossyImageCompression = "01" if self.sources.lossy else "00"
        if self.sources.body_part_examined is not None:
            dataset.BodyPartExamined = self.sources.body_part_examined
        if self.sources.body_part_examined not in _SINGLE_BODY_PARTS:
            dataset.Laterality = ""  # required where the body part might be one of a pair

    def _add_equipment(self, dataset: Dataset) -> None:
        """General Equipment module, and ContributingEquipmentSequence of SOP Common."""
        dataset.Manufacturer = MANUFACTURER
        dataset.ManufacturerModelName = self.model
        dataset.DeviceSerialNumber = self.serial_number
        dataset.SoftwareVersions = list(self.software_versions)
        item = Dataset()
        item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(PROCESSING_EQUIPMENT)]
        item.Manufacturer = MANUFACTURER
        item.ManufacturerModelName = self.model
        item.DeviceSerialNumber = self.serial_number
        item.SoftwareVersions = list(self.software_versions)
        item.DeviceUID = self.identity.device_uid()
        item.ContributionDescription = "Judged the source images"
        dataset.ContributingEquipmentSequence = [item]

    def _add_times(self, dataset: Dataset) -> None:
        """Replace the times of the clock, which highdicom has written."""
        offset = self.sources.patient_and_study.get("TimezoneOffsetFromUTC")
        moment = _in_time_of_study(self.made_at, None if offset is None else str(offset))
        for prefix in ("InstanceCreation", "Content"):
            if f"{prefix}Date" in dataset:
                setattr(dataset, f"{prefix}Date", moment.strftime("%Y%m%d"))
                setattr(dataset, f"{prefix}Time", moment.strftime("%H%M%S.%f"))
        if "DateOfSecondaryCapture" in dataset:
            dataset.DateOfSecondaryCapture = moment.strftime("%Y%m%d")
            dataset.TimeOfSecondaryCapture = moment.strftime("%H%M%S.%f")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file.

    Raises:
        ConfigurationError: The system does not let it, or has no space for it.
    """
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise ConfigurationError(
            f"{path}: cannot be written: {exc.strerror}. Check the folder and the space in it."
        ) from exc


def long_string(text: str) -> str:
    """Return text as VR LO holds it: 64 characters, no backslash."""
    return text.replace("\\", "/")[:_LONG_STRING]


def plain(text: str) -> str:
    """Return text in ASCII, for fonts that have no more."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def replace_sequence(dataset: Dataset, keyword: str, items: Sequence[Dataset]) -> None:
    """Set a sequence to plain items.

    highdicom's own sequences index and check every item, which takes seconds for a thousand images.
    """
    tag = Tag(keyword)
    dataset[tag] = pydicom.DataElement(tag, "SQ", pydicom.Sequence(items))


def _in_time_of_study(moment: datetime, offset: str | None) -> datetime:
    """Return a moment in the time zone of the study: the one it states, else the machine's."""
    if moment.tzinfo is None:
        return moment
    if offset is None:
        return moment.astimezone()
    if not re.fullmatch(r"[+-]\d{4}", offset, re.ASCII):
        return moment.astimezone(UTC)
    shift = timedelta(hours=int(offset[1:3]), minutes=int(offset[3:5]))
    try:
        return moment.astimezone(timezone(-shift if offset[0] == "-" else shift))
    except ValueError:  # a day or more
        return moment.astimezone(UTC)
