"""Which slabs are positive, negative, or neither; masks at the size of the attention map."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.models.stage1 import TOTAL_STRIDE

MIN_CLOT_PIXELS = 12  # at 0.75 mm: 6.75 mm2 in the middle plane [ours]
MIN_CELL_PIXELS = 4  # of a cell of 16 x 16; fewer clot pixels say nothing either way [ours]
UNSURE = -100  # class of a slab that is neither positive nor negative

Label = Literal["positive", "negative", "dropped"]


def slab_label(
    clot_pixels: NDArray[np.int64],
    middle: int,
    planes_per_slab: int,
    min_pixels: int = MIN_CLOT_PIXELS,
) -> Label:
    """Label of one slab.

    Args:
        clot_pixels: (planes,) number of clot pixels of every plane of the study.
        middle: Index of the middle plane of the slab.
        planes_per_slab: Planes of a slab.
        min_pixels: What makes a slab positive.

    Returns:
        ``"positive"`` if the middle plane has at least ``min_pixels``, ``"negative"`` if all
        planes of the slab are clean, of a slab of one plane its neighbours too: what fills less
        than half of a thick slice is not in its mask. Otherwise ``"dropped"``.
    """
    reach = max(planes_per_slab // 2, 1)
    if clot_pixels[middle] >= min_pixels:
        return "positive"
    if not clot_pixels[max(middle - reach, 0) : middle + reach + 1].any():
        return "negative"
    return "dropped"


def slab_labels(
    clot_pixels: Sequence[int],
    plane_labels: Sequence[int] | None,
    middles: Sequence[int],
    planes_per_slab: int,
    min_pixels: int = MIN_CLOT_PIXELS,
) -> list[Label]:
    """Labels of the slabs of a study: of its pixels where a mask has them, else of its planes.

    Args:
        clot_pixels: (planes,) as in ``export.datasets.store.StudyRecord``.
        plane_labels: The same.
        middles: Indices of the slabs' middle planes.
        planes_per_slab: Planes of a slab.
        min_pixels: What makes a slab with a mask positive.

    Returns:
        ``"positive"`` also where no mask says how much of the finding the middle plane has, but its
        label says that it has some; ``"negative"`` only where pixels and labels say so.
    """
    pixels = np.asarray(clot_pixels, dtype=np.int64)
    found = [slab_label(pixels, middle, planes_per_slab, min_pixels) for middle in middles]
    if plane_labels is None:
        return found
    labels, reach = np.asarray(plane_labels), max(planes_per_slab // 2, 1)
    for index, middle in enumerate(middles):
        if pixels[middle] < 0 and labels[middle] == 1:
            found[index] = "positive"
        elif (
            found[index] == "negative" and labels[max(middle - reach, 0) : middle + reach + 1].any()
        ):
            found[index] = "dropped"
    return found


def cell_counts(mask: NDArray[np.bool_], stride: int = TOTAL_STRIDE) -> NDArray[np.int64]:
    """Clot pixels in every cell of the attention map: (..., H, W) to (..., H/stride, W/stride)."""
    *lead, rows, cols = mask.shape
    blocks = mask.reshape(*lead, rows // stride, stride, cols // stride, stride)
    counts: NDArray[np.int64] = blocks.sum(axis=(-3, -1), dtype=np.int64)
    return counts


def plane_target(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Target and weight of every pixel: the middle plane of (planes, H, W), and ones."""
    target = mask[mask.shape[0] // 2].astype(np.float32)
    return target, np.ones_like(target)


def attention_target(
    mask: NDArray[np.bool_], stride: int = TOTAL_STRIDE
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Target and weight of every cell of the attention map.

    Args:
        mask: (planes, H, W) clot mask of a slab, or of a crop of it.
        stride: Pixels per cell.

    Returns:
        The max-pooled mask of the middle plane (H/stride, W/stride), and the weight of each cell in
        the dense loss: 0 where the middle plane has fewer than ``MIN_CELL_PIXELS`` clot pixels
        although there is clot in the cell in some plane, 1 elsewhere.
    """
    counts = cell_counts(mask, stride)
    middle = counts[mask.shape[0] // 2]
    target = middle > 0
    unsure = (middle < MIN_CELL_PIXELS) & (counts.sum(axis=0) > 0)
    return target.astype(np.float32), (~unsure).astype(np.float32)
