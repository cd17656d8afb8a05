"""Hypothesis strategies for slices, grids and studies."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from pe_infer.geometry import PatientGrid, SeriesInfo, Slice, SliceGeometry, Window

AXIAL_ORIENTATIONS = [
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),  # head first, supine
    ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),  # rotated by 180 degrees
    ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),  # prone, feet first
    ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
    ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0)),
    ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0)),
    ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0)),
    ((1.0, 0.0, 0.0), (0.0, 0.9483, -0.3173)),  # a tilted gantry
    ((0.9994, 0.0349, 0.0), (-0.0349, 0.9994, 0.0)),  # not exactly of unit length
]

REGULAR = list(range(0, 100_000, 1000))
LUNG_HU = -800

spacings_mm = st.floats(0.3, 2.5)
rescales = st.sampled_from(
    [(1.0, -1024.0), (1.0, 0.0), (0.5, -500.0), (2.0, -1000.0), (-1.0, 900.0)]
)


@st.composite
def grids(draw: st.DrawFn) -> PatientGrid:
    """Small grids of any shape."""
    low = draw(st.sampled_from([-1024.0, -200.0, 0.0]))
    return PatientGrid(
        rows=draw(st.integers(1, 24)),
        cols=draw(st.integers(1, 24)),
        spacing_mm=draw(spacings_mm),
        pitch_um=draw(st.sampled_from([1000, 2500, 5000])),
        planes_per_slab=draw(st.sampled_from([1, 3, 5])),
        slab_step=draw(st.integers(1, 3)),
        windows=tuple(
            Window(low_hu=low, high_hu=low + width)
            for width in draw(
                st.lists(st.sampled_from([80.0, 500.0, 1524.0]), min_size=1, max_size=2)
            )
        ),
    )


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    """One slice of any size, spacing, orientation, dtype, rescale and padding."""
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    row_direction, col_direction = draw(st.sampled_from(AXIAL_ORIENTATIONS))
    signed = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pixels = (
        rng.integers(-2000, 3000, (rows, cols)) if signed else rng.integers(0, 65535, (rows, cols))
    )
    slope, intercept = draw(rescales)
    value = int(pixels[0, 0])
    return Slice(
        pixels=pixels.astype(np.int16 if signed else np.uint16),
        geometry=SliceGeometry(
            rows=rows,
            cols=cols,
            row_spacing_mm=draw(spacings_mm),
            col_spacing_mm=draw(spacings_mm),
            image_position_mm=(draw(st.floats(-200, 200)), draw(st.floats(-200, 200)), 0.0),
            row_direction=row_direction,
            col_direction=col_direction,
        ),
        rescale_slope=slope,
        rescale_intercept=intercept,
        padding=draw(st.sampled_from([None, (value, value), (value - 50, value + 50)])),
    )


def study(
    positions_um: list[int],
    *,
    seed: int = 0,
    size: int = 8,
    tilt: float = 0.0,
    thickness_mm: float | None = None,
) -> list[Slice]:
    """Slices of noise at these positions; ``tilt`` moves their centres by that many mm per mm."""
    rng = np.random.default_rng(seed)
    series = SeriesInfo(series_instance_uid="1.2.3", study_instance_uid="1.2")
    return [
        Slice(
            pixels=rng.integers(-1000, 1500, (size, size)).astype(np.int16),
            geometry=SliceGeometry(
                rows=size,
                cols=size,
                row_spacing_mm=1.0,
                col_spacing_mm=1.0,
                image_position_mm=(0.0, tilt * position / 1000, position / 1000),
                thickness_mm=thickness_mm,
            ),
            series=series,
            sop_instance_uid=f"1.2.3.{index}",
            source=f"slice {index}",
        )
        for index, position in enumerate(positions_um)
    ]


@st.composite
def positions(draw: st.DrawFn) -> list[int]:
    """Ascending positions: regular, irregular, dense or sparse, any phase."""
    steps = draw(
        st.one_of(
            st.tuples(st.sampled_from([600, 1000, 1250, 2500, 3000, 5000]), st.integers(2, 40)).map(
                lambda pair: [pair[0]] * pair[1]
            ),
            st.lists(st.integers(200, 7400), min_size=1, max_size=30),
        )
    )
    start = draw(st.integers(-300_000, 300_000))
    return [start + sum(steps[:k]) for k in range(len(steps) + 1)]


def body(images: list[Slice], organ_um: range) -> list[Slice]:
    """Tissue with an organ in the middle, where ``organ_um`` says."""
    made = []
    for image in images:
        pixels = np.full(image.pixels.shape, 40, np.int16)
        if image.position_um in organ_um:
            pixels[2:6, 2:6] = LUNG_HU
        geometry = replace(
            image.geometry,
            row_spacing_mm=10.0,
            col_spacing_mm=10.0,
            image_position_mm=(-35, -35, image.position_um / 1000),
        )
        made.append(replace(image, pixels=pixels, geometry=geometry))
    return made
