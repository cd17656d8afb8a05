"""What GPUs can do at best, as their makers publish it: dense rates, without sparsity.

NVIDIA's figures for Jetson are sparse INT8 TOPS; half of it is dense INT8, and half of that dense
FP16, the ratios of the Ampere tensor core. Rates hold at the highest clock of the mode named; under
a lower power limit they fall with the clock.
"""

from dataclasses import dataclass
from typing import Final

_TERA: Final = 1e12
_GIGA: Final = 1e9
_PCIE4: Final = 31.5 * _GIGA  # 16 lanes, one direction, after 128b/130b encoding
_PCIE5: Final = 63.0 * _GIGA
_DESKTOP_LAUNCH_S: Final = 5e-6
_JETSON_LAUNCH_S: Final = 10e-6
_SAME_CLOCK: Final = 0.1  # cards of several makers differ by less, modes of a Jetson by more


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peak rates of one GPU.

    Attributes:
        name: With the mode, where the rates depend on it.
        device: What the driver's device name contains.
        capability: Compute capability.
        multiprocessors: How many it has.
        clock_mhz: At which the rates hold.
        tensor_flops: Dense FP16 products on tensor cores with float32 sums, per second.
        float_flops: Float32 operations per second, a fused multiply-add being two.
        memory_bandwidth: Bytes per second.
        link_bandwidth: Bytes per second from host to device and back; ``None`` where both share one
            memory: a copy is then a read and a write of it.
        launch_s: What every launch adds. An assumption, no published figure.
        source: Where the rates are published, and what was derived from them.
    """

    name: str
    device: str
    capability: str
    multiprocessors: int
    clock_mhz: int
    tensor_flops: float
    float_flops: float
    memory_bandwidth: float
    link_bandwidth: float | None
    launch_s: float
    source: str

    def copy_s(self, copied_bytes: int) -> float:
        """Time of a copy between host and device."""
        if self.link_bandwidth is None:
            return 2 * copied_bytes / self.memory_bandwidth
        return copied_bytes / self.link_bandwidth


def _jetson(
    *,
    name: str,
    multiprocessors: int,
    clock_mhz: int,
    dense_int8: float,
    fp32: float,
    bandwidth: float,
    source: str,
) -> Gpu:
    """Rates in tera-operations and GB per second."""
    return Gpu(
        name=name,
        device="Orin",
        capability="8.7",
        multiprocessors=multiprocessors,
        clock_mhz=clock_mhz,
        tensor_flops=dense_int8 / 2 * _TERA,
        float_flops=fp32 * _TERA,
        memory_bandwidth=bandwidth * _GIGA,
        link_bandwidth=None,
        launch_s=_JETSON_LAUNCH_S,
        source=source,
    )


def _card(
    *,
    name: str,
    device: str,
    capability: str,
    multiprocessors: int,
    clock_mhz: int,
    fp16: float,
    fp32: float,
    bandwidth: float,
    link: float,
    source: str,
) -> Gpu:
    """Rates in TFLOP/s and GB/s."""
    return Gpu(
        name=name,
        device=device,
        capability=capability,
        multiprocessors=multiprocessors,
        clock_mhz=clock_mhz,
        tensor_flops=fp16 * _TERA,
        float_flops=fp32 * _TERA,
        memory_bandwidth=bandwidth * _GIGA,
        link_bandwidth=link,
        launch_s=_DESKTOP_LAUNCH_S,
        source=source,
    )


GPUS: Final = (
    _jetson(
        name="Jetson Orin Nano 8GB, 15 W",
        multiprocessors=8,
        clock_mhz=625,
        dense_int8=20,
        fp32=1.28,
        bandwidth=68,
        source="NVIDIA, Jetson Orin Nano Series data sheet: 1024 CUDA cores, 32 tensor cores, "
        "625 MHz, 40 sparse (20 dense) INT8 TOPS, 68 GB/s; FP32 from cores and clock",
    ),
    _jetson(
        name="Jetson Orin Nano 8GB Super, 25 W",
        multiprocessors=8,
        clock_mhz=1020,
        dense_int8=33,
        fp32=2.09,
        bandwidth=102,
        source="NVIDIA, Jetson Orin Nano Super Developer Kit data sheet: 1020 MHz, 67 sparse "
        "(33 dense) INT8 TOPS, 102 GB/s; FP32 from cores and clock",
    ),
    _jetson(
        name="Jetson Orin NX 16GB, 25 W",
        multiprocessors=8,
        clock_mhz=918,
        dense_int8=30,
        fp32=1.88,
        bandwidth=102.4,
        source="NVIDIA, Jetson Orin NX Series data sheet: 1024 CUDA cores, 32 tensor cores, "
        "918 MHz, 60 sparse (30 dense) INT8 TOPS of the GPU alone, 102.4 GB/s",
    ),
    _jetson(
        name="Jetson AGX Orin 64GB, MAXN",
        multiprocessors=16,
        clock_mhz=1300,
        dense_int8=85,
        fp32=5.3,
        bandwidth=204.8,
        source="NVIDIA, Jetson AGX Orin Series technical brief: 2048 CUDA cores, 64 tensor cores, "
        "1.3 GHz, 170 sparse (85 dense) INT8 TOPS of the GPU alone, 5.3 FP32 TFLOPS, 204.8 GB/s",
    ),
    _card(
        name="RTX 4000 Ada",
        device="RTX 4000 Ada",
        capability="8.9",
        multiprocessors=48,
        clock_mhz=2175,
        fp16=81.9,
        fp32=26.7,
        bandwidth=360,
        link=_PCIE4,
        source="NVIDIA, RTX 4000 Ada Generation data sheet (tensor rate from a reprint): 26.7 FP32 "
        "TFLOPS, 327.6 sparse FP8 tensor TFLOPS, a quarter of which is dense FP16 as on RTX 6000 "
        "Ada (1457 and 364.2); 360 GB/s, PCIe 4. At 2175 MHz its tensor cores could do 106.9",
    ),
    _card(
        name="GeForce RTX 4090",
        device="RTX 4090",
        capability="8.9",
        multiprocessors=128,
        clock_mhz=2520,
        fp16=165.2,
        fp32=82.6,
        bandwidth=1008,
        link=_PCIE4,
        source="NVIDIA, Ada GPU architecture white paper: 165.2 dense FP16 tensor TFLOPS with FP32 "
        "accumulation (twice that with FP16 accumulation), 82.6 FP32 TFLOPS, 1008 GB/s, PCIe 4",
    ),
    _card(
        name="H100 PCIe",
        device="H100 PCIe",
        capability="9.0",
        multiprocessors=114,
        clock_mhz=1755,
        fp16=756,
        fp32=51,
        bandwidth=2000,
        link=_PCIE5,
        source="NVIDIA, H100 data sheet: 1513 sparse, so 756 dense FP16 tensor TFLOPS, 51 FP32 "
        "TFLOPS, 2 TB/s, PCIe 5",
    ),
    _card(
        name="H100 SXM",
        device="H100 80GB HBM3",
        capability="9.0",
        multiprocessors=132,
        clock_mhz=1980,
        fp16=989,
        fp32=67,
        bandwidth=3350,
        link=_PCIE5,
        source="NVIDIA, H100 data sheet: 1979 sparse, so 989 dense FP16 tensor TFLOPS, 67 FP32 "
        "TFLOPS, 3.35 TB/s, PCIe 5",
    ),
)


def gpu_like(device: str, *, multiprocessors: int, clock_mhz: float) -> Gpu | None:
    """The published rates of a device that is there; ``None`` if they are not known.

    Args:
        device: Its name, as the driver tells it. Every Jetson Orin has the same.
        multiprocessors: How many it has.
        clock_mhz: Its highest clock in the power mode of the moment. Rates are known for the clock
            that they were published at, give or take a tenth.
    """
    alike = [
        gpu
        for gpu in GPUS
        if gpu.device.lower() in device.lower()
        and gpu.multiprocessors == multiprocessors
        and abs(clock_mhz / gpu.clock_mhz - 1) <= _SAME_CLOCK
    ]
    return min(alike, key=lambda gpu: abs(gpu.clock_mhz - clock_mhz), default=None)
