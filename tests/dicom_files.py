"""Synthetic CT instances for tests: valid ones, which each test then spoils in its own way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from pe_infer.dicom import convert
from pe_infer.errors import DicomError, GeometryError

STUDY = "2.25.1000"
SERIES = "2.25.2000"
FRAME_OF_REFERENCE = "2.25.3000"

Pixels = NDArray[np.integer[Any]]


def ramp(rows: int = 8, cols: int = 10, *, start: int = -1000, step: int = 25) -> Pixels:
    """Return an int16 image in which all values differ."""
    return (np.arange(rows * cols).reshape(rows, cols) * step + start).astype(np.int16)


def ct_dataset(
    position_mm: float = 0.0, pixels: Pixels | None = None, **changes: object
) -> Dataset:
    """Return a valid CT image; ``changes`` set attributes by keyword, ``None`` removes one."""
    pixels = ramp() if pixels is None else pixels
    dataset = _image(pixels, CTImageStorage)
    dataset.ImagePositionPatient = [-100, -90, position_mm]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.7, 0.8]
    dataset.SliceThickness = 1.25
    dataset.RescaleSlope = 1
    dataset.RescaleIntercept = 0
    dataset.RescaleType = "HU"
    return changed(dataset, **changes)


def enhanced_dataset(
    positions_mm: Sequence[float], volume: Pixels | None = None, **changes: object
) -> Dataset:
    """Return a valid enhanced CT image; positions per frame, everything else shared."""
    if volume is None:
        volume = np.stack([ramp() + i for i in range(len(positions_mm))]).astype(np.int16)
    dataset = _image(volume, EnhancedCTImageStorage)
    dataset.NumberOfFrames = len(positions_mm)
    dataset.SharedFunctionalGroupsSequence = [
        items(
            PixelMeasuresSequence=items(PixelSpacing=[0.7, 0.8], SliceThickness=1.25),
            PlaneOrientationSequence=items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
            PixelValueTransformationSequence=items(
                RescaleSlope=1, RescaleIntercept=0, RescaleType="HU"
            ),
            CTImageFrameTypeSequence=items(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
            CTReconstructionSequence=items(ConvolutionKernel="STANDARD"),
        )[0]
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        items(
            PlanePositionSequence=items(ImagePositionPatient=[-100, -90, z]),
            FrameContentSequence=items(FrameAcquisitionNumber=4),
        )[0]
        for z in positions_mm
    ]
    return changed(dataset, **changes)


def items(**attributes: object) -> Items:
    """Return a sequence of one item."""
    return Items([changed(Dataset(), **attributes)])


def changed(dataset: Dataset, **changes: object) -> Dataset:
    """Set attributes by keyword; ``None`` removes one."""
    for keyword, value in changes.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)
    return dataset


def with_pixels(
    dataset: Dataset, values: Pixels, *, bits: int, high_bit: int, signed: bool
) -> Dataset:
    """Replace the pixels by 16-bit containers as given, garbage included."""
    dataset.Rows, dataset.Columns = values.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, high_bit
    dataset.PixelRepresentation = int(signed)
    dataset.PixelData = values.astype("<u2").tobytes()
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    """Write a file with preamble and file meta information."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_series(folder: Path, positions_mm: Sequence[float], **changes: object) -> list[Path]:
    """Write one series of classic images."""
    return [
        save(ct_dataset(z, InstanceNumber=number, **changes), folder / f"{number:04d}.dcm")
        for number, z in enumerate(positions_mm, start=1)
    ]


def _image(pixels: Pixels, sop_class: UID) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.ImplementationClassUID = UID("2.25.1")
    uid = generate_uid(prefix=None)
    dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = uid
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientName = "SECRET^NAME"
    dataset.PatientID = "SECRET-ID"
    dataset.StudyInstanceUID = STUDY
    dataset.SeriesInstanceUID = SERIES
    dataset.FrameOfReferenceUID = FRAME_OF_REFERENCE
    dataset.SeriesNumber = 3
    dataset.InstanceNumber = 1
    dataset.AcquisitionNumber = 2
    dataset.PatientPosition = "HFS"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    little = pixels.astype(pixels.dtype.newbyteorder("<"))
    data = little.tobytes()
    dataset.add_new("PixelData", "OW", data + b"\0" * (len(data) % 2))
    return dataset


def refusal_of(dataset: Dataset) -> DicomError | GeometryError:
    """Return the error that converting ``dataset`` raises."""
    with pytest.raises((DicomError, GeometryError)) as caught:
        convert(dataset)
    return caught.value
