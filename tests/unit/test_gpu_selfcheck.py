"""The GPU self-check on stand-ins for GPU and TensorRT: it passes, and finds what is broken."""

import ctypes
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
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

from pe_infer import Detector, Slice, StudyResult
from pe_infer.bundle import Bundle
from pe_infer.cli.app import app
from pe_infer.errors import Code, EngineError
from pe_infer.gpu_selfcheck.checks import distance
from pe_infer.gpu_selfcheck.report import Measured, Outcome, Report
from pe_infer.gpu_selfcheck.run import run_selfcheck
from pe_infer.gpu_selfcheck.subject import Counts, choose_target
from pe_infer.manifest import Manifest

COUNTS = Counts(slabs=30, node_slabs=6, repeats=2, studies=1, settle_s=0.0)
MEMORY = 1 << 34
NODES = ("encoder", "project_down", "down", "project_up", "up", "score")
ON_ENGINES = {
    *(f"node {name}" for name in NODES),
    *("study, head first", "study, feet first", "study, late slices"),
    *("interleaved streams", "drift", "leak", "latency"),
}
PREPROCESSING = {"slices", "slices on the device", "planes", "slabs"}
EVERY = {"engines", *PREPROCESSING, *ON_ENGINES}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeGpu:
    made = fake_cuda.install(monkeypatch)
    facts = {"MultiProcessorCount": 128, "ClockRate": 2_520_000}
    monkeypatch.setattr(fake_cuda.Device, "attributes", facts, raising=False)
    made.module.cuda.runtime.memGetInfo = lambda: (
        MEMORY - sum(size for _, size in made.memory.blocks),
        MEMORY,
    )
    made.module.cuda.runtime.getDeviceProperties = lambda _: {"name": b"NVIDIA GeForce RTX 4090"}
    return made


@pytest.fixture
def trt(gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    library = FakeTensorRt("1.7.1.116", "tensorrt_rtx")
    library.queue = gpu.enqueue
    return fake_tensorrt.install(monkeypatch, library, "8.9")


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a gate that some slabs of `studies` do not pass."""
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.04}
    return toy.make(tmp_path_factory.mktemp("bundles") / "gated", grid={"gate": gate})


def studies(manifest: Manifest | None = None) -> list[list[Slice]]:
    """Noise around an organ, in the inner half of the positions."""
    del manifest
    inner = range(REGULAR[len(REGULAR) // 4], REGULAR[-len(REGULAR) // 4])
    return [
        [
            replace(
                image,
                pixels=image.pixels
                + np.random.default_rng(seed).integers(0, 90, image.pixels.shape).astype(np.int16),
            )
            for image in body(study(REGULAR, seed=seed), inner)
        ]
        for seed in (1, 2)
    ]


def checked(bundle: Path) -> Report:
    return run_selfcheck([bundle], counts=COUNTS, studies=studies)


def failed(report: Report) -> set[str]:
    return {outcome.check for outcome in report.outcomes if not outcome.passed}


def problem_of(report: Report, check: str) -> str:
    return next(outcome.problem for outcome in report.outcomes if outcome.check == check)


def test_all_checks_pass_where_nothing_is_broken(gated: Path, trt: FakeTensorRt) -> None:
    told: list[Outcome] = []
    report = run_selfcheck([gated], counts=COUNTS, studies=studies, tell=told.append)
    assert report.passed, [o for o in report.outcomes if not o.passed]
    assert told == list(report.outcomes)
    assert {outcome.check for outcome in report.outcomes} == EVERY
    assert all(outcome.measured is not None for outcome in report.outcomes)
    assert report.facts["GPU"] == "NVIDIA GeForce RTX 4090"
    assert report.facts["engine"] == "tensorrt-rtx"


def test_a_program_of_both_directions_without_a_gate_passes_too(
    both_ways: Bundle, trt: FakeTensorRt
) -> None:
    report = checked(both_ways.folder)
    assert report.passed, [o for o in report.outcomes if not o.passed]


def test_every_stage_is_timed_beside_the_roofline(gated: Path, trt: FakeTensorRt) -> None:
    report = checked(gated)
    stages = [latency.stage for latency in report.latencies]
    assert {"slice", "slab", *NODES} < set(stages)
    assert "encoder, batch 4" in stages
    assert [stage for stage in stages if stage.startswith("last slice to result")] == [
        "last slice to result, head first",
        "last slice to result, feet first",
    ]
    for latency in report.latencies:
        assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
        assert latency.computed_ms is not None
        assert latency.computed_ms > 0


def test_without_published_rates_the_rest_is_there(
    gated: Path, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt
) -> None:
    gpu.module.cuda.runtime.getDeviceProperties = lambda _: {"name": b"Fake GPU"}
    report = checked(gated)
    assert report.passed
    assert {latency.computed_ms for latency in report.latencies} == {None}


# What is broken, and which checks say so.


def broken_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Change the first value that a kernel writes."""
    launch = fake_cuda.Kernel.__call__

    def broken(self: Any, grid: Any, block: Any, args: Any) -> None:
        launch(self, grid, block, args)
        if self.name == name:
            out = args[-1]
            raw = (ctypes.c_uint8 * 1).from_address(out.data.ptr)

            def spoil() -> None:
                raw[0] ^= 1

            self.gpu.enqueue(self.gpu.current.ptr, spoil)

    monkeypatch.setattr(fake_cuda.Kernel, "__call__", broken)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("pe_resample_i16", PREPROCESSING),
        ("pe_resample_u16", {"slices"}),
        ("pe_gather_slab_f32", {"planes", "slabs"}),
    ],
)
def test_a_kernel_that_errs_by_one_bit_is_found(
    gated: Path,
    trt: FakeTensorRt,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    expected: set[str],
) -> None:
    broken_kernel(monkeypatch, kernel)
    report = checked(gated)
    assert failed(report) & PREPROCESSING == expected
    assert not any(outcome.problem for outcome in report.outcomes)


def test_a_slice_that_is_read_before_it_is_there_is_found(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cuda.Stream, "wait_event", lambda *_: None)
    assert failed(checked(gated)) & PREPROCESSING == {"slices on the device"}


def test_a_wrong_plane_for_the_gate_is_found(
    gated: Path, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = fake_cuda.Kernel.__call__

    def broken(self: Any, grid: Any, block: Any, args: Any) -> None:
        launch(self, grid, block, args)
        if self.name == "pe_gather_hu":
            out = args[-1]
            self.gpu.enqueue(
                self.gpu.current.ptr,
                lambda: ctypes.memset(out.data.ptr, 0, out.nbytes),
            )

    monkeypatch.setattr(fake_cuda.Kernel, "__call__", broken)
    report = checked(gated)
    assert failed(report) & PREPROCESSING == {"slabs"}


def spoiled_engines(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[fake_tensorrt.Context, int, dict[str, Any]], None],
) -> None:
    """Let ``spoil`` change what a run has written: context, stream, and values by tensor."""
    execute = fake_tensorrt.Context.execute_async_v3

    def broken(self: fake_tensorrt.Context, handle: int) -> bool:
        queued = execute(self, handle)
        batch = next(iter(self.shapes.values()))[0]
        written = {
            name: fake_tensorrt.memory(
                self.addresses[name], [size if size > 0 else batch for size in tensor.shape]
            )
            for name, tensor in self.engine.outputs.items()
        }
        self.engine.module.queue(handle, lambda: spoil(self, handle, written))
        return queued

    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", broken)


@pytest.mark.parametrize("node", ["encoder", "score"])
def test_a_node_that_computes_something_else_is_named(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    outputs = {"encoder": {"features", "attention", "logit"}, "score": {"logit"}}[node]

    def spoil(_: fake_tensorrt.Context, handle: int, written: dict[str, Any]) -> None:
        if written.keys() == outputs:
            written["logit"] += 2

    spoiled_engines(monkeypatch, spoil)
    report = checked(gated)
    assert {check for check in failed(report) if check.startswith("node ")} == {f"node {node}"}
    studies_failed = {check for check in failed(report) if check.startswith("study")}
    assert studies_failed == {"study, head first", "study, feet first", "study, late slices"}
    assert not failed(report) & {"engines", *PREPROCESSING, "drift", "leak"}


def test_a_batch_that_computes_something_else_is_found(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: fake_tensorrt.Context, handle: int, written: dict[str, Any]) -> None:
        if "features" in written and len(written["features"]) == 2:
            written["features"][1] += 1

    spoiled_engines(monkeypatch, spoil)
    assert "node encoder" in failed(checked(gated))


def test_results_that_are_no_numbers_fail(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: fake_tensorrt.Context, handle: int, written: dict[str, Any]) -> None:
        if "c_next" in written:
            written["c_next"][...] = np.nan

    spoiled_engines(monkeypatch, spoil)
    report = checked(gated)
    assert {"node down", "node up"} <= failed(report)
    json.loads(report.to_json())


def test_streams_that_disturb_each_other_are_found(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that comes from whichever stream ran before: alone, a study is right."""
    last: dict[Any, int] = {}

    def spoil(context: fake_tensorrt.Context, handle: int, written: dict[str, Any]) -> None:
        if "h_next" in written and last.setdefault(context.engine, handle) != handle:
            written["h_next"] += 1e-6
        last[context.engine] = handle

    spoiled_engines(monkeypatch, spoil)
    assert "interleaved streams" in failed(checked(gated))


def test_a_result_that_drifts_is_found(
    gated: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0

    def spoil(_: fake_tensorrt.Context, handle: int, written: dict[str, Any]) -> None:
        nonlocal runs
        if written.keys() == {"logit"}:
            runs += 1
            written["logit"] += np.float32(1e-5 * runs)

    spoiled_engines(monkeypatch, spoil)
    report = checked(gated)
    assert "drift" in failed(report)
    assert not failed(report) & {"study, head first", "study, feet first", "node score", "leak"}


def test_memory_that_does_not_come_back_is_found(
    gated: Path, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def shrinking() -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return MEMORY - asked * (40 << 20), MEMORY

    gpu.module.cuda.runtime.memGetInfo = shrinking
    assert failed(checked(gated)) == {"leak"}

    facts = {**fake_cuda.Device.attributes, "Integrated": 1}
    monkeypatch.setattr(fake_cuda.Device, "attributes", facts)
    assert failed(checked(gated)) == set()  # 40 MiB are less than a hundredth of this memory


def test_engines_that_cannot_be_built_do_not_stop_the_rest(gated: Path, trt: FakeTensorRt) -> None:
    trt.fail = "no room for tactic"
    report = checked(gated)
    assert failed(report) == {"engines", *ON_ENGINES}
    assert "no room for tactic" in problem_of(report, "engines")
    assert "see the check 'engines'" in problem_of(report, "drift")
    assert not report.passed


def test_a_driver_that_fails_is_the_verdict_of_every_check(
    gated: Path, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = fake_cuda.Kernel.__call__

    def broken(self: Any, *args: Any) -> None:
        if self.name == "pe_gather_slab_f32":
            raise fake_cuda.CUDARuntimeError("cudaErrorIllegalAddress")
        launch(self, *args)

    monkeypatch.setattr(fake_cuda.Kernel, "__call__", broken)
    report = checked(gated)
    assert failed(report) >= {"planes", "slabs", "study, head first"}
    assert "slices" not in failed(report)
    assert "cudaErrorIllegalAddress" in problem_of(report, "planes")


# Where there is nothing to check.


def test_without_a_gpu_it_says_so(gated: Path, gpu: fake_cuda.FakeGpu, trt: FakeTensorRt) -> None:
    gpu.remove()
    with pytest.raises(EngineError, match="no GPU to check: CUDA finds no GPU") as caught:
        checked(gated)
    assert (caught.value.code, caught.value.exit_code) == (Code.ENGINE_UNAVAILABLE, 6)


def test_without_tensorrt_both_extras_are_named(
    gated: Path, gpu: fake_cuda.FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pe_infer.gpu_selfcheck.subject.missing", lambda name: (name,))
    with pytest.raises(EngineError, match=r"\[tensorrt-rtx\].*\[tensorrt\]") as caught:
        checked(gated)
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ("8.9", {"tensorrt-rtx", "tensorrt"}, "tensorrt-rtx"),
        ("8.7", {"tensorrt-rtx", "tensorrt"}, "tensorrt"),
        ("8.9", {"tensorrt"}, "tensorrt"),
        ("9.0", {"tensorrt-rtx"}, "tensorrt-rtx"),
    ],
)
def test_the_library_that_knows_the_gpu_is_checked(
    monkeypatch: pytest.MonkeyPatch, capability: str, installed: set[str], chosen: str
) -> None:
    monkeypatch.setattr("pe_infer.machine.device_capability", lambda: capability)
    monkeypatch.setattr(
        "pe_infer.gpu_selfcheck.subject.missing", lambda name: () if name in installed else (name,)
    )
    assert choose_target() == chosen


def test_no_check_at_all_is_no_pass() -> None:
    assert not Report(facts={}, outcomes=[], latencies=[]).passed


def test_what_is_no_number_does_not_pass() -> None:
    assert Measured(value=0, limit=0, unit="").passed
    assert not Measured(value=math.nan, limit=1, unit="").passed
    assert not Measured(value=math.inf, limit=1, unit="").passed


# Results side by side.


@pytest.fixture(scope="module")
def result(gated: Path) -> StudyResult:
    with Detector(gated, engine="onnxruntime", precision="float32", cache_dir=None) as detector:
        found = detector.detect(studies()[0])
    assert found.status == "processed"
    assert found.coverage.gated_slabs
    return found


def moved(result: StudyResult, by: float) -> StudyResult:
    assert result.probability is not None
    return result.model_copy(update={"probability": result.probability + by})


def test_probabilities_are_compared_slab_by_slab(result: StudyResult) -> None:
    assert distance(result, result) == 0
    assert distance(moved(result, 0.001), result) == pytest.approx(0.001)
    at = next(i for i, slab in enumerate(result.evidence) if not slab.gated)
    slab = result.evidence[at]
    assert slab.probability is not None
    evidence = [*result.evidence]
    evidence[at] = slab.model_copy(update={"probability": slab.probability + 0.25})
    assert distance(result.model_copy(update={"evidence": tuple(evidence)}), result) == (
        pytest.approx(0.25)
    )
    evidence[at] = slab.model_copy(update={"probability": None})
    assert distance(result.model_copy(update={"evidence": tuple(evidence)}), result) == math.inf


def test_other_slabs_and_other_verdicts_are_infinitely_far(result: StudyResult) -> None:
    fewer = result.model_copy(update={"evidence": result.evidence[1:]})
    assert distance(fewer, result) == math.inf
    turned = result.model_copy(update={"positive": not result.positive})
    assert result.probability is not None
    for threshold, expected in ((result.probability + 0.005, 0.0), (0.999, math.inf)):
        point = result.operating_point.model_copy(update={"threshold": threshold})
        assert distance(turned, result.model_copy(update={"operating_point": point})) == expected


# The command.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(run_selfcheck, counts=COUNTS, studies=studies)
    monkeypatch.setattr("pe_infer.cli.gpu_selfcheck.run_selfcheck", quick)


def test_the_command_prints_checks_and_latencies_and_writes_json(
    gated: Path, trt: FakeTensorRt, small: None, tmp_path: Path
) -> None:
    file = tmp_path / "selfcheck.json"
    done = CliRunner().invoke(
        app, ["doctor", "--gpu-selfcheck", "--bundle", str(gated), "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    assert "pass  toy: planes: 0 differing values (at most 0)" in done.stdout
    assert "last slice to result, feet first" in done.stdout
    assert f"all {len(EVERY)} checks passed" in done.stdout
    document = json.loads(file.read_text())
    assert document["passed"] is True
    assert {check["check"] for check in document["checks"]} == EVERY
    assert {"stage", "p50_ms", "p95_ms", "p99_ms", "computed_ms"} < document["latencies"][0].keys()


def test_the_command_fails_if_a_check_does(
    gated: Path, trt: FakeTensorRt, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_kernel(monkeypatch, "pe_resample_u16")
    done = CliRunner().invoke(app, ["doctor", "--gpu-selfcheck", "--json", "--bundle", str(gated)])
    assert done.exit_code == 6
    document = json.loads(done.stdout)
    assert document["passed"] is False
    (bad,) = [check for check in document["checks"] if not check["passed"]]
    assert bad["check"] == "slices"
    assert bad["measured"]["value"] > bad["measured"]["limit"] == 0
    assert "FAIL  toy: slices" in done.stderr
    assert f"1 of {len(EVERY)} checks failed" in done.stderr


def test_the_command_writes_json_without_a_gpu_too(
    gpu: fake_cuda.FakeGpu, small: None, tmp_path: Path
) -> None:
    gpu.remove()
    file = tmp_path / "selfcheck.json"
    done = CliRunner().invoke(app, ["doctor", "--gpu-selfcheck", "--json", str(file)])
    assert isinstance(done.exception, EngineError)
    document = json.loads(file.read_text())
    assert document["passed"] is False
    assert "no GPU" in document["unavailable"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-selfcheck", "--engines", "there"], "leave out --engines"),
        (["--gpu-selfcheck", "--machine", "sm=87"], "leave out --engines"),
        (["--gpu-selfcheck", "file.json"], "--gpu-selfcheck --json"),
        (["--json", "file.json"], "--gpu-selfcheck --json"),
        (["--gpu-selfcheck", "--json", "nowhere/file.json"], "there is no folder nowhere"),
        (["--engines", "there", "--bundle", "a", "--bundle", "b"], "name it once"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert message in str(done.exception)


def test_the_bundle_of_the_tests_has_the_nodes_that_are_named(gated: Path) -> None:
    names = {node.name for node in Bundle.load(gated).manifest.nodes if node.kind != "reduce"}
    assert names == set(NODES)
