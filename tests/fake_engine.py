"""An inference runtime in NumPy (onnx.reference) that counts, remembers and fails on demand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from onnx import TensorProto, checker, load_model_from_string
from onnx.reference import ReferenceEvaluator

from pe_infer.engines.base import (
    Engine,
    EngineOptions,
    Session,
    TensorSpec,
    batch_sizes,
    check_tensors,
)
from pe_infer.engines.lane import HostLane, Lane, Tensor
from pe_infer.errors import EngineError

BeforeRun = Callable[[str, int], None]


class FakeSession:
    def __init__(self, engine: "FakeEngine") -> None:
        self._engine = engine
        self._evaluator = engine.evaluator
        self._buffers: dict[str, Tensor] = {}

    def run(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        engine, given = self._engine, out or {}
        batch = check_tensors(engine, inputs, given)
        engine.runtime.before_run(engine.name, batch)
        names = list(engine.outputs)
        try:
            values = self._evaluator.run(names, dict(inputs))
        except Exception as exc:
            raise EngineError(f"the fake failed to run {engine.name}: {exc}") from exc
        results: dict[str, Tensor] = {}
        for name, value in zip(names, values, strict=True):
            if name in given:
                results[name] = given[name]
            else:  # the same memory every time, as in a real runtime
                results[name] = self._buffers.setdefault(name, np.empty(value.shape, np.float32))
                results[name].resize(value.shape, refcheck=False)
            results[name][...] = value
        engine.runtime.runs.append((engine.name, batch))
        return results


class FakeEngine:
    precision = "float32"

    def __init__(self, runtime: "FakeRuntime", graph: bytes, name: str, max_batch: int) -> None:
        model = load_model_from_string(graph)
        checker.check_model(model)
        self.runtime = runtime
        self.name = name
        self.evaluator = ReferenceEvaluator(model)
        self.inputs = _specs(model.graph.input)
        self.outputs = _specs(model.graph.output)
        self.batch_sizes = batch_sizes(runtime.options.max_batch or 1, max_batch)

    def session(self, lane: Lane | None = None) -> Session:  # noqa: ARG002  plain memory
        return FakeSession(self)


class BlankLane(HostLane):
    """What is read before it is written shows."""

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return np.full(shape, np.nan, np.float32)


class FakeRuntime:
    """``runs`` lists (graph, batch) of every run; ``before_run`` may raise to make one fail."""

    name = "fake"
    version = "1"
    device = "NumPy"

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.runs: list[tuple[str, int]] = []
        self.before_run: BeforeRun = lambda _name, _batch: None

    def compile(
        self,
        graph: bytes,
        *,
        name: str,
        precision: str = "float32",  # noqa: ARG002  it has one
        max_batch: int = 1,
    ) -> Engine:
        try:
            return FakeEngine(self, graph, name, max_batch)
        except Exception as exc:
            raise EngineError(f"the fake failed to compile {name}: {exc}") from exc

    def lane(self) -> Lane:
        return BlankLane()

    def fail_at(self, run: int) -> None:
        """Let the run of that index (counted from now) fail, and those after it work."""
        countdown = [run]

        def maybe_fail(name: str, _batch: int) -> None:
            countdown[0] -= 1
            if countdown[0] == -1:
                raise EngineError(f"{name}: made to fail")

        self.before_run = maybe_fail


def _specs(values: object) -> Mapping[str, TensorSpec]:
    specs = {}
    for value in values:  # type: ignore[attr-defined]
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        dtype = "float32" if kind.elem_type == TensorProto.FLOAT else "float64"
        specs[value.name] = TensorSpec(name=value.name, shape=shape, dtype=dtype)
    return MappingProxyType(specs)
