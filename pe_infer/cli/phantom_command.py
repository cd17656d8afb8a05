"""``pe-infer phantom``: write synthetic studies with ground truth as DICOM."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from pe_infer.cli.layout import open_console
from pe_infer.dicom import write_series

if TYPE_CHECKING:  # the phantom brings SciPy, which the other commands need not wait for
    from pe_infer.phantom import Phantom, SyntheticStudy


class Anatomy(StrEnum):
    """What a synthetic study shows."""

    CHEST = "chest"
    HEAD = "head"


USUAL_SPACING_MM = {Anatomy.CHEST: 1.0}  # of the others: drawn by the seed


def phantom_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write to; one folder per study.")
    ],
    *,
    anatomy: Annotated[
        Anatomy, typer.Option("--anatomy", help="Chest with contrast, or head without.")
    ] = Anatomy.CHEST,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same patient.", min=0)] = 7,
    positive: Annotated[
        bool | None,
        typer.Option(
            "--positive/--negative", help="With or without emboli or blood; both if not given."
        ),
    ] = None,
    slice_spacing_mm: Annotated[
        float | None,
        typer.Option(
            "--slice-spacing",
            help="In mm. Default: what --configuration says; without one 1 for the chest, drawn "
            "by the seed for the head.",
            min=0.5,
            max=5.0,
        ),
    ] = None,
    configuration: Annotated[
        Path | None,
        typer.Option(
            "--configuration",
            metavar="FILE",
            help="Other patients and scans than the default ones: TOML or JSON with the fields of "
            "pe_infer/phantom/ANATOMY/default.toml, all of them.",
        ),
    ] = None,
) -> None:
    """Write a synthetic chest or head CT: DICOM files, truth.json and the mask (mask.npz)."""
    from pe_infer.phantom import open_phantom  # noqa: PLC0415  imports SciPy

    phantom = open_phantom(anatomy, configuration)
    if configuration is None:
        phantom = usual_spacing(phantom)
    if slice_spacing_mm is not None:
        phantom = phantom.with_spacing(slice_spacing_mm)
    console = open_console()
    studies: tuple[SyntheticStudy, ...]
    with console.status("making the patient ..."):
        if positive is None:
            studies = phantom.pair(seed)
        else:
            studies = (phantom.generate(seed, positive=positive),)
    for study in studies:
        sign = "positive" if study.positive else "negative"
        folder = out / f"{anatomy}-phantom-{seed}-{sign}"
        with console.status(f"writing {folder} ..."):
            files = write_series(study.slices, folder / "dicom", windows_hu=phantom.windows_hu)
            write_truth(study, folder)
        console.print(f"{folder}: {len(files)} slices, {len(study.lesions)} {phantom.lesion_name}")


def usual_spacing(phantom: "Phantom") -> "Phantom":
    """A phantom with the slice spacing that one looks at it with."""
    spacing_mm = USUAL_SPACING_MM.get(Anatomy(phantom.anatomy))
    return phantom if spacing_mm is None else phantom.with_spacing(spacing_mm)


def write_truth(study: "SyntheticStudy", folder: Path) -> None:
    """Write ``truth.json`` and ``mask.npz`` (see ``SyntheticStudy.masks``) of a study."""
    text = json.dumps(study.truth(), indent=1)
    (folder / "truth.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(folder / "mask.npz", allow_pickle=False, **study.masks())
