"""``pe-infer doctor``: what this machine has, what to install for more, which engines fit."""

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from pe_infer.bundle import shipped
from pe_infer.cli.engines_preflight import preflight
from pe_infer.cli.gpu_selfcheck import selfcheck
from pe_infer.cli.layout import open_console, print_facts
from pe_infer.detector import default_cache_dir
from pe_infer.engines.base import AUTO, RUNTIMES, missing, select
from pe_infer.engines.processor import processor
from pe_infer.errors import ConfigurationError, EngineError, PeInferError

_PACKAGES: Final = (
    "pe-infer",
    "numpy",
    "pydicom",
    "python-gdcm",
    "pylibjpeg-openjpeg",
    "pyjpegls",
    "pylibjpeg-libjpeg",
    "openvino",
    "onnxruntime",
    "onnx",
    "tensorrt",
    "tensorrt-rtx",
)


def doctor_command(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="With --gpu-selfcheck --json: write the JSON to this file.",
        ),
    ] = None,
    *,
    gpu_selfcheck: Annotated[
        bool,
        typer.Option(
            "--gpu-selfcheck",
            help="Build the engines of the shipped bundles on this machine's GPU and compare all "
            "that it computes with the CPU; takes minutes. Exit status 0: every check passed; 6: "
            "one failed, or there is no GPU to check.",
        ),
    ] = False,
    engines: Annotated[
        Path | None,
        typer.Option(
            "--engines",
            metavar="DIR",
            help="Only tell whether the engines in this folder (pe-infer build) can be used, and "
            "why not. Needs no GPU.",
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="FACTS",
            help="With --engines: another machine than this one, as sm=87,tensorrt=10.3 or "
            "sm=8.6,tensorrt-rtx=1.7; also platform=linux-aarch64. What is not said is taken to "
            "fit.",
        ),
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            "--bundle",
            help="With --engines: what they should be built from; without it, the shipped bundle "
            "of that name. With --gpu-selfcheck: what to check, once per bundle; without it, all "
            "shipped ones.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Report processor, engines, GPU and versions; or whether built engines fit, or the GPU works.

    The exit status is 6 if no engine works; with --engines, if one of them cannot be used; with
    --gpu-selfcheck, if a check fails or there is no GPU.
    """
    _refuse_mixture(
        gpu_selfcheck=gpu_selfcheck, engines=engines, machine=machine, as_json=as_json, file=file
    )
    if gpu_selfcheck:
        selfcheck(bundle or (), as_json=as_json, file=file)
        return
    if engines is not None:
        if bundle is not None and len(bundle) > 1:
            raise ConfigurationError(
                f"--bundle {' --bundle '.join(bundle)}: engines are built from one bundle, name it "
                "once"
            )
        preflight(engines, machine=machine, bundle=bundle[0] if bundle else None, as_json=as_json)
        return
    if machine is not None or bundle is not None:
        raise ConfigurationError(
            "--machine and --bundle say what built engines are compared with: name their folder "
            "with --engines, or leave them out (--bundle goes with --gpu-selfcheck too)"
        )
    facts, hints, works = _examine()
    if as_json:
        typer.echo(json.dumps({"facts": dict(facts), "hints": hints}, indent=1))
    else:
        console = open_console()
        print_facts(console, facts)
        for hint in hints:
            console.print(Text(f"hint: {hint}", style="yellow"))
    if not works:
        raise typer.Exit(EngineError.exit_code)


def _refuse_mixture(
    *,
    gpu_selfcheck: bool,
    engines: Path | None,
    machine: str | None,
    as_json: bool,
    file: Path | None,
) -> None:
    if gpu_selfcheck and (engines is not None or machine is not None):
        raise ConfigurationError(
            "--gpu-selfcheck builds engines of its own for this machine: leave out --engines and "
            "--machine, or run them one after the other"
        )
    if file is not None and not (gpu_selfcheck and as_json):
        raise ConfigurationError(
            f"{file}: a file goes with --gpu-selfcheck --json; elsewhere use > {file}"
        )


def _examine() -> tuple[list[tuple[str, str]], list[str], bool]:
    """Facts in order, hints, and whether an engine works."""
    facts = [
        (
            "machine",
            f"{processor().name}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        ),
        ("features", ", ".join(processor().features) or "none of those that matter here"),
        ("memory", _memory()),
        ("python", platform.python_version()),
    ]
    hints, working = [], []
    for name in RUNTIMES:
        state, usable = _engine_state(name)
        facts.append((f"engine {name}", state))
        if usable:
            working.append(name)
    if working:
        facts.append(("engine auto", chosen := _auto()))
        if chosen not in working:
            hints.append(f"name an engine that works (--engine {working[0]}), or mend the other")
    else:
        hints.append("no engine works: pip install openvino")
    gpu = _gpu()
    facts.append(("NVIDIA GPU", gpu or "none found"))
    facts += [(f"package {name}", found) for name in _PACKAGES if (found := _version(name))]
    facts += [("bundles", ", ".join(shipped()) or "none"), ("cache", str(default_cache_dir()))]
    if not _version("pylibjpeg-libjpeg"):
        hints.append(
            "12-bit lossy JPEG (1.2.840.10008.1.2.4.51) needs pip install 'pe-infer[gpl-codecs]' "
            "(GPL)"
        )
    return facts, hints, bool(working)


def _engine_state(name: str) -> tuple[str, bool]:
    if absent := missing(name):
        wanted = " and ".join(absent)
        return f"needs {wanted}, not installed (pip install {RUNTIMES[name].install})", False
    try:
        runtime = select(name)
    except PeInferError as error:
        return f"installed, but: {error}", False
    return f"{runtime.version} on {runtime.device}", True


def _auto() -> str:
    """What ``auto`` stands for here; it is chosen by what is installed, not by what works."""
    try:
        return select(AUTO).name
    except PeInferError as error:
        return f"fails: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size / (1 << 30):.1f} GiB"


def _gpu() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi fails ({error})"
    return done.stdout.strip().replace("\n", "; ") or None
