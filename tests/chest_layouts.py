"""Tiny made-up copies of the layouts of collections of chests: two lungs with vessels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from collection_layouts import save, write_table
from dicom_files import ct_dataset
from numpy.typing import NDArray
from scipy.io import savemat

from pe_infer.dicom.reading import Quiet

SIDE = 32
SPACING_MM = 6.0
STEP_MM = 2.5
CLOT = (slice(14, 19), slice(20, 25))


def chest_plane(index: int, *, clot: bool = False) -> NDArray[np.int16]:
    """(SIDE, SIDE) int16 HU of two lungs with a vessel each, with a clot in the left if asked."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    hu = np.where(np.hypot(x / 15.4, y / 13) < 1, 40, -1000)
    for side in (-7, 7):
        hu = np.where(np.hypot((x - side) / 5.5, y / 7) < 1, -850 + index % 4, hu)
        hu[13:20, int(15.5 + side) - 3 : int(15.5 + side) + 4] = 320
    if clot:
        hu[CLOT] = 50
    return hu.astype(np.int16)


def clot_pixels() -> NDArray[np.bool_]:
    """(SIDE, SIDE): where `chest_plane` puts a clot."""
    pixels = np.zeros((SIDE, SIDE), np.bool_)
    pixels[CLOT] = True
    return pixels


PE_COLUMNS = [
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "pe_present_on_image"),
    *("negative_exam_for_pe", "qa_motion", "qa_contrast", "flow_artifact", "rv_lv_ratio_gte_1"),
    *("rv_lv_ratio_lt_1", "leftsided_pe", "chronic_pe", "true_filling_defect_not_pe"),
    *("rightsided_pe", "acute_and_chronic_pe", "central_pe", "indeterminate"),
]


@Quiet()
def write_rsna_pe(
    root: Path,
    studies: Mapping[str, Sequence[int]],
    *,
    slices: int = 24,
    indeterminate: Sequence[str] = (),
    patients: Mapping[str, str] | None = None,
) -> None:
    """A copy of RSNA's layout: study to the slices with a clot.

    Args:
        root: Made.
        studies: By name, such as ``a1``; their series is ``<name>5``.
        slices: Of every study.
        indeterminate: Studies that are so.
        patients: Study to PatientID, where headers name one.
    """
    rows = []
    for number, (study, positive) in enumerate(studies.items()):
        folder = root / "train" / study / f"{study}5"
        folder.mkdir(parents=True)
        for index in range(slices):
            image = f"{study}{index:04d}"
            dataset = ct_dataset(
                STEP_MM * index,
                chest_plane(index + number, clot=index in positive),
                SOPClassUID=None,
                SliceThickness=STEP_MM,
                SOPInstanceUID=image,
                StudyInstanceUID=study,
                SeriesInstanceUID=f"{study}5",
                PatientID=(patients or {}).get(study),
                PixelSpacing=[SPACING_MM, SPACING_MM],
            )
            save(dataset, folder / f"{image}.dcm")
            unsure, there = study in indeterminate, bool(positive)
            row = dict.fromkeys(PE_COLUMNS, 0)
            row["pe_present_on_image"] = int(index in positive)
            row["negative_exam_for_pe"] = int(not there and not unsure)
            row["leftsided_pe"] = row["central_pe"] = row["rv_lv_ratio_lt_1"] = int(there)
            row["indeterminate"] = int(unsure)
            names = [study, f"{study}5", image]
            rows.append([*names, *(row[column] for column in PE_COLUMNS[3:])])
    write_table(root / "train.csv", PE_COLUMNS, rows)


@Quiet()
def write_fumpe(
    root: Path, positive: Mapping[int, Sequence[int]], *, slices: int = 24, downwards: bool = True
) -> None:
    """A copy of FUMPE's layout: patient number to the slices (of the table) with a clot.

    Args:
        root: Made.
        positive: Slices count from the feet, whatever their files are called.
        slices: Of every study.
        downwards: Whether files are numbered from the head.
    """
    (root / "GroundTruth").mkdir(parents=True)
    for patient, clots in positive.items():
        folder = root / "CT_scans" / f"PAT{patient:03d}"
        folder.mkdir(parents=True)
        order = list(range(slices))[:: -1 if downwards else 1]
        planes = [clot_pixels() * (index in clots) for index in order]
        for place, index in enumerate(order):
            dataset = ct_dataset(
                STEP_MM * index,
                chest_plane(index + patient, clot=index in clots),
                SliceThickness=STEP_MM,
                SOPInstanceUID=f"2.25.{1000 * patient + index + 1}",
                StudyInstanceUID=f"2.25.{patient}",
                SeriesInstanceUID=f"2.25.{patient}9",
                PixelSpacing=[SPACING_MM, SPACING_MM],
            )
            save(dataset, folder / f"D{place + 1:04d}.dcm")
        mask = np.stack(planes, axis=2).astype(np.uint8)
        savemat(root / "GroundTruth" / f"PAT{patient:03d}.mat", {"Mask": mask})


def write_cad_pe(root: Path, positive: Mapping[str, Sequence[int]], *, slices: int = 24) -> None:
    """A copy of CAD-PE's layout: ``001`` or ``e0032`` to slices with a clot. Needs SimpleITK."""
    import SimpleITK  # noqa: PLC0415

    for name in ("images", "rs"):
        (root / name).mkdir(parents=True)
    half = (SIDE - 1) / 2 * SPACING_MM
    for name, clots in positive.items():
        scan = np.stack([chest_plane(index, clot=index in clots) for index in range(slices)])
        masks = np.stack(
            [clot_pixels() * np.uint8(3 * (index in clots)) for index in range(slices)]
        )
        reference = name if name.startswith("e") else f"{int(name):04d}"
        for array, path in ((scan, f"images/{name}"), (masks, f"rs/{reference}RefStd")):
            image = SimpleITK.GetImageFromArray(array)
            image.SetSpacing((SPACING_MM, SPACING_MM, STEP_MM))
            image.SetOrigin((-half, -half, 100.0))
            SimpleITK.WriteImage(image, str(root / f"{path}.nrrd"))
