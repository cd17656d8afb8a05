"""Where training studies come from: a patient with the finding and the same patient without.

A store, training and the sampling of slabs know no anatomy: what they need of a phantom is here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from pe_infer.errors import ConfigurationError
from pe_infer.geometry import Slice
from pe_infer.phantom import DEFAULT, PhantomConfig, PhantomStudy, generate_pair, head


class SyntheticStudy(Protocol):
    """A study with its truth."""

    @property
    def seed(self) -> int:
        """Of the patient."""

    @property
    def positive(self) -> bool:
        """Whether the finding is there."""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The images."""

    def mask_slices(self) -> tuple[Slice, ...]:
        """The truth on the lattice of the images: 1000 where all of a voxel is the finding."""


class Phantoms(Protocol):
    """A phantom with its configuration."""

    def digest(self) -> str:
        """Of the configuration."""

    def pair(self, seed: int) -> Iterable[SyntheticStudy]:
        """Both studies of one patient."""

    def facts(self, study: SyntheticStudy) -> dict[str, Any]:
        """What the record says of a study: plain values."""


@dataclasses.dataclass(frozen=True)
class ChestPhantoms:
    """Contrast-enhanced chests with pulmonary emboli."""

    config: PhantomConfig = DEFAULT

    def digest(self) -> str:
        """Of the configuration."""
        return self.config.digest()

    def pair(self, seed: int) -> tuple[PhantomStudy, PhantomStudy]:
        """Without emboli, and with."""
        return generate_pair(seed, self.config)

    def facts(self, study: SyntheticStudy) -> dict[str, Any]:
        """Emboli and parameters."""
        if not isinstance(study, PhantomStudy):
            raise TypeError(type(study))
        return {
            "emboli": [dataclasses.asdict(embolus) for embolus in study.emboli],
            "parameters": study.parameters,
        }


@dataclasses.dataclass(frozen=True)
class HeadPhantoms:
    """Heads with intracranial hemorrhage."""

    config: head.HeadConfig = head.DEFAULT

    def digest(self) -> str:
        """Of the configuration."""
        return self.config.digest()

    def pair(self, seed: int) -> tuple[head.HeadStudy, head.HeadStudy]:
        """Without blood, and with."""
        return head.generate_pair(seed, self.config)

    def facts(self, study: SyntheticStudy) -> dict[str, Any]:
        """Hemorrhages and parameters."""
        if not isinstance(study, head.HeadStudy):
            raise TypeError(type(study))
        return {
            "hemorrhages": [dataclasses.asdict(bleed) for bleed in study.hemorrhages],
            "tilt_degrees": study.tilt_degrees,
            "parameters": study.parameters,
        }


def _chests(configuration: Path | None) -> ChestPhantoms:
    return ChestPhantoms(PhantomConfig.load(configuration) if configuration else DEFAULT)


def _heads(configuration: Path | None) -> HeadPhantoms:
    return HeadPhantoms(head.HeadConfig.load(configuration) if configuration else head.DEFAULT)


Opener: TypeAlias = Callable[[Path | None], Phantoms]  # of a configuration, or of the default one

PHANTOMS: Final[Mapping[str, Opener]] = {"chest": _chests, "head": _heads}


def open_phantoms(name: str, configuration: Path | None) -> Phantoms:
    """The phantoms that data settings name.

    Raises:
        ConfigurationError: There are none of that name, or the configuration is not valid.
    """
    if name not in PHANTOMS:
        raise ConfigurationError(f"phantom {name!r} is none of {sorted(PHANTOMS)}")
    return PHANTOMS[name](configuration)
