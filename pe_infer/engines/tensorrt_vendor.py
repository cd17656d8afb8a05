"""TensorRT 10, TensorRT 11 and TensorRT for RTX: one API, and a table of what differs.

The only module that imports tensorrt and tensorrt_rtx.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pe_infer.errors import Code, ConfigurationError, EngineError

LogLine = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One of NVIDIA's libraries.

    Attributes:
        name: As given to ``--target``.
        module: Its import name.
        install: How to get it.
        majors: Major versions that this package knows.
        needs_gpu: Whether it builds for the GPU that is there, and for that one only.
        times_tactics: Whether it measures while it builds, and keeps that in a timing cache.
        compiles_at_load: Whether kernels are compiled for the GPU when an engine is loaded.
        capabilities: What it can build for, if it needs no GPU.
        default_capabilities: What its engines run on if nothing is asked for, and anything later.
    """

    name: str
    module: str
    install: str
    majors: tuple[int, ...]
    needs_gpu: bool
    times_tactics: bool
    compiles_at_load: bool
    capabilities: tuple[str, ...] = ()
    default_capabilities: tuple[str, ...] = ()


FLAVOURS: Final[Mapping[str, Flavour]] = MappingProxyType(
    {
        "tensorrt": Flavour(
            name="tensorrt",
            module="tensorrt",
            install="pip install 'pe-infer[tensorrt]'; on a Jetson it comes with JetPack",
            majors=(10, 11),
            needs_gpu=True,
            times_tactics=True,
            compiles_at_load=False,
        ),
        "tensorrt-rtx": Flavour(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            install="pip install 'pe-infer[tensorrt-rtx]' (proprietary licence)",
            majors=(1,),
            needs_gpu=False,
            times_tactics=False,
            compiles_at_load=True,
            capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
            # Turing only where it is asked for (TensorRT-RTX documentation, CPU-only AOT)
            default_capabilities=("8.0", "8.6", "8.9", "12.0"),
        ),
    }
)


def installed_targets() -> tuple[str, ...]:
    """Names of the flavours whose library is installed. Imports none of them."""
    return tuple(
        name
        for name, flavour in FLAVOURS.items()
        if importlib.util.find_spec(flavour.module) is not None
    )


class Vendor:
    """A loaded library with a logger.

    Attributes:
        flavour: Which one.
        version: Its full version.
        trt: Its module.
    """

    def __init__(self, target: str, log: LogLine | None = None) -> None:
        """Load the library.

        Args:
            target: One of `FLAVOURS`.
            log: Takes the library's log, line by line, errors too. It may be called from threads
                of the library.

        Raises:
            ConfigurationError: There is no such target.
            EngineError: The library is not installed, cannot be loaded, or is of a version that is
                not known (``engine.unavailable``).
        """
        if target not in FLAVOURS:
            raise ConfigurationError(f"target={target!r} must be one of {list(FLAVOURS)}")
        self.flavour = FLAVOURS[target]
        self.trt = _load(self.flavour)
        self.version = str(self.trt.__version__)
        major = int(self.version.partition(".")[0])
        if major not in self.flavour.majors:
            raise EngineError(
                f"{target} {self.version} is installed, this pe_infer knows versions "
                f"{' and '.join(map(str, self.flavour.majors))}: {self.flavour.install}",
                code=Code.ENGINE_UNAVAILABLE,
            )
        self.logger = _logger(self.trt, log)

    @contextmanager
    def translated(self, action: str) -> Iterator[None]:
        """Give what the library raises or logs as an error as our own `EngineError`."""
        self.logger.errors.clear()
        try:
            yield
        except EngineError:
            raise
        except Exception as exc:
            raise self.failure(action, str(exc)) from exc

    def failure(self, action: str, reason: str = "") -> EngineError:
        """What went wrong, with what the library has logged since the action began."""
        said = [line for line in (reason, *self.logger.errors) if line]
        return EngineError(
            f"{self.flavour.name} {self.version} failed to {action}: "
            f"{'; '.join(dict.fromkeys(said)) or 'it gives no reason'}"
        )


def _load(flavour: Flavour) -> Any:
    present = installed_targets()
    if flavour.name not in present:
        others = f" ({', '.join(present)} is installed)" if present else ""
        raise EngineError(
            f"target {flavour.name!r} needs the package {flavour.module}, which is not "
            f"installed{others}: {flavour.install}",
            code=Code.ENGINE_UNAVAILABLE,
        )
    try:
        return importlib.import_module(flavour.module)
    except Exception as exc:
        raise EngineError(
            f"{flavour.name} is installed but cannot be loaded: {exc}",
            code=Code.ENGINE_UNAVAILABLE,
        ) from exc


def _logger(trt: Any, log: LogLine | None) -> Any:
    """An ILogger that keeps errors. Its base class exists only once the library is loaded."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in {severity.INTERNAL_ERROR, severity.ERROR}:
                self.errors.append(message)
            if log and level != severity.VERBOSE:
                log(f"{level.name.lower()}: {message}")

    return Logger()
