"""FUMPE: 35 CT pulmonary angiographies with masks of emboli (Ferdowsi University of Mashhad).

Layout, as published code that converts the collection has it (it was not at hand)::

    ROOT/CT_scans/PAT001/*.dcm         one series
    ROOT/GroundTruth/PAT001.mat        variable Mask: rows x columns x files

- Plane k of a mask belongs to the k-th file by name, which is not always the k-th by position:
  masks are put in place by SOPInstanceUID. Where sorting the names as text and by the numbers in
  them gives two orders, the study is left out.
- Published code reads the files with SciPy, so that they are of a version before 7.3; one of 7.3
  is refused.
- A study is positive if its mask has a voxel. The collection says no more of single slices; every
  embolus is said to be marked, so that planes without a voxel are clean.
- One study per patient. Whether headers lack anything that the product needs is not known: a file
  that it does not take is reported when the study is read.

M. Masoudi et al., Scientific Data 5, 180180 (2018). CC BY 4.0.
"""

import re
from pathlib import Path
from typing import Final

from export.datasets.collections import matlab
from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from pe_infer.errors import InputError

SCANS: Final = "CT_scans"
MASKS: Final = "GroundTruth"


class Fumpe:
    """See ``export.datasets.collections.base.Collection``."""

    name = "fumpe"
    terms = "CC BY 4.0"
    repair = None

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``; masks are read."""
        del workers
        scans = required(root, (SCANS,), collection=self.name)
        masks = required(root, (MASKS,), collection=self.name)
        found = Found()
        names = sorted(path.name for path in scans.iterdir() if path.is_dir())
        for path in sorted(masks.glob("*.mat")):
            if path.stem not in names:
                found.leave_out(
                    path.name, "no scan", f"{scans}: holds no {path.stem}; the mask is not used."
                )
        for name in follow(names, len(names)):
            study = _study(root, name, found)
            if study is not None:
                found.studies.append(study)
        return found


def series_files(folder: Path) -> list[Path]:
    """DICOM files of a folder, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".dcm")


def _study(root: Path, name: str, found: Found) -> IndexedStudy | None:
    """One patient; ``None`` if the study is left out."""
    folder, mask = root / SCANS / name, root / MASKS / f"{name}.mat"
    files = series_files(folder)
    if not files:
        found.leave_out(name, "no file", f"{folder}: holds no DICOM file. Unpack it again.")
        return None
    if not mask.exists():
        found.leave_out(
            name, "no mask", f"{mask}: does not exist, so whether there are emboli is not known."
        )
        return None
    if files != sorted(files, key=_by_number):
        found.leave_out(
            name,
            "order of files",
            f"{folder}: its files come in another order as text ({files[0].name} first) than by "
            "their numbers, so which plane of the mask is whose is not known.",
        )
        return None
    try:
        voxels = matlab.read_array(mask)
    except InputError as exc:
        found.leave_out(name, "unreadable", str(exc))
        return None
    if voxels.shape[2] != len(files):
        found.leave_out(
            name,
            "mask of another shape",
            f"{mask}: {voxels.shape[2]} planes, expected one for each of {len(files)} files.",
        )
        return None
    return IndexedStudy(
        study=name,
        patient=name,
        form="dicom",
        files=tuple(path.relative_to(root).as_posix() for path in files),
        positive=bool(voxels.any()),
        mask=mask.relative_to(root).as_posix(),
    )


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts], path.name
