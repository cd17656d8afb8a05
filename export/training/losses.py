"""Losses of stage 1.

Cross-entropy and Dice at 1 : 1 are the paper's [slides]; a focal loss on the un-normalised class
activation map against the down-sampled mask is added [ours]: with few studies it is what teaches
the network where to look.
"""

from dataclasses import dataclass

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor
from torch.nn import functional

from export.datasets.labels import UNSURE
from export.models.stage1 import PE, Stage1Output
from export.training.config import Stage1Loss

EPS = 1e-6
_dice = DiceLoss(reduction="none", smooth_nr=1.0, smooth_dr=1.0)


@dataclass(frozen=True)
class Stage1Terms:
    """The total loss and its parts, each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor
    focal: Tensor


def normalised_attention(attention: Tensor) -> Tensor:
    """Attention of every slab in [0, 1]: ReLU, then division by its maximum [ours].

    Args:
        attention: (N, 1, h, w) float32 raw map.
    """
    positive = functional.relu(attention)
    return positive / (positive.amax(dim=(2, 3), keepdim=True) + EPS)


def dense_focal_loss(attention: Tensor, target: Tensor, weight: Tensor, gamma: float) -> Tensor:
    """Focal loss on the raw activation map, summed and divided by the number of positive cells.

    (Lin et al. 2017, with their normalisation; positive and negative cells weigh the same.)

    Args:
        attention: (N, 1, h, w) logits.
        target: (N, 1, h, w) in {0, 1}.
        weight: (N, 1, h, w) weight of every cell.
        gamma: Focusing parameter.
    """
    plain = functional.binary_cross_entropy_with_logits(attention, target, reduction="none")
    miss = 1.0 - torch.exp(-plain)
    positives = target.sum().clamp(min=attention.shape[0])
    return (weight * miss**gamma * plain).sum() / positives


def stage1_terms(
    output: Stage1Output, labels: Tensor, target: Tensor, weight: Tensor, weights: Stage1Loss
) -> Stage1Terms:
    """Loss of a batch.

    Args:
        output: Of the network.
        labels: (N,) int64, 1 = PE, 0 = none, ``UNSURE`` = neither: such a slab has no part in
            cross-entropy and Dice.
        target: (N, 1, h, w) down-sampled clot mask.
        weight: (N, 1, h, w) weight of every cell in the dense loss.
        weights: Weight of every term.
    """
    cross_entropy = functional.cross_entropy(output.logits, labels, ignore_index=UNSURE)
    per_slab = _dice(normalised_attention(output.attention), target).flatten()
    positive = (labels == PE).float()  # Dice is about annotated slabs only [ours]
    dice = (per_slab * positive).sum() / positive.sum().clamp(min=1.0)
    focal = dense_focal_loss(output.attention, target, weight, weights.focal_gamma)
    total = weights.cross_entropy * cross_entropy + weights.dice * dice + weights.focal * focal
    return Stage1Terms(total, cross_entropy, dice, focal)
