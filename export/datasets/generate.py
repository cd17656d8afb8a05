"""Makes a store of synthetic studies.

``python -m export.datasets.generate --config export/configs/pe-data.toml --out DIR``

Every study goes through the product's own preprocessing. The grid phase is random because the
phantom's positions are. Pairs that are in the store already are kept, so that the command can be
stopped and given again; a store of another phantom configuration is refused.
"""

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from export.command_line import ConfigOption, PhantomOption, reported
from export.datasets.store import (
    StoredStudy,
    StudyRecord,
    grid_digest,
    study_name,
    write_study,
)
from export.training.config import DataSettings, load_settings
from pe_infer import preprocess
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import PatientGrid
from pe_infer.phantom import Pairs, SyntheticStudy, open_phantom

HU_RANGE = (-1024, 3071)
MASK_THRESHOLD = 500.0  # of `SyntheticStudy.mask_slices`: half of a voxel


@dataclasses.dataclass(frozen=True)
class GriddedStudy:
    """A phantom on the patient grid.

    Attributes:
        positions_um: (planes,) ascending.
        hu: (planes, rows, cols) float32.
        mask: (planes, rows, cols) truth.
        slab_planes: Index of the middle plane of every slab that passes the gate.
    """

    positions_um: NDArray[np.int64]
    hu: NDArray[np.float32]
    mask: NDArray[np.bool_]
    slab_planes: list[int]


def to_grid(study: SyntheticStudy, grid: PatientGrid) -> GriddedStudy:
    """Bring a phantom and its truth to the grid with the product's preprocessing.

    Raises:
        SeriesError: The study gives no plane.
    """
    positions, hu = preprocess.planes(study.slices, grid)
    place = {int(p): i for i, p in enumerate(positions)}
    slabs = preprocess.slabs(study.slices, grid)
    slab_planes = [place[slab.position_um] for slab in slabs if not slab.gated]
    if study.positive:
        _, truth = preprocess.planes(study.mask_slices(), grid)
        mask = truth > MASK_THRESHOLD
    else:
        mask = np.zeros(hu.shape, dtype=np.bool_)
    return GriddedStudy(positions, hu, mask, slab_planes)


def store_pair(store: Path, seed: int, grid: PatientGrid, pairs: Pairs) -> int:
    """Make one pair and store it, unless it is there; returns its seed.

    Raises:
        ConfigurationError: The pair that is there was made with another phantom configuration, or
            on another grid.
        InputError: It was made by another version of the kernel.
    """
    folders = [store / study_name(seed, positive=p) for p in (True, False)]
    if all((folder / "study.json").exists() for folder in folders):
        for folder in folders:
            facts = StoredStudy(folder).record.phantom
            made = str(facts.get("configuration"))
            if made != pairs.digest():
                raise ConfigurationError(
                    f"{folder} was made with phantom configuration {made[:12]}, now "
                    f"{pairs.digest()[:12]}: name another --out"
                )
            if facts.get("grid", grid_digest(grid)) != grid_digest(grid):
                raise ConfigurationError(
                    f"{folder} was made on grid {facts['grid']}, now {grid_digest(grid)}: name "
                    "another --out"
                )
        return seed
    for study in pairs.pair(seed):
        gridded = to_grid(study, grid)
        record = StudyRecord(
            seed=seed,
            positive=study.positive,
            positions_um=[int(p) for p in gridded.positions_um],
            slab_planes=gridded.slab_planes,
            clot_pixels=[int(c) for c in gridded.mask.sum(axis=(1, 2))],
            preprocessing_version=preprocess.VERSION,
            phantom={
                "configuration": pairs.digest(),
                "grid": grid_digest(grid),
                **study.truth(),
            },
        )
        hu = np.clip(np.rint(gridded.hu), *HU_RANGE).astype(np.int16)
        write_study(store, record, hu, gridded.mask if study.positive else None)
    return seed


def main(
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which seeds.")] = "train",
    pairs: Annotated[int | None, typer.Option(help="Stop after this many pairs of it.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    phantom: PhantomOption = None,
) -> None:
    """Make a store of synthetic studies."""
    console = Console()
    with reported(console):
        settings = load_settings(config, DataSettings)
        made = open_phantom(settings.phantom, phantom)
        seeds = list(getattr(settings, split).seeds)[:pairs]
        if not seeds:
            raise ConfigurationError(f"{config}: names no synthetic studies of the split {split!r}")
        grid = settings.grid.to_grid()
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(store_pair, out, seed, grid, made) for seed in seeds]
            try:
                for job in track(jobs, f"{split} pairs", console=console):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    typer.run(main)
