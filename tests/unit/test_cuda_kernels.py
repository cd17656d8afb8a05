"""The CUDA kernels, run on the CPU, against the C++ kernel and the NumPy twin."""

import platform
import re
from dataclasses import replace
from typing import Any

import cuda_host
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import kernel
from strategies import grids, positions, slices, study

from pe_infer import preprocess
from pe_infer.geometry import PatientGrid, Slice, Window
from pe_infer.lattice import lattice_for

blocks = st.tuples(st.sampled_from([1, 7, 32]), st.sampled_from([1, 3, 8]))


@pytest.fixture(scope="session")
def host() -> cuda_host.HostKernels:
    return cuda_host.kernels()


def resample(
    host: cuda_host.HostKernels, image: Slice, grid: PatientGrid, block: tuple[int, int]
) -> NDArray[np.int16]:
    # Orientation is a view: address of its first value and strides are what the kernel takes.
    upright, spacing_back, spacing_left = kernel.upright(image.pixels, image)
    sizes = zip(upright.shape, (spacing_back, spacing_left), (grid.rows, grid.cols), strict=True)
    axes: list[Any] = []
    for in_size, in_spacing, out_size in sizes:
        axis = preprocess.AxisWeights.of(in_size, in_spacing, out_size, grid.spacing_mm)
        axes += [axis.start, axis.weight]
        axes += [np.int32(n) for n in (len(axis.weight), axis.first, axis.last)]
    low, high = image.padding or (1, 0)
    out = np.full((grid.rows, grid.cols), 12345, np.int16)
    host.launch(
        f"pe_resample_{'i' if upright.dtype == np.int16 else 'u'}16",
        (grid.cols, grid.rows),
        block,
        upright,
        *(np.int64(stride // upright.itemsize) for stride in upright.strides),
        np.float32(image.rescale_slope),
        np.float32(image.rescale_intercept),
        np.int32(low),
        np.int32(high),
        *axes,
        np.int32(grid.rows),
        np.int32(grid.cols),
        out,
    )
    return out


def window_arguments(windows: tuple[Window, ...]) -> tuple[NDArray[np.float32], ...]:
    low = np.array([window.low_hu for window in windows], np.float32)
    high = np.array([window.high_hu for window in windows], np.float32)
    return low, np.float32(1) / (high - low)


def gather(
    host: cuda_host.HostKernels,
    planes: list[tuple[list[NDArray[np.int16]], NDArray[np.float32]]],
    windows: tuple[Window, ...],
    dtype: type[np.floating],
    block: tuple[int, int] = (32, 3),
) -> NDArray[np.floating]:
    """Channels of the planes, each given as its slices and their weights."""
    first_of_plane = np.cumsum([0, *(len(weights) for _, weights in planes)], dtype=np.int32)
    shape = planes[0][0][0].shape
    pixels = shape[0] * shape[1]
    low, per_hu = window_arguments(windows)
    out = np.full((len(planes) * len(windows), *shape), np.nan, dtype)
    host.launch(
        f"pe_gather_slab_f{8 * out.itemsize}",
        (pixels, len(planes)),
        block,
        np.array([image.ctypes.data for images, _ in planes for image in images], np.uintp),
        np.concatenate([weights for _, weights in planes]),
        first_of_plane,
        np.int32(len(planes)),
        np.int32(pixels),
        low,
        per_hu,
        np.int32(len(windows)),
        out,
    )
    return out


def gather_hu(
    host: cuda_host.HostKernels, images: list[NDArray[np.int16]], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    out = np.full(images[0].shape, np.nan, np.float32)
    addresses = np.array([image.ctypes.data for image in images], np.uintp)
    count, pixels = np.int32(len(images)), np.int32(out.size)
    host.launch("pe_gather_hu", (out.size, 1), (32, 1), addresses, weights, count, pixels, out)
    return out


@given(image=slices(), grid=grids(), block=blocks)
def test_a_slice_has_the_bits_of_the_cpu_kernel(
    host: cuda_host.HostKernels, image: Slice, grid: PatientGrid, block: tuple[int, int]
) -> None:
    found = resample(host, image, grid, block)
    np.testing.assert_array_equal(found, preprocess.SliceResampler(grid)(image))
    # The twin filters in double precision: see test_preprocess.
    assert np.abs(found.astype(int) - kernel.resample(image, grid)).max() <= 1


@given(where=positions(), grid=grids(), block=blocks)
def test_slabs_have_the_bits_of_the_cpu_kernel_and_of_the_twin(
    host: cuda_host.HostKernels, where: list[int], grid: PatientGrid, block: tuple[int, int]
) -> None:
    images = study(where)
    volume, lattice, centres = preprocess.volume_of(images, grid)
    resampled = {image.position_um: preprocess.SliceResampler(grid)(image) for image in images}
    for centre in centres:
        planes = []
        for plane in lattice.slab_planes(where, centre):
            first, weights = lattice.contributors(where, plane)
            sources = [resampled[position] for position in where[first : first + len(weights)]]
            planes.append((sources, weights))
            hu = gather_hu(host, sources, weights)
            np.testing.assert_array_equal(hu, volume.plane(plane, lattice))
            np.testing.assert_array_equal(hu, kernel.plane(resampled, plane, grid.pitch_um))
        single = gather(host, planes, grid.windows, np.float32, block)
        np.testing.assert_array_equal(single, volume.slab(centre, lattice).tensor)
        half = gather(host, planes, grid.windows, np.float16, block)
        np.testing.assert_array_equal(half, single.astype(np.float16))


@given(image=slices(), grid=grids())
def test_planes_of_one_launch_are_those_of_several(
    host: cuda_host.HostKernels, image: Slice, grid: PatientGrid
) -> None:
    other = replace(image, pixels=image.pixels[::-1, ::-1].copy(), padding=None)
    sources = [preprocess.SliceResampler(grid)(each) for each in (image, other)]
    planes = [(sources[:1], np.ones(1, np.float32)), (sources, np.array([0.4, 0.6], np.float32))]
    together = gather(host, planes, grid.windows, np.float32)
    apart = [gather(host, [plane], grid.windows, np.float32) for plane in planes]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_source_planes_are_their_slices(host: cuda_host.HostKernels) -> None:
    grid = PatientGrid(
        rows=8,
        cols=8,
        spacing_mm=1.0,
        pitch_um=5000,
        planes_per_slab=3,
        slab_step=1,
        through_plane="source",
        windows=(Window(low_hu=-1024, high_hu=500), Window(low_hu=0, high_hu=80)),
    )
    images = study([100, 5300, 9000], thickness_mm=5.0)
    resampled = [preprocess.SliceResampler(grid)(image) for image in images]
    planes = [([image], np.ones(1, np.float32)) for image in resampled]
    volume, _, (centre,) = preprocess.volume_of(images, grid)
    expected = volume.slab(centre, lattice_for(grid, [5.0]))
    np.testing.assert_array_equal(gather(host, planes, grid.windows, np.float32), expected.tensor)


@pytest.mark.parametrize("share", [1.0, 0.37, 1e-2, 1e-3, 1e-5])
def test_fp16_is_rounded_to_even_at_every_magnitude(
    host: cuda_host.HostKernels, share: float
) -> None:
    """All 65536 values of a slice, scaled from whole HU down to FP16's subnormal numbers."""
    every = np.arange(-32768, 32768, dtype=np.int16).reshape(256, 256)
    plane = ([every], np.array([share], np.float32))
    windows = tuple(Window(low_hu=0.0, high_hu=width) for width in (1.0, 80.0, 2048.0, 4095.0))
    single = gather(host, [plane], windows, np.float32)
    half = gather(host, [plane], windows, np.float16)
    np.testing.assert_array_equal(half.view(np.uint16), single.astype(np.float16).view(np.uint16))


def test_an_image_larger_than_the_grid_is_cropped_about_its_centre(
    host: cuda_host.HostKernels,
) -> None:
    image = study([0], size=40)[0]
    grid = PatientGrid(
        rows=10,
        cols=16,
        spacing_mm=1.0,
        pitch_um=1000,
        planes_per_slab=1,
        slab_step=1,
        windows=(Window(low_hu=0, high_hu=1),),
    )
    found = resample(host, image, grid, (32, 8))
    np.testing.assert_array_equal(found, 8 * image.pixels[15:25, 12:28].clip(-1024, 4095))


@pytest.mark.parametrize("name", ["pe_no_such_kernel", "pe_gather_hu"])
def test_a_call_with_a_wrong_name_or_count_is_refused(
    host: cuda_host.HostKernels, name: str
) -> None:
    with pytest.raises(LookupError, match=name):
        host.launch(name, (1, 1), (1, 1), np.int32(0))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim knows x86-64's mode only")
def test_the_shim_can_flush_subnormals_as_cupy_compiles(host: cuda_host.HostKernels) -> None:
    """`fake_cuda` runs every kernel so, and slabs have the same bits."""
    image, tiny = np.ones((1, 4), np.int16), np.array([1e-39], np.float32)
    assert gather_hu(host, [image], tiny).all()
    with host.flushing_subnormals():
        assert not gather_hu(host, [image], tiny).any()
    assert np.all(tiny * np.float32(1))  # and the mode is gone


@pytest.mark.parametrize(
    ("source", "included"),
    [("cuda/preprocess.cu", ["pe_infer/pixel.h"]), ("include/pe_infer/pixel.h", ["cstdint"])],
)
def test_kernels_include_nothing_that_nvrtc_lacks(source: str, included: list[str]) -> None:
    """NVRTC has no standard library: pixel.h leaves <cstdint> out for it."""
    text = (cuda_host.SOURCES / source).read_text()
    assert re.findall(r'#include [<"]([^>"]+)', text) == included
