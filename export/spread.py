"""Magnitudes of very many numbers, counted in bins that can be added up and stored."""

from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

_SHIFT: Final = 19  # leaves the exponent and four bits of the mantissa
_BINS: Final = 1 << (31 - _SHIFT)
LARGEST_FLOAT32: Final = float(np.finfo(np.float32).max)


class Spread:
    """Counts of float32 magnitudes, 16 bins per power of two.

    Attributes:
        largest: Exactly. What is not finite counts as the largest float32.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.largest = 0.0
        self._counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the magnitudes of an array of any shape."""
        sizes = np.abs(values).reshape(-1)
        np.nan_to_num(sizes, copy=False, nan=LARGEST_FLOAT32, posinf=LARGEST_FLOAT32)
        self.largest = max(self.largest, float(sizes.max(initial=0.0)))
        self._counts += np.bincount(sizes.view(np.uint32) >> _SHIFT, minlength=_BINS)

    def quantile(self, share: float) -> float:
        """What this share of the values does not exceed: a bin's upper end, at most 6.25 % over."""
        reached = np.cumsum(self._counts)
        if not reached[-1]:
            return 0.0
        at = int(np.searchsorted(reached, share * reached[-1]))
        if at == 0:
            return 0.0  # zeros and numbers that are smaller than any normal one
        upper = np.array([(at + 1) << _SHIFT], np.uint32).view(np.float32)[0]
        return min(float(upper), self.largest)

    def merge(self, other: Self) -> None:
        """Add another one's counts."""
        self.largest = max(self.largest, other.largest)
        self._counts += other._counts

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        used = np.flatnonzero(self._counts)
        return {
            "largest": self.largest,
            "bins": used.tolist(),
            "counts": self._counts[used].tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        spread = cls()
        spread.largest = float(values["largest"])
        spread._counts[values["bins"]] = values["counts"]
        return spread
