"""What tests of all phantoms measure alike."""

from collections.abc import Sequence

import numpy as np

from pe_infer.geometry import Slice


def stored_means(slices: Sequence[Slice]) -> list[float]:
    """Means of the third quarter of a study's slices over 4 x 4 blocks of the plane."""
    stored = np.stack([image.host_pixels for image in slices]).astype(np.float64)
    depth, side = len(stored) // 4, stored.shape[1] // 4
    quarter = stored[2 * depth : 3 * depth, : 4 * side, : 4 * side]
    means: list[float] = quarter.reshape(depth, 4, side, 4, side).mean((0, 2, 4)).ravel().tolist()
    return means
