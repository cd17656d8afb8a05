"""Makes a store of semi-synthetic studies from real studies without the finding.

``python -m export.datasets.generate_semisynthetic --config ... --root DIR --out DIR``, or
``... --config ... --dicom DIR --source TEXT --out DIR``

The configuration's ``phantom`` says what is put in, emboli into a chest or blood into a head, its
``backgrounds`` into which real studies, in turn; ``--dicom`` names a single one instead. Every pair
has its own findings, grid phase and size of the patient. The store has the form of
``export.datasets.generate``, so that both stages can be trained on it, alone or beside others. The
real studies must be ones that may be used so; weights trained on them have to say where they come
from: whoever trains on the store names folder and source in the data settings (``backgrounds``).

Validation pairs are of the same patients as training pairs: what is measured on them says whether
training works, nothing about other patients. For that, leave one background out of the
configuration and give it to ``python -m export.evaluate --semi-synthetic``.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from export.command_line import ConfigOption, reported
from export.datasets.generate import store_pair
from export.datasets.semisynthetic.backgrounds import Backgrounds, open_background
from export.datasets.semisynthetic.painted import RealPairs
from export.training.config import DataSettings, load_settings
from pe_infer.errors import ConfigurationError


def chosen_backgrounds(
    settings: DataSettings, root: Path | None, folder: Path | None, source: str | None
) -> RealPairs:
    """The real studies that pairs are made of.

    Args:
        settings: Name them, and their anatomy.
        root: Folder that those of the settings lie in.
        folder: A single one instead.
        source: Its collection and licence.

    Raises:
        ConfigurationError: Neither or both ways of naming them are used.
        InputError: One cannot be read, or findings have no place in it.
    """
    if folder is not None and source and root is None:
        return open_background(settings.phantom, folder, source)
    if folder is not None or source or root is None or not settings.backgrounds:
        raise ConfigurationError(
            f"{settings.name!r} names {len(settings.backgrounds)} backgrounds: give --root, the "
            "folder that they lie in, or --dicom and --source for a single one"
        )
    return Backgrounds(
        [
            open_background(
                settings.phantom,
                root / each.folder,
                each.source,
                volume=each.volume,
                arteries=each.arteries,
            )
            for each in settings.backgrounds
        ]
    )


def main(
    *,
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    root: Annotated[Path | None, typer.Option(help="Folder that backgrounds lie in.")] = None,
    dicom_folder: Annotated[Path | None, typer.Option("--dicom", help="One real series.")] = None,
    source: Annotated[str | None, typer.Option(help="Its collection and licence.")] = None,
) -> None:
    """Make a store of semi-synthetic studies."""
    console = Console()
    with reported(console):
        settings = load_settings(config, DataSettings)
        pairs = chosen_backgrounds(settings, root, dicom_folder, source)
        grid = settings.grid.to_grid()
        seeds = [*settings.validation.seeds, *settings.train.seeds]
        for seed in track(seeds, "pairs", console=console):
            store_pair(out, seed, grid, pairs)


if __name__ == "__main__":
    typer.run(main)
