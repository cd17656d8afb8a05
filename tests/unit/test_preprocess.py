"""The kernel against its NumPy twin."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import kernel
from strategies import body, grids, positions, slices, study

from pe_infer import _native, preprocess
from pe_infer.errors import GeometryError, SeriesError
from pe_infer.geometry import Gate, PatientGrid, Slice, SliceGeometry, Window

GRID = PatientGrid(
    rows=12,
    cols=10,
    spacing_mm=0.75,
    pitch_um=2500,
    planes_per_slab=5,
    slab_step=2,
    windows=(Window(low_hu=-1024, high_hu=500),),
)


@given(slices(), grids())
def test_resample_agrees_with_reference(image: Slice, grid: PatientGrid) -> None:
    found = preprocess.SliceResampler(grid)(image)
    expected = kernel.resample(image, grid)
    # The twin filters in double precision: a value on a rounding edge may fall to the other side,
    # an eighth HU away.
    assert np.abs(found.astype(int) - expected).max() <= 1


@given(slices())
def test_resample_to_the_same_grid_changes_nothing(image: Slice) -> None:
    geometry = replace(
        image.geometry,
        row_direction=(1.0, 0.0, 0.0),
        col_direction=(0.0, 1.0, 0.0),
        row_spacing_mm=0.5,
        col_spacing_mm=0.5,
    )
    image = replace(image, geometry=geometry)
    grid = replace(GRID, rows=geometry.rows, cols=geometry.cols, spacing_mm=0.5)
    np.testing.assert_array_equal(
        preprocess.SliceResampler(grid)(image), np.round(kernel.to_hu(image) * 8).astype(np.int16)
    )


@given(slices(), st.integers(0, 7))
def test_orientation_is_undone_exactly(image: Slice, turn: int) -> None:
    """The same anatomy stored in any of eight orientations gives the same bits."""
    upright = replace(
        image,
        geometry=replace(
            image.geometry, row_direction=(1.0, 0.0, 0.0), col_direction=(0.0, 1.0, 0.0)
        ),
    )
    pixels, g = upright.pixels, upright.geometry
    row, col = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    spacing = (g.row_spacing_mm, g.col_spacing_mm)
    if turn & 1:
        pixels, row = pixels[:, ::-1], (-1.0, 0.0, 0.0)
    if turn & 2:
        pixels, col = pixels[::-1], (0.0, -1.0, 0.0)
    if turn & 4:
        pixels, row, col, spacing = pixels.T, col, row, spacing[::-1]
    stored = replace(
        upright,
        pixels=np.ascontiguousarray(pixels),
        geometry=SliceGeometry(
            rows=pixels.shape[0],
            cols=pixels.shape[1],
            row_spacing_mm=spacing[0],
            col_spacing_mm=spacing[1],
            image_position_mm=g.image_position_mm,
            row_direction=row,
            col_direction=col,
        ),
    )
    np.testing.assert_array_equal(
        preprocess.SliceResampler(GRID)(stored), preprocess.SliceResampler(GRID)(upright)
    )


@given(positions(), grids(), st.randoms(use_true_random=False))
def test_slabs_agree_with_reference_in_any_order(
    where: list[int], grid: PatientGrid, random: "np.random.Generator"
) -> None:
    images = study(where)
    expected = kernel.slabs(images, grid)
    in_order = {slab.position_um: slab.tensor for slab in preprocess.slabs(images, grid)}
    random.shuffle(images)
    shuffled = {slab.position_um: slab.tensor for slab in preprocess.slabs(images, grid)}
    assert list(in_order) == list(expected) == sorted(expected)
    for position, tensor in expected.items():
        np.testing.assert_allclose(
            in_order[position], tensor, atol=2e-3
        )  # an eighth HU in the narrowest window
        np.testing.assert_array_equal(in_order[position], shuffled[position])


@given(positions(), st.integers(0, 2**32))
def test_planes_are_bit_identical_to_reference(where: list[int], seed: int) -> None:
    images = study(where, seed=seed)
    resample = preprocess.SliceResampler(GRID)
    stored = {image.position_um: resample(image).copy() for image in images}
    found, hu = preprocess.planes(images, GRID)
    for position, plane in zip(found.tolist(), hu, strict=True):
        np.testing.assert_array_equal(plane, kernel.plane(stored, position, GRID.pitch_um))


@given(positions())
def test_every_multiple_of_the_pitch_inside_the_scan_is_a_plane(where: list[int]) -> None:
    found, _ = preprocess.planes(study(where), GRID)
    expected = [p for p in range(-1_000_000, 1_000_000, 2500) if where[0] <= p <= where[-1]]
    assert found.tolist() == expected


def test_a_plane_on_a_slice_of_a_thick_series_is_that_slice() -> None:
    images = study([0, 5000, 10000, 15000])
    found, hu = preprocess.planes(images, GRID)
    np.testing.assert_array_equal(
        hu[found.tolist().index(5000)],
        preprocess.SliceResampler(GRID)(images[1]) * np.float32(0.125),
    )


def test_source_planes_keep_thick_slices_and_resample_thin_ones() -> None:
    grid = replace(GRID, through_plane="source", slab_step=1, planes_per_slab=1)
    where = [100, 5300, 9000]
    thick, _ = preprocess.planes(study(where, thickness_mm=5.0), grid)
    assert thick.tolist() == where
    thin, _ = preprocess.planes(study(where, thickness_mm=1.0), grid)
    assert thin.tolist() == [2500, 5000, 7500]
    mixed = [*study(where[:2], thickness_mm=5.0), *study(where[2:], thickness_mm=1.0)]
    assert preprocess.planes(mixed, grid)[0].tolist() == [2500, 5000, 7500]


def test_padding_becomes_air_before_filtering() -> None:
    image = study([0])[0]
    pixels = np.full((8, 8), 100, np.int16)
    pixels[:, 4:] = -3024
    image = replace(image, pixels=pixels, padding=(-3024, -3024))
    grid = replace(GRID, rows=8, cols=8, spacing_mm=1.0)
    assert set(np.unique(preprocess.SliceResampler(grid)(image))) == {-8192, 800}


def test_outside_the_image_is_air() -> None:
    image = replace(study([0])[0], pixels=np.full((8, 8), 50, np.int16))
    out = preprocess.SliceResampler(replace(GRID, rows=20, cols=20, spacing_mm=1.0))(image)
    assert (out[6:14, 6:14] == 400).all()
    out[6:14, 6:14] = -8192
    assert (out == -8192).all()


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30))
def test_gate_fraction_agrees_with_reference(seed: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.choice(
        np.array([-1000, -800, -100, 40], np.float32), (rows, cols), p=[0.1, 0.2, 0.3, 0.4]
    )
    assert _native.gate_fraction(hu, -950, -500, -200) == pytest.approx(
        kernel.gate_fraction(hu, -950, -500, -200), abs=1e-12
    )


def test_gate_counts_lungs_and_not_what_lies_outside_the_body() -> None:
    hu = np.full((40, 40), -1000, np.float32)
    hu[5:25, 5:35] = 40  # body
    hu[10:20, 10:15] = -800  # lung: 50 pixels
    hu[26:30, 5:35] = -800  # foam under the body
    hu[32:34, 2:38] = 100  # table
    assert _native.gate_fraction(hu, -950, -500, -200) == 50 / 1600


def test_gate_keeps_slabs_with_lung() -> None:
    gate = Gate(low_hu=-950, high_hu=-500, min_fraction=0.1)
    grid = replace(GRID, gate=gate, planes_per_slab=1, rows=8, cols=8, spacing_mm=10.0)
    images = body(study(list(range(0, 40_000, 2500))), range(10_000, 25_001))
    kept = [slab.position_um for slab in preprocess.slabs(images, grid) if not slab.gated]
    assert kept == [10_000, 15_000, 20_000, 25_000]
    for slab in preprocess.slabs(images, grid):
        assert slab.gate_fraction == (16 / 64 if slab.position_um in kept else 0.0)


@pytest.mark.parametrize(
    "rescale",
    [
        {"rescale_slope": 0.0},
        {"rescale_slope": 1e300},  # infinite in single precision: 0 * inf is no number
        {"rescale_slope": 1e-300},
        {"rescale_slope": float("nan")},
        {"rescale_intercept": -1e300},
        {"rescale_intercept": float("inf")},
    ],
)
def test_a_rescale_that_makes_no_numbers_is_refused(rescale: dict[str, float]) -> None:
    with pytest.raises(GeometryError, match="rescale slope"):
        replace(study([0])[0], **rescale)


@pytest.mark.parametrize("padding", [(-(2**40), 0), (0, 2**16), (5, 4), (-32769, -32769)])
def test_a_padding_that_is_no_range_of_stored_values_is_refused(padding: tuple[int, int]) -> None:
    with pytest.raises(GeometryError, match="no range of stored values"):
        replace(study([0])[0], padding=padding)


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("image_position_mm", (0.0, 0.0, 1e306), "at most 100000 mm"),
        ("image_position_mm", (0.0, float("nan"), 0.0), "at most 100000 mm"),
        ("row_spacing_mm", 1e308, "at most 100000 mm"),
        ("col_spacing_mm", float("inf"), "at most 100000 mm"),
        ("row_spacing_mm", 0.0, "must be positive"),
        ("row_direction", (1e200, 0.0, 0.0), "not made of unit vectors"),
        ("row_direction", (100.0, 0.0, 0.0), "not made of unit vectors"),
        ("col_direction", (0.0, float("nan"), 0.0), "not made of unit vectors"),
        ("col_direction", (0.0, 0.0, 0.0), "not made of unit vectors"),
        ("col_direction", (0.5, 0.8, 0.0), "not orthogonal"),
    ],
)
def test_a_place_without_sense_is_refused(attribute: str, value: object, named: str) -> None:
    with pytest.raises(GeometryError, match=named):
        replace(study([0])[0].geometry, **{attribute: value})


def test_two_slices_at_one_position_are_refused() -> None:
    with pytest.raises(SeriesError, match=r"second slice at 1\.000 mm"):
        list(preprocess.slabs(study([0, 1000, 1000]), GRID))


def test_no_slices_are_refused() -> None:
    with pytest.raises(SeriesError, match="no slices"):
        list(preprocess.slabs([], GRID))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_the_binding_refuses_other_dtypes(dtype: type) -> None:
    native = _native.SliceResampler(
        rows=4,
        cols=4,
        row_spacing=1,
        col_spacing=1,
        transpose=False,
        flip_rows=False,
        flip_cols=False,
        out_rows=4,
        out_cols=4,
        out_spacing=1,
    )
    with pytest.raises(TypeError):
        native.run(np.zeros((4, 4), dtype), 1, 0, 1, 0, np.zeros((4, 4), np.int16))
    with pytest.raises(ValueError, match="size"):
        native.run(np.zeros((4, 5), np.int16), 1, 0, 1, 0, np.zeros((4, 4), np.int16))
