"""Losses of stage 1: classification, Dice, and a focal loss on dense logits.

Shi et al.: cross-entropy and Dice at 1 : 1 [slides]; the focal loss on the un-normalised class
activation map against the down-sampled mask is added [ours]: with few studies it is what teaches
the network where to look.

RADnet: cross-entropy of the slice, and a pixel-wise loss of every branch added to it [memory]; Dice
and the focal loss, with these weights, are [ours].
"""

from dataclasses import dataclass

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor
from torch.nn import functional

from export.datasets.labels import UNSURE
from export.models.radnet import SliceOutput
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


def annotated(positive: Tensor, weight: Tensor) -> Tensor:
    """1 for positive slabs that have a weight somewhere, as those with a mask do, else 0: (N,)."""
    return (positive & (weight.amax(dim=(1, 2, 3)) > 0)).float()


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
        weight: (N, 1, h, w) weight of every cell in Dice, where 0 or 1, and the dense loss.
        weights: Weight of every term.
    """
    cross_entropy = functional.cross_entropy(output.logits, labels, ignore_index=UNSURE)
    per_slab = _dice(normalised_attention(output.attention) * weight, target * weight).flatten()
    positive = annotated(labels == PE, target * weight)  # Dice is about what is annotated [ours]
    dice = (per_slab * positive).sum() / positive.sum().clamp(min=1.0)
    focal = dense_focal_loss(output.attention, target, weight, weights.focal_gamma)
    total = weights.cross_entropy * cross_entropy + weights.dice * dice + weights.focal * focal
    return Stage1Terms(total, cross_entropy, dice, focal)


def slice_terms(
    output: SliceOutput, labels: Tensor, target: Tensor, weight: Tensor, weights: Stage1Loss
) -> Stage1Terms:
    """Loss of a batch of slices; Dice and the focal loss are means over the three branches.

    Args:
        output: Of the network.
        labels: (N,) int64, 1 = hemorrhage, 0 = none, ``UNSURE`` = neither: such a slice has no part
            in cross-entropy and Dice.
        target: (N, 1, H, W) mask at the size of the image.
        weight: (N, 1, H, W) weight of every pixel in the focal loss.
        weights: Weight of every term.
    """
    known = (labels != UNSURE).float()
    plain = functional.binary_cross_entropy_with_logits(
        output.logits.flatten(), (labels == 1).float(), reduction="none"
    )
    cross_entropy = (plain * known).sum() / known.sum().clamp(min=1.0)
    branches = output.masks.unbind(dim=1)
    per_slice = torch.stack(
        [_dice(torch.sigmoid(b[:, None]), target).flatten() for b in branches]
    ).mean(dim=0)
    positive = annotated(labels == 1, weight)
    dice = (per_slice * positive).sum() / positive.sum().clamp(min=1.0)
    focal = torch.stack(
        [dense_focal_loss(b[:, None], target, weight, weights.focal_gamma) for b in branches]
    ).mean()
    total = weights.cross_entropy * cross_entropy + weights.dice * dice + weights.focal * focal
    return Stage1Terms(total, cross_entropy, dice, focal)
