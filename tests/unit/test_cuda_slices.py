"""Slices that lie on a GPU, in the arrays of any library: taken where they lie, once made."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import Array, FakeGpu
from hypothesis import given
from numpy.typing import NDArray
from strategies import REGULAR, grids, slices, study

from pe_infer import ConfigurationError, Detector, GeometryError, InputError, Slice
from pe_infer.bundle import Bundle
from pe_infer.cuda.device import DeviceStream, require
from pe_infer.cuda.preprocess import DeviceSliceResampler
from pe_infer.dicom import write_series
from pe_infer.errors import Code
from pe_infer.geometry import PatientGrid, Window
from pe_infer.preprocess import SliceResampler
from pe_infer.result import StudyResult

Pixels = NDArray[np.int16] | NDArray[np.uint16]
Make = Callable[[FakeGpu, Pixels, "Producer"], object]
DEFAULT_STREAM = 1


class Producer:
    """Somebody's stream; what is made there is not made before it is waited for."""

    def __init__(self, gpu: FakeGpu, handle: int | None = None) -> None:
        self.gpu = gpu
        self.handle = handle or fake_cuda.Stream(gpu, non_blocking=True).ptr

    def array(self, pixels: Pixels) -> Array:
        made: Array = require().empty(pixels.shape, pixels.dtype)
        self.gpu.finish(0)
        values = pixels.copy()
        self.gpu.enqueue(self.handle, lambda: np.copyto(made._view, values))
        return made


class CudaArray:
    """An array that says where it lies, and perhaps on which stream it is made."""

    def __init__(self, array: Array, **said: Any) -> None:
        self._said = {**array.__cuda_array_interface__, **said}
        self.array = array  # and its memory

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._said


class DlpackArray:
    """An array whose owner makes the stream of who takes it wait."""

    def __init__(self, array: Array, producer: Producer, kind: int = 2) -> None:
        self.array, self.producer, self.kind = array, producer, kind
        self.shape = list(array.shape)
        self.dtype = f"torch.{array.dtype}"

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.array.data.device_id

    def __dlpack__(self, *, stream: int) -> Array:
        ready = require().cuda.Event(disable_timing=True)
        ready.record(self.producer.gpu.stream(self.producer.handle))
        self.producer.gpu.stream(stream).wait_event(ready)
        return self.array


def of_cupy(gpu: FakeGpu, pixels: Pixels, producer: Producer) -> object:
    return CudaArray(producer.array(pixels), stream=producer.handle)


def of_pycuda(gpu: FakeGpu, pixels: Pixels, producer: Producer) -> object:
    array = producer.array(pixels)
    return CudaArray(array, stream=None, strides=array.strides)


def of_pytorch(gpu: FakeGpu, pixels: Pixels, producer: Producer) -> object:
    array = CudaArray(producer.array(pixels), version=2)
    del array._said["stream"]
    return array


def by_dlpack(gpu: FakeGpu, pixels: Pixels, producer: Producer) -> object:
    return DlpackArray(producer.array(pixels), producer)


KINDS = [of_cupy, of_pycuda, of_pytorch, by_dlpack]
GRID = PatientGrid(
    rows=8,
    cols=8,
    spacing_mm=1.0,
    pitch_um=1000,
    planes_per_slab=1,
    slab_step=1,
    windows=(Window(low_hu=0.0, high_hu=1.0),),
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with pytest.MonkeyPatch.context() as patch:
        yield fake_cuda.install(patch)


@pytest.mark.parametrize("kind", KINDS)
@given(image=slices(), grid=grids())
def test_they_are_resampled_as_on_the_cpu(
    gpu: FakeGpu, kind: Make, image: Slice, grid: PatientGrid
) -> None:
    producer, stream = Producer(gpu), DeviceStream()
    resample = DeviceSliceResampler(grid, stream, producer)
    there: Any = kind(gpu, image.host_pixels, producer)
    on_gpu = replace(image, pixels=there)
    resampled = resample(on_gpu)
    overwrite(there, producer)
    np.testing.assert_array_equal(stream.fetch([resampled])[0], SliceResampler(grid)(image))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_their_values_can_be_had_on_the_host(gpu: FakeGpu, kind: Make, dtype: Any) -> None:
    image = study([0])[0]
    image = replace(image, pixels=image.host_pixels.astype(dtype))
    producer = Producer(gpu)
    resample = DeviceSliceResampler(GRID, DeviceStream(), producer)
    stored = resample.stored(replace(image, pixels=kind(gpu, image.host_pixels, producer)))
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, image.host_pixels)
    assert resample.stored(image) is image.pixels


@pytest.mark.parametrize("kind", [of_pycuda, of_pytorch])
def test_who_names_no_stream_is_taken_to_use_the_default_stream(gpu: FakeGpu, kind: Make) -> None:
    image = study([0])[0]
    producer = Producer(gpu, DEFAULT_STREAM)
    resample = DeviceSliceResampler(GRID, DeviceStream())
    stored = resample.stored(replace(image, pixels=kind(gpu, image.host_pixels, producer)))
    np.testing.assert_array_equal(stored, image.host_pixels)


def test_the_stream_that_an_array_names_comes_before_the_one_of_the_study(gpu: FakeGpu) -> None:
    image = study([0])[0]
    resample = DeviceSliceResampler(GRID, DeviceStream(), Producer(gpu))
    there = of_cupy(gpu, image.host_pixels, Producer(gpu))
    np.testing.assert_array_equal(resample.stored(replace(image, pixels=there)), image.pixels)


def test_an_array_of_cupy_names_the_stream_of_who_pushes_it(gpu: FakeGpu) -> None:
    """CuPy names whichever stream is current when it is asked."""
    image = study([0])[0]
    producer, stream = DeviceStream(), DeviceStream()
    there: Any = producer.empty((8, 8), np.int16)
    producer.upload(image.host_pixels, there)
    with producer:
        stored = DeviceSliceResampler(GRID, stream).stored(replace(image, pixels=there))
    np.testing.assert_array_equal(stored, image.host_pixels)


def test_host_and_device_slices_mix(gpu: FakeGpu) -> None:
    images = study(REGULAR[:6])
    producer, stream = Producer(gpu), DeviceStream()
    resample = DeviceSliceResampler(GRID, stream, producer)
    mixed = [
        replace(image, pixels=kind(gpu, image.host_pixels, producer)) if kind else image
        for image, kind in zip(images, [None, *KINDS, None], strict=True)
    ]
    found = stream.fetch([resample(image) for image in mixed])
    for image, resampled in zip(images, found, strict=True):
        np.testing.assert_array_equal(resampled, SliceResampler(GRID)(image))


def overwrite(there: Any, producer: Producer) -> None:
    """The buffer is the producer's again."""
    producer.gpu.finish(producer.handle)
    there.array._view[...] = 0


def slice_of(pixels: Any) -> Slice:
    return replace(study([0])[0], pixels=pixels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pixels",
    [np.zeros((8, 9), np.int16), np.zeros((8, 8), np.int32), np.zeros(64, np.int16)],
    ids=["shape", "type", "flat"],
)
def test_another_shape_or_type_is_refused(gpu: FakeGpu, kind: Make, pixels: Any) -> None:
    there = kind(gpu, pixels, Producer(gpu))
    with pytest.raises(GeometryError, match=r"expected int16 or uint16 \(8, 8\)") as caught:
        slice_of(there)
    assert caught.value.code == Code.BAD_GEOMETRY


def test_gaps_and_other_orders_are_refused(gpu: FakeGpu) -> None:
    producer = Producer(gpu)
    wide = producer.array(np.zeros((8, 16), np.int16))[:, :8]
    turned = CudaArray(producer.array(np.zeros((8, 8), np.int16)), strides=(2, 16))
    for pixels in (wide, turned):
        with pytest.raises(GeometryError, match=r"row by row without gaps.*contiguous\(\)"):
            slice_of(pixels)

    resample = DeviceSliceResampler(GRID, DeviceStream())  # DLPack tells it only then
    with pytest.raises(GeometryError, match="row by row without gaps") as caught:
        resample(slice_of(DlpackArray(wide, producer)))
    assert caught.value.code == Code.BAD_GEOMETRY


def test_strides_of_axes_of_one_do_not_matter(gpu: FakeGpu) -> None:
    image = study([0], size=1)[0]
    there = CudaArray(Producer(gpu).array(image.host_pixels), strides=(999, 777))
    assert replace(image, pixels=there).pixels is there


@pytest.mark.parametrize("pixels", [[[1]], "text", None, np.int16(3)])
def test_what_is_no_array_is_refused(pixels: Any) -> None:
    with pytest.raises(GeometryError, match="in a NumPy array or on an NVIDIA GPU"):
        slice_of(pixels)


def test_dlpack_of_another_kind_of_device_is_refused(gpu: FakeGpu) -> None:
    """Such as a PyTorch tensor in memory: kDLCPU."""
    producer = Producer(gpu)
    there = DlpackArray(producer.array(np.zeros((8, 8), np.int16)), producer, kind=1)
    with pytest.raises(GeometryError, match=r"DlpackArray .* expected int16"):
        slice_of(there)


def test_pixels_on_another_gpu_are_refused(gpu: FakeGpu) -> None:
    with require().cuda.Device(1):
        elsewhere = Producer(gpu).array(np.zeros((8, 8), np.int16))
    resample = DeviceSliceResampler(GRID, DeviceStream())
    with pytest.raises(InputError, match="lie on GPU 1, the study runs on GPU 0") as caught:
        resample(slice_of(elsewhere))
    assert caught.value.code == Code.ENGINE_INPUT


def test_a_producer_that_is_no_stream_is_refused(gpu: FakeGpu) -> None:
    with pytest.raises(ConfigurationError, match="no CUDA stream"):
        DeviceSliceResampler(GRID, DeviceStream(), "stream 7")


def test_the_processor_does_not_read_them(gpu: FakeGpu, tmp_path: Path) -> None:
    image = slice_of(Producer(gpu).array(np.zeros((8, 8), np.int16)))
    for use in (SliceResampler(GRID), lambda image: write_series([image], tmp_path)):
        with pytest.raises(InputError, match=r"slice 0: .*engine='tensorrt'.*cupy\.asnumpy"):
            use(image)


# Whole studies.


@pytest.fixture
def on_gpu(gpu: FakeGpu, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    library = fake_tensorrt.FakeTensorRt("1.7.1.116", "tensorrt_rtx")
    library.queue = gpu.enqueue
    fake_tensorrt.install(monkeypatch, library)
    settings: dict[str, Any] = {"precision": "float32", "cache_dir": None}
    with Detector(bundle.folder, engine="tensorrt-rtx", **settings) as detector:
        yield detector


@pytest.fixture
def on_cpu(bundle: Bundle) -> Iterator[Detector]:
    settings: dict[str, Any] = {"precision": "float32", "cache_dir": None}
    with Detector(bundle.folder, engine="onnxruntime", **settings) as detector:
        yield detector


def comparable(result: StudyResult) -> Any:
    return result.probability, [(e.position_mm, e.gated, e.probability) for e in result.evidence]


def test_a_study_of_slices_on_the_gpu_is_that_of_the_same_slices_in_memory(
    gpu: FakeGpu, on_gpu: Detector
) -> None:
    images, producer = study(REGULAR[:30]), Producer(gpu)
    expected = on_gpu.detect(images)
    for kind in KINDS:
        with on_gpu.open(producer_stream=producer) as stream:
            for image in reversed(images):
                there: Any = kind(gpu, image.host_pixels, producer)
                stream.push(replace(image, pixels=there))
                overwrite(there, producer)
            assert comparable(stream.finish(timeout=60)) == comparable(expected)


def test_a_slice_sent_again_from_the_gpu_is_known(gpu: FakeGpu, on_gpu: Detector) -> None:
    images, producer = study(REGULAR[:30]), Producer(gpu)
    with on_gpu.open(producer_stream=producer) as stream:
        for image in images:
            stream.push(image)
            stream.push(replace(image, pixels=of_pytorch(gpu, image.host_pixels, producer)))
        assert comparable(stream.finish(timeout=60)) == comparable(on_gpu.detect(images))


def test_a_study_on_the_cpu_refuses_them_and_goes_on(gpu: FakeGpu, on_cpu: Detector) -> None:
    images = study(REGULAR[:30])
    there = of_pytorch(gpu, images[0].host_pixels, Producer(gpu))
    with on_cpu.open() as stream:
        with pytest.raises(InputError, match="lie on a GPU") as caught:
            stream.push(replace(images[0], pixels=there))
        assert caught.value.code == Code.ENGINE_INPUT
        for image in images:
            stream.push(image)
        assert stream.finish(timeout=60).probability is not None


def test_a_producer_of_a_study_on_the_cpu_is_refused(on_cpu: Detector) -> None:
    with pytest.raises(ConfigurationError, match="producer_stream=1 with engine 'onnxruntime'"):
        on_cpu.open(producer_stream=1)
