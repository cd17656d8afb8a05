"""RSNA Intracranial Hemorrhage Detection (2019), the training part of its second stage.

Layout, as the challenge's pages and the notebooks published for it describe it (the collection was
not at hand)::

    ROOT/stage_2_train.csv          ID,Label; a row per image and type: ID_63eb1e259_epidural,0
    ROOT/stage_2_train/ID_63eb1e259.dcm

- The types are epidural, intraparenchymal, intraventricular, subarachnoid, subdural and any. Some
  images have all their rows twice: 752,803 images have 752,807 sets of rows.
- One folder holds all images. The name of a file is its SOPInstanceUID; study, series and patient
  are in the headers only. Patients have several studies.
- De-identification left 19 attributes, SOPClassUID, ImageType and SliceThickness not among them:
  ``repair`` states the class, which Modality CT implies. Without a thickness, planes are resampled.
- Some files of 12 bits say "unsigned, intercept about 0" although their values are HU modulo 4096:
  ``repair`` undoes that.
- ``ID_6431af929.dcm`` is cut short. The image is left out; its study keeps the others.

A. E. Flanders et al., Radiology: Artificial Intelligence 2 (3), e190211 (2020).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from export.datasets.collections.headers import FileIdentity, read_identities
from export.datasets.collections.tables import rows
from pe_infer.errors import Code, DicomError

TYPES: Final = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
ANY: Final = "any"
TABLE: Final = "stage_2_train.csv"
FOLDERS: Final = ("stage_2_train", "stage_2_train_images")

_BITS: Final = {name: 1 << place for place, name in enumerate((*TYPES, ANY))}
_COMPLETE: Final = sum(_BITS.values())
_WRAPPED_BITS: Final = 12
_WRAPPED_ABOVE: Final = -100.0  # intercept of an honest file: about -1000
_LOWEST_HU: Final = -1000  # of what is stored modulo 4096


class RsnaIch:
    """See ``export.datasets.collections.base.Collection``."""

    name = "rsna-ich-2019"
    terms = "Kaggle competition, non-commercial"

    def repair(self, dataset: Dataset) -> None:
        """State the class that is missing; turn values modulo 4096 into signed ones.

        Raises:
            DicomError: The pixels of such a file are not 16 bits each.
        """
        if "SOPClassUID" not in dataset and dataset.get("Modality") == "CT":
            dataset.SOPClassUID = CTImageStorage
        if (
            dataset.get("BitsStored") == _WRAPPED_BITS
            and dataset.get("PixelRepresentation") == 0
            and float(dataset.get("RescaleIntercept", _LOWEST_HU)) > _WRAPPED_ABOVE
        ):
            if len(dataset.PixelData) != 2 * dataset.Rows * dataset.Columns:
                raise DicomError(
                    f"{dataset.get('SOPInstanceUID')}: {len(dataset.PixelData)} bytes of pixels, "
                    f"expected 2 for each of {dataset.Rows} x {dataset.Columns}. Leave it out.",
                    code=Code.UNDECODABLE_PIXELS,
                )
            wrapped = np.frombuffer(dataset.PixelData, "<u2").astype(np.int32)
            stored = (wrapped - _LOWEST_HU) % (1 << _WRAPPED_BITS)
            dataset.PixelData = stored.astype("<u2").tobytes()
            dataset.RescaleIntercept = _LOWEST_HU
            dataset.RescaleSlope = 1

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``."""
        table = required(root, (TABLE,), collection=self.name)
        folder = required(root, FOLDERS, collection=self.name)
        found = Found()
        labels = _read_labels(table, found)
        files = {path.stem: path for path in folder.iterdir() if path.suffix == ".dcm"}
        for image in sorted(labels.keys() - files.keys()):
            found.leave_out(
                image, "no file", f"{folder}: holds no {image}.dcm. Unpack the archive again."
            )
        for image in sorted(files.keys() - labels.keys()):
            found.leave_out(
                image, "no label", f"{table}: has no usable rows of {image}; it is not used."
            )
        paths = [files[image] for image in sorted(files.keys() & labels.keys())]
        groups: dict[tuple[str, str], list[FileIdentity]] = defaultdict(list)
        for read in read_identities(paths, workers=workers, follow=follow):
            if not isinstance(read, FileIdentity):
                found.left_out.append(read)
            elif read.sop_uid != read.path.stem:
                found.leave_out(
                    read.path.name,
                    "another identity",
                    f"{read.path}: its SOPInstanceUID is {read.sop_uid}, expected the file's name: "
                    "the label may be of another image. Download it again.",
                )
            else:
                groups[read.study_uid, read.series_uid].append(read)
        for (study, series), members in sorted(groups.items()):
            _add_series(found, root, f"{study}/{series}", members, labels)
        return found


def _add_series(
    found: Found,
    root: Path,
    name: str,
    members: Sequence[FileIdentity],
    labels: dict[str, int],
) -> None:
    """One series becomes one study; its label is that of the images that are there."""
    patients = sorted({member.patient for member in members})
    if len(patients) > 1:
        found.leave_out(
            name,
            "several patients",
            f"series {name}: its files name patients {patients[:3]}, expected one: it cannot be "
            "put into one split.",
        )
        return
    slices = {
        member.sop_uid: tuple(kind for kind in TYPES if labels[member.sop_uid] & _BITS[kind])
        for member in members
    }
    shown = {kind for kinds in slices.values() for kind in kinds}
    found.studies.append(
        IndexedStudy(
            study=name,
            patient=patients[0],
            form="dicom",
            files=tuple(member.path.relative_to(root).as_posix() for member in members),
            positive=bool(shown),
            types={kind: kind in shown for kind in TYPES},
            slices=slices,
        )
    )


def _read_labels(table: Path, found: Found) -> dict[str, int]:
    """Image to the bits of its types, of the images that have all six rows and agree."""
    values: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    repeated = 0
    conflicting: set[str] = set()
    for row in rows(table, ("ID", "Label")):
        image, _, kind = row.values["ID"].rpartition("_")
        if not image.startswith("ID_") or kind not in _BITS:
            raise row.refused(
                f"ID is {row.values['ID']!r}, expected ID_<image>_<type> with a type of {[*_BITS]}"
            )
        bit, is_set = _BITS[kind], row.flag("Label")
        if seen[image] & bit:
            repeated += 1
            if bool(values[image] & bit) != is_set:
                conflicting.add(image)
        seen[image] |= bit
        values[image] |= bit * is_set
    if repeated:
        found.leave_out(
            f"{repeated} rows", "repeated row", f"{table}: {repeated} rows are there twice."
        )
    for image in sorted(values):
        if why := _fault(values[image], seen[image], conflicting=image in conflicting):
            reason, message = why
            found.leave_out(image, reason, f"{table}: {image} {message}; the image is not used.")
            del values[image]
    return dict(values)


def _fault(value: int, seen: int, *, conflicting: bool) -> tuple[str, str] | None:
    """Reason and message of labels that cannot be used."""
    if conflicting:
        return "contradicting rows", "has rows for one type that say 0 and 1"
    if seen != _COMPLETE:
        lacking = [kind for kind, bit in _BITS.items() if not seen & bit]
        return "incomplete label", f"has no row for {lacking}"
    if bool(value & _BITS[ANY]) != bool(value & ~_BITS[ANY]):
        return "contradicting rows", "says 'any' otherwise than its types do"
    return None
