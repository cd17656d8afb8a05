"""One CT instance into slices: the converter that a stream is given for files and data sets."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.headers import ImageHeader, image_headers
from pe_infer.dicom.pixels import believable_padding, stored_values
from pe_infer.dicom.reading import Quiet, read_image
from pe_infer.dicom.source_file import SourceFile, source_file
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import Slice
from pe_infer.result import Flag, QualityFlag
from pe_infer.series import posture_flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What one instance became.

    Attributes:
        slices: One for a classic image, one per frame for a multi-frame one, in the order of the
            frames.
        flags: What was tolerated about the instance by itself: lossy compression, prone or
            decubitus posture.
        source: What result objects repeat of the file; ``None`` for a data set.
    """

    slices: tuple[Slice, ...]
    flags: tuple[QualityFlag, ...]
    source: SourceFile | None


@Quiet()
def convert(source: object) -> Conversion:
    """Convert one file or data set. Nothing is kept; safe in any thread for different sources.

    Args:
        source: A file, or a pydicom data set with ``file_meta`` (a data set is not changed).

    Raises:
        ConfigurationError: ``source`` is neither.
        DicomError: This is no CT slice, lacks an attribute, or cannot be decoded.
        GeometryError: It has no usable place in the patient.
    """
    path: Path | None = None
    if isinstance(source, Dataset):
        dataset, name = source, dataset_name(source)
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        dataset, name = read_image(path), os.fspath(source)
    else:
        raise ConfigurationError(
            f"cannot convert a {type(source).__name__}, expected a DICOM file or a pydicom Dataset"
        )
    headers = image_headers(dataset, name)
    return Conversion(
        slices=tuple(slice_of(dataset, header) for header in headers),
        flags=tuple(flags_of(headers)),
        source=None if path is None else source_file(dataset, path, headers),
    )


def slices_of(source: object) -> list[Slice]:
    """Convert one file or data set and return its slices only; see ``convert``."""
    return list(convert(source).slices)


def slice_of(dataset: Dataset, header: ImageHeader) -> Slice:
    """Decode the image that ``header`` describes.

    Raises:
        DicomError: The pixels are missing or cannot be decoded.
    """
    pixels = stored_values(
        dataset,
        header.layout,
        header.transfer_syntax,
        name=header.name,
        index=header.frame_index,
        padding=header.padding,
    )
    padding = believable_padding(
        pixels, header.padding, header.rescale_slope, header.rescale_intercept
    )
    return Slice(
        pixels=pixels,
        geometry=header.geometry,
        rescale_slope=header.rescale_slope,
        rescale_intercept=header.rescale_intercept,
        padding=padding,
        padding_ignored=padding != header.padding,
        series=header.series,
        sop_instance_uid=header.sop_instance_uid,
        frame_number=header.frame_number,
        acquisition_number=header.acquisition_number,
        source=header.name
        if header.frame_number is None
        else f"{header.name} frame {header.frame_number}",
    )


def flags_of(headers: Sequence[ImageHeader]) -> list[QualityFlag]:
    """Return what is tolerated about images by themselves: loss, prone or decubitus posture."""
    flags = []
    lossy = [header for header in headers if header.lossy]
    if lossy:
        names = sorted({header.transfer_syntax.name for header in lossy})
        flags.append(
            QualityFlag(
                flag=Flag.LOSSY_COMPRESSION,
                message=f"{len(lossy)} of {len(headers)} images have been compressed with loss",
                values={"images": len(lossy), "transfer_syntaxes": "; ".join(names)},
            )
        )
    if headers:
        flags += posture_flags(headers[0].series, headers[0].geometry)
    return flags


@Quiet()
def dataset_name(dataset: Dataset) -> str:
    """Return the file a data set came from, or its SOPInstanceUID, for messages."""
    filename = getattr(dataset, "filename", None)
    if isinstance(filename, str | os.PathLike):
        return os.fspath(filename)
    uid = Attributes(dataset, "dataset").text("SOPInstanceUID")
    return f"dataset {uid or 'without SOPInstanceUID'}"
