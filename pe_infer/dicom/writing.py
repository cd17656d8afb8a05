"""Slices into CT Image Storage instances (PS3.3 A.3), for synthetic studies.

The result depends on the slices alone: no clock, no random numbers. What is written says of itself
that it is synthetic; do not use it for images of patients, whose module would be replaced.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from pe_infer.dicom.reading import translated
from pe_infer.errors import Code, ConfigurationError
from pe_infer.geometry import Slice

_IMPLEMENTATION_UID = "2.25.302873563911839166240325786148265410321"
_CHECK = "Check what the slice says of its series, and the space in the folder."
_LEAST_TILT_DEGREES = 0.05
_CHARACTER_SET = "ISO_IR 192"  # UTF-8


def write_series(
    slices: Sequence[Slice],
    folder: str | os.PathLike[str],
    *,
    patient_name: str = "PHANTOM^SYNTHETIC",
    patient_id: str = "PHANTOM",
    study_description: str = "Synthetic CT",
    manufacturer: str = "pe_infer phantom",
    kvp: float | None = 120.0,
    windows_hu: Sequence[tuple[float, float]] = ((100.0, 700.0),),
) -> list[Path]:
    """Write one series, one file per slice, in explicit VR little endian.

    Files are named ``00001.dcm`` and on in ascending position, which is also the InstanceNumber.
    UIDs are those of the slices; those that are missing are derived from the content (2.25 form),
    so that equal slices give equal files.

    Args:
        slices: Of one series; any order.
        folder: Created if missing. Existing files are not overwritten.
        patient_name: PatientName, obviously synthetic ("PHANTOM^SEED 7").
        patient_id: PatientID, obviously synthetic.
        study_description: StudyDescription, where the slices do not say.
        manufacturer: Manufacturer, where the slices do not say.
        kvp: KVP, peak kilovoltage of the tube; ``None`` writes it empty.
        windows_hu: WindowCenter and WindowWidth of one or several windows to look through.

    Returns:
        The files, ascending position.

    Raises:
        ConfigurationError: There is no slice, the slices are of several series, the folder cannot
            be made, or a file exists already.
        DicomError: A file cannot be written; those before it stay.
    """
    if not slices:
        raise ConfigurationError("there are no slices to write, expected at least one")
    uids = {s.series.series_instance_uid for s in slices}
    if len(uids) > 1:
        raise ConfigurationError(
            f"slices of {len(uids)} series were given, expected one: write each series to a folder "
            "of its own"
        )
    ascending = sorted(
        slices, key=lambda s: (s.position_um, s.sop_instance_uid, s.frame_number or 0)
    )
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(
            f"{target}: the folder cannot be made: {exc.strerror}. Give another one."
        ) from exc
    paths = [target / f"{number:05d}.dcm" for number in range(1, len(ascending) + 1)]
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None:
        raise ConfigurationError(
            f"{existing}: exists already and is not overwritten. Give an empty folder."
        )
    seed = _content_seed(ascending)
    for number, (path, image) in enumerate(zip(paths, ascending, strict=True), start=1):
        with translated(str(path), "write the image", code=Code.INVALID_ATTRIBUTE, remedy=_CHECK):
            dataset = _image(image, number, seed, kvp)
            dataset.WindowCenter = _decimals(*(centre for centre, _ in windows_hu))
            dataset.WindowWidth = _decimals(*(width for _, width in windows_hu))
            dataset.PatientName = patient_name
            dataset.PatientID = patient_id
            dataset.StudyDescription = image.series.study_description or study_description
            dataset.Manufacturer = image.series.manufacturer or manufacturer
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return paths


def _content_seed(slices: Sequence[Slice]) -> str:
    digest = hashlib.sha256()
    for image in slices:
        digest.update(image.host_pixels.tobytes())
        digest.update(repr((image.geometry, image.rescale_slope, image.rescale_intercept)).encode())
    return digest.hexdigest()


def _uid(*parts: object) -> str:
    """Return a UID of the 2.25 form (PS3.5 B.2) that depends on ``parts`` alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _image(image: Slice, number: int, seed: str, kvp: float | None) -> Dataset:
    uid = image.sop_instance_uid or _uid(seed, "instance", number)
    if image.frame_number is not None:
        uid = _uid(uid, "frame", image.frame_number)  # frames of one instance become instances
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(uid)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
    dataset.file_meta.ImplementationVersionName = "PE_INFER"
    dataset.SpecificCharacterSet = _CHARACTER_SET
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = uid
    _add_identity(dataset, image, seed)
    _add_acquisition(dataset, image, number, kvp)
    _add_plane(dataset, image)
    _add_pixels(dataset, image)
    return dataset


def _add_identity(dataset: Dataset, image: Slice, seed: str) -> None:
    """Patient, General Study, General Series and Frame of Reference modules."""
    info = image.series
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    dataset.StudyInstanceUID = info.study_instance_uid or _uid(seed, "study")
    dataset.StudyDate = ""
    dataset.StudyTime = ""
    dataset.ReferringPhysicianName = ""
    dataset.StudyID = ""
    dataset.AccessionNumber = ""
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID = info.series_instance_uid or _uid(seed, "series")
    dataset.SeriesNumber = "" if info.series_number is None else info.series_number
    dataset.PatientPosition = info.patient_position or "HFS"
    if info.series_description:
        dataset.SeriesDescription = info.series_description
    if info.protocol_name:
        dataset.ProtocolName = info.protocol_name
    if info.body_part_examined:
        dataset.BodyPartExamined = info.body_part_examined
    else:
        dataset.Laterality = ""  # required where the body part might be one of a pair
    dataset.FrameOfReferenceUID = info.frame_of_reference_uid or _uid(seed, "frame of reference")
    dataset.PositionReferenceIndicator = ""


def _add_acquisition(dataset: Dataset, image: Slice, number: int, kvp: float | None) -> None:
    """General Image, CT Image and Contrast/Bolus modules."""
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = number
    dataset.AcquisitionNumber = "" if image.acquisition_number is None else image.acquisition_number
    dataset.KVP = "" if kvp is None else DSfloat(kvp, auto_format=True)
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.ImageComments = "Synthetic image, not of a patient"
    if image.series.convolution_kernel:
        dataset.ConvolutionKernel = image.series.convolution_kernel
    if image.series.contrast_bolus_agent:
        dataset.ContrastBolusAgent = image.series.contrast_bolus_agent


def _add_plane(dataset: Dataset, image: Slice) -> None:
    """Image Plane module."""
    geometry = image.geometry
    dataset.PixelSpacing = _decimals(geometry.row_spacing_mm, geometry.col_spacing_mm)
    dataset.ImageOrientationPatient = _decimals(*geometry.row_direction, *geometry.col_direction)
    dataset.ImagePositionPatient = _decimals(*geometry.image_position_mm)
    dataset.SliceThickness = (
        "" if geometry.thickness_mm is None else _decimals(geometry.thickness_mm)[0]
    )
    tilt = math.degrees(math.atan2(geometry.normal[1], geometry.normal[2]))
    if abs(tilt) >= _LEAST_TILT_DEGREES:
        # Positive where the front of the slice lies nearer to the head, as scanners write it.
        dataset.GantryDetectorTilt = _decimals(round(tilt, 2))[0]


def _add_pixels(dataset: Dataset, image: Slice) -> None:
    """Image Pixel module, and the rescale of the CT Image module."""
    signed = image.host_pixels.dtype == np.int16
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = image.geometry.rows, image.geometry.cols
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = int(signed)
    vr = "SS" if signed else "US"
    if image.padding is not None:
        dataset.add_new("PixelPaddingValue", vr, image.padding[0])
        if image.padding[1] != image.padding[0]:
            dataset.add_new("PixelPaddingRangeLimit", vr, image.padding[1])
    dataset.RescaleIntercept, dataset.RescaleSlope = _decimals(
        image.rescale_intercept, image.rescale_slope
    )
    dataset.RescaleType = "HU"
    dataset.add_new(
        "PixelData",
        "OW",
        image.host_pixels.astype(f"<{'i' if signed else 'u'}2", copy=False).tobytes(),
    )


def _decimals(*values: float) -> list[DSfloat]:
    """Return values as decimal strings of 16 characters, rounded as little as possible."""
    return [DSfloat(float(value), auto_format=True) for value in values]
