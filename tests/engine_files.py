"""Made-up engines: a folder as `pe-infer build` leaves it, with bytes that nothing deserialises."""

import os
from pathlib import Path
from typing import Any

from pe_infer.bundle import Bundle
from pe_infer.engine_folder import EngineFolder, stored, write_engines
from pe_infer.engine_manifest import BuiltFrom, EngineEntry, EngineManifest, ShapeRange
from pe_infer.half import CONVERSION_VERSION
from pe_infer.machine import Machine
from pe_infer.program import Program

MACHINE = Machine.parse("sm=8.6,tensorrt-rtx=1.7.1.116,platform=linux-x86_64")


def engine_bytes(node: str) -> bytes:
    return f"engine of {node}".encode() * 100


def engine_manifest(bundle: Bundle, **changes: Any) -> EngineManifest:
    engines = {}
    for node in Program(bundle.manifest).graph_nodes:
        shape = (1, 4)
        engines[node.name] = EngineEntry(
            **stored(node.name, engine_bytes(node.name)).model_dump(),
            graph=node.graph,
            graph_sha256=bundle.manifest.files[node.graph].sha256,
            precision=node.precision,
            max_batch=1,
            inputs={"x": ShapeRange(min=shape, best=shape, max=shape)},
            outputs={"y": shape},
        )
    values: dict[str, Any] = {
        "format_version": 1,
        "bundle": BuiltFrom(
            name=bundle.manifest.name, version=bundle.manifest.version, sha256=bundle.sha256
        ),
        "target": "tensorrt-rtx",
        "version": "1.7.1.116",
        "platform": "linux-x86_64",
        "compute_capabilities": ("8.6", "8.9"),
        "precision": "fp16",
        "conversion_version": CONVERSION_VERSION,
        "pe_infer_version": "0.1.0",
        "engines": engines,
    }
    return EngineManifest(**{**values, **changes})


def write_made_up(folder: Path, bundle: Bundle, **changes: Any) -> EngineFolder:
    """Engines for every node of a bundle."""
    manifest = engine_manifest(bundle, **changes)
    files = {entry.file: engine_bytes(node) for node, entry in manifest.engines.items()}
    return write_engines(folder, manifest, files)


def open_to_others(path: Path) -> None:
    path.chmod(0o777)


def someone_else() -> int:
    """A user that is not this one."""
    return os.geteuid() + 1
