"""Random streams: every choice has a label, so that a new choice leaves the others alone."""

import zlib

import numpy as np


def stream(seed: int, label: str) -> np.random.Generator:
    """Return the generator of one label within one study; it always gives the same numbers."""
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(label.encode())]))
    )


class Draw:
    """Single named values of one study. A name gives the same value for the same bounds."""

    def __init__(self, seed: int) -> None:
        """Keep the seed and start an empty record of the values drawn."""
        self._seed = seed
        self.values: dict[str, float | bool | str] = {}

    def uniform(self, name: str, bounds: tuple[float, float]) -> float:
        """Draw evenly between the bounds and record it."""
        value = float(stream(self._seed, name).uniform(*bounds))
        self.values[name] = value
        return value

    def log_uniform(self, name: str, bounds: tuple[float, float]) -> float:
        """Draw evenly in the logarithm between two positive bounds and record it."""
        value = float(
            np.exp(stream(self._seed, name).uniform(np.log(bounds[0]), np.log(bounds[1])))
        )
        self.values[name] = value
        return value

    def count(self, name: str, bounds: tuple[int, int]) -> int:
        """Draw a whole number, both bounds included, and record it."""
        value = int(stream(self._seed, name).integers(bounds[0], bounds[1] + 1))
        self.values[name] = value
        return value

    def chance(self, name: str, probability: float) -> bool:
        """Draw yes with the given probability and record it."""
        value = bool(stream(self._seed, name).uniform() < probability)
        self.values[name] = value
        return value

    def rng(self, label: str) -> np.random.Generator:
        """Return the generator of a label, for arrays; not recorded."""
        return stream(self._seed, label)
