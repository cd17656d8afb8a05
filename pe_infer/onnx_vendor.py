"""The onnx package, imported late. The only module that names it; `half` and `roofline` use it.

It is not needed to run a bundle, only to build engines and to count what graphs cost.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pe_infer.errors import Code, EngineError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    __all__ = ["GraphProto", "ModelProto", "NodeProto", "TensorProto", "onnx_module"]


def onnx_module(needed_for: str) -> Any:
    """Import onnx with the modules that are used here; it imports some of them by itself.

    Args:
        needed_for: For the message, in the plural: ``float16 graphs``.

    Raises:
        EngineError: It is not installed, or broken (``engine.unavailable``).
    """
    try:
        onnx = importlib.import_module("onnx")
        for module in ("checker", "helper", "numpy_helper", "shape_inference"):
            importlib.import_module(f"onnx.{module}")
    except Exception as exc:
        raise EngineError(
            f"{needed_for} need the package onnx, which cannot be imported ({exc}): "
            "pip install onnx, which comes with 'pe-infer[tensorrt-rtx]' and 'pe-infer[tensorrt]'",
            code=Code.ENGINE_UNAVAILABLE,
        ) from exc
    return onnx
