"""RADnet's graphs against PyTorch, per node and per study, at lengths other than the traced one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch

from export.bundle import BundleSettings, Trained, manifest_of
from export.models.radnet import SliceClassifier, SliceContext
from export.onnx_export import StudyGraphs, export_graphs, round_weights
from export.parity import (
    STUDY_TOLERANCE,
    assembly_differences,
    check_parity,
    sequences_of_modules,
)
from export.systems.radnet import Radnet
from export.systems.radnet_graphs import study_graphs
from export.training.config import DataSettings, load_settings
from pe_infer.bundle import Bundle, write_bundle
from pe_infer.compiled import CompiledProgram
from pe_infer.engines.base import EngineOptions, select

CONFIGS = Path(__file__).parents[2] / "export" / "configs"
SIZE = 64
LENGTH = 7
PROBABILITY_TOLERANCE = 0.02  # an engine's own precision

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


@pytest.fixture(scope="module")
def bundle(
    networks: Networks,
    graphs: StudyGraphs,
    files: dict[str, Path],
    slabs: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """These graphs as a bundle."""
    data = load_settings(CONFIGS / "ich-data.toml", DataSettings)
    grid = data.grid.model_copy(update={"rows": SIZE, "cols": SIZE})
    data = data.model_copy(update={"grid": grid})
    trained = Trained(
        Radnet(layers=2), *networks, data, validation={}, consecutive=3, provenance={}
    )
    shapes = {n: v.shape[1:] for n, v in sequences_of_modules(graphs, slabs).items()}
    settings = load_settings(CONFIGS / "ich-bundle.toml", BundleSettings)
    document = manifest_of(settings, trained, graphs, shapes, None)
    del document["golden"]
    contents = {path.name: path for path in files.values()}
    return write_bundle(tmp_path_factory.mktemp("bundle"), document, contents)


@pytest.mark.parametrize("arrival", ["down", "up"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_computes_the_networks(
    bundle: Bundle,
    graphs: StudyGraphs,
    slabs: np.ndarray,
    engine: str,
    arrival: Literal["down", "up"],
) -> None:
    def executed(precision: Literal["default", "float32"]) -> Mapping[str, np.ndarray]:
        runtime = select(engine, EngineOptions(precision=precision, threads=2))
        executor = CompiledProgram.compile(bundle, runtime).executor(arrival)
        for index in range(LENGTH) if arrival == "up" else reversed(range(LENGTH)):
            executor.push([(5000 * index, slabs[index])])
        return executor.finish().slabs

    expected = sequences_of_modules(graphs, slabs)
    exact, own = executed("float32"), executed("default")
    for output, sequence in graphs.outputs.items():
        np.testing.assert_allclose(exact[output], expected[sequence], rtol=1e-3, atol=1e-3)
    for output in ("slab_logit", "online_logit"):
        found, wanted = (1 / (1 + np.exp(-logits[output])) for logits in (own, exact))
        np.testing.assert_allclose(found, wanted, atol=PROBABILITY_TOLERANCE)
