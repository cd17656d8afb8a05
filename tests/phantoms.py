"""Small phantoms, and what tests of all phantoms measure alike."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pe_infer.geometry import Slice
from pe_infer.phantom import Phantom
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.phantom.head.phantom import HeadPhantom


def coarse_phantom(anatomy: str) -> Phantom:
    """Few, coarse slices of 5 mm."""
    kinds = {"chest": (ChestPhantom(), 4.0), "head": (HeadPhantom(), 2.5)}
    phantom, pixel_mm = kinds[anatomy]
    config = dataclasses.replace(phantom.config, matrix=96, pixel_spacing_mm=(pixel_mm, pixel_mm))
    return dataclasses.replace(phantom, config=config).with_spacing(5.0)


def stored_means(slices: Sequence[Slice]) -> list[float]:
    """Means of the third quarter of a study's slices over 4 x 4 blocks of the plane."""
    stored = np.stack([image.host_pixels for image in slices]).astype(np.float64)
    depth, side = len(stored) // 4, stored.shape[1] // 4
    quarter = stored[2 * depth : 3 * depth, : 4 * side, : 4 * side]
    means: list[float] = quarter.reshape(depth, 4, side, 4, side).mean((0, 2, 4)).ravel().tolist()
    return means
