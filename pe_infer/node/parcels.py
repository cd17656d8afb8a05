"""What goes out, as folders: a JSON document and DICOM objects that belong together."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from pe_infer.bundle import Bundle
from pe_infer.errors import NodeError
from pe_infer.node.durable import make_private_folder, write_folder
from pe_infer.node.entries import Parcel, SeriesEntry
from pe_infer.node.objects import (
    Alert,
    Outcome,
    ResultObject,
    SourceFile,
    Unjudged,
    WriteResults,
)
from pe_infer.result import NotProcessed, StudyResult

DOCUMENT: Final = "document.json"
_CONTENTS: Final = "contents.json"
_ID_CHARACTERS: Final = 32
_BUNDLE: Final = ("bundle", "bundle_version", "bundle_hash")  # in documents
_PROVISIONAL: Final = "provisional: slices still arrive; the result follows and may say otherwise"
_WITHDRAWN: Final = "the provisional alert of this version is withdrawn; see its result"

Event: TypeAlias = Literal["provisional_alert", "alert_withdrawn", "result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """A DICOM object of a parcel, and what a presentation context for it is proposed with."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a parcel holds.

    Attributes:
        document: JSON: what happened (``event``), of which study, and the result.
        objects: To be stored in this order.
    """

    document: Path
    objects: tuple[StoredObject, ...]


def write_contents(folder: Path, document: str, objects: Sequence[StoredObject]) -> None:
    """Finish a parcel whose objects are in ``folder`` already."""
    (folder / DOCUMENT).write_text(document, encoding="utf-8")
    listed = [
        {
            "file": found.path.name,
            "sop_class_uid": found.sop_class_uid,
            "sop_instance_uid": found.sop_instance_uid,
            "transfer_syntax_uid": found.transfer_syntax_uid,
        }
        for found in objects
    ]
    (folder / _CONTENTS).write_text(json.dumps(listed), encoding="utf-8")


def read_contents(folder: Path) -> Contents:
    """Read what `write_contents` has written.

    Raises:
        NodeError: The parcel is not whole.
    """
    try:
        listed = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        objects = tuple(
            StoredObject(
                path=folder / entry["file"],
                sop_class_uid=entry["sop_class_uid"],
                sop_instance_uid=entry["sop_instance_uid"],
                transfer_syntax_uid=entry["transfer_syntax_uid"],
            )
            for entry in listed
        )
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise NodeError(
            f"{folder}: the parcel cannot be read: {exc!r}. Make it again: pe-infer node replay."
        ) from exc
    return Contents(document=folder / DOCUMENT, objects=objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a parcel is about.

    Attributes:
        series_id: Of the ledger.
        study_instance_uid: Source study.
        series_instance_uid: Source series.
        version: Of the result, or of the one that is to come.
        bundle: Who judges it.
    """

    series_id: int
    study_instance_uid: str
    series_instance_uid: str
    version: int
    bundle: Bundle

    def unjudged(self, reason: NotProcessed) -> Unjudged:
        """The outcome of a series that was refused."""
        return Unjudged(reason=reason, **self._identity())

    def alert(self, *, probability: float, position_mm: float, slices: int) -> Alert:
        """A provisional alert."""
        return Alert(
            probability=probability, position_mm=position_mm, slices=slices, **self._identity()
        )

    def _identity(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "finding": manifest.finding,
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "bundle": manifest.name,
            "bundle_version": manifest.version,
            "bundle_hash": self.bundle.sha256,
            "intended_use": manifest.intended_use,
        }


class Packer:
    """Makes parcels: folders that are there as a whole or not at all. Thread-safe."""

    def __init__(self, folder: Path, scratch: Path, write_results: WriteResults) -> None:
        """Make the folders; what was half made by a process that has ended goes.

        Args:
            folder: Of the parcels.
            scratch: On the same file system.
            write_results: Makes DICOM objects.

        Raises:
            NodeError: The folders cannot be used.
        """
        self._folder = folder
        self._scratch = scratch
        self._write_results = write_results
        make_private_folder(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        make_private_folder(scratch)

    def remove_others(self, known: Collection[str]) -> int:
        """Delete parcels that were never entered in the ledger; returns how many."""
        others = [path for path in self._folder.iterdir() if path.name not in known]
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        return len(others)

    def pack(
        self,
        subject: Subject,
        outcome: Outcome,
        sources: Sequence[Path | SourceFile] | None,
        *,
        alerted: bool = False,
    ) -> str:
        """Make the parcel of an outcome.

        Args:
            subject: What it is about.
            outcome: What is said.
            sources: Files that it is made of; ``None``: the parcel gets no DICOM objects.
            alerted: Whether an alert of this version went out.

        Returns:
            The name of its folder.

        Raises:
            NodeError: The disk fails or is full.
            PeInferError: The objects cannot be made.
        """
        if isinstance(outcome, StudyResult):
            fields = {"result": outcome.to_json()}
        elif isinstance(outcome, Alert):
            fields = {"notice": json.dumps(_PROVISIONAL), "alert": json.dumps(_said(outcome))}
        else:
            fields = {"not_processed": outcome.reason.model_dump_json()}
        event: Event = "provisional_alert" if isinstance(outcome, Alert) else "result"
        made_at = datetime.now(UTC)
        supersedes = subject.version - 1 if event == "result" and subject.version > 1 else None
        head = _head(
            event,
            subject,
            version=subject.version,
            supersedes=supersedes,
            bundle=_named(subject.bundle),
            made_at=made_at,
        )

        def fill(folder: Path) -> None:
            objects: Sequence[ResultObject] = ()
            if sources is not None:
                objects = self._write_results(
                    outcome,
                    sources,
                    folder,
                    version=subject.version,
                    made_at=made_at,
                    supersedes=self._earlier(subject, "result", supersedes),
                    after_alert=self._earlier(
                        subject, "provisional_alert", subject.version if alerted else None
                    ),
                )
            write_contents(folder, _document(head, fields), [_stored(made) for made in objects])

        return self._write(_name(subject.series_id, event, subject.version), fill)

    def withdrawal(self, series: SeriesEntry, alert: Parcel) -> str:
        """Make the parcel that takes an alert back; it has no objects.

        It names the bundle that has raised the alert, which need not be there any more.

        Returns:
            The name of its folder.

        Raises:
            NodeError: The disk fails or is full.
        """
        event: Event = "alert_withdrawn"
        head = _head(
            event,
            series,
            version=alert.version,
            supersedes=None,
            bundle=self._raised_by(alert),
            made_at=datetime.now(UTC),
        )
        document = _document(head, {"notice": json.dumps(_WITHDRAWN)})
        return self._write(
            _name(series.id, event, alert.version),
            lambda folder: write_contents(folder, document, []),
        )

    def raised_by(self, alert: Parcel) -> str | None:
        """The name of the bundle that has raised an alert; ``None``: its parcel is damaged."""
        return self._raised_by(alert)["bundle"]

    def _raised_by(self, alert: Parcel) -> dict[str, str | None]:
        try:
            document = json.loads((self._folder / alert.folder / DOCUMENT).read_text("utf-8"))
        except (OSError, ValueError):
            document = {}
        return {name: document.get(name) for name in _BUNDLE}

    def _write(self, name: str, fill: Callable[[Path], None]) -> str:
        # Left by a conclusion that did not reach the ledger.
        shutil.rmtree(self._folder / name, ignore_errors=True)
        write_folder(self._folder / name, fill, scratch=self._scratch)
        return name

    def _earlier(self, subject: Subject, event: Event, version: int | None) -> int | None:
        """The version, if this bundle has made objects for it that new ones may point to."""
        if version is None:
            return None
        try:
            contents = read_contents(self._folder / _name(subject.series_id, event, version))
            document = json.loads(contents.document.read_text(encoding="utf-8"))
        except (NodeError, OSError, ValueError):
            return None
        same = document.get("bundle_hash") == subject.bundle.sha256
        return version if contents.objects and same else None


def _name(series_id: int, event: Event, version: int) -> str:
    return f"{series_id}-{version}-{event}"


def _named(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    names = (manifest.name, manifest.version, bundle.sha256)
    return dict(zip(_BUNDLE, names, strict=True))


def _head(
    event: Event,
    series: Subject | SeriesEntry,
    *,
    version: int,
    supersedes: int | None,
    bundle: Mapping[str, str | None],
    made_at: datetime,
) -> dict[str, str | int | None]:
    identity = (
        event,
        series.study_instance_uid,
        series.series_instance_uid,
        str(bundle["bundle_hash"]),
        str(version),
    )
    return {
        "event": event,
        "event_id": hashlib.sha256("\0".join(identity).encode()).hexdigest()[:_ID_CHARACTERS],
        "study_instance_uid": series.study_instance_uid,
        "series_instance_uid": series.series_instance_uid,
        "version": version,
        "supersedes": supersedes,
        **bundle,
        "made_at": made_at.isoformat(),
    }


def _document(head: Mapping[str, object], fields: Mapping[str, str]) -> str:
    """One JSON object; the values of ``fields`` are JSON already."""
    members = [
        *(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()),
        *(f"{json.dumps(name)}: {value}" for name, value in fields.items()),
    ]
    return f"{{{', '.join(members)}}}"


def _said(alert: Alert) -> dict[str, float | int | bool]:
    return {
        "provisional": True,
        "probability": alert.probability,
        "position_mm": alert.position_mm,
        "slices": alert.slices,
    }


def _stored(made: ResultObject) -> StoredObject:
    return StoredObject(
        path=made.path,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        transfer_syntax_uid=made.transfer_syntax_uid,
    )
