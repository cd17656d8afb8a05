"""CT images in DICOM: find a series, read slices, inspect, write. The only user of pydicom."""

from pe_infer.dicom.conversion import Conversion, convert, slices_of
from pe_infer.dicom.inspection import InspectReport, PixelReport, SeriesReport, inspect
from pe_infer.dicom.intake import (
    IMPLEMENTATION_NAME,
    IMPLEMENTATION_UID,
    IntakeHeader,
    file_head,
    read_data_set_header,
    read_intake_header,
    storage_contexts,
    store_response,
)
from pe_infer.dicom.opening import (
    Series,
    SliceReference,
    Survey,
    find_series,
    open_series,
    survey,
)
from pe_infer.dicom.scanning import Item, Source
from pe_infer.dicom.selection import Refusal, SeriesSummary
from pe_infer.dicom.source_file import SourceFile
from pe_infer.dicom.writing import write_series

__all__ = [
    "IMPLEMENTATION_NAME",
    "IMPLEMENTATION_UID",
    "Conversion",
    "InspectReport",
    "IntakeHeader",
    "Item",
    "PixelReport",
    "Refusal",
    "Series",
    "SeriesReport",
    "SeriesSummary",
    "SliceReference",
    "Source",
    "SourceFile",
    "Survey",
    "convert",
    "file_head",
    "find_series",
    "inspect",
    "open_series",
    "read_data_set_header",
    "read_intake_header",
    "slices_of",
    "storage_contexts",
    "store_response",
    "survey",
    "write_series",
]
