"""Small phantoms, and what tests of all phantoms measure alike."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pe_infer.geometry import Slice
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.head.phantom import HeadPhantom


def coarse_phantom(anatomy: str) -> ChestPhantom | HeadPhantom:
    """Few, coarse slices of 5 mm."""
    if anatomy == "head":
        head = HeadPhantom()
        config = dataclasses.replace(head.config, matrix=96, pixel_spacing_mm=(2.5, 2.5))
        return HeadPhantom(config).with_spacing(5.0)
    chest = ChestPhantom()
    return ChestPhantom(
        dataclasses.replace(chest.config, matrix=96, pixel_spacing_mm=(4.0, 4.0))
    ).with_spacing(5.0)


def stored_means(slices: Sequence[Slice]) -> list[float]:
    """Means of the third quarter of a study's slices over 4 x 4 blocks of the plane."""
    stored = np.stack([image.host_pixels for image in slices]).astype(np.float64)
    depth, side = len(stored) // 4, stored.shape[1] // 4
    quarter = stored[2 * depth : 3 * depth, : 4 * side, : 4 * side]
    means: list[float] = quarter.reshape(depth, 4, side, 4, side).mean((0, 2, 4)).ravel().tolist()
    return means
