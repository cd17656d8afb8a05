"""An index on disk: a collection's studies with their splits, one JSON value per line.

The first line says which collection, where it lies and how it was split; every other line is a
study. What was left out is in ``<name>.left-out.jsonl`` beside it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from export.datasets.collections.base import (
    SPLITS,
    Found,
    Fractions,
    IndexedStudy,
    Split,
    split_of,
)
from pe_infer.errors import Code, ConfigurationError, InputError

VERSION: Final = 1
_REMEDY = "Make it again with 'python -m export.datasets.index'."


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One study of an index.

    Attributes:
        number: From 0 on; names the study's folder in a store.
        split: Where its patient belongs.
        study: The study.
    """

    number: int
    split: Split
    study: IndexedStudy


@dataclass(frozen=True, kw_only=True)
class Index:
    """The studies of a collection.

    Attributes:
        collection: Its name.
        root: Its folder.
        fractions: How patients were split.
        entries: Studies in their order.
    """

    collection: str
    root: Path
    fractions: Fractions
    entries: tuple[Entry, ...]

    def chosen(self, split: str) -> list[Entry]:
        """The studies of one split, or of ``"all"``.

        Raises:
            ConfigurationError: There is no such split, or it is empty.
        """
        if split not in (*SPLITS, "all"):
            raise ConfigurationError(f"split {split!r} is none of {[*SPLITS, 'all']}")
        entries = [entry for entry in self.entries if split in (entry.split, "all")]
        if not entries:
            raise ConfigurationError(
                f"split {split!r} of {self.collection} is empty: {len(self.entries)} studies in "
                "all. Choose another split, or other fractions for the index."
            )
        return entries


def split_studies(collection: str, root: Path, found: Found, fractions: Fractions) -> Index:
    """Give every patient of a collection a split."""
    return Index(
        collection=collection,
        root=root,
        fractions=fractions,
        entries=tuple(
            Entry(
                number=number,
                split=split_of(collection, study.patient, fractions),
                study=study,
            )
            for number, study in enumerate(found.studies)
        ),
    )


def write_index(path: Path, index: Index, found: Found) -> None:
    """Write an index, and what was left out beside it; either is complete or not there."""
    head = {
        "version": VERSION,
        "collection": index.collection,
        "root": str(index.root.resolve()),
        "fractions": asdict(index.fractions),
        "studies": len(index.entries),
    }
    lines = [{"split": e.split, **asdict(e.study)} for e in index.entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(left_out_path(path), [asdict(each) for each in found.left_out])
    _write_lines(path, [head, *lines])


def left_out_path(path: Path) -> Path:
    """Where an index says what was left out."""
    return path.with_name(f"{path.stem}.left-out.jsonl")


def read_index(path: Path, *, root: Path | None = None) -> Index:
    """Read an index.

    Args:
        path: Written by `write_index`.
        root: Where the collection lies now, if it was moved.

    Raises:
        ConfigurationError: There is no such file.
        InputError: It is damaged or of another version, or a patient is in two splits.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc.strerror}. {_REMEDY}") from exc
    entries: list[Entry] = []
    splits: dict[str, Split] = {}
    number = 1
    try:
        head: Mapping[str, Any] = json.loads(lines[0])
        if head["version"] != VERSION or head["studies"] != len(lines) - 1:
            raise ValueError(
                f"version {head['version']} with {len(lines) - 1} of {head['studies']} studies"
            )
        for number, line in enumerate(lines[1:], start=2):
            entry = _entry(number - 2, json.loads(line))
            patient = entry.study.patient
            if splits.setdefault(patient, entry.split) != entry.split:
                raise ValueError(f"a patient in {entry.split} and {splits[patient]}")
            entries.append(entry)
        fractions = Fractions(**head["fractions"])
        return Index(
            collection=head["collection"],
            root=root or Path(head["root"]),
            fractions=fractions,
            entries=tuple(entries),
        )
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise InputError(
            f"{path}, row {number}: {type(exc).__name__}: {exc}. {_REMEDY}",
            code=Code.INVALID_ARGUMENT,
        ) from exc


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Patients, studies, positive ones, those of every type, labelled and positive slices."""
    studies = [entry.study for entry in entries]
    types: Counter[str] = Counter(
        kind for study in studies for kind, there in study.types.items() if there
    )
    labelled = [kinds for study in studies for kinds in (study.slices or {}).values()]
    return {
        "patients": len({study.patient for study in studies}),
        "studies": len(studies),
        "positive": sum(study.positive for study in studies),
        **{kind: types[kind] for kind in sorted({k for study in studies for k in study.types})},
        "with mask": sum(study.mask is not None for study in studies),
        "labelled slices": len(labelled),
        "positive slices": sum(bool(kinds) for kinds in labelled),
    }


def _entry(number: int, values: dict[str, Any]) -> Entry:
    split = values.pop("split")
    if split not in SPLITS:
        raise ValueError(f"split {split!r}")
    slices = values.pop("slices")
    study = IndexedStudy(
        **{**values, "files": tuple(values["files"])},
        slices=None if slices is None else {key: tuple(kinds) for key, kinds in slices.items()},
    )
    return Entry(number=number, split=split, study=study)


def _write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
    draft.replace(path)
