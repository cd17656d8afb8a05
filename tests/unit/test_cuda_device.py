"""Streams and copies on a fake GPU, which does nothing before somebody waits for it."""

import gc
import sys
import threading
import types
from typing import Any

import fake_cuda
import numpy as np
import pytest

from pe_infer.cuda.device import (
    STAGED,
    DeviceStream,
    available,
    device_name,
    require,
    stream_handle,
    translated,
)
from pe_infer.errors import Code, ConfigurationError, EngineError, InputError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeGpu:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def stream(gpu: fake_cuda.FakeGpu) -> DeviceStream:
    return DeviceStream()


def test_what_was_uploaded_comes_back(stream: DeviceStream) -> None:
    arrays = [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.array([[-5], [7]], np.int16),
        np.array([2**63], np.uint64),
    ]
    there = [stream.empty(array.shape, array.dtype) for array in arrays]
    for array, device in zip(arrays, there, strict=True):
        stream.upload(array, device)
    for array, found in zip(arrays, stream.fetch(there), strict=True):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_a_buffer_may_be_changed_once_its_upload_has_returned(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu
) -> None:
    """More uploads than are staged, and larger ones: each is waited for before it is covered."""
    host = np.empty(64, np.int16)
    there = []
    for value in range(3 * STAGED):
        host = np.empty(64 * (1 + value // STAGED), np.int16)
        host[:] = value
        there.append(stream.empty(host.shape, host.dtype))
        stream.upload(host, there[-1])
        host[:] = -1
    for value, found in enumerate(stream.fetch(there)):
        np.testing.assert_array_equal(found, value)
    assert gpu.waits > 1


def test_uploads_wait_only_when_all_slots_are_taken(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu
) -> None:
    host = np.zeros(8, np.float32)
    there = stream.empty(host.shape)
    for _ in range(STAGED):
        stream.upload(host, there)
    assert gpu.waits == 0
    stream.upload(host, there)
    assert gpu.waits == 1


def test_results_stay_what_they_are(stream: DeviceStream) -> None:
    there = stream.empty((4,))
    stream.upload(np.full(4, 1, np.float32), there)
    (first,) = stream.fetch([there])
    stream.upload(np.full(4, 2, np.float32), there)
    (second,) = stream.fetch([there])
    np.testing.assert_array_equal(first, 1)
    np.testing.assert_array_equal(second, 2)


def test_several_arrays_are_fetched_with_one_wait(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu
) -> None:
    there = [stream.empty((n, 2)) for n in range(4)]
    found = stream.fetch(there)
    assert [array.shape for array in found] == [(n, 2) for n in range(4)]
    assert gpu.waits == 1


def test_memory_is_handed_out_again_behind_the_work_that_uses_it(stream: DeviceStream) -> None:
    first = stream.empty((100,))
    stream.upload(np.full(100, 3, np.float32), first)
    kept = stream.empty((100,))
    with stream:
        kept[...] = first
    address = first.data.ptr
    del first
    again = stream.empty((100,))
    assert again.data.ptr == address
    stream.upload(np.full(100, 4, np.float32), again)
    np.testing.assert_array_equal(stream.fetch([kept])[0], 3)


def test_once_it_is_warm_nothing_is_allocated(gpu: fake_cuda.FakeGpu) -> None:
    """The next study takes over the stream, and with it what the pool keeps for that stream."""

    def study() -> int:
        stream = DeviceStream()
        host = np.zeros((16, 16), np.float32)
        for _ in range(20):
            there = stream.empty(host.shape)
            stream.upload(host, there)
            stream.fetch([there])
        return stream.handle

    handle = study()
    gc.collect()
    before = gpu.allocations
    for _ in range(3):
        assert study() == handle
    assert gpu.allocations == before


def test_studies_at_the_same_time_have_streams_of_their_own(gpu: fake_cuda.FakeGpu) -> None:
    streams = [DeviceStream() for _ in range(3)]
    assert len({stream.handle for stream in streams}) == 3


def test_it_is_the_current_stream_of_this_thread_only(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu
) -> None:
    other = DeviceStream()
    seen = []
    with stream:
        with other, other:
            assert gpu.current.ptr == other.handle
            thread = threading.Thread(target=lambda: seen.append(gpu.current.ptr))
            thread.start()
            thread.join()
        assert gpu.current.ptr == stream.handle
    assert gpu.current.ptr == 0
    assert seen == [0]


def test_its_device_is_current_wherever_it_is_used(gpu: fake_cuda.FakeGpu) -> None:
    """Threads with different devices use it at once and get their own devices back."""
    with require().cuda.Device(1):
        stream = DeviceStream()
    assert stream.device_id == 1
    barrier = threading.Barrier(2, timeout=10)
    seen = []

    def use(device: int) -> None:
        gpu.local.device = device
        barrier.wait()
        for _ in range(200):
            with stream:
                seen.append((gpu.device, 1))
            seen.append((gpu.device, device))

    threads = [threading.Thread(target=use, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 800
    assert all(found == expected for found, expected in seen)
    assert DeviceStream().device_id == 0


def test_threads_may_upload_and_fetch_at_once(stream: DeviceStream, gpu: fake_cuda.FakeGpu) -> None:
    gpu.latency_s = 1e-4
    failures = []

    def use(value: int) -> None:
        there = stream.empty((256,))
        for count in range(20):
            expected = np.full(256, 100 * value + count, np.float32)
            stream.upload(expected, there)
            if not np.array_equal(stream.fetch([there])[0], expected):
                failures.append((value, count))

    threads = [threading.Thread(target=use, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_it_waits_for_another_stream_on_the_gpu(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu
) -> None:
    producer = DeviceStream()
    made, taken = producer.empty((8,)), stream.empty((8,))
    producer.upload(np.full(8, 5, np.float32), made)
    stream.after(producer)
    with stream:
        taken[...] = made
    assert gpu.waits == 0
    np.testing.assert_array_equal(stream.fetch([taken])[0], 5)


@pytest.mark.parametrize(
    "stream",
    [
        0x70,
        types.SimpleNamespace(__cuda_stream__=lambda: (0, 0x70), handle="a CUstream"),
        types.SimpleNamespace(__cuda_stream__=(0, 0x70)),
        types.SimpleNamespace(handle=0x70),  # PyCUDA
        types.SimpleNamespace(ptr=0x70),  # CuPy
        types.SimpleNamespace(cuda_stream=0x70),  # PyTorch
    ],
    ids=["int", "method", "attribute", "PyCUDA", "CuPy", "PyTorch"],
)
def test_streams_of_other_libraries_are_understood(stream: object) -> None:
    assert stream_handle(stream) == 0x70


@pytest.mark.parametrize("stream", [None, "default", -1, 1.5, types.SimpleNamespace(handle="x")])
def test_what_is_no_stream_is_refused(stream: object) -> None:
    with pytest.raises(ConfigurationError, match="is no CUDA stream"):
        stream_handle(stream)


def test_a_stream_says_its_handle_by_the_protocol(stream: DeviceStream) -> None:
    assert stream_handle(stream) == stream.handle


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(EngineError, match=r"pip install 'pe-infer\[gpu\]'") as caught:
        DeviceStream()
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def test_without_a_gpu_it_says_so(gpu: fake_cuda.FakeGpu) -> None:
    assert available() is None
    assert device_name() == "Fake GPU 0"
    gpu.remove()
    assert str(available()).startswith("CUDA finds no GPU: cudaErrorNoDevice")
    with pytest.raises(EngineError, match="no CUDA-capable device") as caught:
        require()
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize("call", ["empty", "upload", "fetch", "wait", "after", "__enter__"])
def test_what_cuda_raises_becomes_an_engine_error(
    stream: DeviceStream, gpu: fake_cuda.FakeGpu, call: str
) -> None:
    there = stream.empty((2,))
    arguments: dict[str, tuple[Any, ...]] = {
        "empty": ((100, 100),),
        "upload": (np.zeros(2, np.float32), there),
        "fetch": ([there],),
        "after": (1,),
    }
    gpu.error = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    with pytest.raises(EngineError, match=r"CUDA failed to .*illegal memory access") as caught:
        getattr(stream, call)(*arguments.get(call, ()))
    assert caught.value.code == Code.ENGINE_FAILED
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_our_own_errors_pass_as_they_are() -> None:
    with pytest.raises(InputError, match=r"^ours$"), translated("do anything"):
        raise InputError("ours", code=Code.ENGINE_INPUT)
