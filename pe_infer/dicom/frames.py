"""The attributes of each frame: from functional groups, or from the data set of a classic image.

Enhanced CT images (PS3.3 A.38) keep geometry, rescale and frame type in functional groups, which
are stated per frame or once for all frames.
"""

from collections.abc import Iterator

from pydicom.uid import EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.layout import PixelLayout
from pe_infer.errors import Code, DicomError
from pe_infer.geometry import MAX_RESCALE, MIN_SLOPE

MULTI_FRAME_CLASSES = frozenset({EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})
HU_TYPES = frozenset({"HU", "HU_MOD"})
SEND_AXIAL = "Send the axial CT reconstruction."
SEND_POSITIONED = (
    "Send the original images: an image without a place in the patient cannot be used."
)


class FrameAttributes:
    """The attributes of one frame: its functional groups, or the data set of a classic image."""

    def __init__(
        self, top: Attributes, name: str, shared: Attributes | None, frame: Attributes | None
    ) -> None:
        self._top = top
        self._name = name
        self._levels = [level for level in (frame, shared) if level is not None]
        self._classic = not self._levels

    @property
    def image_type(self) -> tuple[str, ...]:
        """FrameType, or ImageType."""
        group = self.group("CTImageFrameTypeSequence")
        texts = group.texts("FrameType") if group is not None else ()
        return tuple(text.upper() for text in texts) or image_type_of(self._top)

    def group(self, sequence: str) -> Attributes | None:
        """Return a functional group: the frame's, else the shared one; of a classic image, all."""
        if self._classic:
            return self._top
        for level in self._levels:
            item = level.item(sequence)
            if item is not None:
                return Attributes(item.dataset, self._name)
        return None

    def required(self, sequence: str, remedy: str = SEND_POSITIONED) -> Attributes:
        """Return a functional group that must exist.

        Raises:
            DicomError: ``MISSING_ATTRIBUTE``.
        """
        group = self.group(sequence)
        if group is None:
            raise DicomError(
                f"{self._name}: {sequence} is missing. {remedy}", code=Code.MISSING_ATTRIBUTE
            )
        return group

    def rescale(self) -> tuple[float, float]:
        """Return slope and intercept of the map from stored values to HU (PS3.3 C.11.1).

        Raises:
            DicomError: One is missing or makes no sense, or the result is not HU.
        """
        group = self.required("PixelValueTransformationSequence", SEND_AXIAL)
        remedy = f"Nothing is assumed for it: {SEND_AXIAL[0].lower()}{SEND_AXIAL[1:]}"
        slope = group.required_numbers("RescaleSlope", 1, remedy, most=MAX_RESCALE)[0]
        intercept = group.required_numbers("RescaleIntercept", 1, remedy, most=MAX_RESCALE)[0]
        if abs(slope) < MIN_SLOPE:
            raise group.invalid("RescaleSlope", slope, f"{MIN_SLOPE:g} or more, whatever its sign")
        kind = group.text("RescaleType")
        if kind is not None and kind.upper() not in HU_TYPES:
            raise DicomError(
                f"{self._name}: RescaleType is {kind!r}, expected HU: these are no "
                f"Hounsfield units. {SEND_AXIAL}",
                code=Code.UNSUPPORTED_PIXELS,
            )
        return (slope, intercept)

    def acquisition_number(self) -> int | None:
        """Return FrameAcquisitionNumber, or AcquisitionNumber."""
        group = None if self._classic else self.group("FrameContentSequence")
        number = group.harmless_whole("FrameAcquisitionNumber") if group is not None else None
        return self._top.harmless_whole("AcquisitionNumber") if number is None else number

    def kernel(self) -> str | None:
        """Return ConvolutionKernel."""
        group = self.group("CTReconstructionSequence")
        return group.text("ConvolutionKernel") if group is not None else None

    def body_part(self) -> str | None:
        """Return BodyPartExamined, or the meaning of the anatomic region of the frame."""
        stated = self._top.text("BodyPartExamined")
        if stated is not None or self._classic:
            return stated
        anatomy = self.group("FrameAnatomySequence")
        region = anatomy.item("AnatomicRegionSequence") if anatomy is not None else None
        meaning = region.text("CodeMeaning") if region is not None else None
        return meaning.upper() if meaning is not None else None


def frames_of(
    a: Attributes, sop_class: str, layout: PixelLayout
) -> Iterator[tuple[int | None, FrameAttributes]]:
    """Yield the 1-based number (``None`` for a classic image) and the attributes of each frame.

    Raises:
        DicomError: NumberOfFrames contradicts the SOP class or the functional groups, or those are
            missing.
    """
    if sop_class not in MULTI_FRAME_CLASSES:
        if layout.frames != 1:
            raise a.invalid(
                "NumberOfFrames", layout.frames, "1 for a CT image that is not an enhanced one"
            )
        yield (None, FrameAttributes(a, a.name, None, None))
        return
    shared = a.item("SharedFunctionalGroupsSequence")
    frames = a.items("PerFrameFunctionalGroupsSequence")
    if not frames:
        raise a.missing("PerFrameFunctionalGroupsSequence", SEND_POSITIONED)
    if len(frames) != layout.frames:
        raise a.invalid(
            "NumberOfFrames",
            layout.frames,
            f"{len(frames)}, the items in PerFrameFunctionalGroupsSequence",
        )
    for number, frame in enumerate(frames, start=1):
        yield (number, FrameAttributes(a, f"{a.name} frame {number}", shared, frame))


def image_type_of(a: Attributes) -> tuple[str, ...]:
    """Return ImageType in upper case, without padding."""
    return tuple(text.upper() for text in a.texts("ImageType"))
