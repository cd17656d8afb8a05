"""Building engines, on a stand-in for TensorRT; the real one is in tests/tensorrt."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import toy_bundles as toy
from fake_tensorrt import FakeTensorRt, Flag
from typer.testing import CliRunner

from pe_infer import engine_build
from pe_infer.bundle import Bundle, write_bundle
from pe_infer.bundle_check import build_bundle
from pe_infer.cli.app import app
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engine_folder import EngineFolder
from pe_infer.engines.tensorrt_build import build_engine
from pe_infer.engines.tensorrt_vendor import FLAVOURS, Vendor
from pe_infer.errors import BundleError, Code, ConfigurationError, EngineError
from pe_infer.machine import Machine

OPTIONS = BuildOptions(target="tensorrt")


def install(monkeypatch: pytest.MonkeyPatch, module: FakeTensorRt) -> FakeTensorRt:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return True if name == "tensorrt" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(engine_build, "device_capability", lambda: "8.7")
    return module


@pytest.fixture(params=["10.3.0.26", "11.0.0.114"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    return install(monkeypatch, FakeTensorRt(request.param))


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.startswith("tensorrt") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_builds_every_node_and_writes_what_it_built(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    engines = build_engines(bundle, OPTIONS, tmp_path / "engines")
    manifest = engines.manifest

    assert list(manifest.engines) == [
        "encoder",
        "project_down",
        "down",
        "project_up",
        "up",
        "score",
    ]
    assert (manifest.target, manifest.version) == ("tensorrt", trt.__version__)
    assert manifest.compute_capabilities == ("8.7",)
    assert not manifest.later_capabilities
    machine = Machine(compute_capability="8.7", versions={"tensorrt": trt.__version__})
    for node in manifest.engines:
        assert engines.read(node, bundle=bundle, machine=machine).startswith(b"plan of ")


def test_networks_are_strongly_typed_and_float32_is_float32(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    build_engines(bundle, OPTIONS, tmp_path / "engines")
    for network, config in trt.built:
        assert network.strongly_typed
        assert Flag.TF32 not in config.flags


def test_batches_range_from_one_and_scans_have_one_slab(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    engines = build_engines(bundle, replace(OPTIONS, max_batch=3), tmp_path / "engines")
    (encoder, *_), scan = trt.built[0][1].profiles, trt.built[2][1]

    assert encoder.shapes == {"slab": ((1, 3, 8, 8), (3, 3, 8, 8), (3, 3, 8, 8))}
    assert not scan.profiles
    entry = engines.manifest.engines["encoder"]
    assert (entry.max_batch, entry.inputs["slab"].min, entry.outputs["logit"]) == (
        3,
        (1, 3, 8, 8),
        (3, 1),
    )
    assert engines.manifest.engines["down"].inputs["c"].max == (1, 2, 4, 4)


def test_fp32_leaves_the_graphs_as_they_are(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    build_engines(bundle, replace(OPTIONS, precision="fp32"), tmp_path / "engines")
    assert [t.name for t in trt.built[0][0].graph.initializer] == ["w1_half", "w2_half"]
    assert sum(node.op_type == "Cast" for node in trt.built[0][0].graph.node) == 2


def test_nodes_with_one_graph_share_an_engine(trt: FakeTensorRt, tmp_path: Path) -> None:
    document, files = toy.radnet_like()
    del files["backward.onnx"]
    document["nodes"][3]["graph"] = "forward.onnx"
    bundle = build_bundle(tmp_path / "toy", document, files, toy.golden_slabs())

    engines = build_engines(bundle, OPTIONS, tmp_path / "engines").manifest.engines

    assert engines["forward"] == engines["backward"]
    assert len(trt.built) == 4


def test_a_timing_cache_is_kept_and_used(trt: FakeTensorRt, bundle: Bundle, tmp_path: Path) -> None:
    first = build_engines(bundle, OPTIONS, tmp_path / "engines")
    assert first.manifest.timing_cache is not None
    data = first.read_file(first.manifest.timing_cache)
    assert data == b"measured" * 6
    build_engines(bundle, OPTIONS, tmp_path / "engines")
    cache = trt.built[6][1].cache
    assert cache is not None
    assert cache.data == data


def test_a_timing_cache_of_another_machine_is_not_used(trt: FakeTensorRt) -> None:
    engine = build_engine(
        Vendor("tensorrt"),
        toy.encoder(),
        name="encoder",
        max_batch=1,
        timing_cache=b"of another machine",
    )
    assert engine.timing_cache == b"measured"


def test_an_altered_timing_cache_is_not_used(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    first = build_engines(bundle, OPTIONS, tmp_path / "engines")
    assert first.manifest.timing_cache is not None
    (first.folder / first.manifest.timing_cache.file).write_bytes(b"foreign")
    lines: list[str] = []
    build_engines(bundle, OPTIONS, tmp_path / "engines", log=lines.append)
    cache = trt.built[6][1].cache
    assert cache is not None
    assert cache.data == b""
    assert "timing cache is not used" in lines[0]


def test_progress_and_log(trt: FakeTensorRt, bundle: Bundle, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    lines: list[str] = []
    build_engines(
        bundle,
        OPTIONS,
        tmp_path / "engines",
        progress=lambda *facts: told.append(facts),
        log=lines.append,
    )
    assert told[:4] == [
        ("encoder", 0, 6, "converting", 0, 1),
        ("encoder", 0, 6, "Building engine", 0, 2),
        ("encoder", 0, 6, "Building engine", 1, 2),
        ("encoder", 0, 6, "Building engine", 2, 2),
    ]
    assert lines == ["info: building"] * 6


def test_an_interrupt_ends_the_build_and_leaves_nothing(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    def interrupt(*facts: Any) -> None:
        if facts[3] != "converting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, OPTIONS, tmp_path / "engines", progress=interrupt)
    assert not list((tmp_path / "engines").iterdir())


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_the_library_would_swallow_ends_the_build(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    trt.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, OPTIONS, tmp_path / "engines")
    assert not trt.built
    assert not list((tmp_path / "engines").iterdir())


@pytest.mark.parametrize(
    ("failure", "named"), [("raise", "cuda is gone"), ("out of tactics", "out of tactics")]
)
def test_what_the_library_says_is_in_the_error(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path, failure: str, named: str
) -> None:
    trt.fail = failure
    with pytest.raises(EngineError, match=rf"build toy/encoder\.onnx: .*{named}") as caught:
        build_engines(bundle, OPTIONS, tmp_path / "engines")
    assert caught.value.code == Code.ENGINE_FAILED
    assert trt.__version__ in str(caught.value)


def test_what_the_parser_says_is_in_the_error(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trt, "OnnxParser", type("P", (trt.OnnxParser,), {"parse": lambda *_: False})
    )
    with pytest.raises(EngineError, match="Exotic 'exotic_1': no importer"):
        build_engines(bundle, OPTIONS, tmp_path / "engines")


def test_a_graph_that_is_not_the_manifests_is_refused(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    document = bundle.manifest.model_dump(mode="json", exclude={"files"})
    files = {**bundle.files, "down.onnx": toy.project(3, 4)}
    other = write_bundle(tmp_path / "toy", document, files)
    with pytest.raises(BundleError, match="node 'down'") as caught:
        build_engines(other, OPTIONS, tmp_path / "engines")
    assert caught.value.code == Code.BUNDLE_GRAPH


def test_a_graph_of_one_batch_size_is_refused(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    model = onnx.load_from_string(bundle.files["encoder.onnx"])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    document = bundle.manifest.model_dump(mode="json", exclude={"files"})
    files = {**bundle.files, "encoder.onnx": model.SerializeToString()}
    other = write_bundle(tmp_path / "toy", document, files)
    with pytest.raises(BundleError, match=r"float32 \(4, 3, 8, 8\) to \(4, 3, 8, 8\)"):
        build_engines(other, OPTIONS, tmp_path / "engines")


def test_tensorrt_needs_the_gpu_that_it_builds_for(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_build, "device_capability", lambda: None)
    with pytest.raises(EngineError, match="build on the target") as caught:
        build_engines(bundle, OPTIONS, tmp_path / "engines")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE
    assert not (tmp_path / "engines").exists()


def test_refuses_a_version_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeTensorRt("8.6.1"))
    with pytest.raises(EngineError, match="10 and 11") as caught:
        Vendor("tensorrt")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def test_refuses_a_target_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="cuda"):
        Vendor("cuda")


@pytest.mark.parametrize("target", FLAVOURS)
def test_names_the_extra_when_the_library_is_missing(absent: None, target: str) -> None:
    with pytest.raises(EngineError, match=rf"pe-infer\[{target}\]") as caught:
        Vendor(target)
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def test_says_which_other_library_is_there(absent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeTensorRt())
    with pytest.raises(EngineError, match=r"\(tensorrt is installed\)"):
        Vendor("tensorrt-rtx")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": "tensorrt", "capabilities": ("8.7",)}, "a Jetson on that Jetson"),
        ({"target": "tensorrt-rtx", "capabilities": ("8.7",)}, "a Jetson on that Jetson"),
        ({"target": "tensorrt-rtx", "capabilities": ("9.0",)}, "builds for 7.5, 8.0"),
        ({"target": "tensorrt-rtx", "capabilities": ("ampere",)}, "ampere"),
        ({"target": "tensorrt-rtx", "max_batch": 0}, "max_batch=0"),
        ({"target": "cuda"}, "cuda"),
        ({"target": "tensorrt", "precision": "int8"}, "int8"),
    ],
)
def test_refuses_options_that_make_no_sense(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        BuildOptions(**values)


def test_capabilities_are_put_in_order() -> None:
    options = BuildOptions(target="tensorrt-rtx", capabilities=("12.0", "sm_86", "8.6", "75"))
    assert options.capabilities == ("7.5", "8.6", "12.0")


def test_refuses_a_batch_that_the_bundle_does_not_allow(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="at most 4"):
        build_engines(bundle, replace(OPTIONS, max_batch=5), tmp_path / "engines")


def test_the_command_builds(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "engines"
    command = ["build", str(bundle.folder), "--target", "tensorrt", "--out", str(out), "-v"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)

    assert result.exit_code == 0
    for expected in ("toy 0.1.0", f"tensorrt {trt.__version__}", "1 to 4", "mixed", "8.7"):
        assert expected in result.stdout
    assert "info: building" in result.stderr
    assert set(EngineFolder.open(out).manifest.engines) >= {"encoder", "score"}


def test_the_help_says_where_engines_for_a_jetson_are_built() -> None:
    result = CliRunner().invoke(app, ["build", "--help"], env={"COLUMNS": "200"})
    assert "a Jetson on that Jetson" in " ".join(result.output.split())
