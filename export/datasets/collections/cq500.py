"""CQ500: 491 head CTs read by three radiologists (qure.ai, 2018).

Layout, as published code that reads the collection has it (the collection was not at hand)::

    ROOT/reads.csv        name,Category,R1:ICH,R1:IPH,...,R3:ICH,...; one row per study, 0 or 1
    ROOT/.../CQ500CT42 CQ500CT42/Unknown Study/CT Plain/CT000000.dcm

- ``name`` is CQ500-CT-42; the archives unpack into folders of their own (``CQ500-CT-42``,
  ``qct01``) or none, so that study folders are looked for down to a depth of three.
- What two of three readers saw is there, as in the paper; types and hemorrhage are voted on
  separately.
- A study has several series: thin and thick, some with contrast agent. The reads are of scans
  without, so folders whose name says contrast are left aside. Among the others the product's own
  rule chooses; where it refuses to choose, the study is reported when it is read.

S. Chilamkurthy et al., Lancet 392, 2388-2396 (2018).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from export.datasets.collections.tables import Row, rows

TABLE: Final = "reads.csv"
READERS: Final = ("R1", "R2", "R3")
ANY: Final = "ICH"
TYPES: Final = {
    "EDH": "epidural",
    "IPH": "intraparenchymal",
    "IVH": "intraventricular",
    "SAH": "subarachnoid",
    "SDH": "subdural",
}
DEPTH: Final = 3
STUDY_FOLDER: Final = "Unknown Study"

_NAME = re.compile(r"CQ500-CT-(\d+)")
_FOLDER = re.compile(r"CQ500CT(\d+)[ _]CQ500CT\1")
_CONTRAST_WORDS: Final = frozenset({"POST", "CONTRAST", "CECT", "C", "ORAL"})
_PLAIN_WORDS: Final = frozenset({"PRE", "PLAIN", "NON"})


class Cq500:
    """See ``export.datasets.collections.base.Collection``."""

    name = "cq500"
    terms = "CC BY-NC-SA 4.0"
    repair = None

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``; no header is read."""
        del workers
        table = required(root, (TABLE,), collection=self.name)
        found = Found()
        reads = _read_votes(table, found)
        folders: dict[int, list[Path]] = defaultdict(list)
        for number, folder in _study_folders(root, DEPTH):
            folders[number].append(folder)
        for number in sorted(folders.keys() - reads.keys()):
            found.leave_out(
                folders[number][0].name,
                "no label",
                f"{table}: has no usable row of CQ500-CT-{number}; the study is not used.",
            )
        for number in follow(sorted(reads), len(reads)):
            votes, places = reads[number], sorted(folders.get(number, []))
            name = f"CQ500-CT-{number}"
            if len(places) != 1:
                found.leave_out(
                    name,
                    "no folder" if not places else "several folders",
                    f"{root}: {len(places)} folders 'CQ500CT{number} CQ500CT{number}', expected 1. "
                    "Unpack its archive once.",
                )
            elif series := _plain_series(places[0]):
                found.studies.append(
                    IndexedStudy(
                        study=name,
                        patient=name,
                        form="dicom",
                        files=tuple(path.relative_to(root).as_posix() for path in series),
                        positive=votes[ANY],
                        types={kind: votes[column] for column, kind in TYPES.items()},
                    )
                )
            else:
                found.leave_out(
                    name,
                    "no plain series",
                    f"{places[0]}: no series with DICOM files whose folder does not say contrast; "
                    "the reads are of scans without contrast agent.",
                )
        return found


def says_contrast(folder: str) -> bool:
    """Whether the folder of a series says that a contrast agent was given."""
    words = set(re.findall(r"[A-Z0-9]+", folder.upper()))
    return bool(words & _CONTRAST_WORDS) and not words & _PLAIN_WORDS


def _study_folders(folder: Path, depth: int) -> Iterator[tuple[int, Path]]:
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if match := _FOLDER.fullmatch(path.name):
            yield int(match[1]), path
        elif depth > 1:
            yield from _study_folders(path, depth - 1)


def _plain_series(folder: Path) -> list[Path]:
    """Folders of series without contrast agent, by name."""
    parents = [path for path in (folder / STUDY_FOLDER, folder) if path.is_dir()]
    series = [path for path in sorted(parents[0].iterdir()) if any(path.glob("*.dcm"))]
    return [path for path in series if not says_contrast(path.name)]


def _read_votes(table: Path, found: Found) -> dict[int, dict[str, bool]]:
    """Study number to what most readers saw, by column."""
    wanted = (ANY, *TYPES)
    columns = ["name", *(f"{reader}:{column}" for reader in READERS for column in wanted)]
    first: dict[int, Row] = {}
    contradicting: set[int] = set()
    votes: dict[int, dict[str, bool]] = {}
    for row in rows(table, columns):
        match = _NAME.fullmatch(row.values["name"])
        if match is None:
            raise row.refused(f"name is {row.values['name']!r}, expected CQ500-CT-<number>")
        number = int(match[1])
        read = {
            column: sum(row.flag(f"{reader}:{column}") for reader in READERS) * 2 > len(READERS)
            for column in wanted
        }
        if number in first:
            found.leave_out(
                row.where,
                "repeated row",
                f"{table}, row {row.number}: {row.values['name']} is in row {first[number].number} "
                "already.",
            )
            if row.values != first[number].values:
                contradicting.add(number)
            continue
        first[number], votes[number] = row, read
    for number in sorted(contradicting):
        found.leave_out(
            f"CQ500-CT-{number}",
            "contradicting rows",
            f"{table}: its rows of CQ500-CT-{number} differ; the study is not used.",
        )
        del votes[number]
    return votes
