"""Emboli put into real contrast-enhanced planes that have none: real anatomy, known truth.

Works on planes that are already on the patient grid. Vessels are found by their brightness inside
the closed lung, so that the heart and the aorta are left alone. An embolus takes the place of
contrast agent only: where the vessel is blurred by partial volume, the change is scaled by how much
contrast agent is there. All numbers are [ours].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_infer.errors import Code, InputError

LUNG_HU = -500.0
CLOSING_MM = 16.0  # closes the lung over its vessels, up to the hila
VESSEL_HU = 130.0
LARGEST_VESSEL_MM = 10.0  # radius of the in-plane opening that removes heart and aorta
BACKGROUND_HU = -800.0
CLOT_HU = (25.0, 90.0)
LENGTH_MM = (6.0, 40.0)
CLOTS_PER_STUDY = (3, 9)
OCCLUSIVE_SHARE = 0.4

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Vessels:
    """Where emboli may lie.

    Attributes:
        mask: (planes, rows, cols) vessels with contrast agent.
        radius_mm: (planes, rows, cols) distance to the wall.
        smooth_hu: (planes, rows, cols) planes without their noise.
    """

    mask: Mask
    radius_mm: Volume
    smooth_hu: Volume


def find_vessels(hu: Volume, spacing_mm: float, pitch_mm: float) -> Vessels:
    """Vessels with contrast agent in the lung and the hila.

    Args:
        hu: (planes, rows, cols) HU.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.

    Raises:
        InputError: The planes hold no lung, or no such vessel.
    """
    smooth = ndimage.gaussian_filter(hu, (0.3, 0.8, 0.8))
    body = ndimage.binary_fill_holes(
        ndimage.binary_opening(smooth > -300, iterations=2).any(axis=0)
    )
    air = (smooth < LUNG_HU) & (smooth > -980) & ndimage.binary_erosion(body, iterations=20)
    labels, count = ndimage.label(air)
    if count == 0:
        raise InputError("no lung in these planes", code=Code.INVALID_ARGUMENT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    lung = np.isin(labels, np.flatnonzero(sizes > 0.05 * sizes.max()))
    radius_px = CLOSING_MM / spacing_mm
    outside = np.stack([ndimage.distance_transform_edt(~p) > radius_px for p in lung])
    closed = np.stack([ndimage.distance_transform_edt(~p) > radius_px for p in outside])
    bright = (smooth > VESSEL_HU) & closed
    sampling = (spacing_mm, spacing_mm)
    widest = LARGEST_VESSEL_MM
    core = np.stack(
        [ndimage.distance_transform_edt(p, sampling) > widest for p in smooth > VESSEL_HU]
    )
    large = np.stack([ndimage.distance_transform_edt(~p, sampling) <= widest + 2.0 for p in core])
    mask = ndimage.binary_opening(bright & ~large, np.ones((1, 2, 2), dtype=bool))
    if not mask.any():
        raise InputError(
            f"no vessel above {VESSEL_HU:.0f} HU in the lung: emboli need contrast agent",
            code=Code.INVALID_ARGUMENT,
        )
    radius = ndimage.distance_transform_edt(mask, (pitch_mm, *sampling)).astype(np.float32)
    return Vessels(mask, radius, smooth.astype(np.float32))


def insert_emboli(
    hu: Volume, vessels: Vessels, spacing_mm: float, pitch_mm: float, rng: np.random.Generator
) -> tuple[Volume, Mask]:
    """Planes with emboli, and where they are.

    Args:
        hu: (planes, rows, cols) HU without emboli; not changed.
        vessels: Of the same planes.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.
        rng: Source of all randomness.
    """
    out = hu.copy()
    truth = np.zeros(hu.shape, dtype=np.bool_)
    places = np.argwhere(vessels.mask)
    radii = vessels.radius_mm[vessels.mask]
    bins = np.digitize(radii, [1.0, 1.6, 2.4, 3.4, 5.0])
    weights = (1.0 / np.maximum(np.bincount(bins), 1))[bins] * np.array([0.3, 0.7, 1, 1, 1, 1])[
        bins
    ]
    weights /= weights.sum()
    for _ in range(int(rng.integers(*CLOTS_PER_STUDY))):
        seed = places[int(rng.choice(len(places), p=weights))]
        length = float(rng.uniform(*LENGTH_MM))
        occupancy, box = _embolus(vessels, seed, length, spacing_mm, pitch_mm, rng)
        lumen = (
            float(np.quantile(vessels.smooth_hu[box][occupancy > 0.5], 0.8))
            if (occupancy > 0.5).any()
            else 0.0
        )
        if lumen < VESSEL_HU:
            continue
        clot_hu = float(rng.uniform(*CLOT_HU))
        share = (vessels.smooth_hu[box] - BACKGROUND_HU) / (lumen - BACKGROUND_HU)
        fresh = np.where(truth[box], 0.0, occupancy) * np.clip(share, 0.0, 1.0)
        out[box] -= (fresh * max(lumen - clot_hu, 0.0)).astype(np.float32)
        truth[box] |= (occupancy > 0.5) & vessels.mask[box]
    return out, truth


def _embolus(
    vessels: Vessels,
    seed: NDArray[np.int64],
    length_mm: float,
    spacing_mm: float,
    pitch_mm: float,
    rng: np.random.Generator,
) -> tuple[Volume, tuple[slice, slice, slice]]:
    """Occupancy in [0, 1] of one embolus, and the box (planes, rows, cols) it lies in.

    Args:
        vessels: Where it may lie.
        seed: (3,) voxel of a vessel.
        length_mm: Diameter of the ball around ``seed`` that bounds it.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.
        rng: Source of all randomness.
    """
    reach = np.ceil(length_mm / 2 / np.array([pitch_mm, spacing_mm, spacing_mm])).astype(int) + 2
    low = np.maximum(seed - reach, 0)
    high = np.minimum(seed + reach + 1, vessels.mask.shape)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    mask = vessels.mask[box]
    scale = np.array([pitch_mm, spacing_mm, spacing_mm])[:, None, None, None]
    offset = (np.indices(mask.shape) - (seed - low)[:, None, None, None]) * scale
    distance = np.sqrt((offset**2).sum(axis=0))
    near = mask & (distance <= length_mm / 2)
    labels, _ = ndimage.label(near, np.ones((3, 3, 3)))
    own = labels == labels[tuple(seed - low)]
    if rng.random() > OCCLUSIVE_SHARE:
        kind = rng.random()
        radius = vessels.radius_mm[box]
        own_radius = float(radius[own].max())
        if kind < 0.5:  # surrounded by contrast agent
            own &= radius > rng.uniform(0.2, 0.5) * own_radius
        else:  # on one side of the vessel
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            side = np.tensordot(direction, offset, axes=1)
            own &= side > rng.uniform(-0.3, 0.3) * own_radius
    ring = ndimage.binary_dilation(own, np.ones((1, 3, 3), dtype=bool)) & ~mask
    soft = ndimage.gaussian_filter(own.astype(np.float32), (0.3, 0.6, 0.6))
    return np.where(own | ring, np.maximum(soft, ring * 0.8), soft * mask).astype(np.float32), box
