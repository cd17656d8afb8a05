"""Inference runtimes behind one seam: see `pe_infer.engines.base`."""

from pe_infer.engines.base import (
    AUTO,
    RUNTIMES,
    Engine,
    EngineOptions,
    Runtime,
    Session,
    TensorSpec,
    installed,
    select,
)

__all__ = [
    "AUTO",
    "RUNTIMES",
    "Engine",
    "EngineOptions",
    "Lane",
    "Runtime",
    "Session",
    "TensorSpec",
    "installed",
    "select",
]
