"""What a GPU says of itself, for reports: nothing here queues any work."""

from dataclasses import dataclass

from pe_infer.cuda.device import device_name, require, translated


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """CuPy's current device.

    Attributes:
        name: As its driver tells it.
        multiprocessors: How many it has.
        clock_mhz: Highest clock in the power mode of the moment.
        memory_bytes: Of the device.
        shares_memory: Whether that is the host's memory too (Jetson).
    """

    name: str
    multiprocessors: int
    clock_mhz: float
    memory_bytes: int
    shares_memory: bool

    @classmethod
    def read(cls) -> "DeviceFacts":
        """Ask it.

        Raises:
            EngineError: There is no CuPy or no GPU (``engine.unavailable``).
        """
        cupy = require()
        with translated("describe the device"):
            known = cupy.cuda.Device().attributes
            return cls(
                name=device_name(),
                multiprocessors=int(known.get("MultiProcessorCount", 0)),
                clock_mhz=known.get("ClockRate", 0) / 1000,  # CUDA says kHz
                memory_bytes=int(cupy.cuda.runtime.memGetInfo()[1]),
                shares_memory=bool(known.get("Integrated", 0)),
            )


def free_bytes() -> int:
    """Device memory that nobody has: neither this process, in pools and engines, nor another.

    Raises:
        EngineError: There is no CuPy or no GPU (``engine.unavailable``).
    """
    cupy = require()
    with translated("ask for free memory"):
        return int(cupy.cuda.runtime.memGetInfo()[0])
