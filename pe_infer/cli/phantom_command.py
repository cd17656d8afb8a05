"""``pe-infer phantom``: write synthetic studies with ground truth as DICOM."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from pe_infer.cli.layout import open_console
from pe_infer.dicom import write_series

if TYPE_CHECKING:  # the phantom brings SciPy, which the other commands need not wait for
    from pe_infer.phantom import PhantomStudy
    from pe_infer.phantom.head import HeadStudy

CHEST_SPACING_MM = 1.0
HEAD_WINDOWS_HU = ((40.0, 80.0), (80.0, 200.0), (600.0, 2800.0))  # brain, subdural, bone


class Anatomy(StrEnum):
    """What a synthetic study shows."""

    CHEST = "chest"
    HEAD = "head"


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
            help="In mm. Default: 1 for the chest, drawn by the seed for the head.",
            min=0.5,
            max=5.0,
        ),
    ] = None,
) -> None:
    """Write a synthetic chest or head CT: DICOM files, truth.json and the mask (mask.npz)."""
    make = _head if anatomy is Anatomy.HEAD else _chest
    make(out, seed, slice_spacing_mm, positive=positive)


def _chest(out: Path, seed: int, spacing_mm: float | None, *, positive: bool | None) -> None:
    from pe_infer.phantom import DEFAULT, generate, generate_pair  # noqa: PLC0415  imports SciPy

    spacing_mm = CHEST_SPACING_MM if spacing_mm is None else spacing_mm
    config = replace(DEFAULT, slice_spacing_mm=(spacing_mm, spacing_mm))
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


def _head(out: Path, seed: int, spacing_mm: float | None, *, positive: bool | None) -> None:
    from pe_infer.phantom.head import DEFAULT, generate, generate_pair  # noqa: PLC0415  SciPy again

    config = DEFAULT if spacing_mm is None else DEFAULT.with_spacing(spacing_mm)
    console = open_console()
    studies: tuple[HeadStudy, ...]
    with console.status("making the patient ..."):
        if positive is None:
            studies = generate_pair(seed, config)
        else:
            studies = (generate(seed, positive=positive, config=config),)
    for study in studies:
        folder = out / f"head-phantom-{seed}-{'positive' if study.positive else 'negative'}"
        with console.status(f"writing {folder} ..."):
            files = write_series(study.slices, folder / "dicom", windows_hu=HEAD_WINDOWS_HU)
            write_head_truth(study, folder)
        console.print(f"{folder}: {len(files)} slices, {len(study.hemorrhages)} hemorrhages")


def write_truth(study: "PhantomStudy", folder: Path) -> None:
    """Write ``truth.json`` and ``mask.npz`` (``embolus``: (n, rows, cols) bool) of a study."""
    findings = {"emboli": [asdict(embolus) for embolus in study.emboli]}
    _write(study, findings, folder)
    np.savez_compressed(folder / "mask.npz", embolus=study.embolus_mask)


def write_head_truth(study: "HeadStudy", folder: Path) -> None:
    """Write ``truth.json`` and ``mask.npz`` of a study.

    The mask is ``hemorrhage``: (n, rows, cols) uint8, 0 or a number that ``truth.json`` names.
    """
    from pe_infer.phantom.head import TYPES  # noqa: PLC0415  SciPy again

    findings = {
        "hemorrhages": [asdict(hemorrhage) for hemorrhage in study.hemorrhages],
        "labels": {str(number): kind for number, kind in enumerate(TYPES, start=1)},
    }
    _write(study, findings, folder)
    np.savez_compressed(folder / "mask.npz", hemorrhage=study.labels)


def _write(study: "PhantomStudy | HeadStudy", findings: Mapping[str, object], folder: Path) -> None:
    truth = {
        "seed": study.seed,
        "positive": study.positive,
        **findings,
        "parameters": study.parameters,
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
