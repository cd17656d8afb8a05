"""The chest as a phantom like any other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pe_infer.geometry import SeriesInfo
from pe_infer.phantom.chest.config import DEFAULT, PhantomConfig
from pe_infer.phantom.chest.study import SERIES, PhantomStudy, generate, generate_pair


@dataclass(frozen=True, slots=True)
class ChestPhantom:
    """Contrast-enhanced chests with pulmonary emboli: see ``pe_infer.phantom.base.Phantom``."""

    config: PhantomConfig = DEFAULT

    anatomy = "chest"
    lesion_name = "emboli"
    series: SeriesInfo = SERIES
    windows_hu: tuple[tuple[float, float], ...] = ()

    @classmethod
    def load(cls, configuration: Path) -> Self:
        """Read a configuration.

        Raises:
            ConfigurationError: It cannot be read, or is not valid.
        """
        return cls(PhantomConfig.load(configuration))

    def digest(self) -> str:
        """sha256 of the configuration."""
        return self.config.digest()

    def with_spacing(self, spacing_mm: float) -> Self:
        """The same phantom with one slice spacing."""
        return replace(self, config=replace(self.config, slice_spacing_mm=(spacing_mm, spacing_mm)))

    def generate(self, seed: int, *, positive: bool) -> PhantomStudy:
        """One study."""
        return generate(seed, positive=positive, config=self.config)

    def pair(self, seed: int) -> tuple[PhantomStudy, PhantomStudy]:
        """Without emboli, and with."""
        return generate_pair(seed, self.config)
