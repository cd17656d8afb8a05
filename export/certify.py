"""What float16 costs a bundle, measured without a GPU on synthetic studies.

``python -m export.certify --bundle DIR --pairs 50 --first-seed 2900000 --out FILE``

The float16 graphs that ``pe-infer build --precision fp16`` gives TensorRT run beside the float32
ones in ONNX Runtime (`export.precision`). Every pair is kept in a file of its own in ``--work``:
the command goes on from there when it is given again, and several of them may work on different
seeds at the same time; given once more with all seeds it only sums up. ``--store`` puts the
certificate into the bundle's folder. Needs no PyTorch.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.certificate_summary import StudyRecord, summarise
from export.command_line import PhantomOption, reported
from export.held_out import held_out
from export.phantoms import AnatomyOption, chosen_phantom
from export.precision import Comparison
from pe_infer import preprocess
from pe_infer.bundle import Bundle, add_certificate
from pe_infer.certificate import MARGIN, Certificate, graph_hashes, program_digest
from pe_infer.engines.base import EngineOptions, select
from pe_infer.errors import Code, InputError
from pe_infer.half import CONVERSION_VERSION
from pe_infer.phantom import Phantom, SyntheticStudy

RECORD_VERSION: Final = 2  # of the files in the work folder


def measure(
    comparison: Comparison, bundle: Bundle, study: SyntheticStudy, *, details: bool
) -> StudyRecord:
    """One phantom through both variants.

    Raises:
        InputError: Too few of its slabs pass the gate.
        SeriesError: It gives no slabs.
    """
    manifest = bundle.manifest
    slabs = list(preprocess.slabs(study.slices, manifest.grid))
    passed = [(slab.position_um, slab.tensor) for slab in slabs if not slab.gated]
    if len(passed) < manifest.min_slabs:
        raise InputError(
            f"phantom {study.seed}: {len(passed)} of {len(slabs)} slabs pass the gate, bundle "
            f"{manifest.name!r} needs {manifest.min_slabs}",
            code=Code.TOO_FEW_SLABS,
        )
    measured = comparison.run(passed, details=details)
    return StudyRecord.of(measured, gated=[slab.gated for slab in slabs])


def run(
    bundle: Bundle,
    seeds: Sequence[int],
    work: Path,
    phantom: Phantom,
    *,
    detailed_pairs: int,
    threads: int,
    follow: Callable[[Sequence[int]], Iterable[int]],
) -> Certificate:
    """Measure every pair that is not there yet, and sum up.

    Args:
        bundle: What to measure.
        seeds: Of the phantom.
        work: Folder; pairs are kept in one of its own for every bundle, phantom and ONNX Runtime.
        phantom: What the bundle is shown.
        detailed_pairs: How many, from the first one on, to look inside the graphs with.
        threads: Of ONNX Runtime.
        follow: Passes the seeds that are left through, e.g. to show progress.

    Raises:
        ConfigurationError: The bundle was trained or validated on one of the seeds.
    """
    unseen = held_out(bundle.manifest.training, range(seeds[0], seeds[-1] + 1))
    runtime = select("onnxruntime", EngineOptions(precision="float32", threads=threads))
    folder = work / work_folder(bundle, phantom, runtime.version)
    folder.mkdir(parents=True, exist_ok=True)
    detailed = set(seeds[:detailed_pairs])
    left = [seed for seed in seeds if not _is_done(folder, seed, details=seed in detailed)]
    if left:
        comparison = Comparison(bundle, runtime)
        for seed in follow(left):
            pair = [
                measure(comparison, bundle, study, details=seed in detailed).to_json()
                for study in phantom.pair(seed)
            ]
            partial = _file(folder, seed).with_suffix(".partial")
            partial.write_text(json.dumps(pair))
            partial.replace(_file(folder, seed))
    records = (
        StudyRecord.from_json(values) for seed in seeds for values in _read(_file(folder, seed))
    )
    return Certificate(
        format_version=1,
        bundle=f"{bundle.manifest.name} {bundle.manifest.version}",
        graphs=graph_hashes(bundle.manifest),
        program=program_digest(bundle.manifest),
        conversion_version=CONVERSION_VERSION,
        pe_infer_version=version("pe-infer"),
        onnxruntime_version=runtime.version,
        phantom_configuration=phantom.digest(),
        first_seed=seeds[0],
        pairs=len(seeds),
        held_out=unseen,
        **summarise(records, bundle.manifest),
    )


def work_folder(bundle: Bundle, phantom: Phantom, onnxruntime_version: str) -> str:
    """Name of the folder of what is measured of one program on one kind of phantom."""
    parts = (
        RECORD_VERSION,
        graph_hashes(bundle.manifest),
        program_digest(bundle.manifest),
        CONVERSION_VERSION,
        phantom.digest(),
        onnxruntime_version,
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, seed: int) -> Path:
    return folder / f"pair-{seed}.json"


def _is_done(folder: Path, seed: int, *, details: bool) -> bool:
    if not (path := _file(folder, seed)).exists():
        return False
    return not details or all(record["inside"] is not None for record in _read(path))


def _read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(path.read_text())
    return records


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle.")],
    out: Annotated[Path, typer.Option(help="Where to write the certificate.")],
    pairs: Annotated[int, typer.Option(help="Pairs of studies.", min=1)] = 50,
    first_seed: Annotated[int, typer.Option(help="Of the phantom.", min=0)] = 2_900_000,
    anatomy: AnatomyOption = None,
    phantom: PhantomOption = None,
    inner_pairs: Annotated[
        int, typer.Option(help="Pairs to look inside the graphs with.", min=1)
    ] = 2,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime.", min=1)] = 1,
    work: Annotated[
        Path | None, typer.Option(help="Folder for single studies. Default: certify beside --out.")
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Also put the certificate into the bundle's folder.")
    ] = False,
) -> None:
    """Measure what float16 costs a bundle."""
    console = Console()
    with reported(console):
        loaded = Bundle.load(bundle)
        certificate = run(
            loaded,
            range(first_seed, first_seed + pairs),
            work or out.parent / "certify",
            chosen_phantom(loaded.manifest, anatomy, phantom),
            detailed_pairs=inner_pairs,
            threads=threads,
            follow=lambda left: track(left, "pairs", console=console),
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(certificate.to_bytes())
        if store:
            add_certificate(loaded, certificate)
    console.print(_table(certificate))
    console.print("stored: pe-infer bundles show tells all" if store else f"written to {out}")


def _table(certificate: Certificate) -> Table:
    table = Table("measure", "value", title=f"{certificate.studies} studies")
    for logit in certificate.logits:
        table.add_row(f"error of {logit.output}", f"p99 {logit.p99:.2g}, max {logit.max:.2g}")
    for flips in certificate.flips:
        verdicts = f"{flips.within} within {MARGIN:g} of {flips.threshold:g}, {flips.beyond} beyond"
        table.add_row(f"flips, {flips.operating_point}", verdicts)
    for inside in certificate.ranges:
        table.add_row(f"largest float16 value, {inside.node}", f"{inside.largest:.3g}")
    for shortcoming in certificate.shortcomings():
        table.add_row("shortcoming", shortcoming)
    return table


if __name__ == "__main__":
    typer.run(main)
