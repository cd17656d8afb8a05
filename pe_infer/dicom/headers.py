"""What the header of a CT instance says of its images; and which instances are no CT slices.

Nothing is assumed: a missing position, orientation, spacing or rescale is a refusal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.decoding import LOSSY_SYNTAXES, MAYBE_LOSSY_SYNTAXES
from pe_infer.dicom.frames import (
    MULTI_FRAME_CLASSES,
    SEND_AXIAL,
    SEND_POSITIONED,
    FrameAttributes,
    frames_of,
    image_type_of,
)
from pe_infer.dicom.layout import PixelLayout, pixel_layout
from pe_infer.dicom.reading import Quiet, transfer_syntax_of, uid_of
from pe_infer.errors import Code, DicomError, GeometryError
from pe_infer.geometry import (
    INT16_MIN,
    MAX_COMPONENT,
    MAX_MM,
    UINT16_MAX,
    SeriesInfo,
    SliceGeometry,
    Vector,
)

CT_CLASSES = frozenset({CTImageStorage}) | MULTI_FRAME_CLASSES

# Words in ImageType or FrameType of images whose pixels are no attenuation in a slice.
NOT_SLICES: Mapping[str, str] = {
    "LOCALIZER": "a localizer",
    "SCOUT": "a localizer",
    "TOPOGRAM": "a localizer",
    "SURVIEW": "a localizer",
    "DOSE": "a dose page",
    "SCREEN": "a screen shot",
    "CAPTURE": "a screen shot",
    "PROJECTION": "a projection",
    "MIP": "a maximum intensity projection",
    "MAXIP": "a maximum intensity projection",
    "MINIP": "a minimum intensity projection",
    "MAXIMUM": "a maximum intensity projection",
    "MINIMUM": "a minimum intensity projection",
    "VRT": "a volume rendering",
    "SSD": "a surface rendering",
    "PERFUSION": "a perfusion map",
    "SUBTRACTION": "a subtraction",
    "DIVISION": "a quotient of images",
    "MULTIPLICATION": "a product of images",
    "DEVIATION": "a map of deviations",
    "QUANTITY": "a map of a computed quantity",
    # Value 4 of multi-energy images (PS3.3 C.8.2.1.1.1): MAT_SPECIFIC, MAT_REMOVED and the like,
    # EFF_ATOMIC_NUM, ELECTRON_DENSITY. Those with a material removed show no contrast agent.
    "MAT": "a map of materials",
    "ATOMIC": "a map of atomic numbers",
    "ELECTRON": "a map of electron densities",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """All that is known of one image (one frame) before its pixels are decoded.

    Attributes:
        name: File, for messages.
        geometry: Place in the patient.
        rescale_slope: HU per stored value.
        rescale_intercept: HU of the stored value 0.
        padding: Declared inclusive range of stored values that mean "no data", in the sign of the
            pixels.
        layout: How the pixels are stored.
        transfer_syntax: How the pixel data is encoded.
        lossy: Whether the image has ever been compressed with loss.
        series: What the series says of itself.
        image_type: ImageType or FrameType, upper case.
        sop_class_uid: SOPClassUID.
        sop_instance_uid: SOPInstanceUID.
        frame_index: 0-based frame in the pixel data.
        frame_number: 1-based frame of a multi-frame class, ``None`` for a classic image.
        instance_number: InstanceNumber, if known.
        acquisition_number: AcquisitionNumber or FrameAcquisitionNumber, if known.
    """

    name: str
    geometry: SliceGeometry
    rescale_slope: float
    rescale_intercept: float
    padding: tuple[int, int] | None
    layout: PixelLayout
    transfer_syntax: UID
    lossy: bool
    series: SeriesInfo
    image_type: tuple[str, ...]
    sop_class_uid: str
    sop_instance_uid: str
    frame_index: int
    frame_number: int | None
    instance_number: int | None
    acquisition_number: int | None


@Quiet()
def check_ct_slice(dataset: Dataset, name: str) -> None:
    """Refuse whatever is not a CT slice (or a stack of them) by its kind.

    Raises:
        DicomError: ``NOT_CT`` for another modality or object; ``NOT_AXIAL_IMAGE`` for a localizer,
            a dose page, a secondary capture, a projection or a map, also where they say Modality
            CT.
    """
    a = Attributes(dataset, name)
    sop_class = uid_of(a.required_text("SOPClassUID"))
    modality = a.text("Modality")
    image_type = image_type_of(a)
    if sop_class not in CT_CLASSES:
        if modality == "CT":
            raise DicomError(
                f"{name}: {_article(sop_class.name)} with Modality CT is not a CT slice. "
                f"{SEND_AXIAL}",
                code=Code.NOT_AXIAL_IMAGE,
            )
        raise DicomError(
            f"{name}: {_article(sop_class.name)} (Modality {modality or 'missing'}) is not a CT "
            f"image. {SEND_AXIAL}",
            code=Code.NOT_CT,
        )
    if modality is None:
        raise a.missing("Modality")
    if modality != "CT":
        raise DicomError(
            f"{name}: Modality is {modality}, expected CT. {SEND_AXIAL}", code=Code.NOT_CT
        )
    _check_image_type(name, "ImageType", image_type)


@Quiet()
def image_headers(dataset: Dataset, name: str) -> list[ImageHeader]:
    """Read the header of a CT instance: one entry for a classic image, one per frame of others.

    Args:
        dataset: Attributes, with or without pixel data.
        name: File, for messages.

    Raises:
        DicomError: This is no CT slice (see ``check_ct_slice``); an attribute is missing or makes
            no sense (``MISSING_ATTRIBUTE``, ``INVALID_ATTRIBUTE``); the values are not Hounsfield
            units or are stored in a way that is not supported (``UNSUPPORTED_PIXELS``). Nothing is
            assumed for a missing position, orientation, spacing or rescale.
        GeometryError: Position, orientation and spacing contradict each other, or the image is not
            axial.
    """
    check_ct_slice(dataset, name)
    a = Attributes(dataset, name)
    sop_class = a.required_text("SOPClassUID")
    layout = pixel_layout(a)
    if a.items("ModalityLUTSequence"):
        raise DicomError(
            f"{name}: has a ModalityLUTSequence, expected RescaleSlope and RescaleIntercept. "
            f"{SEND_AXIAL}",
            code=Code.UNSUPPORTED_PIXELS,
        )
    transfer_syntax = transfer_syntax_of(dataset, name)
    lossy = is_lossy(transfer_syntax, a.text("LossyImageCompression"))
    uid = a.required_text("SOPInstanceUID")
    padding = declared_padding(a, layout)
    headers = []
    for index, (frame, groups) in enumerate(frames_of(a, sop_class, layout)):
        where = name if frame is None else f"{name} frame {frame}"
        image_type = groups.image_type
        _check_image_type(where, "FrameType", image_type)
        slope, intercept = groups.rescale()
        headers.append(
            ImageHeader(
                name=name,
                geometry=_geometry(groups, layout),
                rescale_slope=slope,
                rescale_intercept=intercept,
                padding=padding,
                layout=layout,
                transfer_syntax=transfer_syntax,
                lossy=lossy,
                series=_series_info(a, groups),
                image_type=image_type,
                sop_class_uid=sop_class,
                sop_instance_uid=uid,
                frame_index=index,
                frame_number=frame,
                instance_number=a.harmless_whole("InstanceNumber"),
                acquisition_number=groups.acquisition_number(),
            )
        )
    return headers


def is_lossy(transfer_syntax: UID, declared: str | None) -> bool:
    """Tell whether an image has been compressed with loss (PS3.3 C.7.6.1.1.5, PS3.5 8.2).

    Args:
        transfer_syntax: How the pixel data is encoded now.
        declared: LossyImageCompression: "01" if it ever was, "00" if never.
    """
    if declared == "01" or transfer_syntax in LOSSY_SYNTAXES:
        return True
    return transfer_syntax in MAYBE_LOSSY_SYNTAXES and declared != "00"


def declared_padding(a: Attributes, layout: PixelLayout) -> tuple[int, int] | None:
    """Return the range of PixelPaddingValue and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2).

    The two may come in either order. Writers often store a negative value as an unsigned one (63536
    for -2000): the bits are read with the sign of the pixels.

    Raises:
        DicomError: ``INVALID_ATTRIBUTE`` if a value does not fit into 16 bits.
    """
    ends = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = a.whole(keyword)
        if value is not None and not INT16_MIN <= value <= UINT16_MAX:
            raise a.invalid(keyword, value, "a value of 16 bits")
        ends.append(value if value is None else layout.as_stored(value))
    padding, limit = ends
    if padding is None:
        return None
    limit = padding if limit is None else limit
    return (min(padding, limit), max(padding, limit))


def _geometry(groups: FrameAttributes, layout: PixelLayout) -> SliceGeometry:
    position = groups.required("PlanePositionSequence")
    corner = position.required_numbers("ImagePositionPatient", 3, SEND_POSITIONED, most=MAX_MM)
    orientation = groups.required("PlaneOrientationSequence")
    axes = orientation.required_numbers(
        "ImageOrientationPatient", 6, SEND_POSITIONED, most=MAX_COMPONENT
    )
    measures = groups.required("PixelMeasuresSequence")
    spacing = measures.required_numbers("PixelSpacing", 2, SEND_POSITIONED, most=MAX_MM)
    try:
        thickness = measures.number("SliceThickness")
    except DicomError:
        thickness = None
    try:
        return SliceGeometry(
            rows=layout.rows,
            cols=layout.cols,
            row_spacing_mm=spacing[0],
            col_spacing_mm=spacing[1],
            image_position_mm=_vector(corner),
            row_direction=_vector(axes[:3]),
            col_direction=_vector(axes[3:]),
            thickness_mm=thickness if thickness is not None and thickness > 0 else None,
        )
    except GeometryError as exc:
        remedy = "" if exc.code is Code.NON_AXIAL else f". {SEND_POSITIONED}"
        raise GeometryError(f"{position.name}: {exc}{remedy}", code=exc.code) from exc


def _series_info(a: Attributes, groups: FrameAttributes) -> SeriesInfo:
    agent = a.text("ContrastBolusAgent")
    if agent is None:
        item = a.item("ContrastBolusAgentSequence")
        agent = item.text("CodeMeaning") if item is not None else None
    return SeriesInfo(
        series_instance_uid=a.required_text("SeriesInstanceUID"),
        study_instance_uid=a.text("StudyInstanceUID") or "",
        frame_of_reference_uid=a.text("FrameOfReferenceUID"),
        modality=a.text("Modality") or "",
        body_part_examined=groups.body_part(),
        protocol_name=a.text("ProtocolName"),
        series_description=a.text("SeriesDescription"),
        study_description=a.text("StudyDescription"),
        contrast_bolus_agent=agent,
        patient_position=a.text("PatientPosition"),
        convolution_kernel=groups.kernel(),
        manufacturer=a.text("Manufacturer"),
        series_number=a.harmless_whole("SeriesNumber"),
    )


def _check_image_type(name: str, keyword: str, image_type: tuple[str, ...]) -> None:
    stated = "\\".join(image_type)
    for word in re.split(r"[^A-Z0-9]+", stated):
        if word in NOT_SLICES:
            raise DicomError(
                f"{name}: {keyword} {stated} is {NOT_SLICES[word]}, not a CT slice. {SEND_AXIAL}",
                code=Code.NOT_AXIAL_IMAGE,
            )


def _article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'AEIOU' else 'a'} {noun}"


def _vector(values: tuple[float, ...]) -> Vector:
    return (values[0], values[1], values[2])
