"""What every phantom offers, whatever its anatomy: commands and evaluation use no more."""

from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import SeriesInfo, Slice


class Lesion(Protocol):
    """One embolus or hemorrhage as it appears in the voxels."""

    @property
    def kind(self) -> str:
        """What it is, e.g. ``"occlusive"`` or ``"subdural"``."""

    @property
    def place(self) -> str:
        """Where, e.g. ``"left lower segmental"`` or ``"left convexity"``."""

    @property
    def centre_mm(self) -> tuple[float, float, float]:
        """Patient coordinates (LPS) of a mask voxel near its centroid."""

    @property
    def volume_mm3(self) -> float:
        """Its volume."""


class SyntheticStudy(Protocol):
    """A study with its truth."""

    @property
    def seed(self) -> int:
        """Of the patient."""

    @property
    def positive(self) -> bool:
        """Whether it has lesions."""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The images, in ascending position."""

    @property
    def lesions(self) -> tuple[Lesion, ...]:
        """Largest first; empty in a negative study."""

    @property
    def lesion_mask(self) -> NDArray[np.bool_]:
        """(n, rows, cols) bool: voxels of lesions."""

    @property
    def parameters(self) -> dict[str, float | bool | str]:
        """Values drawn, by name; the same for both studies of a pair."""

    def mask_slices(self) -> tuple[Slice, ...]:
        """The truth on the lattice of the images: 1000 HU in voxels of lesions, 0 elsewhere."""

    def truth(self) -> dict[str, Any]:
        """Lesions and parameters, as values that JSON can hold."""

    def masks(self) -> dict[str, NDArray[Any]]:
        """Masks to be written beside the images: name to (n, rows, cols)."""


class Pairs(Protocol):
    """Where pairs of studies come from: a phantom, or a real scan with painted lesions."""

    def digest(self) -> str:
        """sha256 of what they are made from, apart from the seed."""

    def pair(self, seed: int) -> tuple[SyntheticStudy, SyntheticStudy]:
        """Make one patient without lesions and with; they differ by nothing else.

        Raises:
            ConfigurationError: The voxels are so large that a lesion fills none of them.
        """


class Phantom(Pairs, Protocol):
    """A generator of studies of one anatomy, with its configuration."""

    @property
    def anatomy(self) -> str:
        """Its key in ``pe_infer.phantom.ANATOMIES``."""

    @property
    def lesion_name(self) -> str:
        """What its lesions are called, in the plural."""

    @property
    def series(self) -> SeriesInfo:
        """What its series say of themselves, apart from identifiers and kernel."""

    @property
    def windows_hu(self) -> tuple[tuple[float, float], ...]:
        """Centre and width of the windows to look at it with; empty: the viewer's own."""

    def with_spacing(self, spacing_mm: float) -> Self:
        """The same phantom with one slice spacing throughout."""

    def generate(self, seed: int, *, positive: bool) -> SyntheticStudy:
        """Make one study; the same arguments give the same study on one machine.

        Raises:
            ConfigurationError: The voxels are so large that a lesion fills none of them.
        """
