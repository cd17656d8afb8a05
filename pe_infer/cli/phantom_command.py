"""``pe-infer phantom``: write synthetic studies with ground truth as DICOM."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from pe_infer.cli.layout import open_console
from pe_infer.dicom import write_series

if TYPE_CHECKING:  # the phantom brings SciPy, which the other commands need not wait for
    from pe_infer.phantom import PhantomStudy


def phantom_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write to; one folder per study.")
    ],
    *,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same patient.", min=0)] = 7,
    positive: Annotated[
        bool | None,
        typer.Option("--positive/--negative", help="With or without emboli; both if not given."),
    ] = None,
    slice_spacing_mm: Annotated[
        float, typer.Option("--slice-spacing", help="In mm.", min=0.5, max=5.0)
    ] = 1.0,
) -> None:
    """Write a synthetic contrast chest CT: DICOM files, truth.json, the embolus mask (mask.npz)."""
    from pe_infer.phantom import DEFAULT, generate, generate_pair  # noqa: PLC0415  imports SciPy

    config = replace(DEFAULT, slice_spacing_mm=(slice_spacing_mm, slice_spacing_mm))
    console = open_console()
    studies: tuple[PhantomStudy, ...]
    with console.status("making the patient ..."):
        if positive is None:
            studies = generate_pair(seed, config)
        else:
            studies = (generate(seed, positive=positive, config=config),)
    for study in studies:
        folder = out / f"phantom-{seed}-{'positive' if study.positive else 'negative'}"
        with console.status(f"writing {folder} ..."):
            files = write_series(study.slices, folder / "dicom")
            write_truth(study, folder)
        console.print(f"{folder}: {len(files)} slices, {len(study.emboli)} emboli")


def write_truth(study: "PhantomStudy", folder: Path) -> None:
    """Write ``truth.json`` and ``mask.npz`` (``embolus``: (n, rows, cols) bool) of a study."""
    truth = {
        "seed": study.seed,
        "positive": study.positive,
        "emboli": [asdict(embolus) for embolus in study.emboli],
        "parameters": study.parameters,
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "mask.npz", embolus=study.embolus_mask)
