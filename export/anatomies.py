"""What an evaluation has to know of an anatomy: groups of its lesions, scores without a network.

One entry of ``ANATOMIES`` for each of ``pe_infer.phantom.ANATOMIES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from export.datasets.labels import MIN_CLOT_PIXELS
from export.trivial import chest_scores, head_scores
from pe_infer.geometry import PatientGrid
from pe_infer.phantom.head.hemorrhage import TYPES

Scores = Callable[[NDArray[np.float32], NDArray[np.int64], PatientGrid], dict[str, float]]
"""(planes, rows, cols) HU, (planes,) positions in um and their grid to scores by name."""


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest lesion of a patient.

    Attributes:
        kind: What it is.
        place: Where.
        mm3: Its volume.
    """

    kind: str
    place: str
    mm3: float


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Patients by their largest lesion.

    Attributes:
        groups: Names, in order.
        group_of: Largest lesion to one of them.
    """

    groups: tuple[str, ...]
    group_of: Callable[[Largest], str]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """How bundles for an anatomy are evaluated.

    Attributes:
        lesion_pixels: What makes a slab positive, as in training.
        groupings: By name, e.g. ``"type"``.
        scores: Study scores that need no network.
    """

    lesion_pixels: int
    groupings: Mapping[str, Grouping]
    scores: Scores


def by_volume(*edges_ml: float) -> Grouping:
    """Groups below, between and above some volumes in ml, ascending."""
    names = (
        f"below {edges_ml[0]:g} ml",
        *(f"{low:g} to {high:g} ml" for low, high in pairwise(edges_ml)),
        f"from {edges_ml[-1]:g} ml",
    )
    return Grouping(
        groups=names,
        group_of=lambda largest: names[
            int(np.searchsorted(edges_ml, largest.mm3 / 1000, side="right"))
        ],
    )


LOBAR, SEGMENTAL = "lobar or larger", "segmental or smaller"

ANATOMIES: Final[Mapping[str, Anatomy]] = {
    "chest": Anatomy(
        lesion_pixels=MIN_CLOT_PIXELS,
        groupings={
            "place": Grouping(
                groups=(LOBAR, SEGMENTAL),
                group_of=lambda largest: SEGMENTAL if "segmental" in largest.place else LOBAR,
            ),
            "volume": by_volume(0.1, 0.5, 2.0),
        },
        scores=chest_scores,
    ),
    "head": Anatomy(
        lesion_pixels=10,
        groupings={
            "type": Grouping(groups=TYPES, group_of=lambda largest: largest.kind),
            "volume": by_volume(1.0, 5.0, 25.0),
        },
        scores=head_scores,
    ),
}
