"""Stored values of a slice, in memory or on a GPU.

An array on a GPU is known by what it says of itself, so no library for GPUs is imported here.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from pe_infer.errors import Code, GeometryError, InputError


class CudaArray(Protocol):
    """An array on an NVIDIA GPU that says where: of CuPy, PyTorch, PyCUDA, Numba and others."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Shape, type and address; from version 3 on the stream that it is made on."""
        ...


class DlpackArray(Protocol):
    """An array that is handed over by DLPack, the way of the array API standard."""

    @property
    def shape(self) -> Any:
        """Lengths of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the values."""
        ...

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Hand it over, ready on the stream of who takes it."""
        ...

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Kind and number of the device it lies on."""
        ...


StoredPixels: TypeAlias = NDArray[np.int16] | NDArray[np.uint16]
DevicePixels: TypeAlias = CudaArray | DlpackArray

_CUDA: Final = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


def on_gpu(pixels: StoredPixels | DevicePixels) -> TypeGuard[DevicePixels]:
    """Whether an array lies on an NVIDIA GPU."""
    if isinstance(pixels, np.ndarray):
        return False
    if hasattr(pixels, "__cuda_array_interface__"):
        return True
    return hasattr(pixels, "__dlpack_device__") and pixels.__dlpack_device__()[0] in _CUDA


def on_host(pixels: StoredPixels | DevicePixels, source: str) -> StoredPixels:
    """The same array, where the processor can read it.

    Raises:
        InputError: It lies on a GPU (``engine.invalid_input``).
    """
    if isinstance(pixels, np.ndarray):
        return pixels
    raise InputError(
        f"{source}: its pixels lie on a GPU and are wanted on the processor: choose an engine on "
        "that GPU, such as engine='tensorrt', or copy them first, as with cupy.asnumpy(a), "
        "tensor.cpu().numpy() or gpuarray.get()",
        code=Code.ENGINE_INPUT,
    )


def checked(
    pixels: StoredPixels | DevicePixels, shape: tuple[int, int], source: str
) -> StoredPixels | DevicePixels:
    """The array, or if it lies in memory and is not C-contiguous a copy that is.

    Raises:
        GeometryError: It has another shape, or a dtype other than int16 or uint16; or it lies on a
            GPU and is not C-contiguous (``geometry.invalid``).
    """
    interface: Mapping[str, Any] = getattr(pixels, "__cuda_array_interface__", {})
    if interface:
        dtype, found = str(np.dtype(interface["typestr"])), tuple(interface["shape"])
    elif isinstance(pixels, np.ndarray):
        dtype, found = str(pixels.dtype), pixels.shape
    elif on_gpu(pixels):
        array = cast("DlpackArray", pixels)
        dtype, found = str(array.dtype).rpartition(".")[2], tuple(array.shape)
    else:
        dtype, found = type(pixels).__qualname__, ()
    if found != shape or dtype not in {"int16", "uint16"}:
        raise GeometryError(
            f"{source}: pixels are {dtype} {found}, expected int16 or uint16 {shape}, in a NumPy "
            "array or on an NVIDIA GPU",
            code=Code.BAD_GEOMETRY,
        )
    if isinstance(pixels, np.ndarray):
        return np.ascontiguousarray(pixels)
    if (strides := interface.get("strides")) is not None:
        refuse_gaps(shape, strides, 2, source)
    return pixels


def refuse_gaps(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, source: str
) -> None:
    """Check that an array on a GPU is C-contiguous; DLPack tells only who takes the array.

    Raises:
        GeometryError: It is not.
    """
    step = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            raise GeometryError(
                f"{source}: pixels on a GPU must lie row by row without gaps, their strides are "
                f"{strides} for the shape {shape}: copy them first, as with "
                "cupy.ascontiguousarray(a) or tensor.contiguous()",
                code=Code.BAD_GEOMETRY,
            )
        step *= size
