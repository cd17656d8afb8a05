"""Where the network looked, as a Parametric Map in the patient's coordinates.

A Parametric Map says what its values are: saliency, without a unit. A fractional segmentation would
have to call them a probability or an occupancy, which they are not. They are stored as 16-bit
integers with a linear map to the activations, since viewers that show no floating-point pixels show
these.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np
from highdicom import (
    PixelMeasuresSequence,
    PlaneOrientationSequence,
    PlanePositionSequence,
    VOILUTTransformation,
)
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from pe_infer.dicom.results import codes
from pe_infer.dicom.results.envelope import (
    RESEARCH_USE,
    Envelope,
    long_string,
    replace_sequence,
)
from pe_infer.dicom.results.outcome import ResultObject
from pe_infer.dicom.results.sources import reference_to
from pe_infer.result import Attention, SlabEvidence, StudyResult

_STORED_MAX = 65535


def write_attention(result: StudyResult, envelope: Envelope) -> ResultObject | None:
    """Write ``attention.dcm``: one frame per slab that the network saw.

    Returns:
        ``None`` if there is no attention, or the series has no frame of reference.
    """
    slabs = [
        (slab, slab.attention)
        for slab in result.evidence
        if slab.attention is not None and slab.attention.values.size
    ]
    if not slabs or envelope.sources.frame_of_reference_uid is None:
        return None
    sources, identity = envelope.sources, envelope.identity
    dataset = _map(slabs, envelope)
    for item in (dataset, *dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        if "DimensionOrganizationUID" in item:
            item.DimensionOrganizationUID = identity.dimension_uid()
    del dataset.SourceImageSequence  # said per frame
    replace_sequence(
        dataset,
        "ReferencedSeriesSequence",
        [sources.references(sources.instances, "ReferencedInstanceSequence")],
    )
    by_place = {_corner(attention): slab for slab, attention in slabs}
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        corner = frame.PlanePositionSequence[0].ImagePositionPatient
        slab = by_place[float(corner[0]), float(corner[1]), float(corner[2])]
        replace_sequence(frame, "DerivationImageSequence", _derivation(slab, envelope))
    envelope.complete_image(dataset)
    return envelope.write(
        dataset,
        "attention",
        "attention.dcm",
        f"{envelope.model}: attention for {result.finding.code.meaning}",
    )


def _map(slabs: Sequence[tuple[SlabEvidence, Attention]], envelope: Envelope) -> ParametricMap:
    values = np.stack([attention.values for _, attention in slabs])
    low, high = float(values.min()), float(values.max())
    step = (high - low) / _STORED_MAX if high > low else 1.0
    stored = np.clip(np.rint((values - low) / step), 0, _STORED_MAX).astype(np.uint16)
    black = min(max(-low / step, 0.0), _STORED_MAX - 2.0)  # what is not attended to, or less
    first = np.asarray(slabs[0][1].patient_affine)
    left_mm, back_mm = (float(np.linalg.norm(first[:3, axis])) for axis in (0, 1))
    thickness_mm = _step_mm([slab.position_mm for slab, _ in slabs])
    orientation = [*(first[:3, 0] / left_mm), *(first[:3, 1] / back_mm)]
    source = envelope.sources.stand_in(envelope.sources.instances[0])
    source.ImagePositionPatient = list(_corner(slabs[0][1]))  # of some plane: all are given below
    source.ImageOrientationPatient = orientation
    source.PixelSpacing = [back_mm, left_mm]
    source.SliceThickness = thickness_mm
    return ParametricMap(
        source_images=[source],
        pixel_array=stored,
        manufacturer_model_name=envelope.model,
        software_versions=envelope.model,  # like all of the equipment, said in the envelope
        device_serial_number=envelope.serial_number,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            RealWorldValueMapping(
                lut_label="ATTENTION",
                lut_explanation="Activation of the network, no unit",
                unit=codes.NO_UNITS,
                value_range=(0, _STORED_MAX),
                slope=step,
                intercept=low,
                quantity_definition=codes.SALIENCY,
            )
        ],
        voi_lut_transformations=[
            VOILUTTransformation(
                window_center=round((black + _STORED_MAX) / 2, 1),
                window_width=round(_STORED_MAX - black, 1),
            )
        ],
        content_label="ATTENTION",
        content_description=long_string(f"Where the network looked. {RESEARCH_USE}"),
        pixel_measures=PixelMeasuresSequence(
            pixel_spacing=(back_mm, left_mm), slice_thickness=thickness_mm
        ),
        plane_orientation=PlaneOrientationSequence("PATIENT", orientation),
        plane_positions=[
            PlanePositionSequence("PATIENT", _corner(attention)) for _, attention in slabs
        ],
        **envelope.identifiers("attention"),
    )


def _corner(attention: Attention) -> tuple[float, float, float]:
    """Return the centre of the first cell (ImagePositionPatient), as a file holds it."""
    x, y, z = (round(row[3], 4) for row in attention.patient_affine[:3])
    return (x, y, z)


def _step_mm(positions_mm: Sequence[float]) -> float:
    """Return the usual distance of neighbouring slabs."""
    steps = [b - a for a, b in pairwise(sorted(positions_mm)) if not math.isclose(a, b)]
    return round(median(steps), 4) if steps else 1.0


def _derivation(slab: SlabEvidence, envelope: Envelope) -> list[Dataset]:
    """Return the items of DerivationImageSequence: the slice nearest to the slab's middle."""
    source = reference_to(envelope.sources.find(slab.sop_instance_uid), slab.frame_number)
    source.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    item = Dataset()
    item.DerivationCodeSequence = [CodedConcept.from_code(codes.UNSPECIFIED_METHOD)]
    item.SourceImageSequence = [source]
    return [item]
