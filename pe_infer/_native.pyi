"""Signatures of the compiled kernel (``cpp_ext/bindings/module.cpp``)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class SliceResampler:
    def __init__(
        self,
        *,
        rows: int,
        cols: int,
        row_spacing: float,
        col_spacing: float,
        transpose: bool,
        flip_rows: bool,
        flip_cols: bool,
        out_rows: int,
        out_cols: int,
        out_spacing: float,
    ) -> None: ...
    def run(
        self,
        pixels: NDArray[np.int16] | NDArray[np.uint16],
        slope: float,
        intercept: float,
        padding_low: int,
        padding_high: int,
        out: NDArray[np.int16],
    ) -> None: ...

def axis_weights(
    in_size: int, in_spacing: float, out_size: int, out_spacing: float
) -> tuple[NDArray[np.int32], NDArray[np.float32], int, int]: ...
def gather_plane(
    slices: Sequence[NDArray[np.int16]], weights: NDArray[np.float32], out: NDArray[np.float32]
) -> None: ...
def window_plane(
    hu: NDArray[np.float32], low_hu: float, high_hu: float, out: NDArray[np.float32]
) -> None: ...
def gate_fraction(
    hu: NDArray[np.float32], low_hu: float, high_hu: float, tissue_hu: float
) -> float: ...
