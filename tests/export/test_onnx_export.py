"""Exported graphs against PyTorch, per node and per study, at lengths other than the traced one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.models import SlabClassifier, StudyNet
from export.onnx_export import GraphNode, export_graphs, graph_nodes, round_weights
from export.parity import check_parity

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
def nodes(networks: tuple[SlabClassifier, StudyNet]) -> list[GraphNode]:
    """Nodes with rounded weights."""
    made = graph_nodes(*networks, SIZE)
    round_weights(made)
    return made


@pytest.fixture(scope="module")
def files(nodes: list[GraphNode], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The graphs on disk."""
    return dict(export_graphs(nodes, tmp_path_factory.mktemp("graphs")))


def test_graphs_agree_with_pytorch(
    networks: tuple[SlabClassifier, StudyNet], nodes: list[GraphNode], files: dict[str, Path]
) -> None:
    slabs = np.random.default_rng(3).random((LENGTH, 5, SIZE, SIZE), dtype=np.float32)
    report = check_parity(nodes, files, *networks, slabs)
    assert report.passed
    assert set(report.nodes) == set(files)
    assert max(report.nodes.values()) < 1e-4
    assert sorted(report.studies) == [1, 5, 7]
    assert max(report.studies.values()) < 1e-4
    assert 0 < max(report.rounding.values()) < 0.05


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
        assert model.opset_import[0].version >= 17
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
