"""Makes the index of a collection of real studies.

``python -m export.datasets.index --collection NAME --root DIR --out index.jsonl``

Labels and headers are read, pixels are not. Patients are split by a hash of their identifiers.
Prints what was found, and what was left out and why; the whole list is beside the index.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from export.command_line import reported
from export.datasets.collections.base import SPLITS, Fractions, Item, LeftOut
from export.datasets.collections.index import (
    Index,
    counts,
    left_out_path,
    split_studies,
    write_index,
)
from export.datasets.collections.registry import COLLECTIONS, open_collection
from pe_infer.errors import Code, ConfigurationError, InputError


def counts_table(index: Index) -> Table:
    """What an index holds, by split."""
    columns = {"all": counts(index.entries)}
    for split in SPLITS:
        columns[split] = counts([entry for entry in index.entries if entry.split == split])
    table = Table(index.collection, *columns, title=str(index.root))
    for name in columns["all"]:
        table.add_row(name, *(str(column.get(name, 0)) for column in columns.values()))
    return table


def left_out_table(left_out: Iterable[LeftOut]) -> Table:
    """What was left out, by reason, with the first of each."""
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for each in left_out:
        reasons[each.reason] += 1
        first.setdefault(each.reason, each.message)
    table = Table("left out", "count", "the first of them")
    for reason, count in reasons.most_common():
        table.add_row(reason, str(count), escape(first[reason]))
    return table


def main(
    *,
    collection: Annotated[str, typer.Option(help=f"One of {', '.join(COLLECTIONS)}.")],
    root: Annotated[Path, typer.Option(help="Folder that the collection was unpacked into.")],
    out: Annotated[Path, typer.Option(help="Index to write (.jsonl).")],
    validation: Annotated[float, typer.Option(help="Share of the patients.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the patients.")] = 0.2,
    workers: Annotated[int, typer.Option(help="Processes that read headers.", min=1)] = 2,
) -> None:
    """Index a collection of real studies."""
    console = Console()

    def follow(items: Iterable[Item], total: int) -> Iterable[Item]:
        return track(items, "headers", total=total, console=console)

    with reported(console):
        reader = open_collection(collection)
        if not root.is_dir():
            raise ConfigurationError(f"{root}: is no folder. Give --root that of the collection.")
        fractions = Fractions(validation=validation, test=test)
        found = reader.index(root, workers=workers, follow=follow)
        if found.left_out:
            console.print(left_out_table(found.left_out))
        if not found.studies:
            raise InputError(
                f"{root}: no study of {collection} can be used; {len(found.left_out)} things were "
                "left out (see above).",
                code=Code.NO_CT_SERIES,
            )
        index = split_studies(collection, root, found, fractions)
        write_index(out, index, found)
    console.print(counts_table(index))
    console.print(f"{out}: {len(index.entries)} studies; {left_out_path(out)}: what was left out")


if __name__ == "__main__":
    typer.run(main)
