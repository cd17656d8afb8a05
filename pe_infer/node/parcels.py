"""What goes out, as folders: a JSON document and DICOM objects that belong together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pe_infer.errors import NodeError

DOCUMENT: Final = "document.json"
_CONTENTS: Final = "contents.json"


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
