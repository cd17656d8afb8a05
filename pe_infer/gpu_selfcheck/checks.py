"""The checks of one bundle: a value, a limit and a verdict each. None of them relies on another.

Where the GPU computes with the CPU's arithmetic, the limit is zero. Where it computes in another
type, or adds in another order, the limit is what the bundle allows its engines.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeAlias, cast

import numpy as np

from pe_infer.cuda.device import DeviceArray, DeviceStream
from pe_infer.cuda.facts import DeviceFacts
from pe_infer.cuda.preprocess import DeviceSliceResampler, DeviceVolume
from pe_infer.executor import batches
from pe_infer.geometry import PatientGrid, Slice, Window
from pe_infer.gpu_selfcheck.report import Measured
from pe_infer.gpu_selfcheck.subject import (
    Subject,
    relative_error,
    unequal_bits,
    unequal_outputs,
)
from pe_infer.manifest import Direction, GraphNode, MapNode, Tolerance
from pe_infer.pixels import DevicePixels
from pe_infer.preprocess import SliceResampler, volume_of
from pe_infer.program import Program
from pe_infer.result import StudyResult
from pe_infer.stream import MAX_BATCH

Check: TypeAlias = Callable[[Subject], Measured]

PROBABILITY_LIMIT: Final = 0.02  # a logit that errs by 0.05 moves a probability by 0.0125 at most
VERDICT_MARGIN: Final = 0.01  # of the threshold, within which a verdict may turn
GROWTH_LIMIT_MIB: Final = 32.0  # what a driver takes now and then; a leak per study is far more
SHARED_GROWTH_LIMIT: Final = 0.01  # of a memory that the host shares
_UINT16_OFFSET: Final = 1 << 15
_MEBIBYTE: Final = 1 << 20
_WIDE: Final = (Window(low_hu=-1024.0, high_hu=4095.0),)  # every HU that there is


def checks_of(program: Program) -> dict[str, Check]:
    """All checks of a bundle with this program, by name, in a sensible order."""
    return {
        "engines": engines,
        "slices": slices,
        "slices on the device": slices_on_device,
        "planes": planes,
        "slabs": slabs,
        **{f"node {node.name}": partial(one_node, node=node) for node in program.graph_nodes},
        "study, head first": partial(whole_study, arrival="down"),
        "study, feet first": partial(whole_study, arrival="up"),
        "study, late slices": late_slices,
        "interleaved streams": interleaved,
        "drift": drift,
        "leak": leak,
    }


def engines(subject: Subject) -> Measured:
    """All engines can be built, vouched for, loaded and run once."""
    subject.build()
    wanted = subject.gpu.compiled.program.graph_nodes
    missing = len(wanted) - len(subject.gpu.compiled.engines)
    return Measured(value=missing, limit=0, unit="missing engines")


def slices(subject: Subject) -> Measured:
    """In the plane: every slice as it is, turned and mirrored, and with unsigned values."""
    grid = subject.bundle.manifest.grid
    stream, differing = DeviceStream(), 0
    for study in subject.studies:
        for change in (_as_it_is, _turned, _unsigned):
            on_gpu, on_cpu = DeviceSliceResampler(grid, stream), SliceResampler(grid)
            for image in map(change, study):
                (found,) = stream.fetch([on_gpu(image)])
                differing += int(np.count_nonzero(found != on_cpu(image)))
    return Measured(value=differing, limit=0, unit="differing pixels")


def slices_on_device(subject: Subject) -> Measured:
    """Slices that another stream has just made on the GPU: read there, and not too early."""
    grid = subject.bundle.manifest.grid
    producer, stream, differing = DeviceStream(), DeviceStream(), 0
    for study in subject.studies:
        on_gpu, on_cpu = DeviceSliceResampler(grid, stream), SliceResampler(grid)
        for image in study:
            stored = image.host_pixels
            with producer:
                there = producer.empty(stored.shape, stored.dtype)
                producer.upload(stored, there)
                made = on_gpu(replace(image, pixels=cast("DevicePixels", there)))
            (found,) = stream.fetch([made])
            differing += int(np.count_nonzero(found != on_cpu(image)))
    return Measured(value=differing, limit=0, unit="differing pixels")


def planes(subject: Subject) -> Measured:
    """Every plane of a study, over all HU."""
    grid = replace(
        subject.bundle.manifest.grid, planes_per_slab=1, slab_step=1, windows=_WIDE, gate=None
    )
    differing = sum(_unequal_slabs(study, grid) for study in subject.studies)
    return Measured(value=differing, limit=0, unit="differing values")


def slabs(subject: Subject) -> Measured:
    """Every slab as the networks see it, and what the gate says of it."""
    grid = subject.bundle.manifest.grid
    differing = sum(_unequal_slabs(study, grid) for study in subject.studies)
    return Measured(value=differing, limit=0, unit="differing values")


def one_node(subject: Subject, *, node: GraphNode) -> Measured:
    """An engine over slabs and states of the CPU, a map at every batch size."""
    compiled = subject.gpu.compiled
    engine, example = compiled.engines[node.name], subject.examples[node.name]
    count = len(next(iter(example.inputs.values())))
    runs = [(row, row + 1) for row in range(count)]
    if isinstance(node, MapNode):
        runs += [
            run
            for last in range(len(engine.batch_sizes))
            for run in batches(count, engine.batch_sizes[: last + 1])
        ]
    lane = compiled.runtime.lane()
    session = engine.session(lane)
    worst = 0.0
    for start, stop in dict.fromkeys(runs):
        with lane:
            inputs = {}
            for tensor, values in example.inputs.items():
                inputs[tensor] = lane.empty((stop - start, *values.shape[1:]))
                lane.copy(values[start:stop], inputs[tensor])
            outputs = session.run(inputs)
            names = sorted(outputs)
            found = lane.fetch([outputs[name] for name in names])
        errors = [
            relative_error(values, example.outputs[name][start:stop])
            for name, values in zip(names, found, strict=True)
        ]
        worst = max(worst, *errors)
    golden = subject.bundle.manifest.golden
    tolerance = golden.tolerance if golden else Tolerance()
    reduced = engine.precision != "float32"
    return Measured(
        value=worst,
        limit=tolerance.reduced if reduced else tolerance.float32,
        unit="relative error",
    )


def whole_study(subject: Subject, *, arrival: Direction) -> Measured:
    """Studies slice by slice through a stream."""
    return _against_the_cpu(subject, lambda study: study[:: 1 if arrival == "up" else -1])


def late_slices(subject: Subject) -> Measured:
    """Studies of which some slices come last: slabs and states have to be made again."""

    def late(study: list[Slice]) -> list[Slice]:
        third = len(study) // 3
        return [*study[:third], *study[2 * third :], *study[third : 2 * third]]

    return _against_the_cpu(subject, late)


def interleaved(subject: Subject) -> Measured:
    """Studies whose slabs alternate, on streams of their own, against one after the other."""
    compiled = subject.gpu.compiled
    directions: tuple[Direction, Direction] = ("down", "up")
    jobs = [
        (
            arrival,
            [(slab.position_um, slab.tensor) for slab in study][:: 1 if arrival == "up" else -1],
        )
        for arrival in directions
        for study in subject.slabs
    ]
    expected = []
    for arrival, study in jobs:
        executor = compiled.executor(arrival)
        for slab in study:
            executor.push([slab])
        expected.append(executor.finish())
    executors = [compiled.executor(arrival) for arrival, _ in jobs]
    for row in range(max(len(study) for _, study in jobs)):
        for executor, (_, study) in zip(executors, jobs, strict=True):
            if row < len(study):
                executor.push([study[row]])
    differing = sum(
        unequal_outputs(executor.finish(), alone)
        for executor, alone in zip(executors, expected, strict=True)
    )
    return Measured(value=differing, limit=0, unit="differing values")


def drift(subject: Subject) -> Measured:
    """The same study again and again: the same bits every time."""
    return Measured(value=subject.endurance.differing, limit=0, unit="differing studies")


def leak(subject: Subject) -> Measured:
    """Device memory that did not come back after all these studies."""
    facts, limit = DeviceFacts.read(), GROWTH_LIMIT_MIB
    if facts.shares_memory:  # with all other programs
        limit = max(limit, SHARED_GROWTH_LIMIT * facts.memory_bytes / _MEBIBYTE)
    return Measured(value=subject.endurance.grown_bytes / _MEBIBYTE, limit=limit, unit="MiB")


def _against_the_cpu(subject: Subject, arranged: Callable[[list[Slice]], list[Slice]]) -> Measured:
    worst = 0.0
    for study, expected in zip(subject.studies, subject.results_of_cpu, strict=True):
        with subject.gpu.open() as stream:
            for image in arranged(study):
                stream.push(image)
            found = stream.finish()
        worst = max(worst, distance(found, expected))
    return Measured(value=worst, limit=PROBABILITY_LIMIT, unit="probability")


def distance(found: StudyResult, expected: StudyResult) -> float:
    """Largest difference of a study's or slab's probability.

    Infinite where other slabs were seen or gated, where only one has a probability, or where the
    verdict is another one although the expected probability is not near the threshold.
    """
    seen = [(slab.position_mm, slab.gated) for slab in found.evidence]
    if found.status != expected.status or seen != [
        (slab.position_mm, slab.gated) for slab in expected.evidence
    ]:
        return math.inf
    pairs = [
        (found.probability, expected.probability),
        *(
            (a.probability, b.probability)
            for a, b in zip(found.evidence, expected.evidence, strict=True)
        ),
    ]
    if any((a is None) != (b is None) for a, b in pairs):
        return math.inf
    if found.positive != expected.positive and expected.probability is not None:
        away = abs(expected.probability - expected.operating_point.threshold)
        if away > VERDICT_MARGIN:
            return math.inf
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _unequal_slabs(study: Sequence[Slice], grid: PatientGrid) -> int:
    on_cpu, lattice, centres = volume_of(study, grid)
    stream = DeviceStream()
    resample, on_gpu = DeviceSliceResampler(grid, stream), DeviceVolume(grid, stream)
    for image in study:
        on_gpu.put(image.position_um, resample(image))
    differing = 0
    for start in range(0, len(centres), MAX_BATCH):
        some = centres[start : start + MAX_BATCH]
        found = on_gpu.slabs(some, lattice)
        values = stream.fetch([cast("DeviceArray", slab.tensor) for slab in found])
        for centre, slab, tensor in zip(some, found, values, strict=True):
            expected = on_cpu.slab(centre, lattice)
            differing += unequal_bits(tensor, expected.tensor)
            differing += (slab.gate_fraction, slab.gated) != (
                expected.gate_fraction,
                expected.gated,
            )
    return differing


def _as_it_is(image: Slice) -> Slice:
    return image


def _turned(image: Slice) -> Slice:
    """Rows along the back, columns to the right: transposed and mirrored on the way to the grid."""
    turned = replace(image.geometry, row_direction=(0.0, 1.0, 0.0), col_direction=(-1.0, 0.0, 0.0))
    return replace(image, geometry=turned)


def _unsigned(image: Slice) -> Slice:
    pixels = (image.host_pixels.astype(np.int32) + _UINT16_OFFSET).astype(np.uint16)
    padding = image.padding
    return replace(
        image,
        pixels=pixels,
        rescale_intercept=image.rescale_intercept - _UINT16_OFFSET * image.rescale_slope,
        padding=padding and (padding[0] + _UINT16_OFFSET, padding[1] + _UINT16_OFFSET),
    )
