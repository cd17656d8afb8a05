"""What an evaluation has to know of an anatomy: groups of its lesions, scores without a network.

One entry of ``ANATOMIES`` for each of ``pe_infer.phantom.ANATOMIES``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from export.datasets.labels import MIN_CLOT_PIXELS
from export.trivial import chest_scores, head_scores
from pe_infer.geometry import PatientGrid
from pe_infer.phantom import SyntheticStudy
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
class Condition:
    """Patients by how they were examined.

    Attributes:
        unit: Of the values.
        edges: Between the groups, ascending.
        value_of: The value of a study; ``None`` where nobody knows.
    """

    unit: str
    edges: tuple[float, ...]
    value_of: Callable[[SyntheticStudy], float | None]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names, in order."""
        return bands(self.edges, self.unit)

    def group_of(self, study: SyntheticStudy) -> str | None:
        """The group of a study."""
        value = self.value_of(study)
        return None if value is None else self.groups[band(self.edges, value)]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """How bundles for an anatomy are evaluated.

    Attributes:
        lesion_pixels: What makes a slab positive, as in training.
        groupings: By name, e.g. ``"type"``.
        conditions: By name, e.g. ``"noise"``.
        scores: Study scores that need no network.
    """

    lesion_pixels: int
    groupings: Mapping[str, Grouping]
    conditions: Mapping[str, Condition]
    scores: Scores


def bands(edges: Sequence[float], unit: str) -> tuple[str, ...]:
    """Names of the groups below, between and above some values, ascending."""
    return (
        f"below {edges[0]:g} {unit}",
        *(f"{low:g} to {high:g} {unit}" for low, high in pairwise(edges)),
        f"from {edges[-1]:g} {unit}",
    )


def band(edges: Sequence[float], value: float) -> int:
    """Index of the group that a value belongs to; an edge belongs to the group above it."""
    return int(np.searchsorted(edges, value, side="right"))


def by_volume(*edges_ml: float) -> Grouping:
    """Groups below, between and above some volumes in ml, ascending."""
    names = bands(edges_ml, "ml")
    return Grouping(
        groups=names, group_of=lambda largest: names[band(edges_ml, largest.mm3 / 1000)]
    )


def by_parameter(name: str, unit: str, *edges: float) -> Condition:
    """Groups by a value that a phantom drew; painted studies have none."""
    return Condition(unit=unit, edges=edges, value_of=lambda study: _number(study, name))


def by_thickness(*edges_mm: float) -> Condition:
    """Groups by the thickness of the slices in mm."""
    return Condition(
        unit="mm", edges=edges_mm, value_of=lambda study: study.slices[0].geometry.thickness_mm
    )


def _number(study: SyntheticStudy, name: str) -> float | None:
    value = study.parameters.get(name)
    return float(value) if isinstance(value, int | float) else None


ARRIVAL, FEET_FIRST, HEAD_FIRST = "order of arrival", "feet first", "head first"
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
        conditions={
            "slice thickness": by_thickness(1.5, 2.5),
            "noise": by_parameter("noise_hu", "HU", 12.0, 20.0),
            "contrast in the arteries": by_parameter("artery_hu", "HU", 200.0, 300.0, 450.0),
        },
        scores=chest_scores,
    ),
    "head": Anatomy(
        lesion_pixels=10,
        groupings={
            "type": Grouping(groups=TYPES, group_of=lambda largest: largest.kind),
            "volume": by_volume(1.0, 5.0, 25.0),
        },
        conditions={
            "slice thickness": by_thickness(2.0, 4.0),
            "noise": by_parameter("noise_hu", "HU", 3.0, 4.5),
        },
        scores=head_scores,
    ),
}
