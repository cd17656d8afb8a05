"""All engines of a bundle for one kind of machine, and the manifest that vouches for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from pe_infer.bundle import Bundle
from pe_infer.engine_folder import EngineFolder, prepare_folder, stored, write_engines
from pe_infer.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    BuiltFrom,
    Compute,
    EngineEntry,
    EngineManifest,
    ShapeRange,
    StoredFile,
    Target,
)
from pe_infer.engines.base import TensorSpec
from pe_infer.engines.tensorrt_build import BuiltEngine, Progress, build_engine, profile_shapes
from pe_infer.engines.tensorrt_vendor import FLAVOURS, Flavour, LogLine, Vendor
from pe_infer.errors import BundleError, Code, ConfigurationError, EngineError
from pe_infer.half import CONVERSION_VERSION, half_graph
from pe_infer.machine import device_capability, parse_capability, this_platform
from pe_infer.manifest import GraphNode, Precision, ScanNode
from pe_infer.program import Program

NodeProgress: TypeAlias = Callable[[str, int, int, str, int, int], None]
"""Takes the node, how many engines are done and how many there are, what the builder is doing, the
steps done and the steps in all. May be called from threads of the builder."""

_JETSON: Final = frozenset({"5.3", "6.2", "7.2", "8.7", "10.1", "11.0"})
_ON_THE_TARGET: Final = (
    "TensorRT builds for the GPU that it runs on: build on the target, the engines of a Jetson on "
    "that Jetson"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build for.

    Attributes:
        target: The library that will run the engines.
        precision: ``fp16``: as the bundle's nodes allow. ``fp32``: everything in float32.
        capabilities: Compute capabilities, ascending; empty: the library's own choice.
        max_batch: Slabs per run of a map; ``None`` is what the bundle allows.
    """

    target: Target
    precision: Compute = "fp16"
    capabilities: tuple[str, ...] = ()
    max_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built, and bring the capabilities into their form and order.

        Raises:
            ConfigurationError: An option is unknown, or does not go with the target.
        """
        if self.target not in FLAVOURS or self.precision not in {"fp16", "fp32"}:
            raise ConfigurationError(
                f"target={self.target!r}, precision={self.precision!r}: expected one of "
                f"{list(FLAVOURS)} and one of ['fp16', 'fp32']"
            )
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigurationError(f"max_batch={self.max_batch} must be at least 1, or None")
        found = {parse_capability(text) for text in self.capabilities}
        ordered = tuple(sorted(found, key=lambda text: tuple(map(int, text.split(".")))))
        flavour = FLAVOURS[self.target]
        if ordered and flavour.needs_gpu:
            raise ConfigurationError(
                f"sm={', '.join(ordered)} with target {self.target!r}: {_ON_THE_TARGET}, without "
                "--sm; or name --target tensorrt-rtx"
            )
        if unknown := [text for text in ordered if text not in flavour.capabilities]:
            hint = f". {_ON_THE_TARGET} (--target tensorrt)" if _JETSON & set(unknown) else ""
            raise ConfigurationError(
                f"sm={', '.join(unknown)}: {self.target} builds for "
                f"{', '.join(flavour.capabilities)}{hint}"
            )
        object.__setattr__(self, "capabilities", ordered)


def build_engines(
    bundle: Bundle,
    options: BuildOptions,
    folder: Path,
    *,
    progress: NodeProgress | None = None,
    log: LogLine | None = None,
) -> EngineFolder:
    """Build an engine for every graph of a bundle and write them with their manifest.

    Args:
        bundle: What to build.
        options: For what.
        folder: Made if it is not there; engines of an earlier build are replaced, all at once and
            only when all new ones are built.
        progress: Told what is being built.
        log: Takes the builder's log, line by line.

    Raises:
        BundleError: Its dataflow is not valid, or a graph is not what the manifest says.
        ConfigurationError: The folder cannot be used, or ``max_batch`` is more than the bundle
            allows.
        EngineError: The library is not installed, has no GPU where it needs one
            (``engine.unavailable``), or refuses a graph (``engine.failed``).
    """
    program = Program(bundle.manifest)
    allowed = max(program.max_batch(node) for node in program.graph_nodes)
    if options.max_batch is not None and options.max_batch > allowed:
        raise ConfigurationError(
            f"max_batch={options.max_batch}: bundle {bundle.manifest.name!r} allows at most "
            f"{allowed} slabs at once"
        )
    vendor = Vendor(options.target, log)
    capabilities = _built_for(vendor.flavour, options.capabilities)
    old = prepare_folder(folder)
    build = _Build(
        bundle=bundle,
        options=options,
        vendor=vendor,
        program=program,
        progress=progress,
        timing_cache=_timing_cache(old, vendor, log),
    )
    entries, files = build.run()
    cache = None
    if build.timing_cache is not None:
        cache = stored("timing", build.timing_cache, "cache")
        files[cache.file] = build.timing_cache
    manifest = EngineManifest(
        format_version=ENGINE_FORMAT_VERSION,
        bundle=BuiltFrom(
            name=bundle.manifest.name, version=bundle.manifest.version, sha256=bundle.sha256
        ),
        target=options.target,
        version=vendor.version,
        platform=this_platform(),
        compute_capabilities=capabilities,
        later_capabilities=not (options.capabilities or vendor.flavour.needs_gpu),
        precision=options.precision,
        conversion_version=CONVERSION_VERSION,
        options={"tf32": False, "max_batch": options.max_batch or allowed},
        pe_infer_version=version("pe-infer"),
        engines=entries,
        timing_cache=cache,
    )
    return write_engines(folder, manifest, files)


@dataclass(slots=True, kw_only=True)
class _Build:
    """One run over the nodes of a program."""

    bundle: Bundle
    options: BuildOptions
    vendor: Vendor
    program: Program
    progress: NodeProgress | None
    timing_cache: bytes | None

    def run(self) -> tuple[dict[str, EngineEntry], dict[str, bytes]]:
        """Entries by node, contents by file. Nodes with the same graph share an engine."""
        nodes = self.program.graph_nodes
        built: dict[tuple[str, Precision, int], EngineEntry] = {}
        entries: dict[str, EngineEntry] = {}
        files: dict[str, bytes] = {}
        for done, node in enumerate(nodes):
            max_batch = min(
                self.program.max_batch(node), self.options.max_batch or self.program.max_batch(node)
            )
            key = (node.graph, node.precision, max_batch)
            if key not in built:
                engine = self._engine(node, max_batch, done, len(nodes))
                file = stored(node.name, engine.data)
                files[file.file] = engine.data
                built[key] = self._entry(node, max_batch, engine, file)
            entries[node.name] = built[key]
        return entries, files

    def _engine(self, node: GraphNode, max_batch: int, done: int, total: int) -> BuiltEngine:
        name = f"{self.bundle.manifest.name}/{node.graph}"
        tell: Progress | None = None
        if report := self.progress:
            report(node.name, done, total, "converting", 0, 1)

            def tell(phase: str, step: int, steps: int) -> None:
                report(node.name, done, total, phase, step, steps)

        graph = self.bundle.graph(node)
        if self.options.precision == "fp16":
            graph = half_graph(graph, name=name, precision=node.precision)
        engine = build_engine(
            self.vendor,
            graph,
            name=name,
            max_batch=max_batch,
            capabilities=self.options.capabilities,
            timing_cache=self.timing_cache,
            progress=tell,
        )
        self.timing_cache = engine.timing_cache
        self._check(node, max_batch, engine)
        return engine

    def _entry(
        self, node: GraphNode, max_batch: int, engine: BuiltEngine, file: StoredFile
    ) -> EngineEntry:
        shapes = {tensor: profile_shapes(spec, max_batch) for tensor, spec in engine.inputs.items()}
        return EngineEntry(
            **file.model_dump(),
            graph=node.graph,
            graph_sha256=self.bundle.manifest.files[node.graph].sha256,
            precision=node.precision,
            max_batch=max_batch,
            inputs={
                tensor: ShapeRange(min=least, best=best, max=most)
                for tensor, (least, best, most) in shapes.items()
            },
            outputs={tensor: spec.of_batch(max_batch) for tensor, spec in engine.outputs.items()},
        )

    def _check(self, node: GraphNode, max_batch: int, engine: BuiltEngine) -> None:
        """Compare an engine's tensors with what the manifest says of its node."""
        specs = self.program.specs
        reads = {tensor: specs[name].shape for tensor, name in node.inputs.items()}
        writes = {tensor: specs[name].shape for tensor, name in node.outputs.items()}
        if isinstance(node, ScanNode):
            reads.update({state.input: state.shape for state in node.states})
            writes.update({state.output: state.shape for state in node.states})
        for role, expected, found in (
            ("inputs", reads, engine.inputs),
            ("outputs", writes, engine.outputs),
        ):
            wanted = {
                tensor: f"float32 {(1, *shape)} to {(max_batch, *shape)}"
                for tensor, shape in expected.items()
            }
            if (shown := _shown(found, max_batch)) != wanted:
                self._refuse(node, f"its {role} are {shown}, the manifest says {wanted}")

    def _refuse(self, node: GraphNode, problem: str) -> NoReturn:
        raise BundleError(
            f"{self.bundle.folder / node.graph} does not fit node {node.name!r} for batches up to "
            f"the bundle's: {problem}. Export graph and manifest together.",
            code=Code.BUNDLE_GRAPH,
        )


def _shown(specs: Mapping[str, TensorSpec], max_batch: int) -> dict[str, str]:
    return {
        name: f"{spec.dtype} {spec.of_batch(1)} to {spec.of_batch(max_batch)}"
        for name, spec in specs.items()
    }


def _built_for(flavour: Flavour, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities that the engines will be for."""
    if not flavour.needs_gpu:
        return asked or flavour.default_capabilities
    found = device_capability()
    if found is None:
        raise EngineError(
            f"{flavour.name} needs the GPU that it builds for, and none was found here. "
            f"{_ON_THE_TARGET}. TensorRT for RTX builds without one: --target tensorrt-rtx",
            code=Code.ENGINE_UNAVAILABLE,
        )
    return (found,)


def _timing_cache(old: EngineFolder | None, vendor: Vendor, log: LogLine | None) -> bytes | None:
    """What an earlier build with the same library measured on the same kind of GPU.

    One that is not whole is left out, and the log says so: this build will measure anew.
    """
    if old is None or old.manifest.timing_cache is None:
        return None
    same = (old.manifest.target, old.manifest.version) == (vendor.flavour.name, vendor.version)
    if not same or old.manifest.compute_capabilities != (device_capability(),):
        return None
    try:
        return old.read_file(old.manifest.timing_cache)
    except EngineError as error:
        if log:
            log(f"warning: the timing cache is not used: {error}")
        return None
