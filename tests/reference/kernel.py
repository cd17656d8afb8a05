"""The patient grid in NumPy.

float32 where the kernel uses float32, in the same order of operations.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_infer.geometry import PatientGrid, Slice

AIR, TOP = np.float32(-1024), np.float32(4095)


def to_hu(image: Slice) -> NDArray[np.float32]:
    """Stored values to clamped HU, padding to air."""
    stored = image.pixels.astype(np.int32)
    hu = stored.astype(np.float32) * np.float32(image.rescale_slope)
    hu = np.clip(hu + np.float32(image.rescale_intercept), AIR, TOP)
    if image.padding is not None:
        low, high = image.padding
        hu[(stored >= low) & (stored <= high)] = AIR
    return hu


def upright(hu: NDArray[np.float32], image: Slice) -> tuple[NDArray[np.float32], float, float]:
    """Rows to the back, columns to the left; with the spacings that belong to them."""
    geometry = image.geometry
    row, col = geometry.row_direction, geometry.col_direction
    spacing_back, spacing_left = geometry.row_spacing_mm, geometry.col_spacing_mm
    if abs(row[1]) > abs(row[0]):
        hu, row, col = hu.T, col, row
        spacing_back, spacing_left = spacing_left, spacing_back
    if row[0] < 0:
        hu = hu[:, ::-1]
    if col[1] < 0:
        hu = hu[::-1]
    return hu, spacing_back, spacing_left


def axis_matrix(
    in_size: int, in_spacing: float, out_size: int, out_spacing: float
) -> NDArray[np.float32]:
    """(out, in) weights of the centred hat filter; rows of zeros outside the image."""
    half_width = max(in_spacing, out_spacing)
    matrix = np.zeros((out_size, in_size), np.float32)
    for out in range(out_size):
        position = (out - (out_size - 1) / 2) * out_spacing
        if abs(position) > in_size * in_spacing / 2:
            continue
        distance = np.abs((np.arange(in_size) - (in_size - 1) / 2) * in_spacing - position)
        weight = np.where(distance < half_width, 1 - distance / half_width, 0.0)
        matrix[out] = weight / math.fsum(weight)
    return matrix


def resample(image: Slice, grid: PatientGrid) -> NDArray[np.int16]:
    """One slice on the grid, 1/8 HU."""
    hu, spacing_back, spacing_left = upright(to_hu(image), image)
    rows = axis_matrix(hu.shape[0], spacing_back, grid.rows, grid.spacing_mm)
    cols = axis_matrix(hu.shape[1], spacing_left, grid.cols, grid.spacing_mm)
    filtered = rows.astype(np.float64) @ hu.astype(np.float64) @ cols.astype(np.float64).T
    covered = rows.any(axis=1)[:, None] & cols.any(axis=1)[None, :]
    filtered = np.where(covered, np.clip(filtered, AIR, TOP), AIR)
    return np.round(filtered * 8).astype(np.int16)


def plane(
    slices: dict[int, NDArray[np.int16]], plane_um: int, pitch_um: int
) -> NDArray[np.float32]:
    """One plane in HU from resampled slices by position."""
    positions = sorted(slices)
    low = max((p for p in positions if p <= plane_um), default=None)
    high = min((p for p in positions if p > plane_um), default=None)
    if low is not None and high is not None and high - low >= pitch_um:
        share = (plane_um - low) / (high - low)
        weights = {low: 1 - share, high: share}
    else:
        hat = {p: pitch_um - abs(p - plane_um) for p in positions if abs(p - plane_um) < pitch_um}
        weights = {p: weight / sum(hat.values()) for p, weight in hat.items()}
    total = np.zeros(next(iter(slices.values())).shape, np.float32)
    for position in sorted(weights):
        total = total + np.float32(weights[position]) * slices[position].astype(np.float32)
    return total * np.float32(0.125)


def centres(positions: list[int], grid: PatientGrid) -> list[int]:
    """Middle planes of all whole slabs."""
    planes = [
        k
        for k in range(positions[0] // grid.pitch_um - 1, positions[-1] // grid.pitch_um + 2)
        if positions[0] <= k * grid.pitch_um <= positions[-1]
    ]
    half = grid.planes_per_slab // 2
    return [
        k * grid.pitch_um
        for k in planes
        if k % grid.slab_step == 0 and k - half in planes and k + half in planes
    ]


def window(hu: NDArray[np.float32], low_hu: float, high_hu: float) -> NDArray[np.float32]:
    """HU to [0, 1]."""
    per_hu = np.float32(1) / (np.float32(high_hu) - np.float32(low_hu))
    return np.clip((hu - np.float32(low_hu)) * per_hu, 0, 1).astype(np.float32)


def gate_fraction(
    hu: NDArray[np.float32], low_hu: float, high_hu: float, tissue_hu: float
) -> float:
    """Share of pixels within the range that the largest piece of tissue encloses on four sides."""
    labels, count = ndimage.label(hu >= tissue_hu)
    if count == 0:
        return 0.0
    sizes = np.bincount(labels.ravel())[1:]
    body = labels == 1 + int(np.argmax(sizes))  # label numbers follow the raster order
    before = np.logical_or.accumulate(body, axis=1) & np.logical_or.accumulate(body, axis=0)
    flipped = body[::-1, ::-1]
    after = np.logical_or.accumulate(flipped, axis=1) & np.logical_or.accumulate(flipped, axis=0)
    inside = before & after[::-1, ::-1]
    return float(np.mean(inside & (hu >= low_hu) & (hu <= high_hu)))


def slabs(images: list[Slice], grid: PatientGrid) -> dict[int, NDArray[np.float32]]:
    """Every whole slab of a study by position."""
    resampled = {image.position_um: resample(image, grid) for image in images}
    half = grid.planes_per_slab // 2
    found = {}
    for centre in centres(sorted(resampled), grid):
        stack = [
            window(plane(resampled, centre + k * grid.pitch_um, grid.pitch_um), w.low_hu, w.high_hu)
            for k in range(-half, half + 1)
            for w in grid.windows
        ]
        found[centre] = np.stack(stack)
    return found
