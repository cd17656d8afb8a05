"""The real TensorRT for RTX at run time, as far as it goes without a GPU."""

import inspect
import re
from typing import Any

import pytest
import toy_bundles as toy

from pe_infer.engines import tensorrt_types
from pe_infer.engines.base import EngineOptions
from pe_infer.engines.tensorrt import TensorRtRuntime
from pe_infer.engines.tensorrt_vendor import Vendor
from pe_infer.errors import Code, EngineError
from pe_infer.machine import device_capability

pytestmark = pytest.mark.slow
TYPES = {
    tensorrt_types.ExecutionContext: "IExecutionContext",
    tensorrt_types.RuntimeCache: "IRuntimeCache",
    tensorrt_types.RuntimeConfig: "IRuntimeConfig",
    tensorrt_types.CudaEngine: "ICudaEngine",
    tensorrt_types.TrtRuntime: "Runtime",
}


def members() -> list[tuple[type, str, Any]]:
    """What our types promise: class, name, and the method or ``None``."""
    found: list[tuple[type, str, Any]] = []
    for ours in TYPES:
        methods = [(n, m) for n, m in vars(ours).items() if inspect.isfunction(m) and n[0] != "_"]
        found += [(ours, name, method) for name, method in methods]
        values = [n for n, m in vars(ours).items() if isinstance(m, property)]
        found += [(ours, name, None) for name in (*inspect.get_annotations(ours), *values)]
    return found


@pytest.mark.parametrize(
    ("ours", "name", "method"), members(), ids=[f"{o.__name__}.{n}" for o, n, _ in members()]
)
def test_the_library_has_what_our_types_promise(ours: type, name: str, method: Any) -> None:
    theirs = getattr(getattr(Vendor("tensorrt-rtx").trt, TYPES[ours]), name)
    if method is None:
        return
    overloads = re.findall(rf"{name}\(self: [^,)]+(.*?)\) -> ", theirs.__doc__)
    taken = [len(re.findall(r"(?:^|, )\w+: ", arguments)) for arguments in overloads]
    assert len(inspect.signature(method).parameters) - 1 in taken, theirs.__doc__


def test_the_library_has_what_the_runtime_names() -> None:
    trt = Vendor("tensorrt-rtx").trt
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert trt.DataType.FLOAT.name == "FLOAT"


@pytest.mark.skipif(device_capability() is not None, reason="there is a GPU")
@pytest.mark.parametrize("graph", [toy.encoder(), toy.recurrence(4)])
def test_without_a_driver_loading_an_engine_is_an_error_that_says_so(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pe_infer.engines.tensorrt.require", lambda: None)
    monkeypatch.setattr("pe_infer.engines.tensorrt.device_name", lambda: "none")
    runtime = TensorRtRuntime("tensorrt-rtx", EngineOptions())
    with pytest.raises(EngineError, match=r"failed to load graph: .*CUDA driver") as caught:
        runtime.compile(graph, name="graph", precision="mixed", max_batch=1)
    assert caught.value.code == Code.ENGINE_FAILED
