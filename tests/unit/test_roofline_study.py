"""Times from operations and bytes: the arithmetic, and what a study is made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import toy_bundles as toy

from pe_infer.bundle import Bundle
from pe_infer.roofline.gpus import GPUS, Gpu, gpu_like
from pe_infer.roofline.graphs import Kernel
from pe_infer.roofline.study import (
    CHEST,
    Step,
    StudyCost,
    StudyShape,
    Time,
    batches,
    kernel_time,
    steps_time,
    times_by_kind,
    totals,
)

GPU = Gpu(
    name="made up",
    device="Made Up 1",
    capability="0.0",
    multiprocessors=1,
    clock_mhz=1,
    tensor_flops=1000.0,
    float_flops=100.0,
    memory_bandwidth=10.0,
    link_bandwidth=2.0,
    launch_s=0.5,
    source="",
)


@pytest.fixture(scope="module")
def pe() -> StudyCost:
    return StudyCost(Bundle.load("pe"), CHEST)


def test_the_longer_of_operations_and_bytes_bounds_a_kernel() -> None:
    busy = Kernel(name="k", tensor_flops=4000, float_flops=100, read_bytes=10, written_bytes=10)
    assert kernel_time(busy, GPU) == Time(compute=4.0, launch=0.5)
    hungry = replace(busy, weight_bytes=40)
    assert kernel_time(hungry, GPU) == Time(memory=6.0, launch=0.5)
    plain = replace(busy, float_flops=500)
    assert kernel_time(plain, GPU) == Time(compute=5.0, launch=0.5)


def test_copies_go_over_the_link_or_twice_through_a_shared_memory() -> None:
    copy = Kernel(name="k", copied_bytes=20)
    assert kernel_time(copy, GPU) == Time(copy=10.0, launch=0.5)
    assert kernel_time(copy, replace(GPU, link_bandwidth=None)) == Time(copy=4.0, launch=0.5)


def test_steps_add_up_and_say_what_bounds_them() -> None:
    compute = Step(
        kind="encoder", name="a", kernels=(Kernel(name="k", tensor_flops=4000),) * 2, runs=3
    )
    launch = Step(kind="heads", name="b", kernels=(Kernel(name="k", tensor_flops=1),), runs=100)
    assert steps_time([compute], GPU) == Time(compute=24.0, launch=3.0)
    both = steps_time([compute, launch], GPU)
    assert both.seconds == pytest.approx(24 + 0.1 + 106 * 0.5)
    assert (steps_time([compute], GPU).bound, both.bound) == ("compute", "launch")
    assert list(times_by_kind([launch, compute], GPU)) == ["encoder", "heads"]


def test_batches_are_full_ones_and_powers_of_two_for_the_rest() -> None:
    assert batches(58, 8) == {8: 7, 2: 1}
    assert batches(16, 8) == {8: 2}
    assert batches(13, 6) == {6: 2, 1: 1}
    assert batches(7, 8) == {4: 1, 2: 1, 1: 1}
    assert batches(5, 1) == {1: 5}


def test_a_chest_of_300_slices_has_58_slabs(pe: StudyCost) -> None:
    assert pe.slabs == 58


def test_the_last_slice_leaves_one_slab_to_encode(pe: StudyCost) -> None:
    for arrival, online_scans in (("down", {"down1"}), ("up", set())):
        runs = {step.name: step.runs for step in pe.last_slice_steps(arrival)}
        assert runs["encoder"] == runs["resample"] == runs["gather slab"] == 1
        assert runs["outputs back"] == runs["results back"] == 1
        scans = {name for name in ("down1", "up1", "down2", "up2") if runs[name] == pe.slabs}
        assert scans == {"down1", "up1", "down2", "up2"} - online_scans


def test_the_last_slab_is_the_one_at_the_end_of_the_direction(pe: StudyCost) -> None:
    read = {}
    for arrival in ("down", "up"):
        steps = {step.name: step for step in pe.last_slice_steps(arrival)}
        read[arrival] = steps["gather slab"].kernels[0].read_bytes // (2 * 384**2)
    assert read == {"down": 13, "up": 15}  # 13: nothing lies below the plane at 0 mm


def test_what_the_host_needs_is_copied_back_and_reduced_there(pe: StudyCost) -> None:
    """The executor fetches outputs as slabs come, and all of them with what is reduced at the end.

    Sequences of `pe`: an attention map of 24 x 24, and one number for every slab twice.
    """
    steps = {step.name: step for step in pe.study_steps()}
    assert "study_logit" not in steps
    per_slab = {kernel.name: kernel.copied_bytes for kernel in steps["outputs back"].kernels}
    assert per_slab == {"attention": 4 * 24 * 24, "stage1_logit": 4}
    assert steps["outputs back"].runs == pe.slabs
    at_the_end = {kernel.name: kernel.copied_bytes for kernel in steps["results back"].kernels}
    assert at_the_end == {name: 58 * size for name, size in (per_slab | {"score": 4}).items()}
    assert steps["results back"].runs == 1


def test_a_whole_study_runs_maps_in_batches_and_scans_slab_by_slab(pe: StudyCost) -> None:
    steps = pe.study_steps()
    assert [step.runs for step in steps if step.name == "encoder"] == [7, 1]
    assert [step.runs for step in steps if step.name == "up2"] == [58]
    assert [step.runs for step in steps if step.name == "resample"] == [300]
    one, all_of_them = pe.slab_steps("down"), steps
    share = totals(
        kernel for step in all_of_them for kernel in step.kernels * step.runs
    ).tensor_flops
    nodes = {node.name: node for node in pe.program.graph_nodes}
    per_slab = sum(totals(pe.node(node).kernels).tensor_flops for node in nodes.values())
    assert share == 58 * per_slab
    assert totals(k for step in one for k in step.kernels).tensor_flops < per_slab


def test_nodes_are_told_apart_by_what_they_read_and_feed(pe: StudyCost) -> None:
    kinds = {node.name: pe.kind(node) for node in pe.program.graph_nodes}
    assert kinds["encoder"] == "encoder"
    assert kinds["project_down1"] == kinds["project_up2"] == "projections"
    assert kinds["down1"] == kinds["up2"] == "recurrences"
    assert kinds["score"] == "heads"


def test_preprocessing_by_hand(tmp_path: Path) -> None:
    """Planes of 2.5 mm from slices of 5 mm: every plane is one slice, or two."""
    bundle = Bundle.load(toy.make(tmp_path / "toy", toy.pe_like))
    shape = StudyShape(slices=9, spacing_um=5000, rows=64, pixel_mm=5.0)
    cost = StudyCost(bundle, shape)
    steps = {step.name: step for step in cost.slab_steps("down")}
    (resample,) = steps["resample"].kernels
    side = bundle.manifest.grid.rows
    assert resample.read_bytes == 2 * (2 * side) ** 2  # pixels of half the grid's spacing
    assert resample.written_bytes == 2 * side**2
    assert resample.float_flops == side**2 * (6 * 25 + 2 * 5)  # five samples within +-10 mm
    (gather,) = steps["gather slab"].kernels
    planes = bundle.manifest.grid.planes_per_slab
    assert gather.written_bytes == 4 * planes * side**2
    middle = planes // 2 * 2500 // 5000
    assert gather.read_bytes == 2 * side**2 * (2 * middle + 1 + 2 * (planes // 2 % 2))
    assert "gather gate" not in steps  # the toy has no gate


def test_a_slab_of_the_chest_by_hand(pe: StudyCost) -> None:
    """Planes on a slice have 5 within +-2.5 mm, planes half-way 4: 3 of the one, 2 of the other."""
    steps = {step.name: step for step in pe.slab_steps("down")}
    (gather,), (gate,) = steps["gather slab"].kernels, steps["gather gate"].kernels
    sums, windows = 2 * (3 * 5 + 2 * 4), 5 * (1 + 4)
    assert gather.float_flops == 384**2 * (sums + windows)
    assert gate.float_flops == 384**2 * (2 * 5 + 1)


def test_memory_adds_up(pe: StudyCost) -> None:
    memory = pe.memory()
    assert memory.slices == 300 * 384 * 384 * 2
    assert memory.sequences == pe.program.memory_bytes(58, "down")
    parts = (memory.weights, memory.slices, memory.sequences, memory.buffers, memory.contexts)
    assert memory.total == sum(parts)


def test_every_engine_has_a_context_for_its_largest_batch(pe: StudyCost) -> None:
    scratch = {
        node.name: pe.node(node, pe.program.max_batch(node)).scratch_bytes
        for node in pe.program.graph_nodes
    }
    assert pe.memory().contexts == sum(scratch.values()) > max(scratch.values())


def test_one_batch_of_what_is_not_kept_has_buffers(pe: StudyCost) -> None:
    """The worse direction is down: what the first scan says is kept for nobody there."""
    slab, features, gates_1, hidden_1 = 5 * 384**2, 256 * 24**2, 192 * 24**2, 48 * 24**2
    gates_2, hidden_2 = 384 * 12**2, 96 * 12**2
    values = slab + features + gates_1 + hidden_1 + 2 * gates_2 + hidden_2
    assert pe.memory().buffers == 8 * 4 * values


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_published_rates_fit_units_and_clock(gpu: Gpu) -> None:
    """128 float units per multiprocessor; a sparse tensor rate would be twice what is possible."""
    clocks = gpu.multiprocessors * gpu.clock_mhz * 1e6
    assert gpu.float_flops == pytest.approx(clocks * 128 * 2, rel=0.01)
    dense = {"8.7": 2048, "8.9": 1024, "9.0": 4096}[gpu.capability]
    summed_in_float32 = 0.5 if "GeForce" in gpu.name else 1.0
    assert 0.75 < gpu.tensor_flops / (clocks * dense * summed_in_float32) < 1.01


@pytest.mark.parametrize(
    ("device", "multiprocessors", "clock_mhz", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 128, 2625, "GeForce RTX 4090"),
        ("NVIDIA H100 80GB HBM3", 132, 1980, "H100 SXM"),
        ("NVIDIA H100 PCIe", 114, 1755, "H100 PCIe"),
        ("NVIDIA RTX 4000 Ada Generation", 48, 2175, "RTX 4000 Ada"),
        ("Orin", 8, 624.75, "Jetson Orin Nano 8GB, 15 W"),
        ("Orin", 8, 918, "Jetson Orin NX 16GB, 25 W"),
        ("Orin", 16, 1300, "Jetson AGX Orin 64GB, MAXN"),
    ],
)
def test_a_device_is_known_by_what_its_driver_tells(
    device: str, multiprocessors: int, clock_mhz: float, name: str
) -> None:
    found = gpu_like(device, multiprocessors=multiprocessors, clock_mhz=clock_mhz)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("device", "count", "clock_mhz"),
    [
        ("NVIDIA GeForce GTX 1080", 20, 1733),
        ("Orin", 14, 930),  # AGX Orin 32GB
        ("Orin", 8, 765),  # Orin NX 8GB: half as much bandwidth again as the Nano of 625 MHz
        ("Orin", 8, 1173),  # Orin NX 16GB at 40 W
        ("Orin", 16, 828),  # AGX Orin 64GB at 30 W
    ],
)
def test_an_unknown_device_has_no_rates(device: str, count: int, clock_mhz: float) -> None:
    assert gpu_like(device, multiprocessors=count, clock_mhz=clock_mhz) is None
