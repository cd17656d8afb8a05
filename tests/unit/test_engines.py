"""Choosing a runtime, its options, and that none of them talks to the network."""

import fcntl
import importlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import toy_bundles as toy

from pe_infer.engines import base
from pe_infer.engines.base import EngineOptions, TensorSpec, batch_sizes, installed, select
from pe_infer.engines.processor import processor
from pe_infer.errors import Code, ConfigurationError, EngineError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Hides OpenVINO, whether it has been imported or not."""
    monkeypatch.setitem(sys.modules, "openvino", None)  # type: ignore[arg-type]
    return monkeypatch


def test_a_runtime_asked_for_by_name_is_that_one() -> None:
    for name in installed():
        assert select(name).name == name


def test_auto_is_openvino_where_it_is_installed() -> None:
    assert installed()[0] == "openvino"
    assert select("auto").name == "openvino"


def test_auto_is_onnxruntime_where_openvino_is_not(absent: pytest.MonkeyPatch) -> None:
    assert installed() == ("onnxruntime",)
    assert select("auto").name == "onnxruntime"


def test_a_runtime_that_is_not_installed_is_an_error(absent: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="pip install openvino") as caught:
        select("openvino")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def test_nothing_installed_is_an_error(absent: pytest.MonkeyPatch) -> None:
    absent.setitem(sys.modules, "onnxruntime", None)  # type: ignore[arg-type]
    assert installed() == ()
    with pytest.raises(EngineError) as caught:
        select("auto")
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_library_that_does_not_load_is_an_error_and_not_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"pe_infer.engines.{name}")
    vendor = getattr(module, "_vendor")  # noqa: B009
    if hasattr(vendor, "cache_clear"):
        vendor.cache_clear()
    real = importlib.import_module

    def broken(wanted: str, package: str | None = None) -> ModuleType:
        if wanted == name:
            raise OSError("libgomp.so.1: cannot open shared object file")
        return real(wanted, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    for wanted in (name, *(["auto"] if name == "openvino" else [])):
        with pytest.raises(EngineError, match=r"libgomp") as caught:
            select(wanted)
        assert caught.value.code == Code.ENGINE_UNAVAILABLE
        assert isinstance(caught.value.__cause__, OSError)


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"'cuda'.*'auto', 'openvino', 'onnxruntime'"):
        select("cuda")


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"max_batch": 0}, {"precision": "int8"}, {"threads": -1}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        EngineOptions(**wrong)  # type: ignore[arg-type]


def test_batch_sizes_stay_within_what_the_bundle_allows() -> None:
    assert batch_sizes(1, 8) == (1,)
    assert batch_sizes(4, 8) == (1, 4)
    assert batch_sizes(16, 8) == (1, 8)


def test_a_free_axis_takes_the_batch() -> None:
    assert TensorSpec(name="x", shape=(None, 3)).of_batch(2) == (2, 3)
    assert TensorSpec(name="x", shape=(1, 3)).of_batch(2) == (1, 3)


@pytest.mark.skipif("openvino" not in installed(), reason="openvino is not installed")
class TestOpenVino:
    def test_nodes_marked_reduced_run_in_what_the_processor_has(self) -> None:
        runtime = select("openvino", EngineOptions(threads=1))
        reduced = runtime.compile(toy.encoder(), name="encoder", precision="reduced")
        full = runtime.compile(toy.encoder(), name="encoder", precision="float32")
        strict = select("openvino", EngineOptions(threads=1, precision="float32"))

        assert full.precision == "float32"
        assert strict.compile(toy.encoder(), name="e", precision="reduced").precision == "float32"
        here = processor()
        if "avx512_bf16" in here.features:
            slow = here.bfloat16_is_slow
            assert reduced.precision == ("float32" if slow else "bfloat16")
        slab = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
        values = [e.session().run({"slab": slab})["features"] for e in (reduced, full)]
        np.testing.assert_allclose(*values, atol=0.05)
        assert np.array_equal(*values) == (reduced.precision == "float32")

    def test_compiled_graphs_are_kept_and_reused(self, tmp_path: Path) -> None:
        options = EngineOptions(threads=1, precision="float32", cache_dir=tmp_path / "cache")
        values = []
        for _ in range(2):
            engine = select("openvino", options).compile(toy.recurrence(4), name="cell")
            inputs = base.zeros(engine, 1)
            inputs["x"] += 1
            values.append(engine.session().run(inputs)["y"].copy())
            kept = sorted((tmp_path / "cache").glob("*.blob"))
            assert len(kept) == 1
        np.testing.assert_array_equal(*values)

    def test_the_cache_knows_graphs_apart_that_differ_in_weights_only(self, tmp_path: Path) -> None:
        options = EngineOptions(threads=1, precision="float32", cache_dir=tmp_path)
        for _ in range(2):
            for seed in (1, 2, 3):
                found = []
                for chosen in (options, EngineOptions(threads=1, precision="float32")):
                    engine = select("openvino", chosen).compile(toy.project(seed, 4), name="p")
                    x = np.ones((1, 4, 4, 4), np.float32)
                    found.append(engine.session().run({"x": x})["y"])
                np.testing.assert_array_equal(*found)
        assert len(list(tmp_path.glob("*.blob"))) == 3

    def test_one_process_at_a_time_fills_a_cache(self, tmp_path: Path) -> None:
        runtime = select("openvino", EngineOptions(threads=1, cache_dir=tmp_path))
        with (tmp_path / ".lock").open("w") as lock, ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would hold it
            compiled = pool.submit(runtime.compile, toy.encoder(), name="encoder")
            with pytest.raises(TimeoutError):
                compiled.result(timeout=0.5)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert compiled.result(timeout=60).name == "encoder"

    def test_a_cache_that_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ConfigurationError, match=r"cache_dir=.* name another folder"):
            select("openvino", EngineOptions(cache_dir=tmp_path / "file"))


USE_ENGINES = """
import sys
import numpy as np

events = []

def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind",
                         "socket.getaddrinfo", "socket.gethostby", "subprocess.", "os.fork",
                         "os.posix_spawn", "os.exec", "os.system")):
        events.append((event, str(arguments)))

sys.addaudithook(watch)
import pe_infer
vendors = {"openvino", "onnxruntime", "torch", "cupy", "tensorrt"}
assert not vendors & set(sys.modules), vendors & set(sys.modules)
import toy_bundles
from pe_infer.engines.base import EngineOptions, installed, select, warm_up, zeros

graph = toy_bundles.encoder()
for name in installed():
    engine = select(name, EngineOptions(threads=1)).compile(graph, name="encoder")
    warm_up(engine)
    engine.session().run(zeros(engine, 1))
assert not events, events
print("used", *installed(), "telemetry" if "openvino_telemetry" in sys.modules else "silent")
"""


def use_engines(home: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    # without the variables that mark a CI job: telemetry is off there anyway
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return subprocess.run(
        [*prefix, sys.executable, "-c", USE_ENGINES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_engine_opens_a_connection_or_starts_a_program(tmp_path: Path) -> None:
    found = use_engines(tmp_path)

    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["used", *installed(), "silent"]
    assert list(tmp_path.iterdir()) == []  # where both would keep the identity they report


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_engine_makes_a_network_system_call(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    home = tmp_path / "home"
    home.mkdir()
    calls = "trace=connect,sendto,sendmsg,sendmmsg,bind,listen"

    found = use_engines(home, "strace", "-f", "-qq", "-e", calls, "-o", str(log))

    if "ptrace" in found.stderr or "PTRACE" in found.stderr:
        pytest.skip("strace may not trace here")
    assert found.returncode == 0, found.stderr
    lines = [line for line in log.read_text().splitlines() if "(" in line]
    assert not [line for line in lines if "AF_INET" in line or "AF_UNIX" in line], lines
    assert list(home.iterdir()) == []
