"""``pe-infer doctor --engines``: whether built engines fit a machine, told without a GPU."""

import json
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from pe_infer.bundle import Bundle, shipped
from pe_infer.cli.layout import open_console, print_facts, print_table
from pe_infer.engine_folder import EngineFolder
from pe_infer.errors import EngineError
from pe_infer.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a node's engine can be used, and why not."""

    node: str
    file: str
    reasons: list[str]

    @property
    def fits(self) -> bool:
        """Nothing speaks against it."""
        return not self.reasons


def preflight(folder: Path, *, machine: str | None, bundle: str | None, as_json: bool) -> None:
    """Print a verdict per engine; the exit status is 6 if one of them cannot be used.

    Raises:
        PeInferError: The folder or the bundle cannot be read, or ``machine`` makes no sense.
    """
    described = Machine.this() if machine is None else Machine.parse(machine)
    engines = EngineFolder.open(folder)
    loaded = _bundle(engines, bundle)
    verdicts = examine(engines, described, loaded)
    if as_json:
        _print_json(engines, described, loaded, verdicts)
    else:
        _print(open_console(), engines, described, loaded, verdicts)
    if not all(verdict.fits for verdict in verdicts):
        raise typer.Exit(EngineError.exit_code)


def examine(engines: EngineFolder, machine: Machine, bundle: Bundle | None) -> list[Verdict]:
    """Read every engine and compare it with machine and bundle."""
    misfits = engines.manifest.misfits(machine)
    stale = {} if bundle is None else engines.staleness(bundle)
    verdicts = []
    for node in dict.fromkeys((*engines.manifest.engines, *stale)):
        entry = engines.manifest.engines.get(node)
        reasons = [*misfits, *stale.get(node, [])]
        if entry is not None:
            try:
                engines.read_file(entry)
            except EngineError as error:
                reasons.append(str(error))
        verdicts.append(Verdict(node=node, file=entry.file if entry else "", reasons=reasons))
    return verdicts


def _bundle(engines: EngineFolder, named: str | None) -> Bundle | None:
    """The bundle that the engines should be of; without a name, the shipped one of theirs."""
    if named is not None:
        return Bundle.load(named)
    own = engines.manifest.bundle.name
    return Bundle.load(own) if own in shipped() else None


def _facts(machine: Machine) -> dict[str, str]:
    facts = {"where": "this machine" if machine.here else "as described"}
    unknown = "none found" if machine.here else "not told"
    facts["compute capability"] = machine.compute_capability or unknown
    libraries = [f"{name} {known}" for name, known in machine.versions.items()]
    facts["TensorRT"] = ", ".join(libraries) or unknown
    facts["platform"] = machine.platform or "not told"
    return facts


def _print(
    console: Console,
    engines: EngineFolder,
    machine: Machine,
    bundle: Bundle | None,
    verdicts: list[Verdict],
) -> None:
    manifest = engines.manifest
    everywhere = [r for r in verdicts[0].reasons if all(r in v.reasons for v in verdicts)]
    later = " and later" if manifest.later_capabilities else ""
    compared = f"compared with {bundle.folder}" if bundle else "not compared: add --bundle"
    print_facts(
        console,
        [
            ("engines", str(engines.folder)),
            ("built from", f"{manifest.bundle.name} {manifest.bundle.version}, {compared}"),
            ("built with", f"{manifest.target} {manifest.version} on {manifest.platform}"),
            ("built for", ", ".join(manifest.compute_capabilities) + later),
            *_facts(machine).items(),
            *(("no engine fits", reason) for reason in everywhere),
        ],
    )
    print_table(
        console,
        ("node", "verdict", "why not"),
        [
            (
                verdict.node,
                Text("fits", "green") if verdict.fits else Text("DOES NOT FIT", "red"),
                "; ".join(reason for reason in verdict.reasons if reason not in everywhere),
            )
            for verdict in verdicts
        ],
    )


def _print_json(
    engines: EngineFolder, machine: Machine, bundle: Bundle | None, verdicts: list[Verdict]
) -> None:
    document = {
        "folder": str(engines.folder),
        "bundle": str(bundle.folder) if bundle else None,
        "machine": {
            "here": machine.here,
            "compute_capability": machine.compute_capability,
            "versions": dict(machine.versions),
            "platform": machine.platform,
        },
        "fits": all(verdict.fits for verdict in verdicts),
        "engines": [
            {"node": v.node, "file": v.file, "fits": v.fits, "reasons": v.reasons} for v in verdicts
        ],
    }
    typer.echo(json.dumps(document, indent=1))
