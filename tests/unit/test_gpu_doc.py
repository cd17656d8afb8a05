"""The tables of docs/gpu.md are what the generator computes from the graphs of today."""

from pathlib import Path

import pytest
import toy_bundles as toy

from benchmarks import roofline
from pe_infer.bundle import Bundle, shipped
from pe_infer.manifest import ReduceNode

HEADS = {"body_part": ["HEAD"], "contrast": "forbidden"}


def test_the_tables_are_up_to_date() -> None:
    text = roofline.DOCUMENT.read_text(encoding="utf-8")
    assert [block[2] for block in roofline.BLOCK.finditer(text)] == ["gpus", "studies"]
    if text != roofline.filled(text):
        pytest.fail("docs/gpu.md is out of date: make gpu-tables")


@pytest.mark.parametrize("name", shipped())
def test_every_node_of_every_shipped_bundle_is_in_the_tables(name: str) -> None:
    manifest = Bundle.load(name).manifest
    text = roofline.DOCUMENT.read_text(encoding="utf-8")
    section = text.partition(f"### Bundle `{name}`\n")[2].partition("\n### ")[0]
    for node in manifest.nodes:
        assert isinstance(node, ReduceNode) or f"| {node.name} |" in section


@pytest.mark.parametrize(
    ("scope", "study"),
    [
        ({}, "300 slices of 512 x 512 pixels, 1 mm apart: 59 slabs"),
        (HEADS, "40 slices of 512 x 512 pixels, 5 mm apart: 38 slabs"),
    ],
)
def test_a_bundle_is_counted_over_a_study_of_its_anatomy(
    tmp_path: Path, scope: dict[str, object], study: str
) -> None:
    folder = toy.make(tmp_path / "toy", toy.radnet_like, scope={"body_part": ["CHEST"], **scope})
    section = roofline.section(Bundle.load(folder))
    assert section.startswith("### Bundle `toy-bidirectional`\n")
    assert f"A study is {study}." in section


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
