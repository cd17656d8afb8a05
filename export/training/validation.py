"""Validation of stage 1 on whole slabs: classification, and whether the attention peaks at a clot.

The control is the same measurement on the same places of the patients without the finding: what a
prior for its usual places earns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from export.models.base import SlabNetwork
from export.training.config import GridSettings
from export.training.sampling import SlabRef, whole_slab

HIT_DISTANCE_MM = 10.0


@dataclass(frozen=True, kw_only=True)
class SlabScores:
    """Scores of a set of slabs.

    Attributes:
        slabs: Number of positive slabs; each has its negative twin.
        auc: ROC AUC of the slab logit, positives against their own twins.
        peak_auc: The same for the highest value of the raw attention map.
        hit: Share of positives whose attention peak lies within ``HIT_DISTANCE_MM`` of a clot.
        control: The same share for the twins, measured against the clot that is not there.
    """

    slabs: int
    auc: float
    peak_auc: float
    hit: float
    control: float


def peak_hits(attention: NDArray[np.float32], clot: NDArray[np.bool_], spacing_mm: float) -> bool:
    """Whether the highest cell of an attention map lies within ``HIT_DISTANCE_MM`` of the clot.

    Args:
        attention: (h, w) raw map over the same plane; its cells are (rows/h, cols/w) pixels.
        clot: (rows, cols) mask of the middle plane, not empty.
        spacing_mm: Of the mask.
    """
    if not clot.any():
        raise ValueError("no clot: its distance means nothing")
    row, col = np.unravel_index(int(attention.argmax()), attention.shape)
    distance_px: NDArray[np.float64] = ndimage.distance_transform_edt(~clot)
    rows, cols = (size / cells for size, cells in zip(clot.shape, attention.shape, strict=True))
    centre = (int((row + 0.5) * rows), int((col + 0.5) * cols))
    return bool(distance_px[centre] * spacing_mm <= HIT_DISTANCE_MM)


def choose_slabs(positives: Sequence[SlabRef], per_pair: int) -> list[SlabRef]:
    """At most ``per_pair`` positive slabs of every pair, evenly along the study."""
    by_seed: dict[int, list[SlabRef]] = {}
    for ref in positives:
        by_seed.setdefault(ref.pair.seed, []).append(ref)
    chosen: list[SlabRef] = []
    for refs in by_seed.values():
        picks = np.unique(
            np.linspace(0, len(refs) - 1, min(per_pair, len(refs))).round().astype(int)
        )
        chosen += [refs[i] for i in picks]
    return chosen


@torch.inference_mode()
def score_slabs(model: SlabNetwork, refs: Sequence[SlabRef], grid: GridSettings) -> SlabScores:
    """Score positive slabs and their twins, hit or control alike; needs at least one slab.

    The model is left in evaluation mode.
    """
    model.eval()
    half = grid.planes_per_slab // 2
    logits: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, list[float]] = {True: [], False: []}
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for ref in refs:
        clot = ref.study.slab_mask(ref.middle, grid.planes_per_slab)[half]
        for positive, each in ((True, ref), (False, ref.twin)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(whole_slab(each, grid).slabs)
            attention = output.attention[0, 0].float().numpy()
            logits[positive].append(float(output.stage1_logit))
            peaks[positive].append(float(attention.max()))
            hits[positive].append(peak_hits(attention, clot, grid.spacing_mm))
    truth = [1] * len(refs) + [0] * len(refs)
    return SlabScores(
        slabs=len(refs),
        auc=float(roc_auc_score(truth, logits[True] + logits[False])),
        peak_auc=float(roc_auc_score(truth, peaks[True] + peaks[False])),
        hit=float(np.mean(hits[True])),
        control=float(np.mean(hits[False])),
    )
