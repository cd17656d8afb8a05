"""The seam to the DICOM objects of an outcome."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from pe_infer.result import Finding, NotProcessed, StudyResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Unjudged:
    """A series that was refused."""

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
    """A provisional alert, while slices still arrive."""

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


class ResultObject(Protocol):
    """One DICOM file that was written."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def sop_class_uid(self) -> str: ...  # noqa: D102
    @property
    def sop_instance_uid(self) -> str: ...  # noqa: D102
    @property
    def transfer_syntax_uid(self) -> str: ...  # noqa: D102


class WriteResults(Protocol):
    """Writes the objects of an outcome into a folder."""

    def __call__(
        self,
        outcome: Outcome,
        sources: Sequence[Path],
        folder: Path,
        *,
        version: int = 1,
        made_at: datetime,
        supersedes: int | None = None,
        after_alert: int | None = None,
    ) -> Sequence[ResultObject]:
        """Write them; see ``pe_infer.dicom.results``."""


def result_writer() -> WriteResults:
    """What the node writes objects with; imports highdicom."""
    results = importlib.import_module("pe_infer.dicom.results")

    def write(
        outcome: Outcome, sources: Sequence[Path], folder: Path, **how: Any
    ) -> Sequence[ResultObject]:
        if not isinstance(outcome, StudyResult):
            values = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
            outcome = getattr(results, type(outcome).__name__)(**values)
        written: Sequence[ResultObject] = results.write_results(outcome, sources, folder, **how)
        return written

    return write
