"""CAD-PE: 91 CT pulmonary angiographies with masks of emboli (challenge of ISBI 2013).

Layout, as published code that reads the collection has it (it was not at hand)::

    ROOT/images/001.nrrd     ROOT/rs/0001RefStd.nrrd
    ROOT/images/e0032.nrrd   ROOT/rs/e0032RefStd.nrrd

- A mask has a number for every embolus; 0 is background. It has the shape of its scan.
- A study is positive if its mask has a voxel; planes without one are clean.
- One study per patient is taken for granted; nothing found says otherwise. Whether voxels are HU
  could not be confirmed: a volume without air is refused when it is read.

G. Gonzalez et al., arXiv 2003.13440 (2020); IEEE DataPort, doi:10.21227/9bw7-6823.
"""

import re
from pathlib import Path
from typing import Final

from export.datasets.collections import nrrd
from export.datasets.collections.base import Follow, Found, IndexedStudy, required
from pe_infer.errors import InputError

SCANS: Final = "images"
MASKS: Final = "rs"

_MASK = re.compile(r"(e?)0*(\d+)RefStd")
_SCAN = re.compile(r"(e?)0*(\d+)")


class CadPe:
    """See ``export.datasets.collections.base.Collection``."""

    name = "cad-pe"
    terms = "IEEE DataPort, its terms"
    repair = None

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """See ``export.datasets.collections.base.Collection``; masks are read."""
        del workers
        scans = required(root, (SCANS,), collection=self.name)
        masks = required(root, (MASKS,), collection=self.name)
        found = Found()
        volumes = _named(scans, _SCAN, found)
        references = _named(masks, _MASK, found)
        for key in sorted(references.keys() - volumes.keys()):
            name = references[key].name
            found.leave_out(name, "no scan", f"{scans}: holds no scan of {name}; it is not used.")
        for key in follow(sorted(volumes), len(volumes)):
            study = _study(root, volumes[key], references.get(key), found)
            if study is not None:
                found.studies.append(study)
        return found


def _named(folder: Path, pattern: re.Pattern[str], found: Found) -> dict[tuple[str, int], Path]:
    """Files of a folder by the series (``e`` or none) and number in their names."""
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.glob("*.nrrd")):
        match = pattern.fullmatch(path.stem)
        if match is None:
            found.leave_out(path.name, "unknown name", f"{path}: is named as no file of CAD-PE.")
            continue
        key = (match[1], int(match[2]))
        if key in files:
            found.leave_out(
                path.name, "two of a number", f"{path}: has the number of {files[key].name}."
            )
            continue
        files[key] = path
    return files


def _study(root: Path, volume: Path, mask: Path | None, found: Found) -> IndexedStudy | None:
    """One study; ``None`` if it is left out."""
    name = volume.stem
    if mask is None:
        found.leave_out(
            name, "no mask", f"{root / MASKS}: has none of {name}: it may have emboli or not."
        )
        return None
    try:
        shape, other = nrrd.shape_of(volume), nrrd.shape_of(mask)
        if other != shape:
            found.leave_out(
                name,
                "mask of another shape",
                f"{mask}: shape {other}, expected {shape} of the scan. Download both again.",
            )
            return None
        positive = bool(nrrd.read_mask(mask, volume).any())
    except InputError as exc:
        found.leave_out(name, "unreadable", str(exc))
        return None
    return IndexedStudy(
        study=name,
        patient=name,
        form="nrrd",
        files=(volume.relative_to(root).as_posix(),),
        positive=positive,
        mask=mask.relative_to(root).as_posix(),
    )
