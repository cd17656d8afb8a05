"""TensorRT with NumPy arrays: copied to the device before a run, and back after it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pe_infer.engines.base import Engine, Session
from pe_infer.engines.lane import CudaLane, HostLane, Lane, Tensor
from pe_infer.engines.tensorrt import TensorRtEngine, TensorRtRuntime, TensorRtSession


class HostSession(TensorRtSession):
    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        given = dict(out or {})
        found = super().run(
            {name: self._up(array) for name, array in inputs.items()},
            {name: self._up(array) if writeable(array) else array for name, array in given.items()},
        )
        values = dict(zip(found, self._lane.fetch(list(found.values())), strict=True))
        for name, array in given.items():
            array[...] = values[name]
        return {**values, **given}

    def _up(self, array: Tensor) -> Tensor:
        """What does not fit stays where it is, to be refused."""
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            return array
        if not array.flags.c_contiguous or not array.ndim:
            return array
        there = self._lane.empty(array.shape)
        self._lane.copy(array, there)
        return there


class HostEngine:
    def __init__(self, engine: TensorRtEngine) -> None:
        self._engine = engine
        self.name, self.precision = engine.name, engine.precision
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.batch_sizes = engine.batch_sizes

    def session(self, lane: Lane | None = None) -> Session:
        del lane
        return HostSession(self._engine, CudaLane())


class HostRuntime(TensorRtRuntime):
    def lane(self) -> Lane:
        return HostLane()

    def compile(self, *args: Any, **kwargs: Any) -> Engine:
        engine = super().compile(*args, **kwargs)
        assert isinstance(engine, TensorRtEngine)
        return HostEngine(engine)


def writeable(array: Tensor) -> bool:
    return bool(array.flags.writeable)
