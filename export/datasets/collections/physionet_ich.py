"""PhysioNet CT-ICH, version 1.3.1: 75 head CTs of 5 mm with masks of hemorrhage.

Layout, as the collection's own readme and published code that reads it have it (the collection was
not at hand)::

    ROOT/hemorrhage_diagnosis_raw_ct.csv   PatientNumber,SliceNumber,Intraventricular,...
    ROOT/ct_scans/049.nii                  in HU once the header's scaling is applied
    ROOT/masks/049.nii                     voxels above 0 (255 as a rule) are hemorrhage

- Numbers run from 49 to 130; 59 to 65 were not published. One scan per patient.
- SliceNumber counts from 1 along the third axis of the volume. The authors' own script warns of
  scans with another number of rows than slices: slices without a row have no label here, rows
  without a slice are reported.
- Columns Intraventricular, Intraparenchymal, Subarachnoid, Epidural, Subdural are 0 or 1;
  No_Hemorrhage has to agree with them. Fractures and the table of demographics are not used.

M. Hssayeni, PhysioNet, doi:10.13026/4nae-zg36 (2020); M. D. Hssayeni et al., Data 5 (1), 14 (2020).
"""

from collections import defaultdict
from pathlib import Path
from typing import Final

from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from export.datasets.collections.nifti import shape_of
from export.datasets.collections.tables import rows
from pe_infer.errors import InputError

TABLE: Final = "hemorrhage_diagnosis_raw_ct.csv"
SCANS: Final = "ct_scans"
MASKS: Final = "masks"
TYPES: Final = {
    "Epidural": "epidural",
    "Intraparenchymal": "intraparenchymal",
    "Intraventricular": "intraventricular",
    "Subarachnoid": "subarachnoid",
    "Subdural": "subdural",
}
CLEAN: Final = "No_Hemorrhage"

_Labels = dict[int, tuple[str, ...]]  # slice number to types


class PhysionetIch:
    """See ``export.datasets.collections.base.Collection``."""

    name = "physionet-ct-ich"
    terms = "PhysioNet, restricted health data, on application"
    repair = None

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``."""
        del workers
        table = required(root, (TABLE,), collection=self.name)
        scans = required(root, (SCANS,), collection=self.name)
        found = Found()
        labels = _read_labels(table, found)
        for path in sorted(scans.glob("*.nii*")):
            if _number(path) not in labels:
                found.leave_out(
                    path.name, "no label", f"{table}: has no row of {path.name}; it is not used."
                )
        for patient in follow(sorted(labels), len(labels)):
            try:
                study = _study(root, patient, labels[patient], found)
            except InputError as exc:
                found.leave_out(f"{patient:03d}", "unreadable", str(exc))
                continue
            if study is not None:
                found.studies.append(study)
        return found


def _study(root: Path, patient: int, labels: _Labels, found: Found) -> IndexedStudy | None:
    """One patient; ``None`` if the study is left out.

    Raises:
        InputError: A volume cannot be read.
    """
    name = f"{patient:03d}"
    volume, mask = _volume(root / SCANS, name), _volume(root / MASKS, name)
    if volume is None:
        found.leave_out(
            name, "no file", f"{root / SCANS}: holds no {name}.nii (59 to 65 were not published)."
        )
        return None
    shape = shape_of(volume)
    if mask is None:
        found.leave_out(
            f"mask {name}", "no mask", f"{root / MASKS}: holds no {name}.nii; the study has none."
        )
    elif (other := shape_of(mask)) != shape:
        found.leave_out(
            name,
            "mask of another shape",
            f"{mask}: shape {other}, expected {shape} of the scan. Download both again.",
        )
        return None
    beyond = sorted(number for number in labels if not 1 <= number <= shape[2])
    if beyond:
        found.leave_out(
            f"{len(beyond)} rows of {name}",
            "label without a slice",
            f"{TABLE}: slice {beyond[0]} of {name}, which has {shape[2]} slices.",
        )
    kept = {number: kinds for number, kinds in sorted(labels.items()) if number not in beyond}
    shown = {kind for kinds in kept.values() for kind in kinds}
    return IndexedStudy(
        study=name,
        patient=name,
        form="nifti",
        files=(volume.relative_to(root).as_posix(),),
        positive=bool(shown),
        types={kind: kind in shown for kind in TYPES.values()},
        slices={str(number): kinds for number, kinds in kept.items()},
        mask=None if mask is None else mask.relative_to(root).as_posix(),
    )


def _volume(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.nii", folder / f"{name}.nii.gz")
    return next((path for path in candidates if path.exists()), None)


def _number(path: Path) -> int:
    stem = path.name.split(".", maxsplit=1)[0]
    return int(stem) if stem.isdecimal() else -1


def _read_labels(table: Path, found: Found) -> dict[int, _Labels]:
    """Patient to slice number to types."""
    labels: dict[int, _Labels] = defaultdict(dict)
    contradicting: set[tuple[int, int]] = set()
    for row in rows(table, ("PatientNumber", "SliceNumber", *TYPES, CLEAN)):
        patient, number = row.whole("PatientNumber"), row.whole("SliceNumber")
        kinds = tuple(kind for column, kind in TYPES.items() if row.flag(column))
        if row.flag(CLEAN) == bool(kinds):
            contradicting.add((patient, number))
        known = labels[patient].setdefault(number, kinds)
        if known != kinds:
            contradicting.add((patient, number))
    for patient, number in sorted(contradicting):
        found.leave_out(
            f"{patient:03d} slice {number}",
            "contradicting rows",
            f"{table}: patient {patient}, slice {number}: {CLEAN} and the types, or two rows, "
            "contradict each other; the slice has no label.",
        )
        del labels[patient][number]
    return dict(labels)
