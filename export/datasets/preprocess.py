"""Makes a store of the real studies of an index.

``python -m export.datasets.preprocess --index index.jsonl --config export/configs/ich-data.toml
--out STORE``

Planes are made by the product's own kernel of the slices that its own rules choose and accept; the
store keeps them as whole HU, as those of phantoms. Every study has a folder of its own, named by
its number in the index: what is there already is kept, so that the command can be stopped and given
again. A study that cannot be used does not stop the others: ``failures.jsonl`` says why.
"""

import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.command_line import ConfigOption, reported
from export.datasets.collections.gridded import GriddedStudy, to_grid
from export.datasets.collections.index import Entry, Index, read_index
from export.datasets.collections.reading import read_study
from export.datasets.collections.registry import open_collection
from export.datasets.generate import HU_RANGE
from export.datasets.store import (
    UNKNOWN_PIXELS,
    StoredStudy,
    StudyRecord,
    grid_digest,
    study_name,
    write_study,
)
from export.training.config import DataSettings, load_settings
from pe_infer import preprocess
from pe_infer.errors import ConfigurationError, PeInferError
from pe_infer.geometry import PatientGrid

KEPT, STORED = "there already", "stored"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one study.

    Attributes:
        study: Its identifier.
        code: ``KEPT``, ``STORED``, or why it failed.
        message: The same in words, if it failed.
    """

    study: str
    code: str
    message: str = ""


def store_study(store: Path, index: Index, entry: Entry, grid: PatientGrid) -> Outcome:
    """Store one study, unless it is there.

    Raises:
        ConfigurationError: What is there is of another study, label or grid.
    """
    folder = store / study_name(entry.number, positive=entry.study.positive)
    facts = {
        "collection": index.collection,
        "study": entry.study.study,
        "patient": entry.study.patient,
        "split": entry.split,
        "types": entry.study.types,
        "grid": grid_digest(grid),
    }
    other = store / study_name(entry.number, positive=not entry.study.positive)
    if (other / "study.json").exists():
        raise ConfigurationError(
            f"{other}: number {entry.number} had another label in the index that it was stored "
            "from: name another --out"
        )
    if (folder / "study.json").exists():
        made = StoredStudy(folder).record.phantom
        for key in ("collection", "study", "grid"):
            if made.get(key) != facts[key]:
                raise ConfigurationError(
                    f"{folder}: holds {key} {made.get(key)!r}, expected {facts[key]!r}: name "
                    "another --out for another index or another grid"
                )
        return Outcome(study=entry.study.study, code=KEPT)
    try:
        real = read_study(open_collection(index.collection), entry.study, index.root)
        gridded = to_grid(real, entry.study, grid)
    except PeInferError as exc:
        return Outcome(study=entry.study.study, code=str(exc.code), message=str(exc))
    record = StudyRecord(
        seed=entry.number,
        positive=entry.study.positive,
        positions_um=[int(p) for p in gridded.positions_um],
        slab_planes=gridded.slab_planes,
        clot_pixels=finding_pixels(gridded),
        preprocessing_version=preprocess.VERSION,
        phantom=facts,
        plane_labels=None if gridded.labels is None else [int(v) for v in gridded.labels],
    )
    hu = np.clip(np.rint(gridded.hu), *HU_RANGE).astype(np.int16)
    write_study(store, record, hu, gridded.mask)
    return Outcome(study=entry.study.study, code=STORED)


def finding_pixels(gridded: GriddedStudy) -> list[int]:
    """Pixels of the finding in every plane, as far as they are known."""
    if gridded.mask is not None:
        return [int(count) for count in gridded.mask.sum(axis=(1, 2))]
    if gridded.labels is None:
        return [UNKNOWN_PIXELS] * len(gridded.positions_um)
    return [0 if label == 0 else UNKNOWN_PIXELS for label in gridded.labels]


def main(
    *,
    index: Annotated[Path, typer.Option(help="Made by export.datasets.index.")],
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    split: Annotated[str, typer.Option(help="train, validation, test, or all.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Stop after this many studies.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the collection lies now.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Make a store of real studies."""
    console = Console()
    outcomes: list[Outcome] = []
    with reported(console):
        indexed = read_index(index, root=root)
        grid = load_settings(config, DataSettings).grid.to_grid()
        entries = indexed.chosen(split)[:limit]
        shared = Index(
            collection=indexed.collection,
            root=indexed.root,
            fractions=indexed.fractions,
            entries=(),
        )
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(store_study, out, shared, entry, grid) for entry in entries]
            try:
                followed = track(jobs, "studies", console=console)
                outcomes.extend(job.result() for job in followed)
            finally:
                pool.shutdown(cancel_futures=True)
    failed = [outcome for outcome in outcomes if outcome.message]
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"study": o.study, "code": o.code, "message": o.message}) + "\n" for o in failed
    ]
    (out / "failures.jsonl").write_text("".join(lines))
    table = Table("outcome", "studies", title=str(out))
    for code, count in Counter(outcome.code for outcome in outcomes).most_common():
        table.add_row(code, str(count))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
