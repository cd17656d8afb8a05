"""Synthetic CT studies with ground truth (NumPy, SciPy).

One package per anatomy: ``chest`` (pulmonary emboli) and ``head`` (intracranial hemorrhage). What
they have in common to their users is in ``base``: `open_phantom` gives one by the name of its
anatomy. They share shapes on voxels (``raster``), sampling and noise (``acquisition``), random
streams (``sampling``) and frozen configurations (``configuration``).
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pe_infer.errors import ConfigurationError
from pe_infer.phantom.base import Lesion, Pairs, Phantom, SyntheticStudy
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.head.phantom import HeadPhantom

__all__ = ["ANATOMIES", "Lesion", "Pairs", "Phantom", "SyntheticStudy", "open_phantom"]

ANATOMIES: Final[Mapping[str, type[ChestPhantom] | type[HeadPhantom]]] = MappingProxyType(
    {kind.anatomy: kind for kind in (ChestPhantom, HeadPhantom)}
)


def open_phantom(anatomy: str, configuration: Path | None = None) -> Phantom:
    """The phantom of an anatomy.

    Args:
        anatomy: A key of ``ANATOMIES``.
        configuration: TOML or JSON file; ``None`` is the frozen default.

    Raises:
        ConfigurationError: There is none of that name, or the configuration is not valid.
    """
    if anatomy not in ANATOMIES:
        raise ConfigurationError(f"phantom {anatomy!r} is none of {sorted(ANATOMIES)}")
    kind = ANATOMIES[anatomy]
    return kind() if configuration is None else kind.load(configuration)
