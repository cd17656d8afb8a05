"""What decides whether a built engine runs on a machine: its GPU, its TensorRT, its platform.

`Machine.this` asks the CUDA driver itself, which is on every machine that can run an engine;
``nvidia-smi`` is not (Jetson).
"""

import ctypes
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, Final, Self

from pe_infer.errors import ConfigurationError

TARGETS: Final = ("tensorrt", "tensorrt-rtx")  # also the names of the packages
_PLATFORM: Final = "platform"
_SM: Final = "sm"
_CAPABILITY: Final = re.compile(r"(?:sm_?)?([1-9][0-9]?)\.?([0-9])")
_VERSION: Final = re.compile(r"[0-9]+(\.[0-9]+){0,3}")
_DRIVER: Final = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that engines may run on. ``None`` and absent: not known.

    Attributes:
        here: Whether it is the one that this runs on.
        compute_capability: Of its GPU, such as ``"8.6"``.
        versions: Versions of TensorRT by target; one that is told with fewer parts stands for all
            that begin so.
        platform: Operating system and processor, such as ``"linux-x86_64"``.
    """

    here: bool = False
    compute_capability: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    platform: str | None = None

    @classmethod
    def this(cls) -> Self:
        """The machine that this runs on. Loads the CUDA driver, but no TensorRT."""
        found: dict[str, str] = {
            target: known for target in TARGETS if (known := _package_version(target))
        }
        return cls(
            here=True,
            compute_capability=device_capability(),
            versions=MappingProxyType(found),
            platform=this_platform(),
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``sm=87,tensorrt=10.3``.

        Args:
            text: ``sm`` is the compute capability, with or without its point; ``tensorrt`` or
                ``tensorrt-rtx`` a version; ``platform`` as in `this_platform`.

        Raises:
            ConfigurationError: It says something else.
        """
        told: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value or key in told or key not in {_SM, _PLATFORM, *TARGETS}:
                raise ConfigurationError(
                    f"machine {text!r}: {part.strip()!r} is not one of sm=8.7, tensorrt=10.3, "
                    "tensorrt-rtx=1.7 and platform=linux-aarch64, each at most once"
                )
            told[key] = value
        versions: dict[str, str] = {name: told[name] for name in TARGETS if name in told}
        for target, value in versions.items():
            if not _VERSION.fullmatch(value):
                raise ConfigurationError(
                    f"machine {text!r}: {target}={value} is no version such as 10.3 or 10.3.0.26"
                )
        return cls(
            compute_capability=parse_capability(told[_SM]) if _SM in told else None,
            versions=MappingProxyType(versions),
            platform=told.get(_PLATFORM),
        )


def parse_capability(text: str) -> str:
    """A compute capability as ``"8.6"`` from ``8.6``, ``86`` or ``sm_86``.

    Raises:
        ConfigurationError: It is none.
    """
    found = _CAPABILITY.fullmatch(text.strip())
    if not found:
        raise ConfigurationError(f"compute capability {text!r} must be like 8.6, 86 or sm_86")
    return f"{found[1]}.{found[2]}"


def this_platform() -> str:
    """Operating system and processor of this machine."""
    return f"{sys.platform}-{platform.machine()}"


def device_capability(driver: str = _DRIVER) -> str | None:
    """Compute capability of the first GPU that CUDA shows, ``None`` without GPU or driver."""
    try:
        cuda = ctypes.CDLL(driver)
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("cuInit", (0,)),
            ("cuDeviceGet", (ctypes.byref(device), 0)),
        )
        if any(getattr(cuda, name)(*arguments) for name, arguments in calls):
            return None
        for attribute, value in ((_MAJOR, major), (_MINOR, minor)):
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return None
    except (OSError, AttributeError):
        return None
    return f"{major.value}.{minor.value}"


def _package_version(target: str) -> str | None:
    """Of the library for a target, whether it came by itself or for one CUDA version."""
    for suffix in ("", "-cu13", "-cu12"):
        with suppress(PackageNotFoundError):
            return version(target + suffix)
    return None
