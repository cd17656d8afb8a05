"""The processor: its name, and what it can do that matters here."""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")
_FEATURES: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


@dataclass(frozen=True)
class Processor:
    """As the operating system describes it.

    Attributes:
        name: For people.
        vendor: ``vendor_id`` of x86; empty elsewhere.
        features: Those that matter here.
    """

    name: str
    vendor: str
    features: tuple[str, ...]

    @property
    def bfloat16_is_slow(self) -> bool:
        """Whether it has instructions for bfloat16 that are no faster than those for float32.

        Intel's AVX512-BF16 multiplies at the rate of float32, and conversions come on top: on a
        Xeon whose AMX unit the virtual machine hides, two threads of OpenVINO 2026.4 needed 267 ms
        for the encoder of ``pe`` in bfloat16 and 150 ms in float32. AMD's is taken to be fast.
        """
        here = set(self.features)
        return self.vendor == "GenuineIntel" and "avx512_bf16" in here and "amx_bf16" not in here


def described(cpuinfo: str) -> Processor:
    """The first processor in the text of ``/proc/cpuinfo``; what it does not say is left out."""

    def field(*names: str) -> str:
        found = re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        return found.group(1).strip() if found else ""

    present = set(field("flags", "Features").split())
    return Processor(
        name=field("model name") or platform.processor() or platform.machine(),
        vendor=field("vendor_id"),
        features=tuple(feature for feature in _FEATURES if feature in present),
    )


@cache
def processor() -> Processor:
    """That of this machine."""
    try:
        return described(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return described("")
