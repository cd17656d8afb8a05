"""What result objects are made of: an outcome, its identity, and the UIDs that follow from it."""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pe_infer.result import Finding, NotProcessed, StudyResult

MANUFACTURER: Final = "pe_infer"
ObjectKind: TypeAlias = Literal["report", "key_image", "key_object_selection", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultObject:
    """One DICOM file that was written.

    Attributes:
        kind: What it is.
        path: File.
        sop_class_uid: For presentation contexts and storage commitment.
        sop_instance_uid: Its identity.
        transfer_syntax_uid: Its encoding.
    """

    kind: ObjectKind
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unjudged:
    """A study that has no ``StudyResult``, because its series was refused.

    Attributes:
        finding: What would have been looked for.
        reason: Why nothing can be said. It goes into the report: no patient data.
        study_instance_uid: Source study.
        series_instance_uid: Source series.
        bundle: Name of the bundle.
        bundle_version: Its version.
        bundle_hash: sha256 of the bundle.
        intended_use: The bundle's statement.
    """

    finding: Finding
    reason: NotProcessed
    study_instance_uid: str
    series_instance_uid: str
    bundle: str
    bundle_version: str
    bundle_hash: str
    intended_use: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A provisional alert, while slices still arrive. Says nothing of positive or negative.

    Attributes:
        finding: What is suspected.
        probability: Of the slab that raised the alert.
        position_mm: Its middle plane, along the slice normal.
        slices: Slices received so far.
        study_instance_uid: Source study.
        series_instance_uid: Source series.
        bundle: Name of the bundle.
        bundle_version: Its version.
        bundle_hash: sha256 of the bundle.
        intended_use: The bundle's statement.
    """

    finding: Finding
    probability: float
    position_mm: float
    slices: int
    study_instance_uid: str
    series_instance_uid: str
    bundle: str
    bundle_version: str
    bundle_hash: str
    intended_use: str


Outcome: TypeAlias = StudyResult | Unjudged | Alert


@cache
def software_version() -> str:
    """Version of pe-infer as installed; ``unknown`` in a source tree."""
    try:
        return importlib.metadata.version("pe-infer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What an outcome is about and what made it: every UID of its objects follows from this.

    Attributes:
        study_instance_uid: Source study.
        series_instance_uid: Source series.
        bundle: Name of the bundle.
        bundle_version: Its version.
        bundle_hash: sha256 of the bundle.
        version: Counts the outcomes of one series.
        preliminary: Whether this is an alert.
    """

    study_instance_uid: str
    series_instance_uid: str
    bundle: str
    bundle_version: str
    bundle_hash: str
    version: int
    preliminary: bool

    def instance_uid(self, kind: ObjectKind, number: int = 1) -> str:
        """SOPInstanceUID of the ``number``-th object of a kind."""
        return self._uid("instance", kind, number)

    def series_uid(self, kind: ObjectKind) -> str:
        """SeriesInstanceUID of the objects of a kind."""
        return self._uid("series", kind)

    def dimension_uid(self) -> str:
        """DimensionOrganizationUID of the attention object."""
        return self._uid("dimensions")

    def tracking_uid(self) -> str:
        """Identity of the finding: the same in alerts and all versions of the result."""
        return derived_uid(
            "tracking",
            self.study_instance_uid,
            self.series_instance_uid,
            self.bundle,
            self.bundle_hash,
        )

    def device_uid(self) -> str:
        """Identity of what judged: another one for other weights or another pe-infer."""
        return derived_uid("device", MANUFACTURER, software_version(), self.bundle_hash)

    def _uid(self, *parts: object) -> str:
        return derived_uid(
            self.study_instance_uid,
            self.series_instance_uid,
            self.bundle,
            self.bundle_hash,
            self.version,
            "preliminary" if self.preliminary else "final",
            *parts,
        )


def identity_of(outcome: Outcome, version: int) -> Identity:
    """Return the identity of one version of an outcome."""
    made = outcome.provenance if isinstance(outcome, StudyResult) else outcome
    return Identity(
        study_instance_uid=made.study_instance_uid,
        series_instance_uid=made.series_instance_uid,
        bundle=made.bundle,
        bundle_version=made.bundle_version,
        bundle_hash=made.bundle_hash,
        version=version,
        preliminary=isinstance(outcome, Alert),
    )


def derived_uid(*parts: object) -> str:
    """Return a UID of the 2.25 form (PS3.5 B.2) that depends on ``parts`` alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
