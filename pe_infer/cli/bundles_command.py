"""``pe-infer bundles``: which there are, what one says of itself, whether it works here."""

import json
from typing import Annotated, Final

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_infer.bundle import Bundle, shipped
from pe_infer.bundle_check import SelfTest, self_test
from pe_infer.engines.base import EngineOptions, installed, select
from pe_infer.errors import BundleError, Code, EngineError
from pe_infer.manifest import Manifest, ReduceNode, ScanNode
from pe_infer.program import Program

_ALL: Final = "all"
_MEBIBYTE: Final = 1 << 20
_TYPICAL_SLABS: Final = 60  # a chest

app = typer.Typer(help="List, show and verify bundles.", no_args_is_help=True)

BundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A shipped bundle's name, or a folder.")
]


@app.command("list")
def list_bundles() -> None:
    """List the bundles that came with pe_infer."""
    table = _table("name", "version", "finding", "intended use")
    for name in shipped():
        manifest = Bundle.load(name).manifest
        table.add_row(
            name, manifest.version, manifest.finding.code.meaning, Text(manifest.intended_use)
        )
    _console().print(table if table.row_count else "no bundle came with this installation")


@app.command("show")
def show_bundle(
    bundle: BundleArgument,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show what a bundle says of itself, and what runs while the scan is still on."""
    loaded = Bundle.load(bundle)
    if as_json:
        typer.echo(json.dumps(loaded.manifest.model_dump(mode="json"), indent=1))
        return
    console = _console()
    facts = _table("", "", title=f"{loaded.manifest.name} {loaded.manifest.version}", header=False)
    for name, value in _facts(loaded):
        facts.add_row(name, Text(value))
    console.print(facts)
    console.print(_nodes(loaded.manifest))


@app.command("verify")
def verify_bundle(
    bundle: BundleArgument,
    *,
    run: Annotated[
        bool, typer.Option("--run", help="Also replay the golden input, on every engine present.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="With --run: only this engine.", show_default=False)
    ] = _ALL,
) -> None:
    """Check every file of a bundle against its sha256, its dataflow and, with --run, its outputs.

    The exit status is 0 if all is well and 5 if not.
    """
    loaded = Bundle.load(bundle)
    Program(loaded.manifest)
    console = _console()
    console.print(
        Text(f"{loaded.folder}: {len(loaded.files)} files intact, bundle sha256 {loaded.sha256}"),
        soft_wrap=True,
    )
    if not run:
        return
    names = installed() if engine == _ALL else (engine,)
    if not names:
        raise EngineError(
            "no engine is installed: pip install openvino", code=Code.ENGINE_UNAVAILABLE
        )
    tests = [test for name in names for test in _self_tests(loaded, name)]
    console.print(_outcome(tests))
    if failed := [test for test in tests if not test.passed]:
        raise BundleError(
            f"{loaded.folder}: the golden outputs are missed on "
            f"{', '.join(f'{t.engine.name} ({_precisions(t)})' for t in failed)}: the bundle or "
            "the engine's installation is broken, do not use them together",
            code=Code.BUNDLE_SELF_TEST,
        )


def _self_tests(bundle: Bundle, engine: str) -> list[SelfTest]:
    """In the arithmetic that the bundle allows, and in float32 where that is another one."""
    allowed = self_test(bundle, select(engine))
    if set(allowed.engine.precision.values()) == {"float32"}:
        return [allowed]
    return [allowed, self_test(bundle, select(engine, EngineOptions(precision="float32")))]


def _console() -> Console:
    return Console(highlight=False)


def _table(*columns: str, title: str | None = None, header: bool = True) -> Table:
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        show_header=header,
        box=box.ROUNDED,
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    program = Program(manifest)
    finding, grid, scope = manifest.finding, manifest.grid, manifest.scope
    windows = ", ".join(f"{w.low_hu:g} to {w.high_hu:g} HU" for w in grid.windows)
    points = ", ".join(
        f"{p.name} "
        f"{p.threshold:g}{' (default)' if p.name == manifest.default_operating_point else ''}"
        for p in manifest.operating_points
    )
    memory = ", ".join(
        f"{program.memory_bytes(_TYPICAL_SLABS, arrival) / _MEBIBYTE:.0f} MiB arriving {arrival}"
        for arrival in ("down", "up")
    )
    return [
        ("intended use", manifest.intended_use),
        (
            "finding",
            f"{finding.code.meaning} ({finding.code.scheme} {finding.code.value})"
            + (f" in {finding.site.meaning}" if finding.site else ""),
        ),
        ("modality", ", ".join(scope.modality)),
        ("body part", ", ".join(scope.body_part) or "any"),
        ("contrast", scope.contrast),
        ("plane", f"{grid.rows} x {grid.cols} pixels of {grid.spacing_mm:g} mm"),
        ("slab", f"{grid.planes_per_slab} planes {grid.pitch_um / 1000:g} mm apart"),
        ("slab every", f"{grid.pitch_um * grid.slab_step / 1000:g} mm"),
        ("windows", windows),
        ("rule", " ".join(f"{k}={v}" for k, v in manifest.rule.model_dump().items())),
        ("operating points", points),
        ("memory", f"for {_TYPICAL_SLABS} slabs, besides the engine: {memory}"),
        ("golden data", manifest.golden.file if manifest.golden else "none"),
        ("sha256", bundle.sha256),
        ("folder", str(bundle.folder)),
    ]


def _nodes(manifest: Manifest) -> Table:
    program = Program(manifest)
    online = {arrival: program.plan(arrival).online for arrival in ("down", "up")}
    table = _table("node", "kind", "reads", "writes", "online when arriving")
    for node in program.nodes:
        kind = f"scan {node.direction}" if isinstance(node, ScanNode) else str(node.kind)
        if isinstance(node, ReduceNode):
            kind = f"reduce {node.reducer}"
        arrivals = [arrival for arrival, nodes in online.items() if node in nodes]
        table.add_row(
            node.name,
            kind,
            ", ".join(node.inputs.values()),
            ", ".join(node.outputs.values()),
            " or ".join(arrivals) or "never",
        )
    return table


def _outcome(tests: list[SelfTest]) -> Table:
    table = _table("engine", "precision", "largest deviation", "allowed", "outcome")
    for test in tests:
        worst = max(test.deviations, key=lambda name: test.deviations[name])
        table.add_row(
            f"{test.engine.name} {test.engine.version}",
            _precisions(test),
            f"{test.deviations[worst]:.2g} ({worst})",
            f"{test.tolerance:.2g}",
            Text("passed", "green") if test.passed else Text("FAILED", "red"),
        )
    return table


def _precisions(test: SelfTest) -> str:
    return ", ".join(sorted(set(test.engine.precision.values())))
