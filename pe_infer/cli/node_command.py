"""``pe-infer node``: what a node has taken, found and still has to deliver.

Works beside a node that runs, and without one.
"""

import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from pe_infer.cli.layout import open_console, print_facts, print_table, printable
from pe_infer.cli.node_extra import require_node_extra
from pe_infer.errors import ConfigurationError

if TYPE_CHECKING:  # needs the extra ``node``
    from pe_infer.node.entries import SeriesEntry
    from pe_infer.node.ledger import Ledger
    from pe_infer.node.settings import NodeSettings
    from pe_infer.node.state import StateFolder

SHOWN: Final = 20
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MEBIBYTE: Final = 1 << 20
_DROPPED: Final = "dropped: the settings do not name this destination any more"
_UID: Final = re.compile(r"(?<=\binstance )[0-9]+(?:\.[0-9]+)+")

ConfigOption: TypeAlias = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The node's settings.")
]
StateOption: TypeAlias = Annotated[
    Path | None, typer.Option("--state-dir", metavar="DIR", help="Or only its state folder.")
]
SeriesArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SERIES", help="Its name in logs and in status, or its SeriesInstanceUID."
    ),
]

app = typer.Typer(
    name="node",
    help="What a node (pe-infer serve) has taken, found and still has to deliver.",
    no_args_is_help=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    settings: "NodeSettings"
    state: "StateFolder"
    ledger: "Ledger"
    key: bytes
    destinations: list[str] | None  # of the settings; None: they are not known

    def not_in_settings(self) -> dict[str, int]:
        """Destinations that deliveries wait for in vain, and how many."""
        waiting = self.ledger.open_deliveries()
        if self.destinations is None:
            return {}
        return {name: n for name, n in waiting.items() if name not in self.destinations}

    def alias(self, entry: "SeriesEntry") -> str:
        from pe_infer.node.watch import alias_of  # noqa: PLC0415  needs the extra

        return alias_of(entry.series_instance_uid, self.key)

    def without_uids(self, text: str | None) -> str | None:
        """A text with aliases in place of the UIDs of instances that it names."""
        from pe_infer.node.watch import alias_of  # noqa: PLC0415  needs the extra

        return text and _UID.sub(lambda found: alias_of(found[0], self.key), text)

    def find(self, name: str) -> "SeriesEntry":
        for entry in self.ledger.series():
            if name in {self.alias(entry), entry.series_instance_uid}:
                return entry
        raise ConfigurationError(
            f"{printable(name)}: this node has no such series. pe-infer node status lists them."
        )


@contextmanager
def _opened(config: Path | None, state_dir: Path | None) -> Iterator[_Opened]:
    require_node_extra("node")
    from pe_infer.node.configuration import load_settings  # noqa: PLC0415  needs the extra
    from pe_infer.node.ledger import Ledger  # noqa: PLC0415
    from pe_infer.node.state import StateFolder  # noqa: PLC0415

    flags = [] if state_dir is None else [f"--state_dir={state_dir}"]
    settings = load_settings(config, arguments=flags, environment=os.environ)
    state = StateFolder(settings.state_dir)
    state.check_there()
    told = [destination.name for destination in settings.destinations]
    with Ledger(state.ledger) as ledger:
        yield _Opened(
            settings=settings,
            state=state,
            ledger=ledger,
            key=state.key(),
            destinations=told if told or config is not None else None,
        )


@app.command("status")
def status_command(
    *,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: all series.")] = False,
) -> None:
    """Series, their verdicts, and deliveries that wait or were refused."""
    with _opened(config, state_dir) as node:
        document = _status(node)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    console = open_console()
    process = document["process"]
    series, deliveries = document["series"], document["deliveries"]
    facts = [
        ("node", f"runs as process {process}" if process else "does not run"),
        ("state folder", document["state_dir"]),
        ("room on its disk", f"{document['free_disk_bytes'] // _MEBIBYTE} MiB"),
        ("series", _counted(entry["state"] for entry in series)),
        ("verdicts", _counted(entry["verdict"] for entry in series if entry["verdict"])),
        ("deliveries", _counted(delivery["state"] for delivery in deliveries)),
    ]
    for name, count in document["not_in_settings"].items():
        facts.append((f"for {name}", f"{count} wait; not in the settings: pe-infer node drop"))
    print_facts(console, facts)
    if series:
        print_table(
            console,
            ("series", "state", "slices", "last slice", "bundle", "version", "verdict"),
            [
                (
                    entry["series"],
                    entry["state"],
                    str(entry["slices"])
                    + (f" of {entry['expected']}" if entry["expected"] else ""),
                    entry["last_at"],
                    entry["bundle"] or "",
                    str(entry["version"] or ""),
                    entry["verdict"] or entry["reason"] or "",
                )
                for entry in series[-SHOWN:]
            ],
            title=f"the newest {SHOWN} of {len(series)} series" if len(series) > SHOWN else "",
        )
    open_deliveries = [delivery for delivery in deliveries if delivery["state"] != "done"]
    if open_deliveries:
        print_table(
            console,
            ("delivery of", "what", "to", "state", "tries", "why"),
            [
                (
                    delivery["series"],
                    f"{delivery['kind']} {delivery['version']}",
                    delivery["destination"],
                    delivery["state"],
                    str(delivery["attempts"]),
                    delivery["error"] or "",
                )
                for delivery in open_deliveries[:SHOWN]
            ],
            title=f"{len(open_deliveries)} deliveries are not done",
        )


@app.command("replay")
def replay_command(
    series: SeriesArgument,
    *,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    deliver_only: Annotated[
        bool,
        typer.Option("--deliver-only", help="Send what there is again, to whom it was made for."),
    ] = False,
) -> None:
    """Judge a series again, as a new version; or send its results again."""
    with _opened(config, state_dir) as node:
        entry = node.find(series)
        when = "now" if node.state.pid() else "when the node is started"
        if deliver_only:
            count = node.ledger.send_again(entry.id, destinations=node.destinations)
            typer.echo(f"{node.alias(entry)}: {count} deliveries are made again {when}")
            return
        if entry.state == "receiving":
            raise ConfigurationError(
                f"{node.alias(entry)}: is still being received or judged. Wait for its result."
            )
        node.ledger.reopen(entry.id)
        typer.echo(f"{node.alias(entry)}: judged again, as version {entry.version + 1}, {when}")


@app.command("drop")
def drop_command(
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Its name in logs and in status.")
    ],
    *,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give up deliveries to a destination that was taken out of the settings.

    They are refused from here on, and do not keep their series from being deleted.
    """
    with _opened(config, state_dir) as node:
        if node.destinations is None:
            raise ConfigurationError(
                "which destinations the node has is not known: name its settings, --config FILE"
            )
        if destination in node.destinations:
            raise ConfigurationError(
                f"{printable(destination)}: the settings name this destination. Take it out of "
                "them and restart the node first."
            )
        dropped = node.not_in_settings()
        if destination not in dropped:
            raise ConfigurationError(
                f"{printable(destination)}: nothing waits for such a destination. Of those that "
                f"the settings do not name, deliveries wait for: {', '.join(dropped) or 'none'}."
            )
        if not yes:
            typer.confirm(
                f"Give up {dropped[destination]} deliveries to {destination}?", abort=True
            )
        count = node.ledger.drop(destination, reason=_DROPPED)
        typer.echo(f"{destination}: {count} deliveries dropped")


@app.command("purge")
def purge_command(
    *,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="TIME",
            help="After the last slice: 90s, 30m, 24h, 7d. Default: retention.hours.",
        ),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option("--series", help="Only this one, however old: its name, as for replay."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete slices and results of series that are done with and delivered.

    What is being received, or waits for a delivery, stays.
    """
    with _opened(config, state_dir) as node:
        from pe_infer.node.retention import Retention  # noqa: PLC0415  needs the extra

        retention = Retention(node.settings.state_dir, node.ledger)
        before = _before(older_than, series, node.settings)
        one = None if series is None else node.find(series)
        found = (
            [entry for entry in retention.due(before=before) if one in {None, entry}]
            if dry_run
            else retention.purge(before=before, series_id=None if one is None else one.id)
        )
        for entry in found:
            typer.echo(f"{node.alias(entry)}: {entry.instances} slices")
        typer.echo(f"{len(found)} series {'would go' if dry_run else 'deleted'}")
        if one is not None and not found:
            raise ConfigurationError(
                f"{node.alias(one)}: stays: it is {one.state}, or its deliveries are not done "
                "(pe-infer node status)"
            )


def _before(older_than: str | None, series: str | None, settings: "NodeSettings") -> float:
    if older_than is None:
        hours = settings.retention.hours
        if series is not None:
            return math.inf
        if hours == "never":
            raise ConfigurationError("retention.hours is never: say how old, --older-than 24h")
        return time.time() - hours * _SECONDS["h"]
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", older_than)):
        raise ConfigurationError(
            f"--older-than {older_than!r}: expected a number and s, m, h or d, such as 24h"
        )
    return time.time() - float(found[1]) * _SECONDS[found[2]]


def _status(node: _Opened) -> dict[str, Any]:
    """What ``status --json`` prints. No UIDs."""
    entries = node.ledger.series()
    names = {entry.id: node.alias(entry) for entry in entries}
    return {
        "state_dir": str(node.settings.state_dir),
        "process": node.state.pid(),
        "free_disk_bytes": shutil.disk_usage(node.settings.state_dir).free,
        "not_in_settings": node.not_in_settings(),
        "series": [
            {
                "series": names[entry.id],
                "state": entry.state,
                "bundle": entry.bundle,
                "reason": node.without_uids(entry.reason),
                "slices": entry.instances,
                "expected": entry.expected,
                "first_at": _moment(entry.first_at),
                "last_at": _moment(entry.last_at),
                "version": entry.version,
                "verdict": _verdict(node, entry),
            }
            for entry in entries
        ],
        "deliveries": [
            {
                "series": names.get(delivery.parcel.series_id),
                "kind": delivery.parcel.kind,
                "version": delivery.parcel.version,
                "destination": delivery.destination,
                "state": delivery.state,
                "attempts": delivery.attempts,
                "due_at": _moment(delivery.due_at) if delivery.due_at else None,
                "error": delivery.error,
            }
            for delivery in node.ledger.deliveries()
        ],
    }


def _verdict(node: _Opened, entry: "SeriesEntry") -> str | None:
    """That of the newest result."""
    results = [parcel for parcel in node.ledger.parcels(entry.id) if parcel.kind == "result"]
    return results[-1].verdict if results else None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _counted(states: Iterator[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(states).items()) or "none"
