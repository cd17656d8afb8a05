"""Where blood may lie in a real head: found by thresholds inside the skull, slice by slice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_infer.errors import Code, InputError
from pe_infer.geometry import Slice

Volume: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

BONE_HU: Final = 120.0
BRAIN_HU: Final = (-15.0, 90.0)  # of what lies inside the skull, without its noise
FLUID_HU: Final = (6.0, 20.0)  # all fluid, no fluid
NOISE_MM: Final = 0.9  # over which noise is averaged before a threshold
CLOSING_MM: Final = 5.0  # closes the skull over its sutures and foramina
OPENING_MM: Final = 3.0  # parts orbits and soft tissue from the brain
LEAST_AREA_MM2: Final = 2500.0  # of the brain in a slice
GROWTH_MM: Final = 6.0  # that the brain may extend beyond the slice nearer to its widest one
VAULT_SHARE: Final = 0.75  # of the widest slice's area: there the wall is the vault
VENTRICLE_DEPTH_MM: Final = 20.0
VENTRICLE_REACH_MM: Final = 34.0  # to either side of the midline
LEAST_VENTRICLE_ML: Final = 0.5
MARGIN: Final = 8  # pixels around the brain
WIDEST_MM: Final = 4.0  # half of a sulcus or a cistern; what is wider is an old infarct


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """What lies inside a skull; arrays are (slices, rows, cols) in the order of the slices.

    Attributes:
        cavity: Inside of the skull.
        depth_mm: Distance to the inner table, in plane; 0 outside.
        ventricles: Share of fluid in the ventricles.
        sulci: Share of fluid in sulci and cisterns.
        tissue: Brain that is neither.
        vault: (slices,) where the wall of the cavity is the vault.
        row_mm: Distance of rows.
        col_mm: Distance of columns.
        back_mm: (slices,) how far each slice's centre is shifted to the back: gantry tilt.
        position_mm: (slices,) ascending.
        thickness_mm: (slices,).
        middle_col: Column of the midline.
    """

    cavity: Mask
    depth_mm: Volume
    ventricles: Volume
    sulci: Volume
    tissue: Mask
    vault: NDArray[np.bool_]
    row_mm: float
    col_mm: float
    back_mm: NDArray[np.float64]
    position_mm: NDArray[np.float64]
    thickness_mm: NDArray[np.float64]
    middle_col: float

    def cropped(self) -> tuple["Regions", tuple[slice, slice, slice]]:
        """The same without what lies around the brain, and the box (slices, rows, cols) of it."""
        rows = np.flatnonzero(self.cavity.any(axis=(0, 2)))
        cols = np.flatnonzero(self.cavity.any(axis=(0, 1)))
        top, left = max(int(rows[0]) - MARGIN, 0), max(int(cols[0]) - MARGIN, 0)
        box = (
            slice(None),
            slice(top, int(rows[-1]) + MARGIN + 1),
            slice(left, int(cols[-1]) + MARGIN + 1),
        )
        smaller = replace(
            self,
            cavity=self.cavity[box],
            depth_mm=self.depth_mm[box],
            ventricles=self.ventricles[box],
            sulci=self.sulci[box],
            tissue=self.tissue[box],
            back_mm=self.back_mm + top * self.row_mm,
            middle_col=self.middle_col - left,
        )
        return smaller, box

    @property
    def voxel_ml(self) -> NDArray[np.float32]:
        """(slices,) volume of a voxel, by the distance of neighbouring slices."""
        steps = np.gradient(self.position_mm)
        return (steps * self.row_mm * self.col_mm / 1000.0).astype(np.float32)

    def coordinates(self, voxel: NDArray[np.int64]) -> tuple[float, float, float]:
        """Millimetres to the left of the midline, to the back, to the head, of a voxel."""
        index, row, col = (int(v) for v in voxel)
        return (
            (col - self.middle_col) * self.col_mm,
            row * self.row_mm + float(self.back_mm[index]),
            float(self.position_mm[index]),
        )

    def grid(self, offset: float) -> tuple[Volume, Volume, Volume]:
        """Coordinates of all voxels, broadcastable, ``offset`` thicknesses above the middle."""
        _, rows, cols = self.cavity.shape
        x = (np.arange(cols) - self.middle_col) * self.col_mm
        y = np.arange(rows) * self.row_mm
        z = self.position_mm + offset * self.thickness_mm
        return (
            x.astype(np.float32)[None, None, :],
            (y[None, :, None] + self.back_mm[:, None, None]).astype(np.float32),
            z.astype(np.float32)[:, None, None],
        )

    def inward(self, voxel: NDArray[np.int64]) -> tuple[float, float]:
        """Unit vector (left, back) from a voxel at the wall into the cavity."""
        index, row, col = (int(v) for v in voxel)
        reach = round(12.0 / self.row_mm)
        top, left = max(row - reach, 0), max(col - reach, 0)
        part = self.cavity[index, top : row + reach + 1, left : col + reach + 1]
        rows, cols = np.nonzero(part)
        away = np.array(
            [(cols.mean() + left - col) * self.col_mm, (rows.mean() + top - row) * self.row_mm]
        )
        away /= max(float(np.linalg.norm(away)), 1e-6)
        return (float(away[0]), float(away[1]))


def find_regions(hu: Volume, slices: Sequence[Slice]) -> Regions:
    """Find the brain and its fluid.

    Args:
        hu: (slices, rows, cols), columns to the patient's left, rows to the back.
        slices: Their geometry, ascending.

    Raises:
        InputError: The columns run another way, there is no brain in a skull, or no ventricle.
    """
    geometry = slices[0].geometry
    if geometry.row_direction[0] < 0.9 or geometry.col_direction[1] < 0.7:
        raise InputError(
            f"{slices[0].source}: rows along {geometry.row_direction}, expected to the patient's "
            "left: give the original axial series",
            code=Code.BAD_GEOMETRY,
        )
    row_mm, col_mm = geometry.row_spacing_mm, geometry.col_spacing_mm
    smooth = ndimage.gaussian_filter(hu, (0.0, NOISE_MM / row_mm, NOISE_MM / col_mm))
    cavity = _cavity(smooth, row_mm, col_mm)
    areas = cavity.sum(axis=(1, 2))
    depth = np.stack(
        [ndimage.distance_transform_edt(plane, (row_mm, col_mm)) for plane in cavity]
    ).astype(np.float32)
    middle_col = float(np.nonzero(cavity.any(axis=(0, 1)))[0].mean())
    low, high = FLUID_HU
    fluid = np.where(cavity, np.clip((high - smooth) / (high - low), 0, 1), 0).astype(np.float32)
    positions = np.array([image.position_um / 1000.0 for image in slices])
    voxel_ml = float(np.median(np.diff(positions))) * row_mm * col_mm / 1000.0
    ventricle = _ventricles(fluid, depth, middle_col, col_mm, LEAST_VENTRICLE_ML / voxel_ml)
    reached = ndimage.binary_dilation(ventricle, np.ones((1, 5, 5), dtype=bool))
    ventricles = np.where(reached, fluid, 0.0).astype(np.float32)
    return Regions(
        cavity=cavity,
        depth_mm=depth,
        ventricles=ventricles,
        sulci=np.where(reached | _wide(fluid, row_mm, col_mm), 0.0, fluid).astype(np.float32),
        tissue=cavity & (fluid < 0.3),
        vault=areas >= VAULT_SHARE * areas.max(),
        row_mm=row_mm,
        col_mm=col_mm,
        back_mm=np.array(
            [float(np.dot(s.geometry.centre_mm, s.geometry.back_axis)) for s in slices]
        ),
        position_mm=positions,
        thickness_mm=np.array([image.geometry.thickness_mm or 5.0 for image in slices]),
        middle_col=middle_col,
    )


def _cavity(smooth: Volume, row_mm: float, col_mm: float) -> Mask:
    """Inside of the skull: from the widest slice on, what continues the slice next to it.

    Raises:
        InputError: No slice shows enough of it.
    """
    bone = smooth > BONE_HU
    low, high = BRAIN_HU
    sampling = (row_mm, col_mm)
    enclosed = np.zeros_like(bone)
    for index, plane in enumerate(bone):
        closed = _eroded(_dilated(plane, CLOSING_MM, sampling), CLOSING_MM, sampling)
        inside = ndimage.binary_fill_holes(closed) & ~plane
        inside &= (smooth[index] > low) & (smooth[index] < high)
        enclosed[index] = _largest(
            _dilated(_eroded(inside, OPENING_MM, sampling), OPENING_MM, sampling) & inside
        )
    least = LEAST_AREA_MM2 / (row_mm * col_mm)
    areas = enclosed.sum(axis=(1, 2))
    widest = int(areas.argmax())
    if areas[widest] < least:
        raise InputError(
            f"widest slice: {areas[widest] * row_mm * col_mm / 100:.0f} cm2 inside bone, expected "
            f"at least {LEAST_AREA_MM2 / 100:.0f} of a brain: give a head without contrast agent",
            code=Code.INVALID_ARGUMENT,
        )
    cavity = np.zeros_like(enclosed)
    cavity[widest] = enclosed[widest]
    for order in (range(widest + 1, len(areas)), range(widest - 1, -1, -1)):
        before = cavity[widest]
        for index in order:
            part = _largest(enclosed[index] & _dilated(before, GROWTH_MM, sampling))
            if part.sum() < least / 2:
                break
            cavity[index] = before = part
    filled = [ndimage.binary_fill_holes(plane) for plane in cavity]
    return np.stack(filled) & ~bone


def _ventricles(
    fluid: Volume, depth_mm: Volume, middle_col: float, col_mm: float, least_voxels: float
) -> Mask:
    """Large pieces of fluid deep in the brain, near the midline.

    Raises:
        InputError: There are none.
    """
    aside = np.abs(np.arange(fluid.shape[2]) - middle_col) * col_mm
    deep = (fluid > 0.6) & (depth_mm > VENTRICLE_DEPTH_MM) & (aside < VENTRICLE_REACH_MM)
    labels, count = ndimage.label(ndimage.binary_opening(deep, np.ones((1, 3, 3), dtype=bool)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept: Mask = np.isin(labels, np.flatnonzero(sizes >= least_voxels))
    if not kept.any():
        raise InputError(
            f"no fluid below {FLUID_HU[0]:.0f} HU in {LEAST_VENTRICLE_ML} ml deep in the brain: "
            "give a head with visible ventricles",
            code=Code.INVALID_ARGUMENT,
        )
    return kept


def _wide(fluid: Volume, row_mm: float, col_mm: float) -> Mask:
    """Fluid in pieces that are too wide for a sulcus, with their edges."""
    sampling = (row_mm, col_mm)
    return np.stack(
        [
            _dilated(_eroded(plane, WIDEST_MM, sampling), WIDEST_MM + 3.0, sampling)
            for plane in ndimage.binary_closing(fluid > 0.3, np.ones((1, 3, 3), dtype=bool))
        ]
    )


def _dilated(plane: Mask, radius_mm: float, sampling: tuple[float, float]) -> Mask:
    if not plane.any():
        return plane
    near: Mask = ndimage.distance_transform_edt(~plane, sampling) <= radius_mm
    return near


def _eroded(plane: Mask, radius_mm: float, sampling: tuple[float, float]) -> Mask:
    deep: Mask = ndimage.distance_transform_edt(plane, sampling) > radius_mm
    return deep


def _largest(plane: Mask) -> Mask:
    labels, count = ndimage.label(plane)
    if count == 0:
        return plane
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest: Mask = labels == int(sizes.argmax())
    return largest
