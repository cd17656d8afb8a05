"""What the node has made of an outcome: DICOM objects, by one function that tests replace."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from pe_infer.dicom import SourceFile
from pe_infer.dicom.results import Alert, Outcome, ResultObject, Unjudged, warm_up, write_results

__all__ = [
    "Alert",
    "Outcome",
    "ResultObject",
    "SourceFile",
    "Unjudged",
    "WriteResults",
    "warm_up",
    "write_results",
]


class WriteResults(Protocol):
    """Writes the objects of an outcome into a folder; see `pe_infer.dicom.results`."""

    def __call__(
        self,
        outcome: Outcome,
        sources: Sequence[Path | SourceFile],
        folder: Path,
        *,
        version: int = 1,
        made_at: datetime,
        supersedes: int | None = None,
        after_alert: int | None = None,
    ) -> Sequence[ResultObject]:
        """Write them."""
