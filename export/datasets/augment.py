"""Augmentation of slabs in Hounsfield units, before the window; cheap operations on one crop.

The list and its strengths are [ours].
"""

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

SOFT_TISSUE_HU = 60.0  # contrast agent shows above this
SOFT_TISSUE_RANGE_HU = (0.0, 80.0)  # without contrast agent
BONE_HU = (200.0, 800.0)  # none, all


class Strengths(BaseModel):
    """How strongly slabs are changed; zero turns a step off. The defaults are for chests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain_log_sd: float = 0.35
    shift_hu_sd: float = 10.0
    filter_share: float = 0.4
    noise_hu_max: float = 15.0
    coarse_noise_share: float = 0.0  # of the draws of noise: of the grain of a soft kernel
    thick_share: float = 0.0  # planes become means of themselves and their neighbours
    z_flip_share: float = 0.5
    left_right_share: float = 0.3
    warp_share: float = 0.5
    scale: float = 0.09
    rotation_degrees: float = 6.0
    elastic_px: float = 3.0
    no_contrast_share: float = 0.05  # of negatives only
    bone_glare_share: float = 0.0
    bone_glare_hu_max: float = 70.0  # at the surface of thick bone
    shading_hu_sd: float = 0.0
    tissue_gain_log_sd: float = 0.0  # of differences between soft tissues


OFF = Strengths(
    gain_log_sd=0.0,
    shift_hu_sd=0.0,
    filter_share=0.0,
    noise_hu_max=0.0,
    z_flip_share=0.0,
    left_right_share=0.0,
    warp_share=0.0,
    no_contrast_share=0.0,
)


def slab_of(hu: Tensor, windows: Sequence[tuple[float, float]]) -> Tensor:
    """HU (planes, H, W) to a slab (planes * windows, H, W), window fastest, as the grid does."""
    channels = [windowed(hu, low, high) for low, high in windows]
    return torch.stack(channels, dim=1).flatten(0, 1)


def windowed(hu: Tensor, low_hu: float, high_hu: float) -> Tensor:
    """Hounsfield units to [0, 1]."""
    return ((hu - low_hu) / (high_hu - low_hu)).clamp_(0.0, 1.0)


def augmented(
    hu: Tensor, mask: Tensor, strengths: Strengths, generator: torch.Generator, *, positive: bool
) -> tuple[Tensor, Tensor]:
    """Change one slab and its mask alike.

    Args:
        hu: (planes, H, W) float32 HU; may be overwritten.
        mask: (planes, H, W) bool.
        strengths: How strongly.
        generator: Source of all randomness.
        positive: Positive slabs are never stripped of contrast.

    Returns:
        HU and mask of the same shapes and dtypes.
    """
    hu, mask = _moved(hu, mask, strengths, generator)
    return _recoloured(hu, strengths, generator, positive=positive), mask


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _normal(generator: torch.Generator, sd: float) -> float:
    return sd * float(torch.randn((), generator=generator))


def _moved(
    hu: Tensor, mask: Tensor, strengths: Strengths, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Flips and a warp, of both alike."""
    if _uniform(generator) < strengths.z_flip_share:
        hu, mask = hu.flip(0), mask.flip(0)
    if _uniform(generator) < strengths.left_right_share:
        hu, mask = hu.flip(2), mask.flip(2)
    if _uniform(generator) < strengths.warp_share:
        grid = _warp_grid(hu.shape[1], hu.shape[2], strengths, generator)
        hu = functional.grid_sample(hu[None], grid, padding_mode="border", align_corners=False)[0]
        if bool(mask.any()):
            moved = functional.grid_sample(mask[None].float(), grid, align_corners=False)[0]
            mask = moved > 0.5
    return hu, mask


def _recoloured(
    hu: Tensor, strengths: Strengths, generator: torch.Generator, *, positive: bool
) -> Tensor:
    """Contrast, what scanners leave beside bone and across the field, sharpness, noise, a shift."""
    gain = math.exp(_normal(generator, strengths.gain_log_sd)) if strengths.gain_log_sd else 1.0
    if not positive and _uniform(generator) < strengths.no_contrast_share:
        gain = _uniform(generator, 0.0, 0.1)
    if gain != 1.0:
        hu = torch.where(hu > SOFT_TISSUE_HU, SOFT_TISSUE_HU + (hu - SOFT_TISSUE_HU) * gain, hu)
    if strengths.tissue_gain_log_sd:
        hu = _tissues_apart(hu, math.exp(_normal(generator, strengths.tissue_gain_log_sd)))
    if strengths.bone_glare_share and _uniform(generator) < strengths.bone_glare_share:
        amount_hu = _uniform(generator, 0.0, strengths.bone_glare_hu_max)
        reach_px = int(torch.randint(1, 4, (), generator=generator))
        hu = _with_bone_glare(hu, amount_hu, reach_px)
    if strengths.shading_hu_sd:
        hu = hu + _shading(hu.shape[1], hu.shape[2], strengths.shading_hu_sd, generator)
    if _uniform(generator) < strengths.filter_share:
        hu = _filtered(hu, _uniform(generator, -0.3, 0.6))
    if strengths.thick_share and _uniform(generator) < strengths.thick_share:
        hu = _thickened(hu)
    if strengths.noise_hu_max:
        sd = _uniform(generator, 0.0, strengths.noise_hu_max)
        noise = torch.randn(hu.shape, generator=generator)
        if strengths.coarse_noise_share and _uniform(generator) < strengths.coarse_noise_share:
            noise = 3.0 * _filtered(noise, 1.0)  # the mean of 9 has a third of the deviation
        hu = hu + sd * noise
    return hu + _normal(generator, strengths.shift_hu_sd)


def _filtered(hu: Tensor, amount: float) -> Tensor:
    """Mix with a 3x3 mean: positive amounts blur, negative ones sharpen."""
    padded = functional.pad(hu[None], (1, 1, 1, 1), mode="replicate")
    return hu + amount * (functional.avg_pool2d(padded, 3, 1)[0] - hu)


def _thickened(hu: Tensor) -> Tensor:
    """Every plane as the mean of itself and its neighbours, as thicker slices show it."""
    padded = torch.cat([hu[:1], hu, hu[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3.0


def _tissues_apart(hu: Tensor, gain: float) -> Tensor:
    """Soft tissues differ more, or less: gray from white matter, and blood from both."""
    low, high = SOFT_TISSUE_RANGE_HU
    middle = (low + high) / 2
    inside = (hu > low) & (hu < high)
    return torch.where(inside, (middle + (hu - middle) * gain).clamp(low, high), hu)


def _with_bone_glare(hu: Tensor, amount_hu: float, reach_px: int) -> Tensor:
    """Brighten what lies beside bone, as partial volume, beam hardening and membranes do.

    At the surface of a plate at least twice as wide as the reach it comes near the whole amount;
    from twice the reach on it is nothing.
    """
    bone = ((hu - BONE_HU[0]) / (BONE_HU[1] - BONE_HU[0])).clamp(0.0, 1.0)
    width = 2 * reach_px + 1
    glare = bone[None]
    for _ in range(2):
        padded = functional.pad(glare, (reach_px,) * 4, mode="replicate")
        glare = functional.avg_pool2d(padded, width, 1)
    return hu + amount_hu * (2.0 * glare[0]).clamp(max=1.0) * (1.0 - bone)


def _shading(rows: int, cols: int, sd_hu: float, generator: torch.Generator) -> Tensor:
    """(1, rows, cols) smooth field, a few waves across."""
    coarse = sd_hu * torch.randn((1, 1, 4, 4), generator=generator)
    size = (rows, cols)
    return functional.interpolate(coarse, size, mode="bicubic", align_corners=True)[0]


def _warp_grid(rows: int, cols: int, strengths: Strengths, generator: torch.Generator) -> Tensor:
    """Sampling grid (1, rows, cols, 2) of a rotation, a scale and a smooth random field."""
    draw = torch.rand(2, generator=generator) * 2 - 1
    angle = math.radians(strengths.rotation_degrees) * float(draw[0])
    scale = 1.0 + strengths.scale * float(draw[1])
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
    grid = functional.affine_grid(matrix, [1, 1, rows, cols], align_corners=False)
    if strengths.elastic_px:
        coarse = torch.randn((1, 2, 5, 5), generator=generator)
        field = functional.interpolate(coarse, (rows, cols), mode="bilinear", align_corners=True)
        size = torch.tensor([2.0 / cols, 2.0 / rows])
        grid = grid + field.permute(0, 2, 3, 1) * strengths.elastic_px * size
    return grid
