"""Makes a store of semi-synthetic studies from one real study without the finding.

``python -m export.datasets.generate_semisynthetic --dicom DIR --source TEXT --config ... --out
DIR``

The configuration's ``phantom`` says what is put in: emboli into planes of a chest, blood into
slices of a head. Every pair has its own findings, grid phase and size of the patient. The store has
the form of ``export.datasets.generate``, so that stage 1 can be started on it. The real study must
be one that may be used so; weights trained on it have to say where they come from.

Validation pairs are of the same patient as training pairs: what is measured on them says whether
training works, nothing about other patients.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from export.command_line import ConfigOption, reported
from export.datasets import generate
from export.datasets.generate import HU_RANGE
from export.datasets.semisynthetic.chest import find_vessels, insert_emboli
from export.datasets.semisynthetic.head import RealHeads
from export.datasets.semisynthetic.variation import varied
from export.datasets.store import StudyRecord, write_study
from export.training.config import DataSettings, load_settings
from pe_infer import dicom, preprocess
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import PatientGrid, Slice

SCALE = (0.85, 1.05)  # of the patient, in plane
SOFTENED_SHARE = 0.7
SOFTNESS_PX = (0.3, 0.9)


def store_pair(
    store: Path, seed: int, slices: list[Slice], grid: PatientGrid, source: str
) -> list[Path]:
    """Make one pair of chests and store it; returns their folders."""
    rng = np.random.default_rng(seed)
    shift_mm, scale = float(rng.uniform(0, 5)), float(rng.uniform(*SCALE))
    images = [varied(image, scale=scale, shift_mm=shift_mm) for image in slices]
    positions, hu = preprocess.planes(images, grid)
    place = {int(p): i for i, p in enumerate(positions)}
    slab_planes = [place[s.position_um] for s in preprocess.slabs(images, grid) if not s.gated]
    if rng.random() < SOFTENED_SHARE:
        softness = float(rng.uniform(*SOFTNESS_PX))
        hu = ndimage.gaussian_filter(hu, (0.0, softness, softness))
    pitch_mm = grid.pitch_um / 1000
    vessels = find_vessels(hu, grid.spacing_mm, pitch_mm)
    clotted, mask = insert_emboli(hu, vessels, grid.spacing_mm, pitch_mm, rng)
    folders: list[Path] = []
    for positive, planes in ((True, clotted), (False, hu)):
        clot = mask.sum(axis=(1, 2)) if positive else np.zeros(len(positions), dtype=np.int64)
        record = StudyRecord(
            seed=seed,
            positive=positive,
            positions_um=[int(p) for p in positions],
            slab_planes=slab_planes,
            clot_pixels=[int(c) for c in clot],
            preprocessing_version=preprocess.VERSION,
            phantom={"semi-synthetic": source, "scale": scale, "shift_mm": shift_mm},
        )
        stored = np.clip(np.rint(planes), *HU_RANGE).astype(np.int16)
        folders.append(write_study(store, record, stored, mask if positive else None))
    return folders


def main(
    *,
    dicom_folder: Annotated[Path, typer.Option("--dicom", help="The real study.")],
    source: Annotated[str, typer.Option(help="Its collection and licence, for the record.")],
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
) -> None:
    """Make a store of semi-synthetic studies."""
    console = Console()
    with reported(console):
        settings = load_settings(config, DataSettings)
        grid = settings.grid.to_grid()
        if settings.phantom not in ("chest", "head"):
            raise ConfigurationError(
                f"{config}: phantom is {settings.phantom!r}, expected 'chest' or 'head'"
            )
        chest = settings.phantom == "chest"
        slices = list(dicom.open_series(dicom_folder, None, prefer_contrast=chest).slices())
        heads = None if chest else RealHeads(slices, source)
        seeds = [*settings.validation.seeds, *settings.train.seeds]
        for seed in track(seeds, "pairs", console=console):
            if heads is None:
                store_pair(out, seed, slices, grid, source)
            else:
                generate.store_pair(out, seed, grid, heads)


if __name__ == "__main__":
    typer.run(main)
