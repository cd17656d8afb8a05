"""RSNA-STR Pulmonary Embolism Detection (2020), the training part.

Layout, as the challenge's page and the notebooks published for it have it (the collection was not
at hand)::

    ROOT/train.csv     a row per image: StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID,
                       pe_present_on_image, and columns that are the same in all rows of a study
    ROOT/train/<study>/<series>/<image>.dcm

- 1,790,594 images of 7,279 studies, each of one series; 5.4 % of the images show emboli.
- A study is negative (``negative_exam_for_pe``), indeterminate, or positive; ``indeterminate`` ones
  (motion, contrast) are left out and counted. A positive study without a positive image, or another
  one with one, contradicts itself and is left out.
- ``qa_motion``, ``qa_contrast``, ``flow_artifact`` and ``true_filling_defect_not_pe`` are not used:
  such studies stay, as they come.
- A study's files are not told from each other by their headers but by folder and name; one header
  of each series is read, for the patient. Whether headers name patients could not be confirmed:
  where they do not, the study stands for its patient. The same holds for SOPClassUID, which
  ``repair`` states where it is missing, as RSNA's other collection lacks it.

E. Colak et al., Radiology: Artificial Intelligence 3 (2), e200254 (2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from export.datasets.collections.headers import FileIdentity, read_identities
from export.datasets.collections.tables import Row, rows

TABLE: Final = "train.csv"
FOLDER: Final = "train"
IMAGE: Final = "pe_present_on_image"
NEGATIVE: Final = "negative_exam_for_pe"
INDETERMINATE: Final = "indeterminate"
TYPES: Final = {
    "central_pe": "central",
    "leftsided_pe": "left",
    "rightsided_pe": "right",
    "chronic_pe": "chronic",
    "acute_and_chronic_pe": "acute and chronic",
    "rv_lv_ratio_gte_1": "right ventricle at least as wide as the left",
}
KIND: Final = "embolism"  # of a slice
_IDENTITY: Final = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_STUDY: Final = (NEGATIVE, INDETERMINATE, *TYPES)


@dataclass(kw_only=True)
class _Labels:
    """Labels of one series: those of the study, and of every image."""

    study: tuple[bool, ...]
    images: dict[str, bool] = field(default_factory=dict)
    consistent: bool = True


class RsnaPe:
    """See ``export.datasets.collections.base.Collection``."""

    name = "rsna-pe-2020"
    terms = "Kaggle competition, non-commercial"

    def repair(self, dataset: Dataset) -> None:
        """State the class that is missing."""
        if "SOPClassUID" not in dataset and dataset.get("Modality") == "CT":
            dataset.SOPClassUID = CTImageStorage

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``; one header of a series is read."""
        table = required(root, (TABLE,), collection=self.name)
        required(root, (FOLDER,), collection=self.name)
        found = Found()
        labels = _read_labels(table, found)
        usable: list[tuple[tuple[str, str], Path]] = []
        for key, each in sorted(labels.items()):
            first = _first_file(root, key, each, found)
            if first is not None and _is_usable(key, each, table, found):
                usable.append((key, first))
        paths = [path for _, path in usable]
        identities = read_identities(paths, workers=workers, follow=follow, patient_required=False)
        for (key, path), read in zip(usable, identities, strict=True):
            if not isinstance(read, FileIdentity):
                found.left_out.append(read)
            elif (read.study_uid, read.series_uid, read.sop_uid) != (*key, path.stem):
                found.leave_out(
                    "/".join(key),
                    "another identity",
                    f"{path}: its header says {read.study_uid}/{read.series_uid}/{read.sop_uid}, "
                    "expected its path: the labels may be of another study. Download it again.",
                )
            else:
                found.studies.append(_study(key, labels[key], read.patient))
        return found


def _study(key: tuple[str, str], labels: _Labels, patient: str) -> IndexedStudy:
    flags = dict(zip(_STUDY, labels.study, strict=True))
    return IndexedStudy(
        study="/".join(key),
        patient=patient or key[0],
        form="dicom",
        files=(f"{FOLDER}/{key[0]}/{key[1]}",),
        positive=any(labels.images.values()),
        types={kind: flags[column] for column, kind in TYPES.items()},
        slices={image: (KIND,) if shown else () for image, shown in labels.images.items()},
    )


def _read_labels(table: Path, found: Found) -> dict[tuple[str, str], _Labels]:
    """Study and series to their labels."""
    labels: dict[tuple[str, str], _Labels] = {}
    repeated = 0
    for row in rows(table, (*_IDENTITY, IMAGE, *_STUDY)):
        study, series, image = (_named(row, column) for column in _IDENTITY)
        said = tuple(row.flag(column) for column in _STUDY)
        shown = row.flag(IMAGE)
        own = labels.setdefault((study, series), _Labels(study=said))
        repeated += image in own.images
        own.consistent &= own.study == said and own.images.get(image, shown) == shown
        own.images[image] = shown
    if repeated:
        found.leave_out(
            f"{repeated} rows", "repeated row", f"{table}: {repeated} rows are there twice."
        )
    return labels


def _named(row: Row, column: str) -> str:
    """An identifier, which is part of a path.

    Raises:
        InputError: It is empty, or no name of a file.
    """
    text = row.values[column]
    if not text or Path(text).name != text:
        raise row.refused(f"column {column!r} is {text!r}, expected an identifier")
    return text


def _is_usable(key: tuple[str, str], labels: _Labels, table: Path, found: Found) -> bool:
    """Whether a study's labels agree with each other and say something."""
    name = "/".join(key)
    negative, indeterminate = labels.study[:2]
    shown = sum(labels.images.values())
    if not labels.consistent:
        why = "rows differ in what they say of the study, or of one image"
    elif negative and indeterminate:
        why = "is both negative and indeterminate"
    elif (negative or indeterminate) and shown:
        why = f"is not positive, but {shown} of its images are"
    elif not negative and not indeterminate and not shown:
        why = "is positive, but none of its images is"
    elif indeterminate:
        message = f"{table}: {name} is indeterminate: neither positive nor negative."
        found.leave_out(name, "indeterminate", message)
        return False
    else:
        return True
    found.leave_out(name, "contradicting rows", f"{table}: {name} {why}; it is not used.")
    return False


def _first_file(root: Path, key: tuple[str, str], labels: _Labels, found: Found) -> Path | None:
    """The first image of a series; ``None`` if it has none. Images without files lose their labels.

    Files without a label stay: their planes have none.
    """
    folder = root / FOLDER / key[0] / key[1]
    there = {path.stem for path in folder.glob("*.dcm")}
    _note(found, sorted(labels.images.keys() - there), folder, "no file", "is labelled only")
    _note(found, sorted(there - labels.images.keys()), folder, "no label", "has no row")
    kept = sorted(labels.images.keys() & there)
    if not kept:
        return None
    labels.images = {image: labels.images[image] for image in kept}
    return folder / f"{kept[0]}.dcm"


def _note(found: Found, images: Sequence[str], folder: Path, reason: str, why: str) -> None:
    for image in images:
        found.leave_out(image, reason, f"{folder / image}.dcm: {why}. Unpack the archive again.")
