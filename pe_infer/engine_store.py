"""The engines of a bundle for this machine: read from a folder, and built there where that is ours.

A folder that the user names is only read. The one in the cache belongs to this package: what is
missing there, stale, altered or of another machine is built again, as other runtimes compile.
"""

import logging
from pathlib import Path
from typing import Final, cast

from pe_infer.bundle import Bundle
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engine_folder import EngineFolder, add_runtime_cache
from pe_infer.engine_manifest import Compute, Target
from pe_infer.engines.base import Engine
from pe_infer.engines.tensorrt import TensorRtRuntime
from pe_infer.errors import Code, EngineError, PeInferError
from pe_infer.machine import Machine
from pe_infer.manifest import GraphNode
from pe_infer.program import Program

_HASH_DIGITS: Final = 12
_LOG: Final = logging.getLogger(__name__)


class StoredEngines:
    """The engines of a bundle in a folder, read and vouched for, to be loaded on a runtime."""

    def __init__(
        self, folder: EngineFolder, bundle: Bundle, runtime: TensorRtRuntime, *, ours: bool
    ) -> None:
        """Read them, and the kernels that were compiled for them.

        Args:
            folder: Where they are.
            bundle: What will be run.
            runtime: On what. It has loaded nothing yet.
            ours: Whether `keep_kernels` may write there.

        Raises:
            EngineError: One of them was built from something else (``engine.stale``) or for another
                machine, or computes in float16 where the runtime's options say float32
                (``engine.unfit``), or is missing, altered, or could be written by others
                (``engine.untrusted``).
        """
        manifest, machine = folder.manifest, Machine.this()
        self._folder = folder
        self._bundle = bundle
        self._runtime = runtime
        self._ours = ours
        self._data = {
            node.name: folder.read(node.name, bundle=bundle, machine=machine)
            for node in Program(bundle.manifest).graph_nodes
        }
        if manifest.precision == "fp16" and runtime.options.precision == "float32":
            raise EngineError(
                f"{folder.folder}: the engines compute in float16, and precision 'float32' was "
                "asked for. Build others (pe-infer build --precision fp32) or ask for 'default'.",
                code=Code.ENGINE_UNFIT,
            )
        cache = manifest.runtime_cache
        self._kernels = folder.read_file(cache) if cache else b""
        runtime.begin_with(self._kernels)

    def load(self, node: GraphNode) -> Engine:
        """A node's engine, for `CompiledProgram.compile`."""
        manifest = self._folder.manifest
        return self._runtime.load(
            self._data[node.name],
            manifest.engines[node.name],
            name=f"{self._bundle.manifest.name}/{node.graph}",
            reduced=manifest.precision == "fp16",
        )

    def keep_kernels(self) -> None:
        """Keep what the runtime has compiled for the next process, where that is allowed."""
        kernels = self._runtime.kernels()
        if not self._ours or not kernels or kernels == self._kernels:
            return
        try:
            add_runtime_cache(self._folder, kernels)
        except PeInferError as error:
            _LOG.warning("compiled kernels are not kept: %s", error)


def stored_engines(
    bundle: Bundle, runtime: TensorRtRuntime, *, folder: Path | None, cache_dir: Path | None
) -> StoredEngines | None:
    """The engines of a bundle for this machine.

    Args:
        bundle: What will be run.
        runtime: On what. It has loaded nothing yet.
        folder: Of `pe-infer build`, only read; ``None`` takes the one in the cache, and builds
            there what does not fit.
        cache_dir: The cache; ``None`` keeps nothing.

    Returns:
        ``None`` if there is neither folder nor cache: the runtime builds them for itself.

    Raises:
        ConfigurationError: The cache is not private, or cannot be written.
        EngineError: The engines in ``folder`` do not fit, or cannot be built.
    """
    if folder is not None:
        return StoredEngines(EngineFolder.open(folder), bundle, runtime, ours=False)
    if cache_dir is None:
        return None
    compute: Compute = "fp32" if runtime.options.precision == "float32" else "fp16"
    path = cache_dir / "engines" / _folder_name(bundle, runtime.name, compute)
    try:
        return StoredEngines(EngineFolder.open(path), bundle, runtime, ours=True)
    except EngineError as error:
        # a warning, because nothing else is seen by default and silence would look like a fault
        _LOG.warning(
            "building %s engines of bundle %r for this GPU, which takes minutes (%s)",
            runtime.name,
            bundle.manifest.name,
            error,
        )
    options = BuildOptions(
        target=cast("Target", runtime.name),
        precision=compute,
        capabilities=runtime.own_capability,
    )
    return StoredEngines(build_engines(bundle, options, path), bundle, runtime, ours=True)


def _folder_name(bundle: Bundle, target: str, compute: Compute) -> str:
    return f"{bundle.manifest.name}-{bundle.sha256[:_HASH_DIGITS]}-{target}-{compute}"
