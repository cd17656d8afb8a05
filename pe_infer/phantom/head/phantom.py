"""The head as a phantom like any other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from pe_infer.geometry import SeriesInfo
from pe_infer.phantom.head.config import DEFAULT, HeadConfig
from pe_infer.phantom.head.study import SERIES, HeadStudy, generate, generate_pair

BRAIN_SUBDURAL_BONE: Final = ((40.0, 80.0), (80.0, 200.0), (600.0, 2800.0))


@dataclass(frozen=True, slots=True)
class HeadPhantom:
    """Heads with intracranial hemorrhage: see ``pe_infer.phantom.base.Phantom``."""

    config: HeadConfig = DEFAULT

    anatomy = "head"
    lesion_name = "hemorrhages"
    series: SeriesInfo = SERIES
    windows_hu: tuple[tuple[float, float], ...] = BRAIN_SUBDURAL_BONE

    @classmethod
    def load(cls, configuration: Path) -> Self:
        """Read a configuration.

        Raises:
            ConfigurationError: It cannot be read, or is not valid.
        """
        return cls(HeadConfig.load(configuration))

    def digest(self) -> str:
        """sha256 of the configuration."""
        return self.config.digest()

    def with_spacing(self, spacing_mm: float) -> Self:
        """The same phantom with one slice spacing throughout."""
        return replace(self, config=self.config.with_spacing(spacing_mm))

    def generate(self, seed: int, *, positive: bool) -> HeadStudy:
        """One study."""
        return generate(seed, positive=positive, config=self.config)

    def pair(self, seed: int) -> tuple[HeadStudy, HeadStudy]:
        """Without blood, and with."""
        return generate_pair(seed, self.config)
