"""``pe-infer bundles``: which there are, what one says of itself, whether it works here."""

import json
from typing import Annotated, Final

import typer
from rich.text import Text

from pe_infer.bundle import Bundle, shipped
from pe_infer.bundle_check import SelfTest, self_test
from pe_infer.cli.certificate_view import headline, print_certificate
from pe_infer.cli.layout import Cell, open_console, print_facts, print_table
from pe_infer.engines.base import EngineOptions, installed, select
from pe_infer.errors import BundleError, Code, ConfigurationError, EngineError
from pe_infer.manifest import Check, Node, ReduceNode, ScanNode
from pe_infer.program import Program

_MEBIBYTE: Final = 1 << 20
_TYPICAL_SLABS: Final = 60  # a chest

app = typer.Typer(
    help="List, show and verify bundles. A bundle is a program that is run: use none from a source "
    "that you do not trust. Its sha256 proves that it is whole, not who made it.",
    short_help="List, show and verify bundles.",
    no_args_is_help=True,
)

BundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A shipped bundle's name, or a folder.")
]


@app.command("list")
def list_bundles() -> None:
    """List the bundles that came with pe_infer."""
    manifests = {name: Bundle.load(name).manifest for name in shipped()}
    console = open_console()
    if not manifests:
        console.print("no bundle came with this installation")
        return
    print_table(
        console,
        ("name", "version", "finding", "intended use"),
        [
            (name, m.version, m.finding.code.meaning, m.intended_use)
            for name, m in manifests.items()
        ],
    )


@app.command("show")
def show_bundle(
    bundle: BundleArgument,
    *,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print manifest and precision certificate as JSON."),
    ] = False,
) -> None:
    """Show what a bundle says of itself, what runs while the scan is still on, what float16 costs.

    As JSON, the certificate stands in the place of the name of its file.
    """
    loaded = Bundle.load(bundle)
    if as_json:
        document = loaded.manifest.model_dump(mode="json")
        if loaded.certificate:
            document["certificate"] = loaded.certificate.model_dump(mode="json")
        typer.echo(json.dumps(document, indent=1))
        return
    program = Program(loaded.manifest)
    console = open_console()
    print_facts(
        console,
        _facts(loaded, program),
        title=f"{loaded.manifest.name} {loaded.manifest.version}",
    )
    print_table(
        console,
        ("node", "kind", "reads", "writes", "online when arriving"),
        _nodes(program),
        title="program",
    )
    if loaded.certificate:
        print_certificate(console, loaded.certificate)


@app.command("verify")
def verify_bundle(
    bundle: BundleArgument,
    *,
    run: Annotated[
        bool, typer.Option("--run", help="Also replay the golden input, on every engine present.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option("--engine", help="With --run: only this engine.")
    ] = None,
) -> None:
    """Check every file of a bundle against its sha256, its dataflow and, with --run, its outputs.

    The exit status is 0 if all is well, 5 if not, and 6 if an engine fails.
    """
    if engine is not None and not run:
        raise ConfigurationError(
            f"--engine {engine} says where to replay the golden input: add --run, or leave it out"
        )
    loaded = Bundle.load(bundle)
    Program(loaded.manifest)
    console = open_console()
    console.print(
        Text(f"{loaded.folder}: {len(loaded.files)} files intact, bundle sha256 {loaded.sha256}")
    )
    if not run:
        return
    names = installed() if engine is None else (engine,)
    if not names:
        raise EngineError(
            "no engine is installed: pip install openvino", code=Code.ENGINE_UNAVAILABLE
        )
    tests = [test for name in names for test in _self_tests(loaded, name)]
    print_table(
        console,
        ("engine", "precision", "largest deviation", "allowed", "outcome"),
        [_outcome(test) for test in tests],
    )
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


def _facts(bundle: Bundle, program: Program) -> list[tuple[str, str]]:
    manifest = bundle.manifest
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
    rule: list[str] = [manifest.rule.kind]
    rule += [f"{k} {v}" for k, v in manifest.rule.model_dump(exclude={"kind"}).items()]
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
        ("rule", ", ".join(rule)),
        ("operating points", points),
        *((f"check {check.name}", _limits(check)) for check in manifest.checks),
        ("memory", f"for {_TYPICAL_SLABS} slabs, besides the engine: {memory}"),
        ("golden data", manifest.golden.file if manifest.golden else "none"),
        ("certificate", headline(bundle.certificate)),
        ("sha256", bundle.sha256),
        ("folder", str(bundle.folder)),
    ]


def _limits(check: Check) -> str:
    consequences = {"refuse": "refused", "flag": "flagged"}
    return ", ".join(
        f"{consequence} {side} {limit:g} {check.unit}"
        for kind, consequence in consequences.items()
        for side in ("below", "above")
        if (limit := getattr(check, f"{kind}_{side}")) is not None
    )


def _nodes(program: Program) -> list[tuple[str, ...]]:
    online = {arrival: program.plan(arrival).online.nodes for arrival in ("down", "up")}
    return [
        (
            node.name,
            _kind(node),
            ", ".join(node.inputs.values()),
            ", ".join(node.outputs.values()),
            " or ".join(arrival for arrival, nodes in online.items() if node in nodes) or "never",
        )
        for node in program.nodes
    ]


def _kind(node: Node) -> str:
    if isinstance(node, ScanNode):
        return f"scan {node.direction}"
    return f"reduce {node.reducer}" if isinstance(node, ReduceNode) else "map"


def _outcome(test: SelfTest) -> tuple[Cell, ...]:
    worst = max(test.deviations, key=lambda name: test.deviations[name])
    return (
        f"{test.engine.name} {test.engine.version}",
        _precisions(test),
        f"{test.deviations[worst]:.2g} ({worst})",
        f"{test.tolerance:.2g}",
        Text("passed", "green") if test.passed else Text("FAILED", "red"),
    )


def _precisions(test: SelfTest) -> str:
    return ", ".join(sorted(set(test.engine.precision.values())))
