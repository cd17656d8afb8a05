"""Every code in the objects that are made here. A test compares them with the tables of pydicom.

The finding and its site come from the bundle.
"""

from typing import Final

from pydicom.sr.coding import Code

# what the report says
REPORT: Final = Code("126000", "DCM", "Imaging Measurement Report")
PRESENT: Final = Code("52101004", "SCT", "Present")
ABSENT: Final = Code("272519000", "SCT", "Absent")
CERTAINTY: Final = Code("111012", "DCM", "Certainty of Finding")
PERCENT: Final = Code("%", "UCUM", "Percent")
SUMMARY: Final = Code("111017", "DCM", "CAD Processing and Findings Summary")
WITH_FINDINGS: Final = Code("111242", "DCM", "All algorithms succeeded; with findings")
WITHOUT_FINDINGS: Final = Code("111241", "DCM", "All algorithms succeeded; without findings")
NONE_SUCCEEDED: Final = Code("111245", "DCM", "No algorithms succeeded; without findings")
COMMENT: Final = Code("121106", "DCM", "Comment")

# what it was looked at with, and where
DEVICE: Final = Code("121007", "DCM", "Device")
PROCESSING_EQUIPMENT: Final = Code("109102", "DCM", "Processing Equipment")
PROCEDURE: Final = Code("25045-6", "LN", "CT unspecified body region")
IMAGE_LIBRARY: Final = Code("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP: Final = Code("126200", "DCM", "Image Library Group")
MODALITY: Final = Code("121139", "DCM", "Modality")
CT: Final = Code("CT", "DCM", "Computed Tomography")
FRAME_OF_REFERENCE: Final = Code("112227", "DCM", "Frame of Reference UID")

# images
OF_INTEREST: Final = Code("113000", "DCM", "Of Interest")
BEST_ILLUSTRATION: Final = Code("121080", "DCM", "Best illustration of finding")
SOURCE_IMAGE: Final = Code("121322", "DCM", "Source image for image processing operation")
SALIENCY: Final = Code("130404", "DCM", "Saliency")
NO_UNITS: Final = Code("1", "UCUM", "no units")
UNSPECIFIED_METHOD: Final = Code("112187", "DCM", "Unspecified method of calculation")
