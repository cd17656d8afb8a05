"""What comes out: updates while slices arrive, quality flags, the study result, its JSON schema."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

SCHEMA_VERSION: Final = 1
_MOST_DECIMALS: Final = 6


class Flag(StrEnum):
    """An irregularity that was tolerated. Values are stable: they appear in JSON."""

    GANTRY_TILT = "gantry_tilt"
    IRREGULAR_SPACING = "irregular_spacing"
    GAP_FILLED = "gap_filled"
    OUT_OF_ORDER = "out_of_order"
    DUPLICATE_IGNORED = "duplicate_ignored"
    POSITION_CHOSEN = "position_chosen"
    INCOMPLETE_COVERAGE = "incomplete_coverage"
    PRONE = "prone"
    DECUBITUS = "decubitus"
    IN_PLANE_ROTATION = "in_plane_rotation"
    THICKNESS_UNKNOWN = "thickness_unknown"
    PADDING_IGNORED = "padding_ignored"
    LOSSY_COMPRESSION = "lossy_compression"
    FILES_SKIPPED = "files_skipped"
    SERIES_CHOSEN = "series_chosen"
    BUNDLE_CHOSEN = "bundle_chosen"
    SCOPE_UNCONFIRMED = "scope_unconfirmed"
    IMAGE_CHECK = "image_check"


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )


class QualityFlag(_Record):
    """One tolerated irregularity of a study, with the numbers behind it. No patient data.

    Attributes:
        flag: What was tolerated; stable, for programs.
        message: The same in words, for people.
        values: Measured quantities, units in their names.
    """

    flag: Flag
    message: str
    values: Mapping[str, float | int | str] = Field(default_factory=dict)


class CodedConcept(_Record):
    """A code of a terminology (a DICOM code sequence item, PS3.3 section 8.8)."""

    value: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Annotated[str, Field(min_length=1, max_length=16)]
    """Coding scheme designator, such as SCT."""
    meaning: Annotated[str, Field(min_length=1, max_length=64)]


class Finding(_Record):
    """What a bundle looks for, and where."""

    code: CodedConcept
    site: CodedConcept | None = None


class OperatingPoint(_Record):
    """A named threshold on the calibrated probability."""

    name: str
    threshold: Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is known while slices still arrive. Says nothing of positive or negative.

    Attributes:
        position_mm: Middle plane of the newest slab.
        slabs: Slabs completed so far that show the organ.
        probability: Stage-1 probability of the newest slab; ``None`` if it was gated, or if the
            bundle cannot tell before the last slice.
        running_maximum: Highest stage-1 probability so far; ``None`` before the first slab that
            shows the organ.
        covered_mm: Extent of the slabs completed so far.
        provisional_alert: Whether the bundle's rule for an early alert holds.
    """

    position_mm: float
    slabs: int
    probability: float | None
    running_maximum: float | None
    covered_mm: float
    provisional_alert: bool


def shown_probability(probability: float, decimals: int = 3) -> float:
    """Round a probability for people: never to 0 or 1 what is not.

    Args:
        probability: Within [0, 1].
        decimals: Of most values. Those near 0 and 1 have more, up to six.
    """
    if not 0.0 < probability < 1.0:
        return probability
    most = 10.0**-_MOST_DECIMALS
    inner = min(max(probability, most), 1.0 - most)
    rounded = (round(inner, digits) for digits in range(decimals, _MOST_DECIMALS))
    return next((value for value in rounded if 0.0 < value < 1.0), round(inner, _MOST_DECIMALS))


def probability_text(probability: float, decimals: int = 3) -> str:
    """Write `shown_probability`, such as 0.971, 0.9996 or 0.000001."""
    return _with_decimals(shown_probability(probability, decimals), decimals)


def shown_percent(probability: float) -> float:
    """Round a probability, in percent: never to 0 or 100 what is not."""
    return round(100 * shown_probability(probability), _MOST_DECIMALS - 2)


def percent_text(probability: float) -> str:
    """Write `shown_percent`, such as 97.1 % or 99.96 %."""
    return f"{_with_decimals(shown_percent(probability), 1)} %"


def _with_decimals(value: float, least: int) -> str:
    whole, _, fraction = f"{value:.{_MOST_DECIMALS}f}".partition(".")
    return f"{whole}.{fraction[:least]}{fraction[least:].rstrip('0')}"


def _nested(values: NDArray[np.float32]) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


AttentionValues: TypeAlias = Annotated[
    NDArray[np.float32],
    PlainSerializer(_nested, when_used="json"),
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
]


class Attention(_Record):
    """Where the network looked in one slab.

    Attributes:
        values: (rows, cols) float32, the network's raw activation: front to back, patient's right
            to left.
        patient_affine: 4 x 4, row-major: (column, row, 0, 1) of ``values`` to patient coordinates
            (LPS) in mm.
        peak: Highest value.
        peak_mm: Patient coordinates of the highest value.
    """

    values: AttentionValues
    patient_affine: tuple[tuple[float, float, float, float], ...]
    peak: float
    peak_mm: tuple[float, float, float]


class SlabEvidence(_Record):
    """What one slab contributed.

    Attributes:
        position_mm: Middle plane, along the slice normal, growing to the head.
        probability: Stage-1 probability; ``None`` for a gated slab.
        gated: Whether the gate kept the slab from the network.
        attention: Where the network looked; ``None`` for a gated slab, or if the bundle has no
            attention.
        sop_instance_uid: Nearest source instance; of two at the same distance the lower one.
        frame_number: Its frame, 1-based, if it is multi-frame.
    """

    position_mm: float
    probability: float | None
    gated: bool
    attention: Attention | None
    sop_instance_uid: str
    frame_number: int | None


class Coverage(_Record):
    """What part of the patient was seen.

    Attributes:
        lower_mm: Position of the lowest slice.
        upper_mm: Position of the highest slice.
        slices: Slices used.
        slabs: Slabs given to the network.
        gated_slabs: Slabs that do not show the organ.
        complete: Whether the organ ends before the scan does, at both ends.
    """

    lower_mm: float
    upper_mm: float
    slices: int
    slabs: int
    gated_slabs: int
    complete: bool


class Timings(_Record):
    """Where the time went, in seconds, and what was done twice.

    Attributes:
        total_s: From the opening of the stream to the result.
        push_s: In ``push``: validation and in-plane resampling.
        slabs_s: Making slabs.
        online_s: In networks while slices arrived.
        deferred_s: In networks after the last slice.
        last_slice_to_result_s: From the return of the last ``push`` to the result.
        recomputed_slabs: Slabs done again because a slice came late.
    """

    total_s: float
    push_s: float
    slabs_s: float
    online_s: float
    deferred_s: float
    last_slice_to_result_s: float
    recomputed_slabs: int


class Provenance(_Record):
    """What made this result.

    Attributes:
        study_instance_uid: Source study.
        series_instance_uid: Source series.
        bundle: Name of the bundle.
        bundle_version: Its version.
        bundle_hash: sha256 over its manifest, which holds the sha256 of every graph.
        preprocessing_version: Version of the patient grid.
        engine: Inference runtime, with its version.
        precision: Arithmetic of each node, as the runtime reports it.
        packages: Versions of pe-infer and of what it computes with.
    """

    study_instance_uid: str
    series_instance_uid: str
    bundle: str
    bundle_version: str
    bundle_hash: str
    preprocessing_version: int
    engine: str
    precision: Mapping[str, str]
    packages: Mapping[str, str]


class CheckResult(_Record):
    """What one of the bundle's checks of the images found.

    Attributes:
        name: Of the check.
        value: What was measured; ``None`` where no plane could be.
        unit: Of value and limit.
        limit: The one that was passed, for the worse; ``None`` if none was.
        outcome: What follows: a study with a refused check is not processed.
        planes: How many had a value.
    """

    name: str
    value: float | None
    unit: Literal["HU", "mm2"]
    limit: float | None
    outcome: Literal["passed", "flagged", "refused"]
    planes: int


class NotProcessed(_Record):
    """Why there is no verdict."""

    code: str
    message: str


class StudyResult(_Record):
    """The verdict on one study. Research use only. Carries no patient name.

    Attributes:
        schema_version: Of this record.
        status: ``"not_processed"`` means that nothing can be said: it is never a negative.
        not_processed: The reason, if so.
        finding: What was looked for.
        probability: Calibrated; ``None`` if not processed.
        positive: Whether the probability reaches the operating point's threshold; ``None`` if not
            processed.
        operating_point: The threshold used.
        evidence: Slab by slab, ascending position, gated slabs too. Without probabilities where a
            check of the images has refused the study.
        quality: What was tolerated, and every check of the images that did not pass.
        checks: What the bundle's checks of the images found; empty if it has none, or if the gate
            left too few slabs.
        coverage: What was seen.
        timings: Where the time went.
        provenance: What made it.
        intended_use: The bundle's statement.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["processed", "not_processed"]
    not_processed: NotProcessed | None
    finding: Finding
    probability: float | None
    positive: bool | None
    operating_point: OperatingPoint
    evidence: tuple[SlabEvidence, ...]
    quality: tuple[QualityFlag, ...]
    checks: tuple[CheckResult, ...] = ()
    coverage: Coverage
    timings: Timings
    provenance: Provenance
    intended_use: str

    def to_json(self, *, indent: int | None = None, attention_maps: bool = True) -> str:
        """JSON that validates against `result_schema`.

        Args:
            indent: Spaces per level; one line if ``None``.
            attention_maps: Whether to write the attention maps (about 5 kB per slab); without,
                ``values`` is empty.
        """
        if attention_maps:
            return self.model_dump_json(indent=indent)
        empty = np.empty((0, 0), np.float32)
        bare = tuple(
            slab
            if slab.attention is None
            else slab.model_copy(
                update={"attention": slab.attention.model_copy(update={"values": empty})}
            )
            for slab in self.evidence
        )
        return self.model_copy(update={"evidence": bare}).model_dump_json(indent=indent)


def result_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `StudyResult.to_json`, as in ``docs/result.schema.json``."""
    return StudyResult.model_json_schema(mode="serialization")
