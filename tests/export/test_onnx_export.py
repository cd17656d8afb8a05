"""Exported graphs against PyTorch, per node and per study, at lengths other than the traced one."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from export.models import SlabClassifier, StudyNet
from export.onnx_export import OPSET, GraphNode, StudyGraphs, export_graphs, round_weights
from export.parity import STUDY_TOLERANCE, ParityReport, assembly_differences, check_parity
from export.systems.shi_graphs import study_graphs

SIZE = 64
LENGTH = 7


@pytest.fixture(scope="module")
def networks() -> tuple[SlabClassifier, StudyNet]:
    """Small networks whose norms have seen data."""
    torch.manual_seed(0)
    stage1 = SlabClassifier(5, 0.125)
    stage2 = StudyNet(stage1.feature_channels, (6, 10), feature_size=SIZE // 16)
    torch.nn.init.normal_(stage1.head.weight, std=0.5)
    for _ in range(3):
        features = stage1(torch.rand(4, 5, SIZE, SIZE)).features
        stage2(features[None].detach())
    return stage1.eval(), stage2.eval()


@pytest.fixture(scope="module")
def graphs(networks: tuple[SlabClassifier, StudyNet]) -> StudyGraphs:
    """With rounded weights."""
    made = study_graphs(*networks, SIZE)
    round_weights(made.nodes)
    return made


@pytest.fixture(scope="module")
def nodes(graphs: StudyGraphs) -> list[GraphNode]:
    """Nodes with rounded weights."""
    return graphs.nodes


@pytest.fixture(scope="module")
def files(nodes: list[GraphNode], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The graphs on disk."""
    return dict(export_graphs(nodes, tmp_path_factory.mktemp("graphs")))


@pytest.fixture(scope="module")
def slabs() -> np.ndarray:
    """(LENGTH, 5, SIZE, SIZE) in [0, 1]."""
    return np.random.default_rng(3).random((LENGTH, 5, SIZE, SIZE), dtype=np.float32)


def test_graphs_agree_with_pytorch(
    networks: tuple[SlabClassifier, StudyNet],
    graphs: StudyGraphs,
    files: dict[str, Path],
    slabs: np.ndarray,
) -> None:
    assembly = assembly_differences(study_graphs(*networks, SIZE), slabs)
    report = check_parity(graphs, files, slabs, assembly=assembly)
    assert report.passed
    assert set(report.nodes) == set(files)
    assert max(report.nodes.values()) < 1e-4
    assert sorted(report.studies) == sorted(report.assembly) == [1, 5, 7]
    assert max(report.studies.values()) < 1e-4
    assert max(report.assembly.values()) < 1e-4
    assert max(report.rounding.values()) > 0


def test_nodes_that_are_put_together_wrongly_are_noticed(
    networks: tuple[SlabClassifier, StudyNet], slabs: np.ndarray
) -> None:
    stage1, stage2 = networks
    weights = copy.deepcopy(stage2)
    for layer in (weights.down1, weights.up1, weights.down2, weights.up2):
        torch.nn.init.normal_(layer.cell.recurrent.weight, std=0.3)
    torch.nn.init.normal_(weights.dense.weight, std=1.0)
    made = study_graphs(stage1, weights, SIZE)
    assert max(assembly_differences(made, slabs).values()) < STUDY_TOLERANCE
    for place, node in enumerate(made.nodes):
        if node.kind == "scan":
            turned = dataclasses.replace(
                node, direction="up" if node.direction == "down" else "down"
            )
            nodes = [*made.nodes[:place], turned, *made.nodes[place + 1 :]]
            differences = assembly_differences(dataclasses.replace(made, nodes=nodes), slabs)
            assert differences[1] < STUDY_TOLERANCE  # one slab has no direction
            assert differences[LENGTH] > STUDY_TOLERANCE, node.name


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["nodes", "studies", "assembly", "rounding"])
def test_one_difference_too_large_passes_nothing(name: str, value: float) -> None:
    fine: dict[str, dict] = {
        "nodes": {"a": 0.0, "b": 0.0},
        "studies": {1: 0.0, 5: 0.0},
        "assembly": {1: 0.0, 5: 0.0},
        "rounding": {1: 0.0, 5: 0.0},
    }
    assert ParityReport(**fine).passed
    last = list(fine[name])[-1]
    assert not ParityReport(**{**fine, name: {**fine[name], last: value}}).passed


def test_a_graph_that_gives_no_number_does_not_pass(
    graphs: StudyGraphs,
    files: dict[str, Path],
    slabs: np.ndarray,
    tmp_path: Path,
) -> None:
    model = onnx.load(files["score"])
    bias = next(i for i in model.graph.initializer if i.name == "dense.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([np.nan], np.float32), bias.name))
    broken = tmp_path / "score.onnx"
    onnx.save(model, broken)
    report = check_parity(graphs, {**files, "score": broken}, slabs[:1], assembly={1: 0.0})
    assert np.isnan(report.nodes["score"])
    assert not report.passed


def test_nodes_of_the_program(nodes: list[GraphNode]) -> None:
    assert [(n.name, n.kind, n.direction) for n in nodes] == [
        ("encoder", "map", None),
        ("project_down1", "map", None),
        ("down1", "scan", "down"),
        ("project_up1", "map", None),
        ("up1", "scan", "up"),
        ("project_down2", "map", None),
        ("down2", "scan", "down"),
        ("project_up2", "map", None),
        ("up2", "scan", "up"),
        ("score", "map", None),
    ]
    made = {"slab"}
    for node in nodes:
        assert set(node.inputs.values()) <= made
        made |= set(node.outputs.values())


def test_weights_are_stored_as_float16(files: dict[str, Path]) -> None:
    for path in files.values():
        model = onnx.load(path)
        assert [entry.version for entry in model.opset_import] == [OPSET]
        for initializer in model.graph.initializer:
            size = int(np.prod(initializer.dims))
            if initializer.data_type == onnx.TensorProto.FLOAT:
                assert size < 1024, initializer.name
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_graphs_hold_no_paths_of_the_machine(files: dict[str, Path]) -> None:
    for path in files.values():
        assert b"/site-packages/" not in path.read_bytes()
        assert b".py" not in path.read_bytes()


def test_scans_are_one_step_at_batch_one(nodes: list[GraphNode], files: dict[str, Path]) -> None:
    for node in nodes:
        model = onnx.load(files[node.name])
        assert [v.name for v in model.graph.input] == node.input_names
        assert [v.name for v in model.graph.output] == node.output_names
        first = model.graph.input[0].type.tensor_type.shape.dim[0]
        assert first.dim_value == (1 if node.kind == "scan" else 0)
        assert not {n.op_type for n in model.graph.node} & {"Loop", "Scan", "If", "LSTM"}
