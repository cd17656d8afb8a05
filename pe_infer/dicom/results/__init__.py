"""Results as standard DICOM objects: report, key images, key objects, attention.

Imports highdicom, which takes a while: import this package where objects are written.
"""

from pe_infer.dicom.results.outcome import Alert, ObjectKind, Outcome, ResultObject, Unjudged
from pe_infer.dicom.results.writing import prepare_folder, warm_up, write_results

__all__ = [
    "Alert",
    "ObjectKind",
    "Outcome",
    "ResultObject",
    "Unjudged",
    "prepare_folder",
    "warm_up",
    "write_results",
]
