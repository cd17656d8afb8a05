"""Real TensorRT for RTX engines, built without a GPU. Nothing is deserialised: that needs one."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import toy_bundles as toy
from typer.testing import CliRunner

from pe_infer.bundle import Bundle, shipped, write_bundle
from pe_infer.cli.app import app
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engine_folder import EngineFolder, write_engines
from pe_infer.engines.tensorrt_build import build_engine
from pe_infer.engines.tensorrt_vendor import FLAVOURS, Vendor
from pe_infer.errors import Code, EngineError
from pe_infer.half import half_graph
from pe_infer.machine import Machine
from pe_infer.manifest import ReduceNode
from pe_infer.program import Program

pytestmark = pytest.mark.slow
OPTIONS = BuildOptions(target="tensorrt-rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Engines of a bundle, and a machine that they fit."""

    bundle: Bundle
    engines: EngineFolder
    machine: Machine


def build(bundle: Bundle, folder: Path, options: BuildOptions = OPTIONS) -> Built:
    engines = build_engines(bundle, options, folder)
    versions = {"tensorrt-rtx": engines.manifest.version}
    machine = Machine(compute_capability="8.6", versions=versions)
    return Built(bundle=bundle, engines=engines, machine=machine)


@pytest.fixture(scope="module", params=[*shipped(), "pe_like", "radnet_like"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    toys = {"pe_like", "radnet_like"}
    bundle = (
        toy.write_toy(folder / "bundle", request.param)
        if request.param in toys
        else Bundle.load(request.param)
    )
    return build(bundle, folder / "engines")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("toy")
    return build(toy.write_toy(folder / "bundle"), folder / "engines")


@pytest.fixture
def toy_built(original: Built, tmp_path: Path) -> Built:
    """A copy of real engines that may be damaged."""
    files = {
        entry.file: (original.engines.folder / entry.file).read_bytes()
        for entry in original.engines.manifest.engines.values()
    }
    engines = write_engines(tmp_path / "engines", original.engines.manifest, files)
    return Built(bundle=original.bundle, engines=engines, machine=original.machine)


def preflight(built: Built, machine: str | None) -> tuple[int, dict[str, Any]]:
    command = ["doctor", "--json", "--engines", str(built.engines.folder)]
    command += ["--bundle", str(built.bundle.folder)]
    command += ["--machine", machine] if machine else []
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


def test_every_graph_becomes_an_engine(built: Built) -> None:
    manifest = built.engines.manifest
    nodes = {n.name for n in built.bundle.manifest.nodes if not isinstance(n, ReduceNode)}
    assert manifest.engines.keys() == nodes
    assert manifest.version == Vendor("tensorrt-rtx").version
    assert manifest.later_capabilities
    for node in nodes:
        data = built.engines.read(node, bundle=built.bundle, machine=built.machine)
        assert data.startswith(b"vtrt")
        assert len(data) == manifest.engines[node].bytes


def test_batches_are_the_bundles(built: Built) -> None:
    program = Program(built.bundle.manifest)
    for node in program.graph_nodes:
        entry = built.engines.manifest.engines[node.name]
        assert entry.max_batch == program.max_batch(node)
        for tensor, sequence in node.inputs.items():
            shape = program.specs[sequence].shape
            assert entry.inputs[tensor].min == (1, *shape)
            assert entry.inputs[tensor].max == (entry.max_batch, *shape)


def test_float16_engines_are_smaller(built: Built, tmp_path: Path) -> None:
    name = next(iter(built.engines.manifest.engines))
    node = next(n for n in Program(built.bundle.manifest).graph_nodes if n.name == name)
    vendor, graph = Vendor("tensorrt-rtx"), built.bundle.graph(node)
    full = build_engine(vendor, graph, name=name, max_batch=1)
    half = build_engine(
        vendor, half_graph(graph, name=name, precision="mixed"), name=name, max_batch=1
    )
    if len(graph) > 1 << 20:  # two bytes a weight in the graph: float32 engines have as many more
        assert len(full.data) - len(half.data) > 0.8 * len(graph)
    assert full.inputs == half.inputs
    assert full.outputs == half.outputs


@pytest.mark.parametrize("bundle", shipped())
def test_scans_build_in_mixed_precision(bundle: str) -> None:
    loaded, vendor = Bundle.load(bundle), Vendor("tensorrt-rtx")
    for node in Program(loaded.manifest).graph_nodes:
        if node.kind == "scan":
            graph = half_graph(loaded.graph(node), name=node.name, precision="mixed")
            engine = build_engine(vendor, graph, name=node.name, max_batch=1)
            assert {spec.dtype for spec in engine.inputs.values()} == {"float32"}
            assert all(None not in spec.shape for spec in engine.inputs.values())


@pytest.mark.parametrize("machine", ["sm=86,tensorrt-rtx=1", "sm=12.1", "sm=80"])
def test_preflight_of_a_machine_that_fits(built: Built, machine: str) -> None:
    code, report = preflight(built, machine)
    assert (code, report["fits"]) == (0, True)


@pytest.mark.parametrize(
    "machine", ["sm=87,tensorrt=10.3", "sm=75", "sm=86,tensorrt-rtx=0.9", "sm=90", None]
)
def test_preflight_of_a_machine_that_does_not_fit(
    built: Built, machine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pe_infer.machine.device_capability", lambda: None)
    code, report = preflight(built, machine)
    assert (code, report["fits"]) == (EngineError.exit_code, False)
    assert all(engine["reasons"] for engine in report["engines"])


@pytest.mark.parametrize("capability", FLAVOURS["tensorrt-rtx"].capabilities)
def test_builds_for_every_capability_that_it_names(original: Built, capability: str) -> None:
    node = Program(original.bundle.manifest).graph_nodes[0]
    graph = half_graph(original.bundle.graph(node), name="encoder", precision="reduced")
    engine = build_engine(
        Vendor("tensorrt-rtx"), graph, name="encoder", max_batch=4, capabilities=(capability,)
    )
    assert engine.data.startswith(b"vtrt")


def test_a_capability_that_this_version_does_not_know_is_named(original: Built) -> None:
    with pytest.raises(EngineError, match=r"does not build for compute capability 9\.9"):
        build_engine(
            Vendor("tensorrt-rtx"),
            original.bundle.files["encoder.onnx"],
            name="encoder",
            max_batch=1,
            capabilities=("9.9",),
        )


def test_builds_for_chosen_gpus(original: Built, tmp_path: Path) -> None:
    options = BuildOptions(
        target="tensorrt-rtx", precision="fp32", capabilities=("89", "8.6"), max_batch=2
    )
    chosen = build(original.bundle, tmp_path / "engines", options)
    assert chosen.engines.manifest.compute_capabilities == ("8.6", "8.9")
    assert chosen.engines.manifest.engines["encoder"].max_batch == 2
    assert preflight(chosen, "sm=89")[0] == 0
    assert preflight(chosen, "sm=120")[0] == EngineError.exit_code


def refused(built: Built, node: str = "encoder") -> Code:
    with pytest.raises(EngineError) as caught:
        EngineFolder.open(built.engines.folder).read(
            node, bundle=built.bundle, machine=built.machine
        )
    assert preflight(built, "sm=86")[0] == EngineError.exit_code
    return caught.value.code


def path_of(built: Built, node: str = "encoder") -> Path:
    return built.engines.folder / built.engines.manifest.engines[node].file


def test_a_corrupted_engine_is_refused(toy_built: Built) -> None:
    data = bytearray((path := path_of(toy_built)).read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(data)
    assert refused(toy_built) == Code.ENGINE_UNTRUSTED


def test_a_truncated_engine_is_refused(toy_built: Built) -> None:
    (path := path_of(toy_built)).write_bytes(path.read_bytes()[:-1])
    assert refused(toy_built) == Code.ENGINE_UNTRUSTED


def test_swapped_engines_are_refused(toy_built: Built) -> None:
    a, b = path_of(toy_built, "down"), path_of(toy_built, "up")
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert refused(toy_built, "down") == Code.ENGINE_UNTRUSTED


def test_a_symbolic_link_is_refused(toy_built: Built, tmp_path: Path) -> None:
    (path := path_of(toy_built)).rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert refused(toy_built) == Code.ENGINE_UNTRUSTED


def test_an_engine_that_others_can_write_is_refused(toy_built: Built) -> None:
    path_of(toy_built).chmod(0o666)
    assert refused(toy_built) == Code.ENGINE_UNTRUSTED


def test_an_unlisted_engine_is_refused(toy_built: Built) -> None:
    manifest = toy_built.engines.folder / "engines.json"
    document = json.loads(manifest.read_text())
    del document["engines"]["encoder"]
    manifest.write_text(json.dumps(document))
    assert refused(toy_built) == Code.ENGINE_STALE


def test_a_stale_engine_is_refused(toy_built: Built, tmp_path: Path) -> None:
    document = toy_built.bundle.manifest.model_dump(mode="json", exclude={"files"})
    files = {**toy_built.bundle.files, "down.onnx": toy.recurrence(99)}
    changed = write_bundle(tmp_path / "changed", document, files)
    assert refused(Built(bundle=changed, engines=toy_built.engines, machine=toy_built.machine)) == (
        Code.ENGINE_STALE
    )


def unsupported() -> bytes:
    make = toy.helper.make_node
    node = make("StringNormalizer", ["x"], ["y"])
    text = toy.TensorProto.STRING
    return toy.graph([node], {"x": [1]}, {"y": [1]}, dtype=text)


@pytest.mark.parametrize("graph", [b"junk", unsupported()])
def test_what_the_parser_refuses_is_an_error_with_its_words(graph: bytes) -> None:
    with pytest.raises(EngineError, match=r"failed to read graph: .{10}") as caught:
        build_engine(Vendor("tensorrt-rtx"), graph, name="graph", max_batch=1)
    assert caught.value.code == Code.ENGINE_FAILED


def test_the_builder_reports_its_progress_and_can_be_stopped(original: Built) -> None:
    graph = original.bundle.graph(Program(original.bundle.manifest).graph_nodes[0])
    told: list[tuple[str, int, int]] = []
    lines: list[str] = []
    vendor = Vendor("tensorrt-rtx", lines.append)
    build_engine(vendor, graph, name="g", max_batch=2, progress=lambda *facts: told.append(facts))
    assert len(told) > 10
    assert all(0 <= done <= steps for _, done, steps in told)
    assert any("Engine generation completed" in line for line in lines)

    def stop(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(vendor, graph, name="g", max_batch=2, progress=stop)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_not_lost_in_the_library(original: Built) -> None:
    pressed: list[str] = []

    def press(line: str) -> None:
        if not pressed:
            pressed.append(line)
            os.kill(os.getpid(), signal.SIGINT)

    graph = original.bundle.graph(Program(original.bundle.manifest).graph_nodes[0])
    with pytest.raises(KeyboardInterrupt):
        build_engine(Vendor("tensorrt-rtx", press), graph, name="g", max_batch=2)
    assert pressed
