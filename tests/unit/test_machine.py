"""What is said of a machine, and what the CUDA driver says of this one."""

import ctypes
from typing import Any

import pytest

from pe_infer.errors import ConfigurationError
from pe_infer.machine import Machine, device_capability, parse_capability, this_platform


@pytest.mark.parametrize(
    ("text", "capability"),
    [("8.6", "8.6"), ("86", "8.6"), ("sm_87", "8.7"), ("sm120", "12.0"), ("12.1", "12.1")],
)
def test_a_compute_capability_has_several_forms(text: str, capability: str) -> None:
    assert parse_capability(text) == capability


@pytest.mark.parametrize("text", ["", "8", "0.6", "8.66", "1200", "ampere", "8,6", "sm_"])
def test_refuses_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(ConfigurationError, match="compute capability"):
        parse_capability(text)


def test_reads_a_description() -> None:
    machine = Machine.parse("sm=87, tensorrt=10.3,platform=linux-aarch64")
    assert machine.compute_capability == "8.7"
    assert dict(machine.versions) == {"tensorrt": "10.3"}
    assert machine.platform == "linux-aarch64"
    assert not machine.here


@pytest.mark.parametrize(
    "text",
    [
        *("", "sm", "sm=", "sm=87,sm=86", "gpu=orin", "tensorrt=ten", "tensorrt=1.2.3.4.5"),
        *("sm=87,", "sm=8700", "tensorrt=10."),
    ],
)
def test_refuses_a_description_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Machine.parse(text)


class Driver:
    """Stands in for libcuda."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.failing:
                return 100
            if name == "cuDeviceGetAttribute":
                value = {75: 8, 76: 7}[arguments[1]]
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = value
            return 0

        return call


def test_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert device_capability() == "8.7"
    assert Machine.this().compute_capability == "8.7"


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_without_a_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(failing))
    assert device_capability() is None


def test_without_a_driver_there_is_none() -> None:
    assert device_capability("no-such-library.so") is None


def test_this_machine_is_here() -> None:
    machine = Machine.this()
    assert machine.here
    assert machine.platform == this_platform()
