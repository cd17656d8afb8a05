"""A real scan with painted findings, as evaluation and stores take it; values in HU."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import Slice
from pe_infer.phantom import Lesion, Pairs
from pe_infer.phantom.truth import as_slices


class RealPairs(Pairs, Protocol):
    """Pairs made of real scans of one anatomy."""

    @property
    def anatomy(self) -> str:
        """A key of ``pe_infer.phantom.ANATOMIES``."""

    @property
    def lesion_name(self) -> str:
        """What the findings are called, in the plural."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PaintedStudy:
    """A real scan with or without painted findings: a `pe_infer.phantom.SyntheticStudy`.

    Attributes:
        seed: Of the pair.
        positive: Whether something was painted.
        slices: The images, in ascending position.
        lesion_mask: (slices, rows, cols) bool: what was painted.
        lesions: None, or what was painted, largest first; dataclasses.
        parameters: What both studies of the pair were changed by.
        source: Collection and licence of the scan.
        name: Of a finding: ``"embolus"``.
        lesion_name: Of several.
    """

    seed: int
    positive: bool
    slices: tuple[Slice, ...]
    lesion_mask: NDArray[np.bool_]
    lesions: tuple[Lesion, ...]
    parameters: dict[str, float | bool | str]
    source: str
    name: str
    lesion_name: str

    def mask_slices(self) -> tuple[Slice, ...]:
        """The findings on the lattice of the images: 1000 within them, 0 elsewhere."""
        return as_slices(self.lesion_mask, self.slices)

    def truth(self) -> dict[str, Any]:
        """Where it comes from, findings and parameters, as values that JSON can hold."""
        return {
            "seed": self.seed,
            "positive": self.positive,
            "semi-synthetic": self.source,
            self.lesion_name: [dataclasses.asdict(lesion) for lesion in self.lesions],  # type: ignore[call-overload]
            "parameters": self.parameters,
        }

    def masks(self) -> dict[str, NDArray[Any]]:
        """``name``: (slices, rows, cols) bool."""
        return {self.name: self.lesion_mask}


def hu_of(image: Slice) -> NDArray[np.float32]:
    """(rows, cols) float32 HU of a slice."""
    stored = image.host_pixels.astype(np.float32)
    return np.asarray(stored * image.rescale_slope + image.rescale_intercept, np.float32)


def with_hu(image: Slice, hu: NDArray[np.float32], before: NDArray[np.float32]) -> Slice:
    """The slice with other values where they changed."""
    kind = np.iinfo(image.host_pixels.dtype)
    stored = np.rint((hu - image.rescale_intercept) / image.rescale_slope)
    pixels = np.where(hu == before, image.host_pixels, np.clip(stored, kind.min, kind.max))
    return replace(image, pixels=np.ascontiguousarray(pixels.astype(image.host_pixels.dtype)))
