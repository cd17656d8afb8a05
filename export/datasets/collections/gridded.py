"""A real study on the patient grid, with the label of every plane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.datasets.collections.base import IndexedStudy
from export.datasets.collections.reading import RealStudy, accepted
from export.datasets.store import UNLABELLED
from pe_infer import preprocess
from pe_infer.geometry import PatientGrid, Slice
from pe_infer.lattice import lattice_for

MASK_THRESHOLD = 500.0  # of `RealStudy.mask_slices`: half of a voxel
POSITIVE_SHARE = 0.5  # of a plane's weight that positive slices need


@dataclass(frozen=True, kw_only=True, eq=False)
class GriddedStudy:
    """A study on the patient grid.

    Attributes:
        positions_um: (planes,) ascending.
        hu: (planes, rows, cols) float32, exactly what a `Detector` makes of the same slices.
        slab_planes: Index of the middle plane of every slab that passes the gate.
        labels: (planes,) 1, 0 or ``UNLABELLED``; ``None`` where the collection labels studies only.
        mask: (planes, rows, cols) of the finding; ``None`` without one.
    """

    positions_um: NDArray[np.int64]
    hu: NDArray[np.float32]
    slab_planes: list[int]
    labels: NDArray[np.int64] | None
    mask: NDArray[np.bool_] | None


def to_grid(real: RealStudy, study: IndexedStudy, grid: PatientGrid) -> GriddedStudy:
    """Bring a study, its labels and its mask to the grid with the product's preprocessing.

    A negative study needs no labels of its slices: all its planes are clean.

    Raises:
        SeriesError: A stream would refuse the study.
    """
    slices = accepted(real.slices, grid)
    positions, hu = preprocess.planes(slices, grid)
    place = {int(position): index for index, position in enumerate(positions)}
    slabs = preprocess.slabs(slices, grid)
    slab_planes = [place[slab.position_um] for slab in slabs if not slab.gated]
    labels = None
    if study.slices is not None:
        labels = plane_labels(slices, study.slices, [int(p) for p in positions], grid)
    elif not study.positive:
        labels = np.zeros(len(positions), np.int64)
    return GriddedStudy(
        positions_um=positions,
        hu=hu,
        slab_planes=slab_planes,
        labels=labels,
        mask=mask_planes(real, slices, grid),
    )


def mask_planes(
    real: RealStudy, kept: Sequence[Slice], grid: PatientGrid
) -> NDArray[np.bool_] | None:
    """The mask on the grid, of the slices that are kept: (planes, rows, cols)."""
    masks = real.mask_slices()
    if masks is None:
        return None
    identities = {id(image) for image in kept}
    chosen = [
        mask for image, mask in zip(real.slices, masks, strict=True) if id(image) in identities
    ]
    _, truth = preprocess.planes(chosen, grid)
    return truth > MASK_THRESHOLD


def plane_labels(
    slices: Sequence[Slice],
    labels: Mapping[str, Sequence[str]],
    positions_um: Sequence[int],
    grid: PatientGrid,
) -> NDArray[np.int64]:
    """Labels of planes, from those of the slices that each is made of.

    A plane is positive if at least half of its weight comes from positive slices, clean if all its
    slices are, and ``UNLABELLED`` in between or where a slice has no label.

    Args:
        slices: Ascending, one per position.
        labels: SOPInstanceUID to the kinds of finding.
        positions_um: Of the planes.
        grid: They belong to.

    Returns:
        (planes,) int64.
    """
    lattice = lattice_for(grid, (image.geometry.thickness_mm for image in slices))
    own = [image.position_um for image in slices]
    known = np.array([image.sop_instance_uid in labels for image in slices])
    positive = np.array([bool(labels.get(image.sop_instance_uid)) for image in slices])
    result = np.full(len(positions_um), UNLABELLED, np.int64)
    for index, position in enumerate(positions_um):
        first, weights = lattice.contributors(own, position)
        part = slice(first, first + len(weights))
        used = weights > 0.0
        if float(weights[positive[part]].sum()) >= POSITIVE_SHARE:
            result[index] = 1
        elif not (positive[part] & used).any() and known[part][used].all():
            result[index] = 0
    return result
