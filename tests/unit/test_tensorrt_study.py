"""Whole studies on stand-ins for TensorRT and the GPU, against ONNX Runtime on the CPU."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
import toy_bundles as toy
from fake_tensorrt import FakeTensorRt
from strategies import REGULAR, body, study
from typer.testing import CliRunner

from pe_infer import Detector, EngineError, Slice, StreamCancelledError, StudyResult
from pe_infer.bundle import Bundle
from pe_infer.bundle_check import self_test
from pe_infer.cli.app import app, main
from pe_infer.compiled import CompiledProgram
from pe_infer.dicom import write_series
from pe_infer.engine_build import BuildOptions, build_engines
from pe_infer.engines.base import EngineOptions, select
from pe_infer.engines.lane import Tensor
from pe_infer.errors import Code, ConfigurationError
from pe_infer.executor import StudyOutputs
from pe_infer.manifest import Direction

FLOAT32 = EngineOptions(precision="float32")
COUNT = 11
ARRIVALS: tuple[Direction, Direction] = ("down", "up")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeGpu:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def trt(gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    library = FakeTensorRt("1.7.1.116", "tensorrt_rtx")
    library.queue = gpu.enqueue
    return fake_tensorrt.install(monkeypatch, library)


@pytest.fixture(params=["bundle", "both_ways"])
def program(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def compiled(program: Bundle, trt: FakeTensorRt) -> CompiledProgram:
    return CompiledProgram.compile(program, select("tensorrt-rtx", FLOAT32))


@pytest.fixture
def on_cpu(program: Bundle) -> CompiledProgram:
    return CompiledProgram.compile(program, select("onnxruntime", FLOAT32))


def in_order(arrival: Direction, seed: int = 0) -> list[tuple[int, Tensor]]:
    slabs = toy.slabs(COUNT, seed)
    return slabs if arrival == "up" else slabs[::-1]


def run(
    compiled: CompiledProgram, arrival: Direction, at_once: int = 1, seed: int = 0
) -> StudyOutputs:
    executor = compiled.executor(arrival)
    slabs = in_order(arrival, seed)
    for start in range(0, COUNT, at_once):
        executor.push(slabs[start : start + at_once])
    return executor.finish()


def assert_same(found: StudyOutputs, expected: StudyOutputs, atol: float = 1e-6) -> None:
    np.testing.assert_array_equal(found.positions_um, expected.positions_um)
    for a, b in ((found.slabs, expected.slabs), (found.study, expected.study)):
        assert a.keys() == b.keys()
        for name, values in a.items():
            assert type(values) is np.ndarray
            np.testing.assert_allclose(values, b[name], rtol=0, atol=atol)


@pytest.mark.parametrize("at_once", [1, 3, COUNT])
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_a_study_on_the_device_equals_the_one_on_the_cpu(
    compiled: CompiledProgram, on_cpu: CompiledProgram, arrival: Direction, at_once: int
) -> None:
    assert_same(run(compiled, arrival, at_once), run(on_cpu, arrival))


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_a_late_slab_drops_those_behind_it(
    compiled: CompiledProgram, on_cpu: CompiledProgram, arrival: Direction
) -> None:
    executor = compiled.executor(arrival)
    wrong, slabs = in_order(arrival, seed=1), in_order(arrival)
    executor.push(slabs[:4])
    executor.push(wrong[4:9])
    executor.truncate(4)
    executor.push(slabs[4:])
    assert_same(executor.finish(), run(on_cpu, arrival))


def test_interleaved_studies_do_not_disturb_each_other(
    compiled: CompiledProgram, on_cpu: CompiledProgram
) -> None:
    studies = [(arrival, seed) for arrival in ARRIVALS for seed in range(2)]
    executors = [compiled.executor(arrival) for arrival, _ in studies]
    for i in range(COUNT):
        for executor, (arrival, seed) in zip(executors, studies, strict=True):
            executor.push([in_order(arrival, seed)[i]])
    for executor, (arrival, seed) in zip(executors, studies, strict=True):
        assert_same(executor.finish(), run(on_cpu, arrival, seed=seed))


def test_slabs_of_the_device_are_used_where_they_lie(
    compiled: CompiledProgram, on_cpu: CompiledProgram, gpu: fake_cuda.FakeGpu
) -> None:
    lane = compiled.runtime.lane()
    executor = compiled.executor("down", lane)
    for position_um, slab in in_order("down"):
        there = lane.empty(slab.shape)
        lane.copy(slab, there)
        executor.push([(position_um, there)])
    assert_same(executor.finish(), run(on_cpu, "down"))


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_one_wait_per_push_and_one_at_the_end(
    compiled: CompiledProgram, gpu: fake_cuda.FakeGpu, arrival: Direction
) -> None:
    executor = compiled.executor(arrival)
    slabs = in_order(arrival)
    for start in range(0, COUNT, 4):
        before = gpu.waits
        executor.push(slabs[start : start + 4])
        assert gpu.waits == before + 1
    before = gpu.waits
    executor.finish()
    assert gpu.waits == before + 1


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_a_second_study_allocates_nothing(
    compiled: CompiledProgram, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt, arrival: Direction
) -> None:
    run(compiled, arrival)
    before = gpu.allocations, len(trt.contexts)
    run(compiled, arrival)
    assert (gpu.allocations, len(trt.contexts)) == before


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("ends", ["push", "finish"])
def test_a_failure_leaves_the_study_as_it_was(
    compiled: CompiledProgram,
    on_cpu: CompiledProgram,
    trt: FakeTensorRt,
    arrival: Direction,
    ends: str,
) -> None:
    executor = compiled.executor(arrival)
    slabs = in_order(arrival)
    pushed = COUNT if ends == "finish" else 4
    executor.push(slabs[:pushed])
    runs = iter(range(3))

    def queue(handle: int, work: Callable[[], None], queue: Any = trt.queue) -> None:
        if next(runs, None) is None:
            raise RuntimeError("cudaErrorLaunchFailure")
        queue(handle, work)

    working, trt.queue = trt.queue, queue
    with pytest.raises(EngineError, match="cudaErrorLaunchFailure"):
        executor.finish() if ends == "finish" else executor.push(slabs[pushed:])
    trt.queue = working
    executor.push(slabs[pushed:])
    assert_same(executor.finish(), run(on_cpu, arrival))


def test_a_graph_behind_a_reduction(tmp_path: Path, trt: FakeTensorRt) -> None:
    document, files = toy.pe_like()
    by_name = {node["name"]: node for node in document["nodes"]}
    by_name["study_logit"].update(inputs={"x": "hidden_up"}, outputs={"y": "pooled"})
    by_name["score"].update(inputs={"x": "pooled"}, outputs={"logit": "study_logit"})
    bundle = toy.build_bundle(tmp_path / "head", document, files, toy.golden_slabs())
    compiled, on_cpu = (
        CompiledProgram.compile(bundle, select(name, FLOAT32))
        for name in ("tensorrt-rtx", "onnxruntime")
    )
    for arrival in ARRIVALS:
        assert_same(run(compiled, arrival), run(on_cpu, arrival))


def test_float16_engines_are_near(bundle: Bundle, trt: FakeTensorRt) -> None:
    compiled = CompiledProgram.compile(bundle, select("tensorrt-rtx"))
    assert set(compiled.info.precision.values()) == {"float16"}
    on_cpu = CompiledProgram.compile(bundle, select("onnxruntime", FLOAT32))
    assert_same(run(compiled, "down"), run(on_cpu, "down"), atol=0.01)


def test_the_golden_outputs_are_met(program: Bundle, trt: FakeTensorRt) -> None:
    for options in (FLOAT32, EngineOptions()):
        assert self_test(program, select("tensorrt-rtx", options)).passed


# Through the detector.


def detector_of(bundle: Bundle, tmp_path: Path, **options: Any) -> Detector:
    settings: dict[str, Any] = {
        "engine": "tensorrt-rtx",
        "precision": "float32",
        "cache_dir": tmp_path / "cache",
    }
    return Detector(bundle.folder, **{**settings, **options})


@pytest.fixture
def detector(bundle: Bundle, tmp_path: Path, trt: FakeTensorRt) -> Iterator[Detector]:
    with detector_of(bundle, tmp_path) as made:
        yield made


def streamed(detector: Detector, images: list[Slice]) -> StudyResult:
    with detector.open() as stream:
        for image in images:
            stream.push(image)
        return stream.finish(timeout=60)


def test_checks_find_on_the_device_what_they_find_on_the_cpu(
    tmp_path: Path, trt: FakeTensorRt
) -> None:
    measure = {"kind": "area", "low_hu": 0.0}
    check = {"name": "bright", "measure": measure, "over": 1.0, "meaning": "tests"}
    images = body(study(REGULAR), range(30_000, 70_001))
    for limit, status in ((1e6, "processed"), (0.0, "not_processed")):
        folder = toy.make(tmp_path / status, checks=[{**check, "refuse_above": limit}])
        with (
            detector_of(Bundle.load(folder), tmp_path) as on_device,
            Detector(folder, engine="onnxruntime", cache_dir=None) as on_host,
        ):
            found = streamed(on_device, images)
            assert found.status == status
            assert found.checks == on_host.detect(images).checks


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Iterator[Callable[[list[Slice]], StudyResult]]:
    with Detector(
        bundle.folder, engine="onnxruntime", precision="float32", cache_dir=None
    ) as detector:
        yield lambda images: streamed(detector, images)


def assert_result(found: StudyResult, wanted: StudyResult) -> None:
    assert found.probability == pytest.approx(wanted.probability, abs=1e-6)
    for a, b in zip(found.evidence, wanted.evidence, strict=True):
        assert (a.position_mm, a.gated) == (b.position_mm, b.gated)
        assert a.probability == pytest.approx(b.probability, abs=1e-6)
        assert a.attention is not None
        assert b.attention is not None
        np.testing.assert_allclose(a.attention.values, b.attention.values, atol=1e-5)


@pytest.mark.parametrize("step", [1, -1])
def test_a_stream_gives_the_result_of_the_cpu(
    detector: Detector, expected: Callable[[list[Slice]], StudyResult], step: int
) -> None:
    images = study(REGULAR)[::step]
    found = streamed(detector, images)
    assert_result(found, expected(images))
    assert found.provenance.engine.startswith("tensorrt-rtx 1.7.1.116 (")
    assert set(found.provenance.precision.values()) == {"float32"}


def test_streams_at_the_same_time_with_late_slices(
    detector: Detector, expected: Callable[[list[Slice]], StudyResult]
) -> None:
    studies = [study(REGULAR, seed=seed) for seed in range(3)]
    orders = [s[:40] + s[60:] + s[40:60] for s in studies]
    streams = [detector.open() for _ in studies]
    for images in zip(*orders, strict=True):
        for stream, image in zip(streams, images, strict=True):
            stream.push(image)
    for stream, images in zip(streams, studies, strict=True):
        assert_result(stream.finish(timeout=60), expected(images))


def test_a_cancelled_study_leaves_the_next_one_alone(
    detector: Detector, expected: Callable[[list[Slice]], StudyResult]
) -> None:
    images = study(REGULAR)
    stream = detector.open()
    for image in images[:60]:
        stream.push(image)
    stream.cancel()
    with pytest.raises(StreamCancelledError):
        stream.finish()
    assert_result(streamed(detector, images), expected(images))


def test_an_engine_that_fails_ends_its_stream_and_no_other(
    detector: Detector, trt: FakeTensorRt, expected: Callable[[list[Slice]], StudyResult]
) -> None:
    images = study(REGULAR)
    trt.fail = "cudaErrorIllegalAddress"
    with pytest.raises(EngineError, match=r"failed to run .*: cudaErrorIllegalAddress"):
        streamed(detector, images)
    trt.fail = ""
    assert_result(streamed(detector, images), expected(images))


# Where engines come from.


def test_engines_are_built_once_and_kept(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRt, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        detector_of(bundle, tmp_path).close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "takes minutes" in line
    (folder,) = (tmp_path / "cache" / "engines").iterdir()
    assert folder.name == f"toy-{bundle.sha256[:12]}-tensorrt-rtx-fp32"
    assert folder.stat().st_mode & 0o077 == 0
    builds = len(trt.built)
    assert json.loads((folder / "engines.json").read_text())["compute_capabilities"] == ["8.6"]

    detector_of(bundle, tmp_path).close()
    assert len(trt.built) == builds


def test_compiled_kernels_are_kept_for_the_next_process(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRt
) -> None:
    detector_of(bundle, tmp_path).close()
    compiled = trt.compiled
    assert compiled > 0
    (folder,) = (tmp_path / "cache" / "engines").iterdir()
    before = (folder / "engines.json").read_bytes()

    detector_of(bundle, tmp_path).close()
    assert trt.compiled == compiled
    assert (folder / "engines.json").read_bytes() == before
    (kept,) = folder.glob("runtime-*.cache")
    assert kept.stat().st_mode & 0o077 == 0

    trt.__version__ = "1.7.1.117"  # refused by the library; the engines themselves still fit
    detector_of(bundle, tmp_path, engines=folder).close()
    assert trt.compiled == 2 * compiled
    assert (folder / "engines.json").read_bytes() == before  # a folder that is named is only read


def altered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(folder.glob("encoder-*.engine"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def truncated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(folder.glob("encoder-*.engine"))
    path.write_bytes(path.read_bytes()[:-1])


def unlisted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((folder / "engines.json").read_text())
    del document["engines"]["encoder"]
    (folder / "engines.json").write_text(json.dumps(document))


def writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(folder.glob("encoder-*.engine")).chmod(0o666)


def of_another_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("machine", "engine_build", "engines.tensorrt"):
        monkeypatch.setattr(f"pe_infer.{user}.device_capability", lambda: "7.5")


def of_another_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_infer.machine._package_version", lambda _: "1.8.0")
    sys.modules["tensorrt_rtx"].__version__ = "1.8.0"


def altered_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(folder.glob("runtime-*.cache")).write_bytes(b"kernels of somebody else")


MISHAPS = [
    (altered_kernels, Code.ENGINE_UNTRUSTED),
    (altered, Code.ENGINE_UNTRUSTED),
    (truncated, Code.ENGINE_UNTRUSTED),
    (unlisted, Code.ENGINE_STALE),
    (writable, Code.ENGINE_UNTRUSTED),
    (of_another_gpu, Code.ENGINE_UNFIT),
    (of_another_version, Code.ENGINE_UNFIT),
]


@pytest.mark.parametrize(("mishap", "code"), MISHAPS)
def test_engines_that_do_not_fit_are_refused_where_they_are_named_and_built_again_in_the_cache(
    bundle: Bundle,
    tmp_path: Path,
    trt: FakeTensorRt,
    monkeypatch: pytest.MonkeyPatch,
    mishap: Callable[[Path, pytest.MonkeyPatch], None],
    code: Code,
) -> None:
    detector_of(bundle, tmp_path).close()
    (folder,) = (tmp_path / "cache" / "engines").iterdir()
    builds = len(trt.built)
    mishap(folder, monkeypatch)

    with pytest.raises(EngineError, match=r"pe-infer build|build the engines again") as caught:
        detector_of(bundle, tmp_path, engines=folder)
    assert caught.value.code == code
    assert len(trt.built) == builds

    with detector_of(bundle, tmp_path) as detector:
        assert streamed(detector, study(REGULAR)).status == "processed"
    assert len(trt.built) == 2 * builds


def test_engines_of_another_bundle_are_refused(
    both_ways: Bundle, bundle: Bundle, tmp_path: Path, trt: FakeTensorRt
) -> None:
    options = BuildOptions(target="tensorrt-rtx", precision="fp32")
    build_engines(both_ways, options, tmp_path / "engines")
    with pytest.raises(EngineError, match="built from bundle toy-bidirectional") as caught:
        detector_of(bundle, tmp_path, engines=tmp_path / "engines")
    assert caught.value.code == Code.ENGINE_STALE


def test_named_engines_are_used(
    bundle: Bundle,
    tmp_path: Path,
    trt: FakeTensorRt,
    expected: Callable[[list[Slice]], StudyResult],
) -> None:
    options = BuildOptions(target="tensorrt-rtx", precision="fp32")
    build_engines(bundle, options, tmp_path / "engines")
    builds = len(trt.built)
    with detector_of(
        bundle, tmp_path, engines=tmp_path / "engines", precision="default"
    ) as detector:
        found = streamed(detector, study(REGULAR))
    assert len(trt.built) == builds
    assert_result(found, expected(study(REGULAR)))
    assert set(found.provenance.precision.values()) == {"float32"}


def test_float16_engines_do_not_pass_for_float32(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRt
) -> None:
    build_engines(bundle, BuildOptions(target="tensorrt-rtx"), tmp_path / "engines")
    with pytest.raises(EngineError, match="compute in float16") as caught:
        detector_of(bundle, tmp_path, engines=tmp_path / "engines")
    assert caught.value.code == Code.ENGINE_UNFIT


def test_without_a_cache_nothing_is_written(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRt
) -> None:
    with detector_of(bundle, tmp_path, cache_dir=None) as detector:
        assert streamed(detector, study(REGULAR)).status == "processed"
    assert list(tmp_path.iterdir()) == []


def test_built_engines_belong_to_tensorrt(bundle: Bundle, tmp_path: Path) -> None:
    for engine in ("auto", "onnxruntime"):
        with pytest.raises(ConfigurationError, match="'tensorrt', 'tensorrt-rtx'"):
            detector_of(bundle, tmp_path, engine=engine, engines=tmp_path)


def test_the_command_line_takes_engine_and_engines(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_series(study(REGULAR), tmp_path / "study")
    build_engines(bundle, BuildOptions(target="tensorrt-rtx"), tmp_path / "engines")
    command = ["detect", str(tmp_path / "study"), "--bundle", str(bundle.folder), "--json", "-"]
    command += ["--engine", "tensorrt-rtx", "--engines", str(tmp_path / "engines")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["provenance"]["engine"].startswith("tensorrt-rtx 1.7.1.116")


def test_without_a_gpu_the_command_line_says_so_and_ends_with_6(
    bundle: Bundle,
    tmp_path: Path,
    trt: FakeTensorRt,
    gpu: fake_cuda.FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.remove()
    options = ["--bundle", str(bundle.folder), "--engine", "tensorrt-rtx"]
    monkeypatch.setattr("sys.argv", ["pe-infer", "detect", str(tmp_path), *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 6
    assert "error [engine.unavailable] CUDA finds no GPU" in capsys.readouterr().err


def test_the_doctor_tells_of_the_gpu_engines(
    trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    facts = dict(
        json.loads(CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False).stdout)[
            "facts"
        ]
    )
    assert facts["engine tensorrt-rtx"].startswith("1.7.1.116 on Fake GPU 0")
    wanted = "needs tensorrt, not installed (pip install 'pe-infer[tensorrt]')"
    assert facts["engine tensorrt"] == wanted
    assert facts["engine auto"] in {"openvino", "onnxruntime"}
