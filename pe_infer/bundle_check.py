"""Making bundles and proving them: golden data, and their replay on a runtime."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.bundle import Bundle, GoldenData, write_bundle
from pe_infer.compiled import CompiledProgram, EngineInfo
from pe_infer.engines.base import Engine, EngineOptions, Runtime, select
from pe_infer.engines.lane import Tensor
from pe_infer.errors import BundleError, Code
from pe_infer.manifest import SLAB, Direction

GOLDEN_FILE: Final = "golden.npz"
_AXES: Final[dict[int, tuple[str, ...]]] = {1: ("value",), 3: ("channel", "row", "col")}
_ARRIVALS: Final[tuple[Direction, Direction]] = ("down", "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """How far a runtime is from the golden outputs.

    Attributes:
        engine: What computed.
        deviations: By output, the larger of both directions of arrival: largest absolute
            difference, divided by the largest golden value or 1, whichever is more; infinite
            where a value is not a number.
        tolerance: What the bundle allows.
    """

    engine: EngineInfo
    deviations: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every output is as near as the bundle demands."""
        return all(deviation <= self.tolerance for deviation in self.deviations.values())


def self_test(bundle: Bundle, runtime: Runtime) -> SelfTest:
    """Replay the golden slabs, with both directions of arrival.

    Raises:
        BundleError: There are no golden data (``bundle.self_test``), or they do not belong to this
            program (``bundle.invalid``).
        EngineError: The runtime failed.
    """
    golden, spec = bundle.golden(), bundle.manifest.golden
    if golden is None or spec is None:
        raise BundleError(
            f"bundle {bundle.manifest.name!r} has no golden data, so there is nothing to replay: "
            "export it with some",
            code=Code.BUNDLE_SELF_TEST,
        )
    compiled = CompiledProgram.compile(bundle, runtime)
    slab = compiled.program.specs[SLAB].shape
    if golden.slabs.shape[1:] != slab:
        raise BundleError(
            f"{bundle.folder / spec.file}: slabs are {golden.slabs.shape[1:]}, the program takes "
            f"{slab}. Export the bundle again.",
            code=Code.BUNDLE_INVALID,
        )
    found = [replay(compiled, golden, arrival) for arrival in _ARRIVALS]
    deviations = {}
    for name in compiled.program.outputs:
        expected = golden.outputs.get(name)
        if expected is None or any(values[name].shape != expected.shape for values in found):
            raise BundleError(
                f"{bundle.folder / spec.file}: output {name!r} is "
                f"{'missing' if expected is None else expected.shape}, the program gives "
                f"{found[0][name].shape}. Export the bundle again.",
                code=Code.BUNDLE_INVALID,
            )
        scale = max(1.0, float(np.abs(expected).max()))
        # np.max, unlike max, does not lose a NaN that is not the first
        apart = np.max([np.abs(values[name] - expected).max() for values in found])
        deviations[name] = float("inf") if np.isnan(apart) else float(apart) / scale
    exact = set(compiled.info.precision.values()) == {"float32"}
    return SelfTest(
        engine=compiled.info,
        deviations=deviations,
        tolerance=spec.tolerance.float32 if exact else spec.tolerance.reduced,
    )


def replay(compiled: CompiledProgram, golden: GoldenData, arrival: Direction) -> dict[str, Tensor]:
    """Run golden slabs through the program one by one, as a scanner would send them."""
    executor = compiled.executor(arrival)
    order = range(len(golden.slabs))
    for index in order if arrival == "up" else reversed(order):
        executor.push([(int(golden.positions_um[index]), golden.tensor(index))])
    outputs = executor.finish()
    return {**outputs.slabs, **outputs.study}


def build_bundle(
    folder: Path,
    document: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
    golden_slabs: NDArray[np.uint8] | None = None,
) -> Bundle:
    """Write a bundle from its graphs, and check it.

    Describes the sequences, computes the golden outputs (ONNX Runtime, float32, CPU) and hashes
    every file.

    Args:
        folder: Made if it is not there.
        document: The manifest without ``files`` and, if they are to be filled in here,
            ``sequences`` and ``golden.file``. A ``golden.tolerance`` is kept. Sequences of 1 and 3
            axes get the names ``value`` and ``channel, row, col``.
        files: Graphs, and any other files to be listed, by their name in the bundle.
        golden_slabs: (T, channels, rows, cols) uint8 in ascending position; a slab is value / 255.

    Raises:
        BundleError: The bundle would be refused when it is loaded.
        EngineError: ONNX Runtime is not installed or refuses a graph.
    """
    runtime = select("onnxruntime", EngineOptions(precision="float32"))
    contents = {
        name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()
    }
    draft = {key: value for key, value in document.items() if key not in {"files", "golden"}}
    if "sequences" not in draft:
        draft["sequences"] = _describe(document, contents, runtime)
    if golden_slabs is None:
        bundle = write_bundle(folder, draft, contents)
        CompiledProgram.compile(bundle, runtime)
        return bundle
    with TemporaryDirectory() as scratch:
        compiled = CompiledProgram.compile(write_bundle(Path(scratch), draft, contents), runtime)
        contents[GOLDEN_FILE] = make_golden(compiled, golden_slabs).to_bytes()
    draft["golden"] = {**(document.get("golden") or {}), "file": GOLDEN_FILE}
    return write_bundle(folder, draft, contents)


def make_golden(compiled: CompiledProgram, slabs: NDArray[np.uint8]) -> GoldenData:
    """The outputs of a compiled program for some slabs.

    Args:
        compiled: On the runtime whose values shall be the golden ones.
        slabs: (T, channels, rows, cols) uint8 in ascending position; a slab is value / 255.
    """
    grid = compiled.bundle.manifest.grid
    step_um = grid.pitch_um * grid.slab_step
    positions_um = np.arange(len(slabs), dtype=np.int64) * step_um
    inputs = GoldenData(slabs=slabs, positions_um=positions_um, outputs={})
    arrival = compiled.program.best_arrival()
    return GoldenData(
        slabs=slabs, positions_um=positions_um, outputs=replay(compiled, inputs, arrival)
    )


def _describe(
    document: Mapping[str, Any], files: Mapping[str, bytes], runtime: Runtime
) -> dict[str, Any]:
    """The manifest's ``sequences``, from what the graphs declare; checked when it is loaded."""
    grid = document["grid"]
    slab = (grid["planes_per_slab"] * len(grid["windows"]), grid["rows"], grid["cols"])
    found: dict[str, tuple[tuple[int | None, ...], str]] = {SLAB: (slab, "slab")}
    engines: dict[str, Engine] = {}
    waiting = list(document["nodes"])
    while ready := [node for node in waiting if found.keys() >= set(node["inputs"].values())]:
        for node in ready:
            waiting.remove(node)
            reads = [found[name] for name in node["inputs"].values()]
            if node["kind"] == "reduce":
                found.update(dict.fromkeys(node["outputs"].values(), (reads[0][0], "study")))
                continue
            graph = node["graph"]
            if graph not in files:
                raise BundleError(
                    f"node {node['name']!r} needs {graph!r}, given: {sorted(files)}",
                    code=Code.BUNDLE_INVALID,
                )
            if graph not in engines:
                engines[graph] = runtime.compile(files[graph], name=graph)
            for tensor, name in node["outputs"].items():
                spec = engines[graph].outputs.get(tensor)
                if spec is None or None in spec.shape[1:]:
                    raise BundleError(
                        f"{graph}: output {tensor!r} of node {node['name']!r} is "
                        f"{spec.shape if spec else 'not there'}, expected a shape with no free "
                        "axis but the first",
                        code=Code.BUNDLE_GRAPH,
                    )
                found[name] = (spec.shape[1:], reads[0][1])
    return {
        name: {
            "shape": list(shape),
            "axes": list(_AXES.get(len(shape), tuple(f"axis{i}" for i in range(len(shape))))),
            "per": per,
        }
        for name, (shape, per) in found.items()
    }
