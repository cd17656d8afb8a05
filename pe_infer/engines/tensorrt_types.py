"""As much of TensorRT's runtime API as is used, as types: none of its packages has stubs.

A test holds them against the real library (``tests/tensorrt``).
"""

from collections.abc import Sequence
from typing import Any, Protocol


class ExecutionContext(Protocol):
    """``IExecutionContext``: one run at a time."""

    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool:
        """False if the profile does not allow it."""
        ...

    def set_tensor_address(self, name: str, memory: int, /) -> bool:
        """False if there is no such tensor. Addresses are multiples of 256, as CUDA gives them."""
        ...

    def execute_async_v3(self, stream_handle: int, /) -> bool:
        """Queue a run on a CUDA stream; false if it cannot be queued."""
        ...


class RuntimeCache(Protocol):
    """``IRuntimeCache`` of TensorRT for RTX: kernels compiled so far. Thread-safe."""

    def serialize(self) -> Any:
        """A buffer that `deserialize` takes."""
        ...

    def deserialize(self, blob: bytes, /) -> bool:
        """False, and as it was, if they are of another GPU, driver or version."""
        ...


class RuntimeConfig(Protocol):
    """``IRuntimeConfig`` of TensorRT for RTX: how contexts finish an engine's kernels."""

    dynamic_shapes_kernel_specialization_strategy: Any

    def create_runtime_cache(self) -> RuntimeCache:
        """An empty one."""
        ...

    def set_runtime_cache(self, cache: RuntimeCache, /) -> bool:
        """Use a cache, perhaps of another engine's configuration."""
        ...


class CudaEngine(Protocol):
    """``ICudaEngine``: immutable; contexts may be made in any thread."""

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs."""
        ...

    def get_tensor_name(self, index: int, /) -> str:
        """Name of an input or output."""
        ...

    def get_tensor_mode(self, name: str, /) -> Any:
        """``TensorIOMode.INPUT`` or ``OUTPUT``."""
        ...

    def get_tensor_dtype(self, name: str, /) -> Any:
        """A ``DataType``."""
        ...

    def get_tensor_shape(self, name: str, /) -> Sequence[int]:
        """-1 for a free axis."""
        ...

    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Sequence[int]]:
        """Smallest, best and largest shape of an input."""
        ...

    def create_runtime_config(self) -> RuntimeConfig:
        """TensorRT for RTX."""
        ...

    def create_execution_context(self, config: Any = ..., /) -> ExecutionContext | None:
        """With device memory of its own for what lies between layers."""
        ...


class TrtRuntime(Protocol):
    """``Runtime``."""

    def deserialize_cuda_engine(self, serialized_engine: bytes, /) -> CudaEngine | None:
        """Runs what the bytes say: see `pe_infer.engine_folder`."""
        ...
