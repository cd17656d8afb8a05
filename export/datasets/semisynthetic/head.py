"""Blood put into a real head scan that shows none: real anatomy and noise, known truth.

Works on the slices as they came, so that a pair goes through everything that a patient's study
does. Blood replaces what a voxel holds on average around it and leaves the difference from that
average, which is the scan's own noise. Shapes are averaged over the thickness of a slice and
blurred in plane. Nothing is pushed aside: there is no mass effect. All numbers are [ours].
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from export.datasets.semisynthetic.painted import PaintedStudy, hu_of, with_hu
from export.datasets.semisynthetic.regions import Regions, find_regions
from export.datasets.semisynthetic.variation import varied
from pe_infer.geometry import Slice

Volume: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float, float]

VERSION: Final = 1
BLOOD_HU: Final = (54.0, 76.0)  # acute to early subacute
EDEMA_HU: Final = -7.0
MASK_SHARE: Final = 0.5  # of a voxel that blood makes a voxel of the mask
SUBPLANES: Final = 5  # over the thickness of a slice
EDGE_MM: Final = 1.2
BLUR_MM: Final = 0.5  # of what is painted, in plane
AVERAGE_MM: Final = 1.4  # over which the average around a voxel is taken
SECOND_BLEED_SHARE: Final = 0.35
SCALE: Final = (0.92, 1.05)  # of the patient, in plane
SHIFT_MM: Final = (0.0, 5.0)
LEAST_ML: Final = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintedBleed:
    """One hemorrhage as it appears in the voxels.

    Attributes:
        kind: epidural, subdural, subarachnoid, intraparenchymal or intraventricular.
        volume_ml: Of blood.
        hu: Of it.
        centre_mm: Patient coordinates (LPS) of the voxel nearest to its centroid.
    """

    kind: str
    volume_ml: float
    hu: float
    centre_mm: Point

    @property
    def place(self) -> str:
        """Side of the body."""
        return "left" if self.centre_mm[0] > 0 else "right"

    @property
    def volume_mm3(self) -> float:
        """Of blood."""
        return 1000 * self.volume_ml


class RealHeads:
    """Pairs made of one real head: see ``export.datasets.semisynthetic.painted.RealPairs``.

    Every pair has its own blood, grid phase and size of the patient. All pairs are of one patient:
    what is measured on them says nothing about others.
    """

    anatomy = "head"
    lesion_name = "hemorrhages"

    def __init__(self, slices: Sequence[Slice], source: str) -> None:
        """Find the regions that blood may lie in.

        Args:
            slices: One axial series without contrast agent and without blood.
            source: Its collection and licence, for the record.

        Raises:
            InputError: There is no brain in a skull, or no fluid in the brain.
        """
        self._slices = tuple(sorted(slices, key=lambda image: image.position_um))
        self._source = source
        self._hu = np.stack([hu_of(image) for image in self._slices])
        self._regions, self._box = find_regions(self._hu, self._slices).cropped()
        self._average = _average_within(self._hu[self._box], self._regions)

    @property
    def regions(self) -> Regions:
        """Where blood may lie, in a box around the brain."""
        return self._regions

    def digest(self) -> str:
        """Of the scan and of this module's version."""
        digest = hashlib.sha256(f"{VERSION} {self._source}".encode())
        digest.update(self._hu.tobytes())
        return digest.hexdigest()

    def pair(self, seed: int) -> tuple[PaintedStudy, PaintedStudy]:
        """Without blood, and with."""
        rng = np.random.default_rng((VERSION, seed))
        scale, shift_mm = float(rng.uniform(*SCALE)), float(rng.uniform(*SHIFT_MM))
        kinds = [str(rng.choice(tuple(SHAPES)))]
        if rng.random() < SECOND_BLEED_SHARE:
            kinds.append(str(rng.choice([kind for kind in SHAPES if kind != kinds[0]])))
        base = tuple(varied(i, scale=scale, shift_mm=shift_mm) for i in self._slices)
        painted = self._hu[self._box].copy()
        shares = np.zeros(painted.shape, np.float32)
        bleeds: list[PaintedBleed] = []
        for kind in kinds:
            bleed = self._bleed(kind, rng, painted, shares, base)
            if bleed is not None:
                bleeds.append(bleed)
        while not bleeds:  # too little of it lay inside the brain
            bleed = self._bleed("intraparenchymal", rng, painted, shares, base)
            bleeds += [] if bleed is None else [bleed]
        variation: dict[str, float | bool | str] = {"scale": scale, "shift_mm": shift_mm}
        mask = np.zeros(self._hu.shape, np.bool_)
        mask[self._box] = shares >= MASK_SHARE
        hu = self._hu.copy()
        hu[self._box] = painted
        with_blood = tuple(
            with_hu(image, plane, before)
            for image, plane, before in zip(base, hu, self._hu, strict=True)
        )
        clean = PaintedStudy(
            seed=seed,
            positive=False,
            slices=base,
            lesion_mask=np.zeros_like(mask),
            lesions=(),
            parameters=variation,
            source=self._source,
            name="hemorrhage",
            lesion_name=self.lesion_name,
        )
        bleeds.sort(key=lambda bleed: -bleed.volume_ml)
        bleeding = replace(
            clean, positive=True, slices=with_blood, lesion_mask=mask, lesions=tuple(bleeds)
        )
        return clean, bleeding

    def _bleed(
        self,
        kind: str,
        rng: np.random.Generator,
        painted: Volume,
        shares: Volume,
        slices: Sequence[Slice],
    ) -> PaintedBleed | None:
        """Paint one hemorrhage; ``None``, and nothing changed, if there is hardly any of it."""
        regions = self._regions
        share, rim = SHAPES[kind](regions, rng)
        blur = (0.0, BLUR_MM / regions.row_mm, BLUR_MM / regions.col_mm)
        share = ndimage.gaussian_filter(share, blur) * regions.cavity
        share = np.clip(share, 0.0, 1.0 - shares)
        voxels_ml = regions.voxel_ml[:, None, None] * share
        volume = float(voxels_ml.sum())
        if volume < LEAST_ML or not (share >= MASK_SHARE).any():
            return None
        hu = float(rng.uniform(*BLOOD_HU))
        clouds = _clouds(regions, rng, 4.0)
        painted += (share * (hu + 1.5 * clouds - self._average)).astype(np.float32)
        if rim is not None:
            tissue = regions.tissue & (shares + share < MASK_SHARE)
            painted += np.where(tissue, EDEMA_HU * np.clip(rim - share, 0, 1), 0).astype(np.float32)
        shares += share
        places = np.argwhere(share >= MASK_SHARE)
        centre = places[int(((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin())]
        g = slices[int(centre[0])].geometry
        row, col = (int(c) + b.start for c, b in zip(centre[1:], self._box[1:], strict=True))
        at = (
            np.array(g.image_position_mm)
            + col * g.col_spacing_mm * np.array(g.row_direction)
            + row * g.row_spacing_mm * np.array(g.col_direction)
        )
        return PaintedBleed(
            kind=kind,
            volume_ml=volume,
            hu=hu,
            centre_mm=(float(at[0]), float(at[1]), float(at[2])),
        )


Shape: TypeAlias = Callable[[Regions, np.random.Generator], tuple[Volume, Volume | None]]


def _soft(distance_mm: Volume, edge_mm: float = EDGE_MM) -> Volume:
    """Share of a voxel within a surface, from the signed distance to it, negative inside."""
    share = np.float32(0.5) - distance_mm / np.float32(edge_mm)
    return np.asarray(np.clip(share, 0, 1), np.float32)


def _clouds(regions: Regions, rng: np.random.Generator, length_mm: float) -> Volume:
    """Smooth noise of unit variance."""
    step = 4  # made coarsely: it is smooth
    shape = tuple(-(-side // step) for side in regions.cavity.shape[1:])
    coarse = rng.normal(size=(len(regions.cavity), *shape)).astype(np.float32)
    sigma = (1.0, length_mm / regions.row_mm / step, length_mm / regions.col_mm / step)
    coarse = ndimage.gaussian_filter(coarse, sigma)
    coarse /= float(coarse.std()) or 1.0
    fine = coarse.repeat(step, axis=1).repeat(step, axis=2)
    rows, cols = regions.cavity.shape[1:]
    return np.asarray(fine[:, :rows, :cols], np.float32)


def _over_thickness(shape: Callable[[float], Volume]) -> Volume:
    """Mean of a shape over the thickness of slices; ``shape`` takes the offset in thicknesses."""
    offsets = (np.arange(SUBPLANES) + 0.5) / SUBPLANES - 0.5
    return np.asarray(np.mean([shape(float(o)) for o in offsets], axis=0), np.float32)


def _wall(regions: Regions, rng: np.random.Generator) -> NDArray[np.int64]:
    """A voxel next to the inner table of the vault, at the side, front or back."""
    high = regions.vault[:, None, None] & regions.cavity & (regions.depth_mm < 1.5)
    places = np.argwhere(high)
    return np.asarray(places[int(rng.integers(len(places)))], np.int64)


def _epidural(regions: Regions, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """A lens: the part of a ball beyond the skull that lies inside it."""
    seed = _wall(regions, rng)
    thickness, half = float(rng.uniform(6, 16)), float(rng.uniform(18, 34))
    radius = (half * half + thickness * thickness) / (2 * thickness)
    x, y, z = regions.coordinates(seed)
    inward = regions.inward(seed)
    cx, cy = x - inward[0] * (radius - thickness), y - inward[1] * (radius - thickness)
    rough = 0.5 * _clouds(regions, rng, 3.0)

    def lens(offset: float) -> Volume:
        gx, gy, gz = regions.grid(offset)
        away = np.sqrt((gx - cx) ** 2 + (gy - cy) ** 2 + (gz - z) ** 2) - radius
        return _soft(np.asarray(away + rough, np.float32))

    return _over_thickness(lens), None


def _subdural(regions: Regions, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """A crescent along one hemisphere, thinner the farther it is from its middle."""
    seed = _wall(regions, rng)
    thickness, reach = float(rng.uniform(4, 11)), float(rng.uniform(40, 75))
    x, y, z = regions.coordinates(seed)
    rough = _clouds(regions, rng, 8.0)

    def crescent(offset: float) -> Volume:
        gx, gy, gz = regions.grid(offset)
        along = np.sqrt((gx - x) ** 2 + (gy - y) ** 2 + (1.5 * (gz - z)) ** 2) / reach
        width = thickness * np.clip(1.15 - along**2, 0, 1) ** 0.6 * (1 + 0.12 * rough)
        own_side = np.clip(0.5 + np.sign(x) * gx / 2, 0, 1)
        layer = _soft(np.asarray(regions.depth_mm - width, np.float32))
        return np.asarray(layer * own_side * np.clip(width / 0.8, 0, 1), np.float32)

    return _over_thickness(crescent), None


def _subarachnoid(regions: Regions, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """Fluid of sulci and cisterns around one place, patchy."""
    places = np.argwhere(regions.sulci > 0.7)
    x, y, z = regions.coordinates(places[int(rng.integers(len(places)))])
    reach = float(rng.uniform(22, 45))
    patches = np.clip(0.85 + 0.3 * _clouds(regions, rng, 6.0), 0, 1)
    gx, gy, gz = regions.grid(0.0)
    along = np.sqrt((gx - x) ** 2 + (gy - y) ** 2 + (1.3 * (gz - z)) ** 2) / reach
    near = np.clip(2.4 * (1.2 - along), 0, 1)
    fluid = np.clip(1.5 * regions.sulci, 0, 1)  # thin sulci are blurred with the brain beside them
    return np.asarray(fluid * near * patches, np.float32), None


def _intraparenchymal(regions: Regions, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """An uneven ellipsoid in the brain, with a rim of water."""
    places = np.argwhere(regions.tissue & (regions.depth_mm > 12.0))
    x, y, z = regions.coordinates(places[int(rng.integers(len(places)))])
    a, b, c = (float(v) for v in rng.uniform((6, 6, 5), (20, 15, 14)))
    angle = float(rng.uniform(0, np.pi))
    mean = (a * b * c) ** (1 / 3)
    rough = min(0.14 * mean, 2.2) * _clouds(regions, rng, 5.0)
    rim_mm = float(rng.uniform(0.0, 5.0))
    cos, sin = float(np.cos(angle)), float(np.sin(angle))

    def surface(offset: float) -> Volume:
        gx, gy, gz = regions.grid(offset)
        dx, dy = gx - x, gy - y
        q = ((cos * dx + sin * dy) / a) ** 2 + ((cos * dy - sin * dx) / b) ** 2
        q = q + ((gz - z) / c) ** 2
        return np.asarray((np.sqrt(q) - 1) * mean + rough, np.float32)

    own_side = np.clip(0.5 + np.sign(x) * regions.grid(0.0)[0] / 2, 0, 1)
    tissue = (1.0 - regions.sulci) * own_side
    ball = _over_thickness(lambda offset: _soft(surface(offset)))
    rim = _over_thickness(lambda offset: _soft(surface(offset) - rim_mm, 3.0))
    return np.asarray(ball * tissue, np.float32), np.asarray(rim * own_side, np.float32)


def _intraventricular(regions: Regions, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """Blood that has settled at the back of the ventricles of a patient who lies on it."""
    _, gy, _ = regions.grid(0.0)
    inside = regions.ventricles > 0.7
    rows = np.broadcast_to(gy, inside.shape)[inside]
    level = float(np.quantile(rows, rng.uniform(0.25, 0.8)))
    surface = level + 0.8 * _clouds(regions, rng, 5.0)
    return np.asarray(regions.ventricles * _soft(surface - gy, 2.5), np.float32), None


SHAPES: Final[dict[str, Shape]] = {
    "epidural": _epidural,
    "subdural": _subdural,
    "subarachnoid": _subarachnoid,
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
}


def _average_within(hu: Volume, regions: Regions) -> Volume:
    """Average around every voxel, in plane, of voxels inside the skull only."""
    sigma = (0.0, AVERAGE_MM / regions.row_mm, AVERAGE_MM / regions.col_mm)
    inside = regions.cavity.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, sigma)
    total = ndimage.gaussian_filter(np.where(regions.cavity, hu, 0.0).astype(np.float32), sigma)
    return np.asarray(np.where(weight > 0.05, total / np.maximum(weight, 0.05), hu), np.float32)
