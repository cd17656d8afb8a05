"""What result objects repeat of the files that an outcome is made of, without reading them again.

It is taken from each file when that is read for its pixels. Of the patient it holds nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.frames import MULTI_FRAME_CLASSES
from pe_infer.dicom.headers import ImageHeader, check_ct_slice, image_headers, is_lossy
from pe_infer.dicom.reading import Quiet, read_header, stated_transfer_syntax
from pe_infer.errors import DicomError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One instance of a series. Some 0.8 kB; what instances have in common is held once.

    Attributes:
        path: File.
        study_instance_uid: Its study; empty if it does not say.
        series_instance_uid: Its series.
        sop_class_uid: SOPClassUID.
        sop_instance_uid: SOPInstanceUID.
        ct_slice: Whether it is a CT slice or a stack of them, not a localizer or the like.
        positions_mm: Of its images along the slice normal, by frame; none if it does not say.
        instance_number: InstanceNumber, if known.
        frame_of_reference_uid: FrameOfReferenceUID, if stated.
        body_part_examined: BodyPartExamined, if stated.
        lossy: Whether it has ever been compressed with loss.
        burned_in_annotation: BurnedInAnnotation, if stated.
    """

    path: Path
    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    ct_slice: bool
    positions_mm: tuple[float, ...]
    instance_number: int | None
    frame_of_reference_uid: str | None
    body_part_examined: str | None
    lossy: bool
    burned_in_annotation: str | None

    def frame_number(self, index: int) -> int | None:
        """1-based number of the frame that ``positions_mm[index]`` is of, if it has frames."""
        return index + 1 if self.sop_class_uid in MULTI_FRAME_CLASSES else None


@Quiet()
def read_source_file(path: Path) -> SourceFile:
    """Read the header of a file, which may be any kind of instance.

    Raises:
        DicomError: The file cannot be read, or lacks an identity.
    """
    dataset = read_header(path)
    try:
        check_ct_slice(dataset, str(path))
    except DicomError:
        return source_file(dataset, path, [], ct_slice=False)
    try:
        headers = image_headers(dataset, str(path))
    except InputError:
        headers = []
    return source_file(dataset, path, headers)


@Quiet()
def source_file(
    dataset: Dataset, path: Path, headers: Sequence[ImageHeader], *, ct_slice: bool = True
) -> SourceFile:
    """Describe a file that has been read.

    Args:
        dataset: Attributes of ``reading.HEADER_KEYWORDS``.
        path: Where they are from.
        headers: Of its images; none if they make no sense.
        ct_slice: Whether it is one.

    Raises:
        DicomError: ``MISSING_ATTRIBUTE``: it lacks an identity.
    """
    a = Attributes(dataset, str(path))
    return SourceFile(
        path=path,
        study_instance_uid=sys.intern(a.text("StudyInstanceUID") or ""),
        series_instance_uid=sys.intern(a.required_text("SeriesInstanceUID")),
        sop_class_uid=sys.intern(a.required_text("SOPClassUID")),
        sop_instance_uid=a.required_text("SOPInstanceUID"),
        ct_slice=ct_slice,
        positions_mm=tuple(header.geometry.position_mm for header in headers),
        instance_number=a.harmless_whole("InstanceNumber"),
        frame_of_reference_uid=_shared(a.text("FrameOfReferenceUID")),
        body_part_examined=_shared(a.text("BodyPartExamined")),
        lossy=is_lossy(
            stated_transfer_syntax(dataset) or ExplicitVRLittleEndian,
            a.text("LossyImageCompression"),
        ),
        burned_in_annotation=_shared(a.text("BurnedInAnnotation")),
    )


def _shared(text: str | None) -> str | None:
    """Return a text that other files have too, so that it is in memory once."""
    return None if text is None else sys.intern(text)
