"""The command line as a user runs it: output, JSON, exit codes."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_runs
import jsonschema
import numpy as np
import pytest
from cli_runs import Cli, chest
from rich.console import Console
from strategies import REGULAR, body, study
from toy_bundles import make
from typer.testing import CliRunner

from pe_infer import errors, schemas
from pe_infer.cli import app as command_line
from pe_infer.cli import layout, pacing, phantom_command
from pe_infer.dicom import write_series
from pe_infer.phantom.chest.phantom import ChestPhantom
from pe_infer.result import result_schema

cli = pytest.fixture(cli_runs.runner)
bundle = pytest.fixture(scope="module")(cli_runs.toy_bundle)
series = pytest.fixture(scope="module")(cli_runs.chest_series)


def test_detect_prints_a_verdict(cli: Cli, bundle: Path, series: Path) -> None:
    done = cli("detect", series, "--bundle", bundle, "--engine", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "Pulmonary embolism: " in done.stdout
    assert "onnxruntime" in done.stdout
    assert "100/100 slices" in done.stdout  # plain lines where there is no terminal
    assert "\x1b" not in done.stdout


def test_a_check_of_the_images_refuses_or_flags(cli: Cli, series: Path, tmp_path: Path) -> None:
    cells = {"low_hu": -200.0, "high_hu": 1500.0, "quantile": 0.5, "cell_px": 1}
    contrast = {
        "name": "opacification",
        "measure": {"kind": "level", **cells},
        "over": 0.5,
        "meaning": "too little contrast agent",
        "remedy": "choose the contrast series",
    }
    said = {}
    for limit in ("refuse_below", "flag_below"):
        folder = make(tmp_path / limit, min_slabs=2, checks=[{**contrast, limit: 80.0}])
        done = cli("detect", series, "--bundle", folder, "--engine", "onnxruntime", COLUMNS="300")
        assert done.returncode == (10 if limit == "refuse_below" else 0), done.stderr
        said[limit] = done.stdout
    assert "NOT PROCESSED" in said["refuse_below"]
    assert (
        "[check.opacification] too little contrast agent (opacification is 40 HU, at least 80 HU "
        "needed); choose the contrast series. Nothing can be said of this study."
    ) in said["refuse_below"]
    assert "highest probability" not in said["refuse_below"]
    assert "flag image_check" in said["flag_below"]
    assert "40 HU, flagged" in said["flag_below"]


def test_detect_writes_json_and_nothing_else_to_standard_output(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    done = cli("detect", series, "--bundle", bundle, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, result_schema())
    out = tmp_path / "out.json"
    done = cli("detect", series, "--bundle", bundle, "--json", out, COLUMNS="40")
    again = json.loads(out.read_text())
    assert again["probability"] == pytest.approx(document["probability"], abs=1e-5)
    assert "Pulmonary embolism" in done.stdout
    best = max(again["evidence"], key=lambda slab: slab["probability"] or 0.0)
    assert f" {best['sop_instance_uid']} " in done.stdout  # on one line: it can be searched


def test_detect_looks_at_the_json_file_before_it_reads_the_study(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    for target, named in ((tmp_path / "no" / "out.json", "no folder"), (tmp_path, "is a folder")):
        done = cli("detect", series, "--bundle", bundle, "--json", target)
        assert done.returncode == 2
        assert named in done.stderr
        assert str(target) in done.stderr
        assert not done.stdout


def test_a_verdict_that_cannot_be_written_is_still_printed(
    cli: Cli, bundle: Path, series: Path
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    done = cli("detect", series, "--bundle", bundle, "--json", full)
    assert done.returncode == 2
    assert "/dev/full: the result cannot be written" in done.stderr
    assert "Pulmonary embolism: " in done.stdout


def test_detect_streams_at_a_rate(cli: Cli, bundle: Path, series: Path) -> None:
    whole = json.loads(cli("detect", series, "--bundle", bundle, "--json", "-").stdout)
    done = cli("detect", series, "--bundle", bundle, "--json", "-", "--stream-rate", "2000")
    assert json.loads(done.stdout)["probability"] == pytest.approx(whole["probability"], abs=1e-5)


def test_detect_reports_what_was_not_processed(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    write_series(chest(body(study(REGULAR), range(0))), tmp_path)
    done = cli("detect", tmp_path, "--bundle", bundle)
    assert done.returncode == 10
    assert "NOT PROCESSED" in done.stdout
    assert "gate.no_organ" in done.stdout


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--engine", "tensorflow"]),
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--operating-point", "nope"]),
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--operating-point", ""]),
        (2, ["bundles", "verify", "{bundle}", "--engine", "onnxruntime"]),
        (2, ["detect"]),
        (2, ["detect", "{series}", "--bundle", "{bundle}", "--json", "{empty}/no/such/out.json"]),
        (3, ["detect", "{empty}", "--bundle", "{bundle}"]),
        (3, ["detect", "{series}", "--bundle", "{bundle}", "--series", "99"]),
        (3, ["inspect", "{empty}"]),
        (5, ["detect", "{series}", "--bundle", "no-such-bundle"]),
        (5, ["bundles", "verify", "{empty}"]),
    ],
)
def test_exit_codes(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path, code: int, arguments: list[str]
) -> None:
    places = {"series": series, "bundle": bundle, "empty": tmp_path}
    done = cli(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr or done.stdout


def test_an_error_cannot_write_to_the_terminal_by_the_name_of_a_file(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "red\x1b[31m").write_text("no image")
    done = cli("detect", tmp_path / "red\x1b[31m")
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert r"red\x1b[31m" in done.stderr


def test_a_study_outside_the_scope_is_refused(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    images = [
        replace(i, series=replace(i.series, body_part_examined="HEAD")) for i in study(REGULAR)
    ]
    write_series(images, tmp_path)
    done = cli("detect", tmp_path, "--bundle", bundle)
    assert done.returncode == 4
    assert "[scope.mismatch]" in done.stderr
    assert "HEAD" in done.stderr


def broken(folder: Path, *vendors: str) -> dict[str, str]:
    """An environment where these libraries are installed but cannot be loaded."""
    for vendor in vendors:
        (folder / f"{vendor}.py").write_text("raise ImportError('libmissing.so: not found')")
    return {"PYTHONPATH": str(folder)}


def test_an_engine_that_cannot_be_loaded_ends_with_6(
    cli: Cli, bundle: Path, series: Path, tmp_path: Path
) -> None:
    environment = broken(tmp_path, "onnxruntime")
    done = cli("detect", series, "--bundle", bundle, "--engine", "onnxruntime", **environment)
    assert done.returncode == 6
    assert "[engine.unavailable]" in done.stderr
    assert "libmissing.so" in done.stderr
    assert "Traceback" not in done.stderr


INTERRUPTED_WHILE_IT_WAITS = """
import signal, sys, time
from pe_infer.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
time.sleep = lambda seconds: signal.raise_signal(signal.SIGINT) if seconds else None
main()
"""


def test_an_interrupted_study_ends_with_130(bundle: Path, series: Path, tmp_path: Path) -> None:
    arguments = ["detect", series, "--bundle", bundle, "--stream-rate", "0.01"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IT_WAITS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "Pulmonary embolism" not in done.stdout


def test_nobody_reading_the_output_is_no_traceback(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pe_infer", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert not process.stderr.read()
    assert process.returncode == 1


def all_errors(kind: type[errors.PeInferError] = errors.PeInferError) -> Iterator[type]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from all_errors(narrower)


@pytest.mark.parametrize("kind", list(all_errors()))
def test_every_error_ends_with_the_exit_code_of_its_class(
    kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        error = kind.__new__(kind)
        errors.PeInferError.__init__(error, "file: value. Remedy.", code=errors.Code.GAP)
        raise error

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == kind.exit_code
    assert capsys.readouterr().err == "pe-infer: error [series.gap] file: value. Remedy.\n"


def test_the_help_names_every_exit_code_and_no_other() -> None:
    named = CliRunner().invoke(command_line.app, ["--help"], env={"COLUMNS": "400"}).output
    found = re.findall(r"(\d+) ", named.partition("Exit status:")[2])
    assert {int(code) for code in found} == {kind.exit_code for kind in all_errors()} | {0, 10, 130}  # type: ignore[attr-defined]


def test_the_command_line_starts_without_scipy_and_engines() -> None:
    slow = ("scipy", "pe_infer.phantom", "openvino", "onnxruntime")
    program = f"import sys, pe_infer.cli.app; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_doctor_names_the_engines_and_their_versions(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0
    assert "openvino" in done.stdout
    assert "onnxruntime" in done.stdout
    facts = json.loads(cli("doctor", "--json").stdout)["facts"]
    assert facts["engine auto"] in {"openvino", "onnxruntime"}


def test_doctor_reports_engines_that_cannot_be_loaded(cli: Cli, tmp_path: Path) -> None:
    environment = broken(tmp_path, "openvino")  # the one that auto would take
    done = cli("doctor", "--json", **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "libmissing.so" in report["facts"]["engine openvino"]
    assert report["facts"]["engine auto"].startswith("fails: ")
    assert any("--engine onnxruntime" in hint for hint in report["hints"])
    done = cli("doctor", **broken(tmp_path, "openvino", "onnxruntime"))
    assert done.returncode == 6
    assert "pip install openvino" in done.stdout


def test_phantom_writes_dicom_and_truth(cli: Cli, tmp_path: Path) -> None:
    done = cli("phantom", tmp_path, "--seed", "3", "--slice-spacing", "5", "--positive")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "chest-phantom-3-positive"
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["positive"]
    assert truth["emboli"]
    report = json.loads(cli("inspect", folder / "dicom", "--json").stdout)
    assert len(report["series"]) == 1


def test_phantom_writes_a_head_with_its_truth(cli: Cli, tmp_path: Path) -> None:
    done = cli(
        "phantom",
        tmp_path,
        "--anatomy",
        "head",
        "--seed",
        "3",
        "--slice-spacing",
        "5",
        "--positive",
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "head-phantom-3-positive"
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["positive"]
    labels = np.load(folder / "mask.npz")["hemorrhage"]
    assert {truth["labels"][str(n)] for n in np.unique(labels) if n} == {
        h["kind"] for h in truth["hemorrhages"]
    }
    report = json.loads(cli("inspect", folder / "dicom", "--json").stdout)
    assert report["usable"]
    assert len(report["series"]) == 1


def test_a_chest_without_contrast_agent_is_written_and_not_processed(
    cli: Cli, tmp_path: Path
) -> None:
    shipped = Path(__file__).parents[2] / "export" / "configs" / "pe-native.toml"
    coarse = {"matrix": 256, "pixel_spacing_mm": [1.4, 1.4], "slice_spacing_mm": [5.0, 5.0]}
    file = tmp_path / "native.json"
    file.write_text(json.dumps(ChestPhantom.load(shipped).config.to_mapping() | coarse))
    made = cli("phantom", tmp_path, "--configuration", file, "--seed", "3", "--negative")
    assert made.returncode == 0, made.stderr
    done = cli("detect", tmp_path / "chest-phantom-3-negative" / "dicom", "--json", "-")
    assert done.returncode == 10
    result = json.loads(done.stdout)
    assert result["probability"] is None
    assert result["not_processed"]["code"] == "check.opacification"


def test_a_configuration_of_no_phantom_is_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "few.toml"
    file.write_text("matrix = 512\n")
    done = cli("phantom", tmp_path / "out", "--configuration", file)
    assert done.returncode == 2
    assert "few.toml" in done.stderr
    assert not (tmp_path / "out").exists()


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("pe-infer ")
    assert "Exit status" in cli("--help").stdout


# the demo: a coarse phantom, as fast as it can be pushed


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    monkeypatch.setitem(phantom_command.USUAL_SPACING_MM, phantom_command.Anatomy.CHEST, 5.0)

    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(
            command_line.app,
            ["demo", "--rate", "10000", "--engine", "onnxruntime", *map(str, arguments)],
            env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
            catch_exceptions=False,
        )
        return done.exit_code, done.output

    return run


def test_the_demo_prints_the_verdict_beside_the_truth(
    demo: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, output = demo("--positive", "--bundle", make(tmp_path / "bundle"))
    assert code == 0, output
    right = "Pulmonary embolism: POSITIVE" in output
    assert f"truth: emboli; the verdict is {'right' if right else 'WRONG'}" in output
    for expected in ("where the network looked", "emboli, largest first", "last slice to result"):
        assert expected in output


def test_the_demo_calls_no_verdict_neither_right_nor_wrong(
    demo: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    gate = {"low_hu": -950.0, "high_hu": -949.0, "min_fraction": 1.0}
    code, output = demo("--negative", "--bundle", make(tmp_path / "bundle", grid={"gate": gate}))
    assert code == 10, output
    assert "truth: no emboli; there is no verdict" in output
    assert "WRONG" not in output
    assert "right" not in output


# how it is laid out


def test_a_terminal_gets_folded_columns_and_a_file_whole_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = [("sha256", "0123456789abcdef" * 4), ("[bold]", "[red]no markup[/red]")]
    terminal = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    layout.print_facts(terminal, facts, title="[title]")
    layout.print_table(terminal, ["[head]"], [["[cell]"]])
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 40
    for text in ("[title]", "[bold]", "[red]no markup[/red]", "[cell]"):
        assert text in shown
    monkeypatch.setenv("COLUMNS", "40")
    elsewhere = layout.open_console()
    elsewhere.file = io.StringIO()
    layout.print_facts(elsewhere, facts)
    assert elsewhere.file.getvalue().splitlines() == [
        f"sha256  {'0123456789abcdef' * 4}",
        "[bold]  [red]no markup[/red]",
    ]


def test_slices_come_at_the_pace_and_late_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            assert seconds >= 0
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    given = []
    for item in pacing.paced("abcde", 2.0):
        given.append((item, clock.now))
        clock.now += 1.25 if item == "b" else 0.0
    assert given == [("a", 0.0), ("b", 0.5), ("c", 1.75), ("d", 1.75), ("e", 2.0)]


# python -m pe_infer.schemas


def test_the_schemas_are_written_to_a_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["schemas", str(tmp_path)])
    schemas.main()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: schemas.schema_text(name) for name in schemas.SCHEMAS
    }
    for arguments in ([], [str(tmp_path / "nowhere")]):
        monkeypatch.setattr(sys, "argv", ["schemas", *arguments])
        with pytest.raises(SystemExit, match="usage"):
            schemas.main()
