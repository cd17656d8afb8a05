"""Where the work of one study is queued, and the memory it lives in.

On a CPU nothing is queued and memory is memory: `HostLane`. On a GPU a lane is a CUDA stream with
device memory (`pe_infer.cuda`): whatever is asked of it comes after what was asked before, the
caller does not wait, and only `Lane.fetch` and `Lane.wait` let values and errors come back.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from pe_infer.cuda.device import DeviceArray, DeviceStream

Tensor: TypeAlias = NDArray[np.float32]
"""C-contiguous float32. On a device lane, an array of that device that offers the same interface:
shape, dtype, flags, slices of rows, assignment through ``[...]`` and ``fill``."""


class Lane(Protocol):
    """One study's queue and memory. Not thread-safe.

    As a context manager it is the queue of what this thread does with its arrays.
    """

    @property
    def stream(self) -> DeviceStream | None:
        """The CUDA stream; ``None`` on the host."""
        ...

    def __enter__(self) -> Self:
        """Begin to queue here; may be nested."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Go on where the thread was before."""
        ...

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory that engines use without a copy; its values are arbitrary.

        It may be dropped while queued work uses it: it is handed out again to later work of the
        same queue only.
        """
        ...

    def holds(self, array: Tensor) -> bool:
        """Whether engines can use an array where it lies."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy into memory of this lane.

        Args:
            source: On the host or of this lane; may be changed once this returns.
            target: Of this lane, of the same shape.
        """
        ...

    def fetch(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Values on the host, all waited for together.

        Returns:
            NumPy arrays, only to be read: on the host, the arrays themselves.

        Raises:
            EngineError: Work that was queued before has failed (``engine.failed``).
        """
        ...

    def wait(self) -> None:
        """Wait for everything that was queued.

        Raises:
            EngineError: Some of it has failed (``engine.failed``).
        """
        ...


class HostLane:
    """Plain memory, and nothing to wait for."""

    stream = None

    def __enter__(self) -> Self:
        """Return the lane."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to end."""

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `Lane.empty`."""
        return np.empty(shape, np.float32)

    def holds(self, array: Tensor) -> bool:
        """See `Lane.holds`."""
        return bool(array.flags.c_contiguous)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See `Lane.copy`."""
        target[...] = source

    def fetch(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """The arrays themselves."""
        return list(arrays)

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaLane:
    """A CUDA stream with memory of its device."""

    def __init__(self) -> None:
        """Take a stream.

        Raises:
            EngineError: There is no CuPy or no GPU (``engine.unavailable``).
        """
        self.stream = DeviceStream()

    def __enter__(self) -> Self:
        """Make it CuPy's current stream."""
        self.stream.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Make current what was so before."""
        self.stream.__exit__(kind, value, traceback)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `Lane.empty`."""
        return cast("Tensor", self.stream.empty(shape))

    def holds(self, array: Tensor) -> bool:
        """See `Lane.holds`."""
        return not _on_host(array) and bool(array.flags.c_contiguous)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See `Lane.copy`."""
        if _on_host(source):
            self.stream.upload(np.ascontiguousarray(source), cast("DeviceArray", target))
        else:
            with self:
                target[...] = source

    def fetch(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """See `Lane.fetch`; waits for nothing if there is nothing to fetch."""
        return self.stream.fetch(cast("Sequence[DeviceArray]", arrays)) if arrays else []

    def wait(self) -> None:
        """See `Lane.wait`."""
        self.stream.wait()


def _on_host(array: object) -> bool:
    return isinstance(array, np.ndarray)
