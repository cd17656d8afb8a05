"""Validation of stage 1 on whole slabs: classification, and whether the attention peaks at a clot.

The control is the same measurement on the same places of the patients without the finding: what a
prior for its usual places earns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from export.models.base import SlabNetwork, mixed_precision
from export.training.config import GridSettings
from export.training.sampling import SlabRef, whole_slab
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import TISSUE_HU

HIT_DISTANCE_MM = 10.0


@dataclass(frozen=True, kw_only=True)
class SlabScores:
    """Scores of a set of slabs. What the slabs do not define is not a number.

    Attributes:
        slabs: Number of positive slabs; there are as many negative ones.
        auc: ROC AUC of the slab logit.
        peak_auc: The same for the highest value of the raw attention map.
        hit: Share of positives with a mask whose attention peak lies within ``HIT_DISTANCE_MM`` of
            the finding.
        control: What a prior earns: the same share for their twins, measured against the clot that
            is not there; for real slabs, which have none, the share of the patient that lies within
            that distance.
    """

    slabs: int
    auc: float
    peak_auc: float
    hit: float
    control: float

    @property
    def total(self) -> float:
        """What the best weights have most of: the sum of both AUC and of hits, if there are any."""
        return self.auc + self.peak_auc + float(np.nan_to_num(self.hit))


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


def near_share(mask: NDArray[np.bool_], hu: NDArray[np.float32], spacing_mm: float) -> float:
    """Share of the patient's pixels that lie within 10 mm of a mask: what guessing earns.

    Args:
        mask: (rows, cols), not empty.
        hu: (rows, cols) of the same plane.
        spacing_mm: Of pixels.
    """
    near = ndimage.distance_transform_edt(~mask) * spacing_mm <= HIT_DISTANCE_MM
    patient = (hu > TISSUE_HU) | mask
    return float(near[patient].mean())


def choose_slabs(
    positives: Sequence[SlabRef], negatives: Sequence[SlabRef], per_study: int
) -> list[tuple[SlabRef, SlabRef]]:
    """Positive slabs, each with the negative one that it is compared with.

    Args:
        positives: At most ``per_study`` of every study are taken, evenly along it.
        negatives: A positive slab without a twin is given the next one of these, evenly over all
            of them; none are needed where all have twins.
        per_study: See ``positives``.

    Raises:
        ConfigurationError: There are none although they are needed.
    """
    by_study: dict[Path, list[SlabRef]] = {}
    for ref in positives:
        by_study.setdefault(ref.study.folder, []).append(ref)
    chosen: list[SlabRef] = []
    for refs in by_study.values():
        picks = np.unique(
            np.linspace(0, len(refs) - 1, min(per_study, len(refs))).round().astype(int)
        )
        chosen += [refs[i] for i in picks]
    alone = sum(ref.twin is None for ref in chosen)
    if alone and not negatives:
        raise ConfigurationError("no negative slab to validate on: name a source that has some")
    spread = iter(np.linspace(0, max(len(negatives) - 1, 0), alone).round().astype(int))
    return [(ref, ref.twin or negatives[next(spread)]) for ref in chosen]


@torch.inference_mode()
def score_slabs(
    model: SlabNetwork, slabs: Sequence[tuple[SlabRef, SlabRef]], grid: GridSettings
) -> SlabScores:
    """Score positive slabs and those they are compared with; needs at least one pair of slabs.

    The model is left in evaluation mode.
    """
    model.eval()
    half = grid.planes_per_slab // 2
    logits: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, list[float]] = {True: [], False: []}
    hits: dict[bool, list[float]] = {True: [], False: []}
    for ref, compared in slabs:
        clot = ref.study.slab_mask(ref.middle, grid.planes_per_slab)[half]
        for positive, each in ((True, ref), (False, compared)):
            with mixed_precision():
                output = model(whole_slab(each, grid).slabs)
            attention = output.attention[0, 0].float().numpy()
            logits[positive].append(float(output.stage1_logit))
            peaks[positive].append(float(attention.max()))
            if not ref.masked:
                continue
            if positive or ref.twin is not None:
                hits[positive].append(peak_hits(attention, clot, grid.spacing_mm))
            else:
                hu = ref.study.slab_hu(ref.middle, grid.planes_per_slab)[half]
                hits[False].append(near_share(clot, hu.astype(np.float32), grid.spacing_mm))
    truth = [1] * len(slabs) + [0] * len(slabs)
    return SlabScores(
        slabs=len(slabs),
        auc=float(roc_auc_score(truth, logits[True] + logits[False])),
        peak_auc=float(roc_auc_score(truth, peaks[True] + peaks[False])),
        hit=float(np.mean(hits[True])) if hits[True] else math.nan,
        control=float(np.mean(hits[False])) if hits[False] else math.nan,
    )
