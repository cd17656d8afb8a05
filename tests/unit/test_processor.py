"""What the operating system says of a processor, and which type it computes in."""

from pathlib import Path

import pytest
import toy_bundles as toy

from pe_infer.engines import processor as module
from pe_infer.engines.base import EngineOptions, installed, select
from pe_infer.engines.processor import Processor, described

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse avx2 avx512f avx512_bf16 {amx}

processor\t: 1
vendor_id\t: GenuineIntel
flags\t\t: fpu amx_bf16
"""
EPYC = """\
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
flags\t\t: avx2 avx512f avx512_bf16
"""
ARM = """\
processor\t: 0
Features\t: fp asimd sve bf16
CPU implementer\t: 0x41
"""


def test_the_first_processor_is_described() -> None:
    xeon = described(XEON.format(amx=""))
    assert xeon == Processor(
        "Intel(R) Xeon(R) Processor", "GenuineIntel", ("avx2", "avx512f", "avx512_bf16")
    )
    assert described(ARM).features == ("asimd", "bf16")
    for text in (ARM, ""):
        assert described(text).name
        assert described(text).vendor == ""
    assert described("").features == ()


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        (XEON.format(amx=""), True),
        (XEON.format(amx="amx_bf16"), False),
        (EPYC, False),
        (ARM, False),
    ],
)
def test_bfloat16_without_amx_is_slow_on_intel(cpuinfo: str, slow: bool) -> None:
    assert described(cpuinfo).bfloat16_is_slow is slow


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "none")
    assert module.processor.__wrapped__() == described("")


@pytest.mark.skipif("openvino" not in installed(), reason="openvino is not installed")
@pytest.mark.parametrize(
    ("cpuinfo", "chosen"), [(XEON.format(amx=""), "float32"), (EPYC, "bfloat16")]
)
def test_openvino_computes_in_float32_where_bfloat16_is_slow(
    cpuinfo: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "avx512_bf16" not in module.processor().features:
        pytest.skip("OpenVINO does not choose bfloat16 on this processor")
    monkeypatch.setattr("pe_infer.engines.openvino.processor", lambda: described(cpuinfo))
    runtime = select("openvino", EngineOptions(threads=1))
    assert runtime.compile(toy.encoder(), name="e", precision="reduced").precision == chosen
