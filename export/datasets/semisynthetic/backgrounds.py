"""Real studies without the finding that pairs are made of: where they lie, and several in turn."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from export.datasets.collections import nifti
from export.datasets.semisynthetic.chest import RealChests
from export.datasets.semisynthetic.head import RealHeads
from export.datasets.semisynthetic.painted import PaintedStudy, RealPairs
from pe_infer import dicom
from pe_infer.errors import ConfigurationError

ANATOMIES: Final = ("chest", "head")


def open_background(
    anatomy: str,
    folder: Path,
    source: str,
    *,
    volume: str | None = None,
    arteries: str | None = None,
) -> RealPairs:
    """Pairs made of one real study.

    Args:
        anatomy: ``"chest"``: emboli, ``"head"``: blood.
        folder: Of a DICOM series, or of NIfTI volumes.
        source: Its collection and licence, for the record.
        volume: The scan in ``folder``, where it is a NIfTI volume.
        arteries: NIfTI mask of the pulmonary arteries on the lattice of ``volume``.

    Raises:
        ConfigurationError: Nothing can be painted into that anatomy, or a mask of arteries is given
            without a volume.
        InputError: The study cannot be read, or findings have no place in it.
    """
    if anatomy not in ANATOMIES:
        raise ConfigurationError(f"phantom is {anatomy!r}, expected one of {ANATOMIES}")
    if arteries and not (volume and anatomy == "chest"):
        raise ConfigurationError(
            f"{folder}: arteries {arteries!r} are given: they belong to a NIfTI volume of a chest"
        )
    if volume:
        slices = nifti.read_slices(folder / volume)
    else:
        series = dicom.open_series(folder, None, prefer_contrast=anatomy == "chest")
        slices = list(series.slices())
    if anatomy == "head":
        return RealHeads(slices, source)
    mask = nifti.read_mask(folder / arteries, folder / str(volume)) if arteries else None
    return RealChests(slices, source, mask)


class Backgrounds:
    """Pairs of several real studies of one anatomy, in turn: a `RealPairs`."""

    def __init__(self, backgrounds: Sequence[RealPairs]) -> None:
        """Take at least one."""
        self._backgrounds = list(backgrounds)
        self.anatomy = backgrounds[0].anatomy
        self.lesion_name = backgrounds[0].lesion_name

    def digest(self) -> str:
        """Of all of them, in their order."""
        digests = " ".join(each.digest() for each in self._backgrounds)
        return hashlib.sha256(digests.encode()).hexdigest()

    def pair(self, seed: int) -> tuple[PaintedStudy, PaintedStudy]:
        """A pair of the background whose turn it is."""
        without, with_finding = self._backgrounds[seed % len(self._backgrounds)].pair(seed)
        if not isinstance(without, PaintedStudy) or not isinstance(with_finding, PaintedStudy):
            raise TypeError(type(without))
        return without, with_finding
