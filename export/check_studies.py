"""Studies that a bundle's checks must let pass, flag or refuse: phantoms, altered on purpose."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from export.training.config import Settings
from pe_infer.geometry import Slice
from pe_infer.phantom import SyntheticStudy
from pe_infer.phantom.chest.config import DEFAULT as CHEST
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.configuration import Configuration
from pe_infer.phantom.head.config import DEFAULT as HEAD
from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.phantom import HeadPhantom

METAL_HU = 3071.0  # the largest value of most scanners
STREAKS = 7  # dark ones that a piece of metal casts, and as many bright ones between
STREAK_FALL_MM = 45.0  # a streak is weaker by a factor of e that far from the metal
GRAIN_PX = 0.7  # of added noise: standard deviation of the filter that makes neighbours alike


class MetalSettings(Settings):
    """An upright rod in the back of the patient, with streaks."""

    radius_mm: float = Field(gt=0)
    length_mm: float = Field(gt=0)
    streak_hu: float = Field(ge=0)
    right_mm: float = 15.0  # from the middle of the image
    back_mm: float = 50.0


class GroupSettings(Settings):
    """Phantoms of one kind, and what the checks must say of them."""

    name: str
    check: str | None = None  # the one that must speak; None: none may
    outcome: Literal["passed", "flagged", "refused"] = "passed"  # at least
    # Fields of the phantom's configuration that differ.
    phantom: dict[str, Any] = Field(default_factory=dict)
    metal: MetalSettings | None = None
    noise_hu: float = Field(default=0.0, ge=0)  # added to the phantom's own


class StudySettings(Settings):
    """``export/configs/*-checks.toml``."""

    phantom: Literal["chest", "head"]
    groups: tuple[GroupSettings, ...]


def study(settings: StudySettings, group: GroupSettings, seed: int) -> tuple[Slice, ...]:
    """The slices of one study without lesions, ascending.

    The phantom is kept for the next call: groups with the same one share it.

    Raises:
        ConfigurationError: The phantom has no such fields, or does not take such values.
    """
    slices = _phantom(phantom_configuration(settings, group), seed)
    if group.noise_hu:
        slices = with_noise(slices, group.noise_hu, seed)
    return slices if group.metal is None else with_metal(slices, group.metal)


def phantom_configuration(settings: StudySettings, group: GroupSettings) -> Configuration:
    """What the phantoms of a group are made with.

    Raises:
        ConfigurationError: The phantom has no such fields, or does not take such values.
    """
    default: Configuration = CHEST if settings.phantom == "chest" else HEAD
    values = {**default.to_mapping(), **group.phantom}
    return type(default).from_mapping(values, f"group {group.name!r}")


@functools.lru_cache(maxsize=1)
def _phantom(config: Configuration, seed: int) -> tuple[Slice, ...]:
    made: SyntheticStudy
    if isinstance(config, PhantomConfig):
        made = ChestPhantom(config).generate(seed, positive=False)
    elif isinstance(config, HeadConfig):
        made = HeadPhantom(config).generate(seed, positive=False)
    else:
        raise TypeError(type(config))
    return made.slices


def with_noise(slices: Sequence[Slice], sigma_hu: float, seed: int) -> tuple[Slice, ...]:
    """The same study with noise of that standard deviation on top; padding stays."""
    rng = np.random.default_rng(seed)

    def noisy(image: Slice) -> Slice:
        shape = image.host_pixels.shape
        grain = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), GRAIN_PX)
        return _stored(image, _hu(image) + sigma_hu / grain.std() * grain)

    return tuple(noisy(image) for image in slices)


def with_metal(slices: Sequence[Slice], metal: MetalSettings) -> tuple[Slice, ...]:
    """The same study with a rod in its middle slices; padding stays."""
    middle = 0.5 * (slices[0].position_um + slices[-1].position_um)
    return tuple(
        _with_rod(image, metal)
        if abs(image.position_um - middle) <= 500 * metal.length_mm
        else image
        for image in slices
    )


def _with_rod(image: Slice, metal: MetalSettings) -> Slice:
    geometry = image.geometry
    across = geometry.col_spacing_mm * (np.arange(geometry.cols) - geometry.cols / 2)
    along = geometry.row_spacing_mm * (np.arange(geometry.rows) - geometry.rows / 2)
    x, y = across[None, :] + metal.right_mm, along[:, None] - metal.back_mm
    distance = np.hypot(x, y)
    waves = np.sin(STREAKS * np.arctan2(y, x)) * np.exp(-distance / STREAK_FALL_MM)
    hu = _hu(image) + metal.streak_hu * waves
    return _stored(image, np.where(distance <= metal.radius_mm, METAL_HU, hu))


def _hu(image: Slice) -> NDArray[Any]:
    slope, intercept = np.float32(image.rescale_slope), np.float32(image.rescale_intercept)
    hu: NDArray[Any] = image.host_pixels * slope + intercept
    return hu


def _stored(image: Slice, hu: NDArray[Any]) -> Slice:
    """The slice with other HU, but for padding."""
    stored = image.host_pixels
    limits = np.iinfo(stored.dtype)
    values = np.round((hu - image.rescale_intercept) / image.rescale_slope)
    made: NDArray[Any] = np.clip(values, limits.min, limits.max).astype(stored.dtype)
    if image.padding is not None:
        low, high = image.padding
        made = np.where((stored >= low) & (stored <= high), stored, made)
    return replace(image, pixels=made)
