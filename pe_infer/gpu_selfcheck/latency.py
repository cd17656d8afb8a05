"""What a caller waits for, stage by stage, beside what the roofline says.

Every stage is timed from the call until its result is there, launches and waiting included. What is
computed holds for the GPU's published peak rates (`pe_infer.roofline.gpus`), if they are known.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pe_infer.cuda.device import DeviceStream
from pe_infer.cuda.facts import DeviceFacts
from pe_infer.cuda.preprocess import DeviceSliceResampler, DeviceVolume
from pe_infer.geometry import Slice
from pe_infer.gpu_selfcheck.report import Latency
from pe_infer.gpu_selfcheck.subject import Subject, lattice_of
from pe_infer.manifest import Direction, GraphNode
from pe_infer.roofline.gpus import Gpu, gpu_like
from pe_infer.roofline.study import Step, StudyCost, StudyShape, steps_time

_SLICE: tuple[str, ...] = ("slice to device", "resample")
_SLAB: tuple[str, ...] = ("gather slab", "gather gate", "gate plane back")


def latencies(subject: Subject) -> list[Latency]:
    """Time a bundle's stages.

    Raises:
        PeInferError: A stage cannot be run, or its graph not be counted.
    """
    return list(_Table(subject).rows())


class _Table:
    """One bundle on this GPU."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._cost = StudyCost(subject.bundle, shape_of(subject.studies[0]))
        facts = DeviceFacts.read()
        self._rates: Gpu | None = gpu_like(
            facts.name, multiprocessors=facts.multiprocessors, clock_mhz=facts.clock_mhz
        )

    def rows(self) -> Iterator[Latency]:
        """Time one stage after the other."""
        yield from self._preprocessing()
        compiled = self._subject.gpu.compiled
        for node in compiled.program.graph_nodes:
            for batch in dict.fromkeys((1, compiled.engines[node.name].batch_sizes[-1])):
                yield self._node(node, batch)
        yield self._last_slice("last slice to result, head first", "down")
        yield self._last_slice("last slice to result, feet first", "up")

    def _preprocessing(self) -> Iterator[Latency]:
        subject = self._subject
        grid, images = subject.bundle.manifest.grid, subject.studies[0]
        stream = DeviceStream()
        resample, volume = DeviceSliceResampler(grid, stream), DeviceVolume(grid, stream)
        slice_steps = [step for step in self._cost.slab_steps() if step.name in _SLICE]
        slab_steps = [step for step in self._cost.slab_steps() if step.name in _SLAB]

        def one_slice(index: int) -> None:
            image = images[index % len(images)]
            volume.put(image.position_um, resample(image))
            stream.wait()

        yield self._row("slice", self._timed(one_slice, len(images)), slice_steps)
        lattice = lattice_of(images, subject)
        centres = lattice.centres(volume.positions_um)

        def one_slab(index: int) -> None:
            volume.slabs([centres[index % len(centres)]], lattice)
            stream.wait()

        yield self._row("slab", self._timed(one_slab), slab_steps)

    def _node(self, node: GraphNode, batch: int) -> Latency:
        compiled = self._subject.gpu.compiled
        engine = compiled.engines[node.name]
        lane = compiled.runtime.lane()
        session = engine.session(lane)
        inputs = {name: lane.empty(spec.of_batch(batch)) for name, spec in engine.inputs.items()}
        with lane:
            for array in inputs.values():
                array.fill(0.0)

        def once(_: int) -> None:
            session.run(inputs)
            lane.wait()

        kernels = self._cost.node(node, batch).kernels
        step = Step(kind=self._cost.kind(node), name=node.name, kernels=kernels, runs=1)
        name = f"{node.name}, batch {batch}" if batch > 1 else node.name
        return self._row(name, self._timed(once), [step])

    def _last_slice(self, name: str, arrival: Direction) -> Latency:
        subject = self._subject
        images = subject.studies[0][:: 1 if arrival == "up" else -1]
        seconds = []
        for _ in range(subject.counts.studies):
            with subject.gpu.open() as stream:
                for image in images[:-1]:
                    stream.push(image)
                time.sleep(subject.counts.settle_s)
                began = time.perf_counter()
                stream.push(images[-1])
                stream.finish()
                seconds.append(time.perf_counter() - began)
        return self._row(name, seconds, self._cost.last_slice_steps(arrival))

    def _timed(self, once: Callable[[int], None], least: int = 0) -> list[float]:
        """Seconds of every run but the first, in which buffers are made."""
        once(0)
        seconds = []
        for index in range(max(least, self._subject.counts.repeats)):
            began = time.perf_counter()
            once(index)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _row(self, stage: str, seconds: Sequence[float], steps: Iterable[Step]) -> Latency:
        """A row of the table; steps that are done several times over for a slab count once."""
        p50, p95, p99 = (float(ms) for ms in 1000 * np.percentile(seconds, [50, 95, 99]))
        if stage in {"slice", "slab"}:
            steps = [replace(step, runs=1) for step in steps]
        computed = None if self._rates is None else steps_time(steps, self._rates).seconds
        return Latency(
            bundle=self._subject.bundle.manifest.name,
            stage=stage,
            runs=len(seconds),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            computed_ms=None if computed is None else 1000 * computed,
        )


def shape_of(images: Sequence[Slice]) -> StudyShape:
    """A study as the roofline knows it: of equal spacing, the mean one of these slices."""
    first, last = images[0], images[-1]
    spacing_um = (last.position_um - first.position_um) / max(1, len(images) - 1)
    return StudyShape(
        slices=len(images),
        spacing_um=max(1, round(spacing_um)),
        rows=first.geometry.rows,
        pixel_mm=first.geometry.row_spacing_mm,
    )
