"""The tables of docs/gpu.md are what the generator computes from the graphs of today."""

from pathlib import Path

import onnx
import pytest

from benchmarks import roofline
from benchmarks.radnet import write_radnet
from pe_infer.bundle import Bundle, shipped
from pe_infer.roofline.study import HEAD, StudyCost, totals


@pytest.fixture(scope="module")
def radnet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_radnet(tmp_path_factory.mktemp("radnet"))


def test_the_tables_are_up_to_date() -> None:
    text = roofline.DOCUMENT.read_text(encoding="utf-8")
    assert [block[2] for block in roofline.BLOCK.finditer(text)] == ["gpus", "studies"]
    if text != roofline.filled(text):
        pytest.fail("docs/gpu.md is out of date: make gpu-tables")


def test_every_shipped_bundle_and_the_other_system_are_there() -> None:
    sections = roofline.study_sections()
    for name in shipped():
        assert f"### Bundle `{name}`" in sections
    assert "### RADnet's graph" in sections


def test_radnet_is_a_valid_bundle_of_valid_graphs(radnet: Bundle) -> None:
    for name, graph in radnet.files.items():
        assert name.endswith(".onnx")
        onnx.checker.check_model(graph, full_check=True)


def test_radnet_costs_what_densenet_40_does(radnet: Bundle) -> None:
    """Counted anew: 12 layers of growth 12 in each of three blocks, and the branches."""
    pixels, channels = 256 * 256, 16
    multiply_adds = pixels * 9 * 3 * channels
    for block in range(3):
        for _ in range(12):
            multiply_adds += pixels * 9 * channels * 12
            channels += 12
        multiply_adds += pixels * 9 * channels * 16  # branch: a convolution to 16 channels
        multiply_adds += 256 * 256 * 16  # and a deconvolution: every pixel of the mask reads 16
        if block < 2:
            multiply_adds += pixels * channels * channels
            pixels //= 4
    assert channels == 448
    cost = StudyCost(radnet, HEAD)
    assert cost.slabs == 32
    encoder = next(node for node in cost.program.graph_nodes if node.name == "encoder")
    assert totals(cost.node(encoder).kernels).tensor_flops == 2 * multiply_adds


def test_numbers_are_short_and_plain() -> None:
    numbers = (0, 0.000123456, 0.5, 12.345, 1008, 40076)
    assert [roofline._number(n) for n in numbers] == [
        *("0", "0.000123", "0.5", "12.3", "1010", "40100")
    ]


def test_an_unknown_argument_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["roofline", "--wirte"])
    with pytest.raises(SystemExit, match="usage"):
        roofline.main()


def test_the_document_is_where_the_generator_writes() -> None:
    assert Path(__file__).parents[2] / "docs" / "gpu.md" == roofline.DOCUMENT
