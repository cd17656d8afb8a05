"""Tiny made-up copies of the layouts of public collections: discs of tissue for heads."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from dicom_files import ct_dataset
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pe_infer.dicom import write_series
from pe_infer.dicom.reading import Quiet
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry

SIDE = 32
SPACING_MM = 6.0
TYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")


def plane(index: int, *, blood: bool = False) -> NDArray[np.int16]:
    """(SIDE, SIDE) int16 HU of a round head, with a bleed at the patient's left if asked for."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    radius = np.hypot(x, y)
    hu = np.where(radius < 14, 1000, -1000)
    hu = np.where(radius < 12, 30 + index % 3, hu)
    if blood:
        hu[blood_pixels()] = 70
    return hu.astype(np.int16)


def blood_pixels() -> NDArray[np.bool_]:
    """(SIDE, SIDE): where `plane` puts blood."""
    pixels = np.zeros((SIDE, SIDE), np.bool_)
    pixels[14:19, 20:25] = True
    return pixels


def head(
    count: int, *, blood: Sequence[int] = (), step_mm: float = 5.0, seed: int = 0
) -> list[Slice]:
    """Slices of a head, feet to head; ``blood``: those that show it."""
    info = SeriesInfo(
        series_instance_uid=f"2.25.{1000 + seed}",
        study_instance_uid=f"2.25.{2000 + seed}",
        frame_of_reference_uid=f"2.25.{3000 + seed}",
        body_part_examined="HEAD",
    )
    half = (SIDE - 1) / 2 * SPACING_MM
    return [
        Slice(
            pixels=plane(index + seed, blood=index in blood),
            geometry=SliceGeometry(
                rows=SIDE,
                cols=SIDE,
                row_spacing_mm=SPACING_MM,
                col_spacing_mm=SPACING_MM,
                image_position_mm=(-half, -half, index * step_mm),
                thickness_mm=step_mm,
            ),
            series=info,
            sop_instance_uid=f"2.25.{100 * seed + index + 1}",
        )
        for index in range(count)
    ]


@Quiet()
def rsna_dataset(
    sop: str, position_mm: float, *, patient: str, study: str, blood: bool = False
) -> Dataset:
    """An image with the attributes that RSNA's de-identification left, and no others."""
    dataset = ct_dataset(
        position_mm,
        plane(0, blood=blood),
        SOPClassUID=None,
        SliceThickness=None,
        RescaleType=None,
        SOPInstanceUID=sop,
        StudyInstanceUID=f"ID_{study}",
        SeriesInstanceUID=f"ID_{study}s",
        PatientID=patient,
        PixelSpacing=[SPACING_MM, SPACING_MM],
    )
    kept = {
        *("SOPInstanceUID", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID"),
        *("ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "Rows", "Columns"),
        *("PhotometricInterpretation", "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit"),
        *("PixelRepresentation", "RescaleIntercept", "RescaleSlope", "PixelData"),
    }
    for element in list(dataset):
        if element.keyword not in kept:
            del dataset[element.tag]
    return dataset


def write_rsna(
    root: Path,
    studies: Mapping[str, Sequence[str]],
    *,
    slices: int = 4,
    positive: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """A copy of RSNA's layout; returns its images in order.

    Args:
        root: Made.
        studies: Patient to studies.
        slices: Of every study.
        positive: Study to the slices with subdural blood.
    """
    folder = root / "stage_2_train"
    folder.mkdir(parents=True)
    images: list[str] = []
    rows: list[tuple[str, int]] = []
    for patient, names in studies.items():
        for study in names:
            for index in range(slices):
                image = f"ID_{study}{index:04d}"
                shown = index in (positive or {}).get(study, ())
                dataset = rsna_dataset(
                    image, 5.0 * index, patient=patient, study=study, blood=shown
                )
                save(dataset, folder / f"{image}.dcm")
                images.append(image)
                kinds = {"subdural", "any"} if shown else set()
                rows += [(f"{image}_{kind}", int(kind in kinds)) for kind in (*TYPES, "any")]
    write_table(root / "stage_2_train.csv", ["ID", "Label"], rows)
    return images


@Quiet()
def save(dataset: Dataset, path: Path) -> None:
    """Write a data set that need not be valid."""
    dataset.save_as(path, enforce_file_format=True)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


CQ500_COLUMNS = [
    "name",
    "Category",
    *(
        f"R{r}:{c}"
        for r in (1, 2, 3)
        for c in ("ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "Fracture")
    ),
]


def write_cq500(root: Path, votes: Mapping[int, Sequence[str]], *, slices: int = 14) -> None:
    """A copy of CQ500's layout.

    Args:
        root: Made.
        votes: Study number to what readers 1, 2 and 3 saw, such as ``"ICH SDH"``.
        slices: Of the thick series.
    """
    root.mkdir()
    rows = []
    for number, seen in votes.items():
        flags = [
            int(column.split(":")[1] in seen[int(column[1]) - 1].split())
            for column in CQ500_COLUMNS[2:]
        ]
        rows.append([f"CQ500-CT-{number}", "B1", *flags])
        study = root / f"CQ500CT{number} CQ500CT{number}" / "Unknown Study"
        blood = range(4, 8) if sum("ICH" in s for s in seen) > 1 else ()
        for name, agent in (("CT Plain", None), ("CT POST CONTRAST", "IV")):
            images = [
                replace(image, series=replace(image.series, contrast_bolus_agent=agent))
                for image in head(slices, blood=blood, seed=number)
            ]
            for place, path in enumerate(write_series(images, study / name)):
                path.rename(path.with_name(f"CT{place:06d}.dcm"))
    write_table(root / "reads.csv", CQ500_COLUMNS, rows)


PHYSIONET_COLUMNS = [
    *("PatientNumber", "SliceNumber", "Intraventricular", "Intraparenchymal", "Subarachnoid"),
    *("Epidural", "Subdural", "No_Hemorrhage", "Fracture_Yes_No"),
]


def write_physionet(
    root: Path, positive: Mapping[int, Sequence[int]], *, slices: int = 12, tilt: float = 0.0
) -> None:
    """A copy of PhysioNet CT-ICH's layout: patient number to the slices (from 1) with blood.

    Needs nibabel.
    """
    import nibabel  # noqa: PLC0415

    for name in ("ct_scans", "masks"):
        (root / name).mkdir(parents=True)
    half = (SIDE - 1) / 2 * SPACING_MM
    # Columns to the patient's left, rows to the back: RAS has both reversed.
    affine = np.diag([-SPACING_MM, -SPACING_MM, 5.0, 1.0])
    affine[:3, 3] = half, half, -30.0
    affine[1, 2] = tilt
    rows = []
    for patient, bleeding in positive.items():
        planes = [plane(index, blood=index + 1 in bleeding) for index in range(slices)]
        masks = [blood_pixels() * (index + 1 in bleeding) for index in range(slices)]
        for folder, volume in (("ct_scans", planes), ("masks", masks)):
            voxels = np.stack(volume).transpose(2, 1, 0).astype(np.int16)
            if folder == "masks":
                voxels = voxels * np.int16(255)
            image = nibabel.Nifti1Image(voxels, affine)
            nibabel.save(image, root / folder / f"{patient:03d}.nii")
        for number in range(1, slices + 1):
            shown = int(number in bleeding)
            rows.append([patient, number, 0, shown, 0, 0, 0, 1 - shown, 0])
    write_table(root / "hemorrhage_diagnosis_raw_ct.csv", PHYSIONET_COLUMNS, rows)
