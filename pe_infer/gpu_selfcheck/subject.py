"""One bundle on the GPU and on the CPU, with studies to run on both."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from pe_infer.bundle import Bundle
from pe_infer.cuda.device import DeviceStream
from pe_infer.cuda.facts import free_bytes
from pe_infer.cuda.preprocess import DeviceSliceResampler, DeviceVolume
from pe_infer.detector import Detector
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engine_manifest import Target
from pe_infer.engines.base import Session, missing
from pe_infer.engines.lane import Tensor
from pe_infer.engines.tensorrt_vendor import FLAVOURS
from pe_infer.errors import Code, EngineError
from pe_infer.executor import StudyOutputs
from pe_infer.geometry import Slice
from pe_infer.lattice import PlaneLattice, lattice_for
from pe_infer.machine import Machine
from pe_infer.manifest import SLAB, GraphNode, MapNode, ReduceNode, ScanNode
from pe_infer.preprocess import Slab, volume_of
from pe_infer.result import StudyResult
from pe_infer.stream import MAX_BATCH

CPU_ENGINE: Final = "onnxruntime"
WARM_STUDIES: Final = 2  # after which every pool and buffer is as large as it gets


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much is run.

    Attributes:
        slabs: Of the endurance run, in studies one after the other.
        node_slabs: That every node is compared over.
        repeats: Of a stage that is timed.
        studies: Whole studies that are timed, per direction.
        settle_s: Pause before the last slice of a timed study, so that nothing is left to do.
    """

    slabs: int = 10_000
    node_slabs: int = 16
    repeats: int = 200
    studies: int = 20
    settle_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """What a node read and wrote on the CPU, in float32.

    Attributes:
        inputs: (n, ...) by tensor: a row per slab, in the order of the node's direction; recurrent
            states among them.
        outputs: (n, ...) by tensor.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endurance:
    """Many studies one after the other.

    Attributes:
        studies: After the first ones, which warm up.
        differing: How many did not give the bits of the first.
        grown_bytes: How much less device memory is free after the last than before the first.
    """

    studies: int
    differing: int
    grown_bytes: int


class Subject:
    """What the checks of one bundle share. Close it when they are done."""

    def __init__(
        self,
        bundle: Bundle,
        studies: Sequence[Sequence[Slice]],
        *,
        target: Target,
        folder: Path,
        counts: Counts,
    ) -> None:
        """Build nothing yet.

        Args:
            bundle: What to check.
            studies: At least two, in ascending position.
            target: The library that runs its engines.
            folder: Where to build them: only this user can write there.
            counts: How much to run.
        """
        self.bundle = bundle
        self.studies = [list(study) for study in studies]
        self.target = target
        self.counts = counts
        self._folder = folder
        self._gpu: Detector | None = None
        self._cpu: Detector | None = None

    def build(self) -> None:
        """Build the engines, and load them as anybody would.

        Raises:
            PeInferError: It did not work.
        """
        capability = Machine.this().compute_capability
        known = FLAVOURS[self.target].capabilities
        options = BuildOptions(
            target=self.target,
            capabilities=tuple(one for one in known if one == capability),
        )
        build_engines(self.bundle, options, self._folder)
        self._gpu = Detector(
            self.bundle.folder, engine=self.target, engines=self._folder, cache_dir=None
        )

    @property
    def gpu(self) -> Detector:
        """With TensorRT.

        Raises:
            EngineError: `build` has not worked.
        """
        if self._gpu is None:
            raise EngineError("there are no engines: see the check 'engines'")
        return self._gpu

    @property
    def cpu(self) -> Detector:
        """With ONNX Runtime, in float32.

        Raises:
            PeInferError: It cannot be opened.
        """
        if self._cpu is None:
            self._cpu = Detector(
                self.bundle.folder, engine=CPU_ENGINE, precision="float32", cache_dir=None
            )
        return self._cpu

    def close(self) -> None:
        """End both detectors."""
        for detector in (self._gpu, self._cpu):
            if detector is not None:
                detector.close()

    @cached_property
    def results_of_cpu(self) -> list[StudyResult]:
        """Of every study: the CPU gives the same bits for any order of arrival."""
        return [self.cpu.detect(study) for study in self.studies]

    @cached_property
    def slabs(self) -> list[list[Slab]]:
        """The slabs of every study that pass the gate, made by the CPU, in ascending position."""
        found = []
        for study in self.studies:
            volume, lattice, centres = volume_of(study, self.bundle.manifest.grid)
            made = (volume.slab(centre, lattice) for centre in centres)
            found.append([slab for slab in made if not slab.gated])
        if not all(found):
            raise EngineError("no slab of a study passes the gate: there is nothing to compare")
        return found

    @cached_property
    def examples(self) -> dict[str, Example]:
        """By node: what it does with the first slabs of the first study on the CPU."""
        compiled = self.cpu.compiled
        program = compiled.program
        slabs = self.slabs[0][: self.counts.node_slabs]
        sequences = {SLAB: np.stack([slab.tensor for slab in slabs])}
        found: dict[str, Example] = {}
        for node in program.nodes:
            reads = {tensor: sequences[name] for tensor, name in node.inputs.items()}
            if isinstance(node, ReduceNode):
                (values,), (result,) = reads.values(), node.outputs.values()
                reduced = values.max(axis=0) if node.reducer == "max" else values.mean(axis=0)
                sequences[result] = reduced[np.newaxis]
                continue
            session = compiled.engines[node.name].session()
            example = found[node.name] = _walk(node, session, reads)
            sequences.update(
                {
                    name: example.outputs[tensor][:: _step(node)]
                    for tensor, name in node.outputs.items()
                }
            )
        return found

    @cached_property
    def endurance(self) -> Endurance:
        """Whole studies from slices to outputs until there were enough slabs."""
        images = self.studies[0]
        first = self.run_on_gpu(images)
        for _ in range(WARM_STUDIES):
            self.run_on_gpu(images)
        free = free_bytes()
        done = studies = differing = 0
        while done < self.counts.slabs:
            outputs = self.run_on_gpu(images)
            differing += unequal_outputs(outputs, first) > 0
            done += len(outputs.positions_um)
            studies += 1
        return Endurance(
            studies=studies, differing=differing, grown_bytes=max(0, free - free_bytes())
        )

    def run_on_gpu(self, images: Sequence[Slice]) -> StudyOutputs:
        """A study from its slices to the program's outputs, in batches that are always the same."""
        compiled = self.gpu.compiled
        lane = compiled.runtime.lane()
        if lane.stream is None:
            raise EngineError(f"engine {compiled.info.name!r} runs on the host")
        executor = compiled.executor("up", lane)
        for slabs in slabs_on_gpu(images, self, lane.stream):
            if passing := [(slab.position_um, slab.tensor) for slab in slabs if not slab.gated]:
                executor.push(passing)
        return executor.finish()


def slabs_on_gpu(
    images: Sequence[Slice], subject: Subject, stream: DeviceStream
) -> Iterator[list[Slab]]:
    """The slabs of a study, gated ones too, as many at a time as a stream makes."""
    grid = subject.bundle.manifest.grid
    resample = DeviceSliceResampler(grid, stream)
    volume = DeviceVolume(grid, stream)
    for image in images:
        volume.put(image.position_um, resample(image))
    lattice = lattice_of(images, subject)
    centres = lattice.centres(volume.positions_um)
    for start in range(0, len(centres), MAX_BATCH):
        yield volume.slabs(centres[start : start + MAX_BATCH], lattice)


def lattice_of(images: Sequence[Slice], subject: Subject) -> PlaneLattice:
    """Where the planes of a study lie."""
    return lattice_for(
        subject.bundle.manifest.grid, [image.geometry.thickness_mm for image in images]
    )


def choose_target() -> Target:
    """The library to check: TensorRT for RTX where it is installed and knows the GPU.

    Raises:
        EngineError: Neither library is installed (``engine.unavailable``).
    """
    capability = Machine.this().compute_capability
    targets: tuple[Target, ...] = ("tensorrt-rtx", "tensorrt")
    here = [target for target in targets if not missing(target)]
    for target in here:
        known = FLAVOURS[target].capabilities
        if not known or capability in known:
            return target
    if here:
        return here[0]
    raise EngineError(
        "neither TensorRT for RTX nor TensorRT is installed: "
        f"{FLAVOURS['tensorrt-rtx'].install}, or {FLAVOURS['tensorrt'].install}",
        code=Code.ENGINE_UNAVAILABLE,
    )


def unequal_bits(found: Tensor, expected: Tensor) -> int:
    """How many float32 values differ in any bit; all of them where the shapes do."""
    if found.shape != expected.shape:
        return max(found.size, expected.size, 1)
    return int(np.count_nonzero(found.view(np.uint32) != expected.view(np.uint32)))


def unequal_outputs(found: StudyOutputs, expected: StudyOutputs) -> int:
    """How many values of two runs of a study differ in any bit."""
    if not np.array_equal(found.positions_um, expected.positions_um):
        return max(len(found.positions_um), len(expected.positions_um), 1)
    pairs = [
        *((found.slabs[name], values) for name, values in expected.slabs.items()),
        *((found.study[name], values) for name, values in expected.study.items()),
    ]
    return sum(unequal_bits(np.ascontiguousarray(a), np.ascontiguousarray(b)) for a, b in pairs)


def _step(node: GraphNode) -> int:
    """Rows of an example in the order of ascending position."""
    return -1 if isinstance(node, ScanNode) and node.direction == "down" else 1


def _walk(node: GraphNode, session: Session, reads: Mapping[str, Tensor]) -> Example:
    """Run a node row by row, and carry its states."""
    step = _step(node)
    ordered = {tensor: values[::step] for tensor, values in reads.items()}
    count = len(next(iter(ordered.values())))
    taken: dict[str, list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}
    states = () if isinstance(node, MapNode) else node.states
    carried = {
        state.input: np.full((1, *state.shape), state.initial, np.float32) for state in states
    }
    for row in range(count):
        inputs = {
            **{t: np.ascontiguousarray(values[row : row + 1]) for t, values in ordered.items()},
            **carried,
        }
        outputs = {tensor: values.copy() for tensor, values in session.run(inputs).items()}
        carried = {state.input: outputs[state.output] for state in states}
        for kept, values_of in ((taken, inputs), (given, outputs)):
            for tensor, values in values_of.items():
                kept.setdefault(tensor, []).append(values)
    return Example(
        inputs={tensor: np.concatenate(rows) for tensor, rows in taken.items()},
        outputs={tensor: np.concatenate(rows) for tensor, rows in given.items()},
    )


def is_finite(values: Tensor) -> bool:
    """Whether every value is a number."""
    return bool(np.isfinite(values).all())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected value or 1; infinite for no number."""
    if found.shape != expected.shape or not is_finite(found):
        return math.inf
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
