"""Key images: Secondary Capture of the slices that show a finding best, for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.conversion import slice_of
from pe_infer.dicom.frames import frames_of
from pe_infer.dicom.headers import ImageHeader, image_headers
from pe_infer.dicom.layout import pixel_layout
from pe_infer.dicom.reading import read_image, translated
from pe_infer.dicom.results import codes
from pe_infer.dicom.results.envelope import RESEARCH_USE, Envelope, plain
from pe_infer.dicom.results.outcome import ResultObject
from pe_infer.dicom.results.rendering import display_window, rendered
from pe_infer.dicom.results.selection import KeySlab, Selection
from pe_infer.dicom.results.sources import reference_to
from pe_infer.dicom.source_file import SourceFile
from pe_infer.errors import Code, DicomError
from pe_infer.geometry import Slice, SliceGeometry, Vector
from pe_infer.result import StudyResult

BURNT_IN: Final = "RESEARCH USE, NOT FOR DIAGNOSIS"
_RESEND: Final = "Send the file again."
_LETTERS: Final = ("RL", "AP", "FH")  # negative and positive end of each axis of the patient


def write_key_images(
    result: StudyResult, selection: Selection, envelope: Envelope
) -> list[ResultObject]:
    """Write ``key-image-1.dcm`` and on.

    Raises:
        DicomError: A slice cannot be read any more.
    """
    strongest = max(
        (slab.attention.peak for slab in result.evidence if slab.attention is not None),
        default=0.0,
    )
    opened: dict[Path, tuple[Dataset, list[ImageHeader]]] = {}  # one file may hold all frames
    written = []
    for number, key in enumerate(selection.slabs, start=1):
        instance = envelope.sources.find(key.slab.sop_instance_uid)
        if instance.path not in opened:
            dataset = read_image(instance.path)
            opened[instance.path] = (dataset, image_headers(dataset, str(instance.path)))
        image = _decoded(instance, *opened[instance.path], key.slab.frame_number)
        windows = _windows(instance, opened[instance.path][0], key.slab.frame_number)
        count = len(selection.slabs)
        shown = _Shown(instance=instance, image=image, windows=windows, number=number, count=count)
        written.append(_write(result, key, shown, strongest, envelope))
    return written


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shown:
    """The slice of one key image."""

    instance: SourceFile
    image: Slice
    windows: Sequence[tuple[float, float]]
    number: int
    count: int


def _write(
    result: StudyResult, key: KeySlab, shown: _Shown, strongest: float, envelope: Envelope
) -> ResultObject:
    slab, image, number = key.slab, shown.image, shown.number
    window = display_window(shown.windows)
    meaning = result.finding.code.meaning
    source_number = shown.instance.instance_number
    place = "" if source_number is None else f"image {source_number}, "
    below = [
        plain(f"{meaning}: key image {number} of {shown.count}; {place}{slab.position_mm:.1f} mm"),
        plain(f"{key.strength}. Window {window}"),
    ]
    if slab.attention is not None:
        below.append("Colour: where the network looked. No outline of a finding.")
    pixels = rendered(
        image,
        slab.attention,
        strongest=strongest,
        window=window,
        above=[BURNT_IN],
        below=below,
        sides=sides_of(image.geometry),
    )
    dataset = SCImage(
        pixel_array=np.ascontiguousarray(pixels),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=envelope.sources.study_instance_uid,
        patient_orientation=patient_orientation(image.geometry),
        **envelope.identifiers("key_image", number),
    )
    dataset.ConversionType = "SYN"
    # What is burnt in here identifies nobody (PS3.3 C.7.6.1); whether the source does, it has said.
    if (stated := shown.instance.burned_in_annotation) in {"YES", "NO"}:
        dataset.BurnedInAnnotation = stated
    default = ", a default" if window not in shown.windows else ""
    wash = "no attention" if slab.attention is None else "attention as a colour wash"
    dataset.DerivationDescription = (
        f"{key.strength}; window {window} HU{default}; {wash}. {RESEARCH_USE}"
    )
    source = reference_to(shown.instance, slab.frame_number)
    source.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    dataset.SourceImageSequence = [source]
    envelope.complete_image(dataset)
    spacing_um = [
        round(1000 * mm) for mm in (image.geometry.row_spacing_mm, image.geometry.col_spacing_mm)
    ]
    if spacing_um[0] != spacing_um[1]:  # a ratio of 1:1 may not be said
        dataset.PixelAspectRatio = spacing_um
    return envelope.write(
        dataset,
        "key_image",
        f"key-image-{number}.dcm",
        f"{envelope.model}: key images of {meaning}",
    )


def patient_orientation(geometry: SliceGeometry) -> tuple[str, str]:
    """Return PatientOrientation (PS3.3 C.7.6.1.1.1) of rows and columns, such as ("L", "P")."""
    return _letter(geometry.row_direction), _letter(geometry.col_direction)


def sides_of(geometry: SliceGeometry) -> tuple[str, str]:
    """Return the sides of the patient that are left and right in the picture."""
    row = geometry.row_direction
    return _letter((-row[0], -row[1], -row[2])), _letter(row)


def _letter(direction: Vector) -> str:
    """Return the main direction, which is all that highdicom takes."""
    axis = max(range(3), key=lambda a: abs(direction[a]))
    return _LETTERS[axis][direction[axis] > 0]


def _decoded(
    instance: SourceFile,
    dataset: Dataset,
    headers: Sequence[ImageHeader],
    frame_number: int | None,
) -> Slice:
    header = next((h for h in headers if h.frame_number == frame_number), None)
    if header is None or header.sop_instance_uid != instance.sop_instance_uid:
        raise DicomError(
            f"{instance.path}: does not hold the slice of a key image any more. Do not change "
            "files while they are read.",
            code=Code.UNREADABLE_FILE,
        )
    return slice_of(dataset, header)


def _windows(
    instance: SourceFile, dataset: Dataset, frame_number: int | None
) -> list[tuple[float, float]]:
    """Return the windows (centre, width) that the file suggests."""
    name = str(instance.path)
    if frame_number is None:
        with translated(name, "read the window", code=Code.UNREADABLE_FILE, remedy=_RESEND):
            stated = pydicom.dcmread(
                instance.path,
                force=True,
                stop_before_pixels=True,
                specific_tags=["WindowCenter", "WindowWidth"],
            )
        group: Attributes | None = Attributes(stated, name)
    else:
        a = Attributes(dataset, name)
        frames = frames_of(a, instance.sop_class_uid, pixel_layout(a))
        groups = next(groups for number, groups in frames if number == frame_number)
        group = groups.group("FrameVOILUTSequence")
    if group is None:
        return []
    try:
        centres = [float(text) for text in group.texts("WindowCenter")]
        widths = [float(text) for text in group.texts("WindowWidth")]
    except ValueError:
        return []
    return list(zip(centres, widths, strict=False))
