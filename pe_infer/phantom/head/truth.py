"""What the voxels of a study say of its hemorrhages."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.head.hemorrhage import TYPES, Bleed
from pe_infer.phantom.head.layout import HeadLayout
from pe_infer.phantom.raster import F32, Box

MASK_SHARE = 0.4  # a voxel is blood if this much of it is: sulci are thinner than slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Hemorrhage:
    """One hemorrhage as it appears in the voxels.

    Attributes:
        kind: epidural, subdural, subarachnoid, intraparenchymal or intraventricular.
        place: Where, e.g. ``"left convexity"``, ``"right putamen"``.
        centre_mm: Patient coordinates (LPS) of a mask voxel near its centroid.
        volume_ml: Of blood, before the kernel blurs it.
        thickness_mm: Of extra-axial blood where it is thickest; else the mean diameter.
        hu: Of its blood.
        age_days: 0 is fresh.
    """

    kind: str
    place: str
    centre_mm: tuple[float, float, float]
    volume_ml: float
    thickness_mm: float
    hu: float
    age_days: float

    @property
    def volume_mm3(self) -> float:
        """Volume of blood in mm3."""
        return 1000 * self.volume_ml


class Truth:
    """Collects the voxels of the hemorrhages."""

    def __init__(self, layout: HeadLayout, bleeds: list[Bleed]) -> None:
        self._layout, self._bleeds = layout, bleeds
        self._volume = np.zeros(len(bleeds))
        self._voxels: list[list[NDArray[np.float64]]] = [[] for _ in bleeds]
        self.labels = np.zeros((len(layout.w_mm), layout.matrix, layout.matrix), np.uint8)

    def add(self, index: int, box: Box, shares: dict[int, F32]) -> None:
        """Take the shares of one slice in a box of pixels, per bleed."""
        layout = self._layout
        total = np.sum(list(shares.values()), axis=0)
        most = np.argmax(list(shares.values()), axis=0)
        blood = total >= MASK_SHARE
        voxel_ml = layout.pixel_mm**2 * layout.spacing_mm(index) / 1000
        for order, (number, part) in enumerate(shares.items()):
            self._volume[number] += float(part.sum()) * voxel_ml
            own = blood & (most == order)
            self.labels[index][box][own] = TYPES.index(self._bleeds[number].kind) + 1
            rows, cols = (p + b.start for p, b in zip(np.nonzero(own), box, strict=True))
            u = layout.first_pixel_mm[0] + cols * layout.pixel_mm
            v = layout.first_pixel_mm[1] + rows * layout.pixel_mm
            c, s = np.cos(layout.tilt_rad), np.sin(layout.tilt_rad)
            points = np.stack([u, v * c, layout.w_mm[index] - v * s], 1)
            self._voxels[number].append(points)

    def hemorrhages(self) -> tuple[Hemorrhage, ...]:
        """Return those that some voxel shows, largest first."""
        found: list[Hemorrhage] = []
        for bleed, volume, parts in zip(self._bleeds, self._volume, self._voxels, strict=True):
            voxels = np.concatenate(parts) if parts else np.zeros((0, 3))
            if not len(voxels):
                continue
            nearest = np.argmin(((voxels - voxels.mean(0)) ** 2).sum(1))
            x, y, z = (float(c) for c in voxels[nearest])
            mean = float(np.prod(bleed.size)) ** (1 / 3)
            found.append(
                Hemorrhage(
                    kind=bleed.kind,
                    place=bleed.place,
                    centre_mm=(x, y, z),
                    volume_ml=float(volume),
                    thickness_mm=2 * mean if bleed.kind == "intraparenchymal" else bleed.size[0],
                    hu=bleed.hu,
                    age_days=bleed.age_days,
                )
            )
        return tuple(sorted(found, key=lambda h: -h.volume_ml))
