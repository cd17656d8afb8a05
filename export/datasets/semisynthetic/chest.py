"""Emboli put into a real contrast-enhanced chest that has none: real anatomy, known truth.

Works on the slices as they came, so that a pair goes through everything that a patient's study
does. An embolus takes the place of contrast agent only: HU -= occupancy * f * (lumen - clot), where
f is the share of a voxel that contrast agent fills, from its smoothed value between that of the
lumen and that of what lies around the vessel. Hence partial volume at the wall is right, be the
vessel in lung or in the hilum, and the scan's own noise stays. All numbers are [ours].

Arteries and veins of the lung are not told apart, so that some emboli lie in veins.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy import ndimage

from export.datasets.semisynthetic.painted import PaintedStudy, hu_of, with_hu
from export.datasets.semisynthetic.variation import varied
from export.datasets.semisynthetic.vessels import VESSEL_HU, Mask, Vessels, Volume, find_vessels
from pe_infer.errors import Code, InputError
from pe_infer.geometry import Slice

VERSION: Final = 2
CLOT_HU: Final = (25.0, 85.0)
EMBOLI: Final = (1, 5)  # of a study
LENGTH_MM: Final = (7.0, 40.0)
LENGTH_RADII: Final = (4.0, 11.0)  # length of an embolus in radii of its vessel
KINDS: Final = {"occlusive": 0.4, "central": 0.3, "eccentric": 0.3}
TISSUE_HU: Final = 40.0  # around a vessel with nothing but vessels around it
LEAST_CONTRAST_HU: Final = 90.0  # between lumen and clot
LEAST_MM3: Final = 20.0
LEAST_MM2: Final = 12.0  # that the first one fills of some slice: a positive study has to show it
MASK_SHARE: Final = 0.5  # of a voxel that an embolus makes a voxel of the mask
BUMP_MM: Final = 4.0  # size of the bumps on the free side of an eccentric embolus
BUMP_RADII: Final = 0.12  # their standard deviation, in radii of the vessel
MARGIN_PX: Final = 6  # around an embolus, for what lies around its vessel
ATTEMPTS: Final = 200
RADII_MM: Final = (1.0, 1.6, 2.4, 3.4, 5.0, 8.0)  # vessels of all sizes get emboli
SIZE_WEIGHTS: Final = (0.15, 0.6, 1.0, 1.0, 1.0, 1.0, 0.3)
LOBAR_MM, SEGMENTAL_MM = 4.0, 2.0  # least radii of lobar and segmental vessels
SCALE: Final = (0.92, 1.05)  # of the patient, in plane
SHIFT_MM: Final = (0.0, 5.0)
SOFTENED_SHARE: Final = 0.5  # as if by a softer kernel
SOFTNESS_PX: Final = (0.3, 0.9)

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintedEmbolus:
    """One embolus as it appears in the voxels.

    Attributes:
        kind: occlusive, central (surrounded by contrast agent) or eccentric (on one wall).
        place: Side, level of the lung, and size of the vessel: ``"left lower segmental"``.
        centre_mm: Patient coordinates (LPS) of a voxel of its mask near its centroid.
        length_mm: Greatest length along the vessel.
        lumen_radius_mm: Of the vessel where it is widest.
        volume_mm3: Of contrast agent that it replaces.
        hu: Of the clot.
    """

    kind: str
    place: str
    centre_mm: tuple[float, float, float]
    length_mm: float
    lumen_radius_mm: float
    volume_mm3: float
    hu: float


@dataclass(frozen=True)
class Painted:
    """Emboli in the voxels of a scan, before it is varied.

    Attributes:
        drop_hu: (planes, rows, cols) float32, what they take away.
        mask: (planes, rows, cols) at least half of the voxel is embolus.
        emboli: What they are, and the voxel (plane, row, col) of their centre.
    """

    drop_hu: Volume
    mask: Mask
    emboli: list[tuple[PaintedEmbolus, tuple[int, int, int]]]


class RealChests:
    """Pairs made of one real chest: see ``export.datasets.semisynthetic.painted.RealPairs``.

    Every pair has its own emboli, grid phase, size and sharpness. All pairs are of one patient:
    what is measured on them says nothing about others.
    """

    anatomy = "chest"
    lesion_name = "emboli"

    def __init__(self, slices: Sequence[Slice], source: str, arteries: Mask | None = None) -> None:
        """Find the vessels that emboli may lie in.

        Args:
            slices: One axial series with contrast agent and without emboli.
            source: Its collection and licence, for the record.
            arteries: (slices, rows, cols) pulmonary arteries, in the order of ``slices``, where
                somebody marked them.

        Raises:
            InputError: There is no lung, no vessel with contrast agent, or only one slice.
        """
        order = sorted(range(len(slices)), key=lambda place: slices[place].position_um)
        if len(order) < 2:
            raise InputError(
                f"{len(order)} slices, expected a series of a chest", code=Code.INVALID_ARGUMENT
            )
        self._slices = tuple(slices[place] for place in order)
        self._source = source
        self._hu = np.stack([hu_of(image) for image in self._slices])
        geometry = self._slices[0].geometry
        self._spacing_mm = (geometry.row_spacing_mm + geometry.col_spacing_mm) / 2
        positions = [image.position_um for image in self._slices]
        self._pitch_mm = float(np.median(np.diff(positions))) / 1000
        marked = None if arteries is None else arteries[order]
        self._vessels = find_vessels(self._hu, self._spacing_mm, self._pitch_mm, marked)

    @property
    def vessels(self) -> Vessels:
        """Where emboli may lie, on the lattice of the slices in ascending position."""
        return self._vessels

    def digest(self) -> str:
        """Of the scan, its vessels and this module's version."""
        digest = hashlib.sha256(f"{VERSION} {self._source}".encode())
        digest.update(self._hu.tobytes())
        digest.update(np.packbits(self._vessels.mask).tobytes())
        return digest.hexdigest()

    def pair(self, seed: int) -> tuple[PaintedStudy, PaintedStudy]:
        """Without emboli, and with.

        Raises:
            InputError: No embolus fits into any of the vessels tried.
        """
        rng = np.random.default_rng((VERSION, seed))
        scale, shift_mm = float(rng.uniform(*SCALE)), float(rng.uniform(*SHIFT_MM))
        softness = float(rng.uniform(*SOFTNESS_PX)) if rng.random() < SOFTENED_SHARE else 0.0
        painted = insert_emboli(self._vessels, self._spacing_mm, self._pitch_mm, rng)
        hu = [self._hu, self._hu - painted.drop_hu]
        if softness:
            hu = [ndimage.gaussian_filter(each, (0.0, softness, softness)) for each in hu]
        base = [varied(image, scale=scale, shift_mm=shift_mm) for image in self._slices]
        clean, clotted = (tuple(map(with_hu, base, planes, self._hu)) for planes in (hu[0], hu[1]))
        emboli = [self._located(*each, base, scale) for each in painted.emboli]
        emboli.sort(key=lambda embolus: -embolus.volume_mm3)
        negative = PaintedStudy(
            seed=seed,
            positive=False,
            slices=clean,
            lesion_mask=np.zeros_like(painted.mask),
            lesions=(),
            parameters={"scale": scale, "shift_mm": shift_mm, "softness_px": softness},
            source=self._source,
            name="embolus",
            lesion_name=self.lesion_name,
        )
        positive = replace(
            negative,
            positive=True,
            slices=clotted,
            lesion_mask=painted.mask,
            lesions=tuple(emboli),
        )
        return negative, positive

    def _located(
        self,
        embolus: PaintedEmbolus,
        voxel: tuple[int, int, int],
        slices: Sequence[Slice],
        scale: float,
    ) -> PaintedEmbolus:
        """An embolus with its place in a patient of another size."""
        image = slices[voxel[0]]
        centre = _place_mm(image, voxel[1], voxel[2])
        middle = _place_mm(image, voxel[1], self._vessels.lung[2])
        return replace(
            embolus,
            place=f"{'left' if centre[0] > middle[0] else 'right'} {embolus.place}",
            centre_mm=centre,
            volume_mm3=embolus.volume_mm3 * scale**2,
        )


def insert_emboli(
    vessels: Vessels, spacing_mm: float, pitch_mm: float, rng: np.random.Generator
) -> Painted:
    """Emboli in some of the vessels.

    Args:
        vessels: Of the planes.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.
        rng: Source of all randomness.

    Raises:
        InputError: No embolus fits into any of the vessels tried.
    """
    places = np.argwhere(vessels.mask)
    bins = np.digitize(vessels.radius_mm[vessels.mask], RADII_MM)
    weights = np.array(SIZE_WEIGHTS)[bins] / np.maximum(np.bincount(bins), 1)[bins]
    weights /= weights.sum()
    shares = np.zeros(vessels.mask.shape, np.float32)
    drop = np.zeros_like(shares)
    emboli: list[tuple[PaintedEmbolus, tuple[int, int, int]]] = []
    wanted = int(rng.integers(EMBOLI[0], EMBOLI[1] + 1))
    for _ in range(ATTEMPTS):
        seed = places[int(rng.choice(len(places), p=weights))]
        least = 0.0 if emboli else LEAST_MM2
        embolus = _painted(vessels, seed, spacing_mm, pitch_mm, shares, drop, rng, least_mm2=least)
        if embolus is not None:
            emboli.append(embolus)
        if len(emboli) == wanted:
            break
    if not emboli:
        raise InputError(
            f"none of {ATTEMPTS} vessels took an embolus: there is too little contrast agent",
            code=Code.INVALID_ARGUMENT,
        )
    return Painted(drop, (shares >= MASK_SHARE) & vessels.mask, emboli)


def _painted(
    vessels: Vessels,
    seed: np.ndarray[tuple[int], np.dtype[np.int64]],
    spacing_mm: float,
    pitch_mm: float,
    shares: Volume,
    drop: Volume,
    rng: np.random.Generator,
    *,
    least_mm2: float,
) -> tuple[PaintedEmbolus, tuple[int, int, int]] | None:
    """Paint one embolus at a voxel of a vessel; ``None``, and nothing changed, if it does not fit.

    Args:
        vessels: Where it may lie.
        seed: (3,) the voxel.
        spacing_mm: Pixel spacing.
        pitch_mm: Distance of planes.
        shares: (planes, rows, cols) of voxels that emboli fill so far; changed.
        drop: (planes, rows, cols) what they take away in HU so far; changed.
        rng: Source of all randomness.
        least_mm2: Area of its mask in the slice that shows most of it.
    """
    step = np.array([pitch_mm, spacing_mm, spacing_mm])
    radius = float(vessels.radius_mm[tuple(seed)])
    length = float(np.clip(rng.uniform(*LENGTH_RADII) * radius, *LENGTH_MM))
    reach = np.ceil(length / 2 / step).astype(int) + np.array([2, MARGIN_PX, MARGIN_PX])
    low = np.maximum(seed - reach, 0)
    high = np.minimum(seed + reach + 1, vessels.mask.shape)
    box: Box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    mask, smooth = vessels.mask[box], vessels.smooth_hu[box]
    offset = (np.indices(mask.shape) - (seed - low)[:, None, None, None]) * step[
        :, None, None, None
    ]
    near = mask & (np.sqrt((offset**2).sum(axis=0)) <= length / 2)
    labels, _ = ndimage.label(near, np.ones((3, 3, 3)))
    vessel = labels == labels[tuple(seed - low)]
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    own = _shape(kind, vessel, vessels.radius_mm[box], offset, step, rng)
    lumen, clot_hu = float(np.quantile(smooth[vessel], 0.8)), float(rng.uniform(*CLOT_HU))
    if lumen - clot_hu < LEAST_CONTRAST_HU or lumen < VESSEL_HU or not own.any():
        return None
    filled = own & ~(shares[box] >= MASK_SHARE)
    ring = ndimage.binary_dilation(own, np.ones((1, 3, 3), dtype=bool), iterations=2) & ~mask
    wall = ring & ndimage.binary_dilation(own & _at_wall(mask), iterations=2)
    soft = ndimage.gaussian_filter((own | wall).astype(np.float32), (0.3, 0.6, 0.6)) * mask
    solid = wall | own if kind == "occlusive" else wall
    occupancy = np.minimum(np.where(solid, 1.0, soft), 1.0 - shares[box])
    share = occupancy * contrast_share(smooth, mask, lumen)
    voxel_mm3 = float(step.prod())
    kept = filled & (share >= MASK_SHARE)
    volume = float(share[own | wall].sum()) * voxel_mm3
    area_mm2 = float(kept.sum(axis=(1, 2)).max()) * spacing_mm**2
    if volume < LEAST_MM3 or not kept.any() or area_mm2 < least_mm2:
        return None
    shares[box] += share.astype(np.float32)
    drop[box] += (share * (lumen - clot_hu)).astype(np.float32)
    voxels = np.argwhere(kept)
    middle = voxels[int(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin())] + low
    widest = float(vessels.radius_mm[box][vessel].max())
    along = (voxels - voxels.mean(axis=0)) * step
    extent = float(2 * np.sqrt((along**2).sum(axis=1)).max())
    embolus = PaintedEmbolus(
        kind=kind,
        place=_place(vessels, int(middle[0]), widest),
        centre_mm=(0.0, 0.0, 0.0),
        length_mm=extent,
        lumen_radius_mm=widest,
        volume_mm3=volume,
        hu=clot_hu,
    )
    return embolus, (int(middle[0]), int(middle[1]), int(middle[2]))


def _shape(
    kind: str,
    vessel: Mask,
    radius_mm: Volume,
    offset_mm: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    step_mm: np.ndarray[tuple[int], np.dtype[np.float64]],
    rng: np.random.Generator,
) -> Mask:
    """The part of a piece of vessel that an embolus of a kind fills."""
    if kind == "occlusive":
        return vessel
    widest = float(radius_mm[vessel].max())
    if kind == "central":
        # Against the widest place nearby, so that branches keep a rim of their own.
        local = ndimage.grey_dilation(np.where(vessel, radius_mm, 0.0), size=(3, 7, 7))
        inner: Mask = vessel & (radius_mm > float(rng.uniform(0.25, 0.45)) * local)
        return inner
    points = offset_mm[:, vessel].T
    _, _, axes = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    angle = float(rng.uniform(0, 2 * np.pi))
    across = np.cos(angle) * axes[1] + np.sin(angle) * axes[2]  # axes[0] runs along the vessel
    side = np.tensordot(across, offset_mm - points.mean(axis=0)[:, None, None, None], axes=1)
    bumps = ndimage.gaussian_filter(rng.standard_normal(vessel.shape), BUMP_MM / step_mm)
    side += BUMP_RADII * widest * bumps / bumps.std()
    half: Mask = vessel & (side > float(rng.uniform(-0.3, 0.3)) * widest)
    return half


def _at_wall(mask: Mask) -> Mask:
    """Voxels of vessels that have something else beside them in their plane."""
    inner = ndimage.binary_erosion(mask, np.ones((1, 3, 3), dtype=bool))
    wall: Mask = mask & ~inner
    return wall


def contrast_share(smooth_hu: Volume, vessels: Mask, lumen_hu: float) -> Volume:
    """Share of every voxel that contrast agent fills, in [0, 1].

    Args:
        smooth_hu: (planes, rows, cols) HU without noise.
        vessels: (planes, rows, cols) all vessels with contrast agent.
        lumen_hu: Of a voxel that is full of it.
    """
    around = ~ndimage.binary_dilation(vessels, np.ones((1, 3, 3), dtype=bool), iterations=2)
    around &= smooth_hu < VESSEL_HU
    weight = ndimage.gaussian_filter(around.astype(np.float32), (0.5, 3.0, 3.0))
    total = ndimage.gaussian_filter(np.where(around, smooth_hu, 0.0), (0.5, 3.0, 3.0))
    background = np.where(weight > 0.01, total / np.maximum(weight, 0.01), TISSUE_HU)
    background = np.minimum(background, lumen_hu - 1.0)
    share = (smooth_hu - background) / (lumen_hu - background)
    return np.asarray(np.clip(share, 0.0, 1.0), np.float32)


def _place(vessels: Vessels, plane: int, radius_mm: float) -> str:
    """Level of the lung and size of the vessel."""
    first, last, _ = vessels.lung
    third = int(np.clip(3 * (plane - first) / max(last - first, 1), 0, 2))
    level = ("lower", "middle", "upper")[third]
    size = "subsegmental"
    if radius_mm >= SEGMENTAL_MM:
        size = "lobar" if radius_mm >= LOBAR_MM else "segmental"
    return f"{level} {size}"


def _place_mm(image: Slice, row: int, col: float) -> tuple[float, float, float]:
    """Patient coordinates (LPS) of a pixel's centre."""
    g = image.geometry
    at = (
        np.array(g.image_position_mm)
        + col * g.col_spacing_mm * np.array(g.row_direction)
        + row * g.row_spacing_mm * np.array(g.col_direction)
    )
    return (float(at[0]), float(at[1]), float(at[2]))
