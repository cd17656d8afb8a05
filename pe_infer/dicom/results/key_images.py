"""Key images: Secondary Capture of the slices that show a finding best, for people to look at."""

from typing import Final

import numpy as np
import pydicom
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.conversion import slice_of
from pe_infer.dicom.frames import frames_of
from pe_infer.dicom.headers import image_headers
from pe_infer.dicom.layout import pixel_layout
from pe_infer.dicom.reading import Quiet, read_image
from pe_infer.dicom.results import codes
from pe_infer.dicom.results.envelope import RESEARCH_USE, Envelope, plain
from pe_infer.dicom.results.outcome import ResultObject
from pe_infer.dicom.results.rendering import DEFAULT_WINDOW, display_window, rendered
from pe_infer.dicom.results.selection import KeySlab, Selection
from pe_infer.dicom.results.sources import SourceInstance
from pe_infer.errors import Code, DicomError
from pe_infer.geometry import Slice, SliceGeometry, Vector
from pe_infer.result import StudyResult

BURNT_IN: Final = "RESEARCH USE, NOT FOR DIAGNOSIS"
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
    return [
        _write(result, key, envelope, strongest, number, len(selection.slabs))
        for number, key in enumerate(selection.slabs, start=1)
    ]


def _write(
    result: StudyResult,
    key: KeySlab,
    envelope: Envelope,
    strongest: float,
    number: int,
    count: int,
) -> ResultObject:
    slab = key.slab
    instance = envelope.sources.find(slab.sop_instance_uid)
    image, windows = _read(instance, slab.frame_number)
    window = display_window(windows)
    meaning = result.finding.code.meaning
    below = [
        plain(f"{meaning}: key image {number} of {count}, {slab.position_mm:.1f} mm"),
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
    )
    stand_in = envelope.sources.stand_in(instance)
    dataset = SCImage(
        pixel_array=np.ascontiguousarray(pixels),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=stand_in.StudyInstanceUID,
        patient_orientation=patient_orientation(image.geometry),
        **envelope.identifiers("key_image", number),
    )
    dataset.ConversionType = "SYN"
    dataset.BurnedInAnnotation = "YES"
    default = ", a default" if window == DEFAULT_WINDOW and window not in windows else ""
    dataset.DerivationDescription = (
        f"{key.strength}; window {window} HU{default}; attention as a colour wash. {RESEARCH_USE}"
    )
    source = instance.reference(slab.frame_number)
    source.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    dataset.SourceImageSequence = [source]
    envelope.complete_image(dataset)
    spacing = (image.geometry.row_spacing_mm, image.geometry.col_spacing_mm)
    if spacing[0] != spacing[1]:
        dataset.PixelAspectRatio = [round(1000 * mm) for mm in spacing]
    return envelope.write(
        dataset,
        "key_image",
        f"key-image-{number}.dcm",
        f"{envelope.model}: key images of {meaning}",
    )


def patient_orientation(geometry: SliceGeometry) -> tuple[str, str]:
    """Return PatientOrientation (PS3.3 C.7.6.1.1.1) of rows and columns, such as ("L", "P")."""
    return _letter(geometry.row_direction), _letter(geometry.col_direction)


def _letter(direction: Vector) -> str:
    """Return the main direction, which is all that highdicom takes."""
    axis = max(range(3), key=lambda a: abs(direction[a]))
    return _LETTERS[axis][direction[axis] > 0]


@Quiet()
def _read(
    instance: SourceInstance, frame_number: int | None
) -> tuple[Slice, list[tuple[float, float]]]:
    """Decode one image; and the windows (centre, width) that its file suggests."""
    name = str(instance.path)
    dataset = read_image(instance.path)
    header = next((h for h in image_headers(dataset, name) if h.frame_number == frame_number), None)
    if header is None:
        raise DicomError(
            f"{name}: has no frame {frame_number}. Do not change files while they are read.",
            code=Code.UNREADABLE_FILE,
        )
    return slice_of(dataset, header), _windows(instance, dataset, frame_number)


def _windows(
    instance: SourceInstance, dataset: Dataset, frame_number: int | None
) -> list[tuple[float, float]]:
    name = str(instance.path)
    if frame_number is None:
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
