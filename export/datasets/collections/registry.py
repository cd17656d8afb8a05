"""The collections that can be read, by name."""

from collections.abc import Mapping
from typing import Final

from export.datasets.collections.base import Collection
from export.datasets.collections.cad_pe import CadPe
from export.datasets.collections.cq500 import Cq500
from export.datasets.collections.fumpe import Fumpe
from export.datasets.collections.physionet_ich import PhysionetIch
from export.datasets.collections.rsna_ich import RsnaIch
from export.datasets.collections.rsna_pe import RsnaPe
from pe_infer.errors import ConfigurationError

_ALL: Final[tuple[Collection, ...]] = (
    RsnaPe(),
    Fumpe(),
    CadPe(),
    RsnaIch(),
    Cq500(),
    PhysionetIch(),
)
COLLECTIONS: Final[Mapping[str, Collection]] = {each.name: each for each in _ALL}


def open_collection(name: str) -> Collection:
    """The collection of that name.

    Raises:
        ConfigurationError: There is none.
    """
    if name not in COLLECTIONS:
        raise ConfigurationError(f"collection {name!r} is none of {sorted(COLLECTIONS)}")
    return COLLECTIONS[name]
