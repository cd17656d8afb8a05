"""RADnet's graphs against PyTorch, per node and per study, at lengths other than the traced one."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.models.radnet import SliceClassifier, SliceContext
from export.onnx_export import StudyGraphs, export_graphs, round_weights
from export.parity import STUDY_TOLERANCE, assembly_differences, check_parity
from export.systems.radnet_graphs import study_graphs

SIZE = 64
LENGTH = 7

Networks = tuple[SliceClassifier, SliceContext]


@pytest.fixture(scope="module")
def networks() -> Networks:
    """Small networks whose norms have seen data and whose context is loud."""
    torch.manual_seed(0)
    stage1 = SliceClassifier(3, 0.5, layers=2)
    torch.nn.init.normal_(stage1.head.weight, std=0.5)
    for _ in range(3):
        features = stage1(torch.rand(4, 3, SIZE, SIZE)).features.detach()
    stage2 = SliceContext(stage1.feature_channels, 6)
    stage2.scale_to(features.mean(dim=0), features.std(dim=0))
    torch.nn.init.normal_(stage2.head.weight, std=1.0)
    return stage1.eval(), stage2.eval()


@pytest.fixture(scope="module")
def slabs() -> np.ndarray:
    """(LENGTH, 3, SIZE, SIZE) in [0, 1]."""
    return np.random.default_rng(3).random((LENGTH, 3, SIZE, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def graphs(networks: Networks) -> StudyGraphs:
    """With rounded weights."""
    made = study_graphs(*networks, SIZE)
    round_weights(made.nodes)
    return made


@pytest.fixture(scope="module")
def files(graphs: StudyGraphs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The graphs on disk."""
    return dict(export_graphs(graphs.nodes, tmp_path_factory.mktemp("graphs")))


def test_graphs_agree_with_pytorch(
    networks: Networks, graphs: StudyGraphs, files: dict[str, Path], slabs: np.ndarray
) -> None:
    assembly = assembly_differences(study_graphs(*networks, SIZE), slabs)
    report = check_parity(graphs, files, slabs, assembly=assembly)
    assert report.passed
    assert set(report.nodes) == set(files)
    assert max(report.nodes.values()) < 1e-4
    assert sorted(report.studies) == sorted(report.assembly) == [1, 5, LENGTH]
    assert max(report.studies.values()) < 1e-4
    assert max(report.assembly.values()) < 1e-4
    assert max(report.rounding.values()) > 0


def test_a_direction_that_is_turned_is_noticed(networks: Networks, slabs: np.ndarray) -> None:
    made = study_graphs(*networks, SIZE)
    for place, node in enumerate(made.nodes):
        if node.kind == "scan":
            turned = dataclasses.replace(
                node, direction="up" if node.direction == "down" else "down"
            )
            nodes = [*made.nodes[:place], turned, *made.nodes[place + 1 :]]
            differences = assembly_differences(dataclasses.replace(made, nodes=nodes), slabs)
            assert differences[1] < STUDY_TOLERANCE  # one slice has no direction
            assert differences[LENGTH] > STUDY_TOLERANCE, node.name


def test_nodes_of_the_program(graphs: StudyGraphs, files: dict[str, Path]) -> None:
    assert [(n.name, n.kind, n.direction) for n in graphs.nodes] == [
        ("encoder", "map", None),
        ("project_down", "map", None),
        ("down", "scan", "down"),
        ("project_up", "map", None),
        ("up", "scan", "up"),
        ("score", "map", None),
    ]
    for node in graphs.nodes:
        model = onnx.load(files[node.name])
        assert [v.name for v in model.graph.input] == node.input_names
        assert [v.name for v in model.graph.output] == node.output_names
        first = model.graph.input[0].type.tensor_type.shape.dim[0]
        assert first.dim_value == (1 if node.kind == "scan" else 0)
        for initializer in model.graph.initializer:
            if initializer.data_type == onnx.TensorProto.FLOAT:
                assert int(np.prod(initializer.dims)) < 1024, initializer.name
