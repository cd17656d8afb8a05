"""Slices, planes and slabs made on a fake GPU, against the CPU: the same bits."""

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_host
import fake_cuda
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import REGULAR, body, grids, positions, slices, study

from pe_infer import preprocess
from pe_infer.checks import plane_measure
from pe_infer.cuda import preprocess as cuda_preprocess
from pe_infer.cuda.device import STAGED, DeviceStream, require
from pe_infer.cuda.preprocess import SLICES_AT_ONCE, DeviceSliceResampler, DeviceVolume
from pe_infer.errors import Code, EngineError
from pe_infer.geometry import Gate, PatientGrid, Slice, Window
from pe_infer.lattice import PlaneLattice
from pe_infer.manifest import Check
from pe_infer.preprocess import PlaneMeasure, Slab, SliceResampler

GATE = Gate(low_hu=-950.0, high_hu=-500.0, min_fraction=0.05)
GRID = PatientGrid(
    rows=8,
    cols=8,
    spacing_mm=10.0,
    pitch_um=1000,
    planes_per_slab=3,
    slab_step=2,
    windows=(Window(low_hu=-1000.0, high_hu=400.0), Window(low_hu=0.0, high_hu=80.0)),
    gate=GATE,
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[fake_cuda.FakeGpu]:
    with pytest.MonkeyPatch.context() as patch:
        yield fake_cuda.install(patch)


class OnGpu:
    """What a study has on a GPU."""

    def __init__(self, grid: PatientGrid, measure: PlaneMeasure | None = None) -> None:
        self.stream = DeviceStream()
        self.resample = DeviceSliceResampler(grid, self.stream)
        self.volume = DeviceVolume(grid, self.stream, measure)

    def take(self, images: Sequence[Slice]) -> None:
        for image in images:
            self.volume.put(image.position_um, self.resample(image))

    def slabs(self, centres: Sequence[int], lattice: PlaneLattice, batch: int) -> list[Slab]:
        """With their tensors on the host."""
        found: list[Slab] = []
        for start in range(0, len(centres), batch):
            made = self.volume.slabs(centres[start : start + batch], lattice)
            tensors = self.stream.fetch([slab.tensor for slab in made])  # type: ignore[misc]
            found += [replace(s, tensor=t) for s, t in zip(made, tensors, strict=True)]
        return found


def assert_same(found: Sequence[Slab], expected: Sequence[Slab]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.position_um, a.gate_fraction, a.gated, a.measured) == (
            b.position_um,
            b.gate_fraction,
            b.gated,
            b.measured,
        )
        np.testing.assert_array_equal(a.tensor, b.tensor)


@given(images=st.lists(slices(), min_size=1, max_size=4), grid=grids())
def test_slices_have_the_bits_of_the_cpu(
    gpu: fake_cuda.FakeGpu, images: list[Slice], grid: PatientGrid
) -> None:
    on_gpu, on_cpu = OnGpu(grid), SliceResampler(grid)
    resampled = [on_gpu.resample(image) for image in images]  # plans change while work is queued
    for image, found in zip(images, on_gpu.stream.fetch(resampled), strict=True):
        np.testing.assert_array_equal(found, on_cpu(image))


@given(
    where=positions(),
    grid=grids(),
    gate=st.sampled_from([None, GATE]),
    batch=st.integers(1, 8),
    rng=st.randoms(use_true_random=False),
)
def test_slabs_have_the_bits_of_the_cpu_in_any_order_of_arrival(
    gpu: fake_cuda.FakeGpu,
    where: list[int],
    grid: PatientGrid,
    gate: Gate | None,
    batch: int,
    rng: random.Random,
) -> None:
    grid = replace(grid, gate=gate)
    images = study(where)
    volume, lattice, centres = preprocess.volume_of(images, grid)
    rng.shuffle(images)
    on_gpu = OnGpu(grid)
    on_gpu.take(images)
    assert on_gpu.volume.positions_um == volume.positions_um
    assert_same(on_gpu.slabs(centres, lattice, batch), volume.slabs(centres, lattice))


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_checks_measure_the_bits_of_the_cpu(
    gpu: fake_cuda.FakeGpu, gate: Gate | None, batch: int
) -> None:
    grid = replace(GRID, gate=gate)
    cells = {"low_hu": -1000.0, "high_hu": 1500.0, "quantile": 0.9, "cell_px": 1}
    kinds: list[dict[str, Any]] = [
        {"kind": "level", **cells},
        {"kind": "noise", **cells, "cell_px": 2},
        {"kind": "area", "low_hu": 0.0},
    ]
    checks = [
        Check.model_validate(
            {"name": k["kind"], "measure": k, "over": 0.5, "flag_above": 0.0, "meaning": "tests"}
        )
        for k in kinds
    ]
    measure = plane_measure(checks, grid)
    images = body(study(REGULAR), range(30_000, 60_000))
    volume, lattice, centres = preprocess.volume_of(images, grid, measure)
    expected = volume.slabs(centres, lattice)
    assert {len(slab.measured) for slab in expected} == ({3} if gate is None else {0, 3})
    on_gpu = OnGpu(grid, measure)
    on_gpu.take(images)
    assert_same(on_gpu.slabs(centres, lattice, batch), expected)


def test_the_gate_decides_as_on_the_cpu(gpu: fake_cuda.FakeGpu) -> None:
    images = body(study(REGULAR), range(30_000, 60_000))
    volume, lattice, centres = preprocess.volume_of(images, GRID)
    expected = volume.slabs(centres, lattice)
    assert {slab.gated for slab in expected} == {True, False}
    on_gpu = OnGpu(GRID)
    on_gpu.take(images)
    assert_same(on_gpu.slabs(centres, lattice, 8), expected)


def test_thick_slices_are_planes(gpu: fake_cuda.FakeGpu) -> None:
    grid = replace(GRID, through_plane="source", pitch_um=5000, slab_step=1)
    images = study([100, 5300, 9000, 14_000, 19_500], thickness_mm=5.0)
    volume, lattice, centres = preprocess.volume_of(images, grid)
    on_gpu = OnGpu(grid)
    on_gpu.take(images)
    assert len(centres) == 3
    assert_same(on_gpu.slabs(centres, lattice, 2), volume.slabs(centres, lattice))


def test_a_slice_put_again_takes_the_place_of_the_first(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR[:12])
    other = replace(images[5], pixels=images[5].pixels[::-1].copy())
    volume, lattice, centres = preprocess.volume_of([*images[:5], other, *images[6:]], GRID)
    on_gpu = OnGpu(GRID)
    on_gpu.take(images)
    on_gpu.slabs(centres, lattice, 8)
    on_gpu.take([other])
    on_gpu.volume.forget_planes()
    assert_same(on_gpu.slabs(centres, lattice, 8), volume.slabs(centres, lattice))


def test_pixels_may_be_changed_once_they_are_taken(gpu: fake_cuda.FakeGpu) -> None:
    """As by a scanner that has one buffer, and without anybody waiting in between."""
    images = study(REGULAR[: 2 * STAGED], size=8)
    buffer = np.empty((8, 8), np.int16)
    on_gpu, on_cpu = OnGpu(GRID), SliceResampler(GRID)
    resampled = []
    for image in images:
        buffer[:] = image.pixels
        resampled.append(on_gpu.resample(replace(image, pixels=buffer)))
    buffer[:] = -1
    for image, found in zip(images, on_gpu.stream.fetch(resampled), strict=True):
        np.testing.assert_array_equal(found, on_cpu(image))


def test_a_batch_of_slabs_waits_once_and_without_a_gate_never(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR[:20])
    for grid, waits in ((GRID, 1), (replace(GRID, gate=None), 0)):
        _, lattice, centres = preprocess.volume_of(images, grid)
        on_gpu = OnGpu(grid)
        on_gpu.take(images)
        on_gpu.stream.wait()
        before = gpu.waits
        made = on_gpu.volume.slabs(centres[:8], lattice)
        assert gpu.waits == before + waits
        assert len(made) == 8


def test_the_slabs_of_a_batch_lie_behind_each_other(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR[:20])
    _, lattice, centres = preprocess.volume_of(images, GRID)
    on_gpu = OnGpu(GRID)
    on_gpu.take(images)
    made: list[Any] = [slab.tensor for slab in on_gpu.volume.slabs(centres[:4], lattice)]
    apart = {b.data.ptr - a.data.ptr for a, b in itertools.pairwise(made)}
    assert apart == {made[0].nbytes}
    assert on_gpu.volume.slabs([], lattice) == []


def test_nothing_is_allocated_per_slab_or_by_a_second_study(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = fake_cuda.install(monkeypatch)
    images = study(REGULAR[:40])
    _, lattice, centres = preprocess.volume_of(images, GRID)

    def run() -> int:
        on_gpu = OnGpu(GRID)
        on_gpu.take(images)
        on_gpu.slabs(centres[:2], lattice, 2)
        before = gpu.allocations
        for start in range(0, len(centres), 2):
            on_gpu.slabs(centres[start : start + 2], lattice, 2)
        on_gpu.volume.clear()
        assert not on_gpu.volume.positions_um
        return gpu.allocations - before

    assert run() == 0
    before = gpu.allocations
    assert run() == 0
    assert gpu.allocations == before


def test_memory_for_slices_is_taken_for_many_at_once(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR[:SLICES_AT_ONCE])
    on_gpu = OnGpu(replace(GRID, rows=100, cols=100))  # larger than anything before
    on_gpu.take(images[:1])
    before = gpu.allocations
    on_gpu.take(images[1:])
    assert gpu.allocations == before


def test_slices_come_while_slabs_are_made(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR)
    volume, lattice, centres = preprocess.volume_of(images, GRID)
    ready = [centre for centre in centres if centre <= REGULAR[40] - GRID.pitch_um]
    on_gpu = OnGpu(GRID)
    on_gpu.take(images[:42])
    thread = threading.Thread(target=on_gpu.take, args=(images[42:],))
    thread.start()
    found = on_gpu.slabs(ready, lattice, 4)
    thread.join(60)
    found += on_gpu.slabs(centres[len(ready) :], lattice, 4)
    assert_same(found, volume.slabs(centres, lattice))


def test_the_source_is_one_text_with_the_header_in_its_place() -> None:
    """CuPy knows what it compiled by the text of the source."""
    text = cuda_preprocess.source()
    assert "#include" not in text.replace("#include <cstdint>", "")
    for name in ("cuda/preprocess.cu", "include/pe_infer/pixel.h"):
        lines = (cuda_host.SOURCES / name).read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("#include", "#pragma once"))]
        assert set(kept) <= set(text.splitlines())


def test_kernels_that_were_built_beforehand_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """-DPE_INFER_CUDA=ON puts them beside the source."""
    monkeypatch.setattr(cuda_preprocess, "_FOLDER", tmp_path)
    (tmp_path / "preprocess.fatbin").write_bytes(b"")
    loaded = []
    cupy = fake_cuda.install(monkeypatch).module
    module = cupy.RawModule
    monkeypatch.setattr(cupy, "RawModule", lambda **given: loaded.append(given) or module(**given))
    OnGpu(GRID)
    assert loaded == [{"path": str(tmp_path / "preprocess.fatbin")}]


def test_kernels_that_cannot_be_compiled_are_an_engine_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda.install(monkeypatch)

    def broken(**_: Any) -> None:
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture")

    monkeypatch.setattr(require(), "RawModule", broken)
    with pytest.raises(EngineError, match=r"compile the kernels of preprocess\.cu") as caught:
        OnGpu(GRID)
    assert caught.value.code == Code.ENGINE_FAILED


def test_a_failure_of_cuda_leaves_what_was_taken(gpu: fake_cuda.FakeGpu) -> None:
    images = study(REGULAR[:12])
    volume, lattice, centres = preprocess.volume_of(images, GRID)
    on_gpu = OnGpu(GRID)
    on_gpu.take(images)
    gpu.error = "cudaErrorMemoryAllocation: out of memory"
    try:
        with pytest.raises(EngineError, match="out of memory"):
            on_gpu.volume.slabs(centres, lattice)
        with pytest.raises(EngineError, match="out of memory"):
            on_gpu.resample(images[0])
    finally:
        gpu.error = ""
    assert_same(on_gpu.slabs(centres, lattice, 8), volume.slabs(centres, lattice))


def test_axis_weights_are_those_of_the_kernel() -> None:
    """Against a hat written down: 4 samples of 1 mm onto 3 of 2 mm."""
    axis = preprocess.AxisWeights.of(4, 1.0, 3, 2.0)
    matrix: NDArray[np.float64] = np.zeros((3, 4))
    for out in range(3):
        first = axis.start[out]
        matrix[out, first : first + len(axis.weight)] = axis.weight[:, out]
    expected = np.array([[0.75, 0.25, 0, 0], [0.125, 0.375, 0.375, 0.125], [0, 0, 0.25, 0.75]])
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    assert (axis.first, axis.last) == (0, 3)
