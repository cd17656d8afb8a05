"""All checks of all bundles, whatever fails."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from pe_infer.bundle import Bundle
from pe_infer.conclusion import package_versions
from pe_infer.cuda.device import available
from pe_infer.cuda.facts import DeviceFacts
from pe_infer.errors import Code, EngineError, PeInferError
from pe_infer.geometry import Slice
from pe_infer.gpu_selfcheck.checks import Check, checks_of
from pe_infer.gpu_selfcheck.latency import latencies
from pe_infer.gpu_selfcheck.report import Latency, Measured, Outcome, Report
from pe_infer.gpu_selfcheck.subject import Counts, Subject, choose_target
from pe_infer.machine import Machine
from pe_infer.manifest import Manifest
from pe_infer.program import Program
from pe_infer.synthetic import phantom_for

Studies: TypeAlias = Callable[[Manifest], Sequence[Sequence[Slice]]]
Tell: TypeAlias = Callable[[Outcome], None]

_GIBIBYTE = 1 << 30
_SEEDS = ((7, True), (8, False))  # of phantoms, and whether they are positive


def phantom_studies(manifest: Manifest) -> list[list[Slice]]:
    """Two synthetic patients that a bundle accepts, one of them positive, in ascending position.

    Raises:
        ConfigurationError: No phantom is what the bundle was made for.
    """
    phantom = phantom_for(manifest)
    return [list(phantom.generate(seed, positive=positive).slices) for seed, positive in _SEEDS]


def run_selfcheck(
    bundles: Sequence[str | Path],
    *,
    counts: Counts | None = None,
    studies: Studies = phantom_studies,
    tell: Tell | None = None,
) -> Report:
    """Run every check of every bundle on this machine's GPU.

    Args:
        bundles: Names or folders.
        counts: How much to run; ``None``: what ten minutes on an idle GPU allow.
        studies: Makes what a bundle is run on.
        tell: Told of every check when it is done.

    Raises:
        EngineError: There is no CuPy, no GPU or no TensorRT (``engine.unavailable``).
        BundleError: A bundle cannot be read.
    """
    if (reason := available()) is not None:
        raise EngineError(
            f"there is no GPU to check: {reason}. Everything else works without one.",
            code=Code.ENGINE_UNAVAILABLE,
        )
    target = choose_target()
    loaded = [Bundle.load(bundle) for bundle in bundles]
    outcomes: list[Outcome] = []
    table: list[Latency] = []
    with tempfile.TemporaryDirectory(prefix="pe_infer-selfcheck-") as scratch:
        for number, bundle in enumerate(loaded):
            subject = Subject(
                bundle,
                studies(bundle.manifest),
                target=target,
                folder=Path(scratch) / f"engines{number}",
                counts=counts or Counts(),
            )

            def timed(subject: Subject) -> Measured:
                table.extend(latencies(subject))
                return Measured(value=0, limit=0, unit="stages not timed")

            try:
                for name, check in {
                    **checks_of(Program(bundle.manifest)),
                    "latency": timed,
                }.items():
                    outcomes.append(_outcome(name, check, subject))
                    if tell is not None:
                        tell(outcomes[-1])
            finally:
                subject.close()
    return Report(facts=_facts(target), outcomes=outcomes, latencies=table)


def _outcome(name: str, check: Check, subject: Subject) -> Outcome:
    measured, problem, began = None, "", time.perf_counter()
    try:
        measured = check(subject)
    except PeInferError as error:
        problem = f"[{error.code}] {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, it is this check's verdict)
        problem = f"{type(error).__name__}: {error}"
    return Outcome(
        bundle=subject.bundle.manifest.name,
        check=name,
        measured=measured,
        problem=problem,
        seconds=time.perf_counter() - began,
    )


def _facts(target: str) -> dict[str, str]:
    device = DeviceFacts.read()
    return {
        "GPU": device.name,
        "compute capability": Machine.this().compute_capability or "not known",
        "multiprocessors": str(device.multiprocessors),
        "highest clock": f"{device.clock_mhz:g} MHz",
        "memory": f"{device.memory_bytes / _GIBIBYTE:.1f} GiB",
        "engine": target,
        **package_versions(),
    }
