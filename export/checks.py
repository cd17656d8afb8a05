"""The limits of a bundle's checks: measured on studies made for that, and put into bundles.

``python -m export.checks measure --system pe --patients 20 --out FILE`` measures the checks of
``export/configs/pe-bundle.toml`` on the groups of studies in ``pe-checks.toml``, on the grid of
``pe-data.toml``, and says which outcome each group gets and how far every limit is from the values
on either side. The seeds are used for nothing else: training, evaluation and certificates stay
below 5,000,000. Studies that are in FILE already are kept, so that the command can be given again;
limits may change in between, measures may not.

``python -m export.checks store --bundle DIR --config FILE --version X`` puts the checks of a
configuration into a bundle that is there already.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.bundle import BundleSettings
from export.check_studies import (
    GroupSettings,
    StudySettings,
    phantom_configuration,
    study,
)
from export.command_line import reported
from export.training.config import DataSettings, load_settings
from pe_infer import preprocess
from pe_infer.bundle import Bundle, set_checks
from pe_infer.checks import assess, plane_measure
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import PatientGrid
from pe_infer.manifest import Check
from pe_infer.result import CheckResult

CONFIGS: Final = Path(__file__).parent / "configs"
FIRST_SEED: Final = 5_000_000
LIMITS: Final = ("refuse_below", "flag_below", "flag_above", "refuse_above")
SEVERITY: Final = ("passed", "flagged", "refused")


@dataclass(frozen=True)
class CheckSettings:
    """All that the measurements depend on.

    Attributes:
        checks: With their limits.
        studies: Which are made.
        grid: Their planes.
    """

    checks: tuple[Check, ...]
    studies: StudySettings
    grid: PatientGrid

    @classmethod
    def load(cls, system: str) -> "CheckSettings":
        """Of ``export/configs/<system>-{bundle,checks,data}.toml``.

        Raises:
            ConfigurationError: A file is missing or not valid, or a group names no check.
        """
        checks = load_settings(CONFIGS / f"{system}-bundle.toml", BundleSettings).checks
        studies = load_settings(CONFIGS / f"{system}-checks.toml", StudySettings)
        grid = load_settings(CONFIGS / f"{system}-data.toml", DataSettings).grid.to_grid()
        known = {check.name for check in checks}
        for group in studies.groups:
            if group.check is not None and group.check not in known:
                raise ConfigurationError(
                    f"group {group.name!r} is for check {group.check!r}, declared: {sorted(known)}"
                )
        return cls(checks, studies, grid)

    def digest(self, group: GroupSettings) -> str:
        """Of what the values of a group depend on; limits are not."""
        parts = [
            [check.model_dump(mode="json", include={"name", "measure", "over"})]
            for check in self.checks
        ]
        unlike = {"check", "outcome", "phantom"}
        altered = group.model_dump(mode="json", exclude=unlike, exclude_defaults=True)
        phantom = phantom_configuration(self.studies, group).digest()
        text = json.dumps([parts, altered, phantom, repr(self.grid)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def measure_study(settings: CheckSettings, group: GroupSettings, seed: int) -> dict[str, Any]:
    """What the checks find in one study: a record for `judge`."""
    slices = study(settings.studies, group, seed)
    measure = plane_measure(settings.checks, settings.grid)
    slabs = preprocess.slabs(slices, settings.grid, measure)
    results = assess(settings.checks, [slab.measured for slab in slabs if not slab.gated])
    return {
        "group": group.name,
        "seed": seed,
        "digest": settings.digest(group),
        "values": {result.name: result.value for result in results},
        "planes": {result.name: result.planes for result in results},
    }


def measure_patient(
    settings: CheckSettings, groups: Sequence[GroupSettings], seed: int
) -> list[dict[str, Any]]:
    """`measure_study` for several groups."""
    return [measure_study(settings, group, seed) for group in groups]


def judge(checks: Sequence[Check], record: Mapping[str, Any]) -> tuple[CheckResult, ...]:
    """Compare a record with the limits of today."""
    values = tuple(record["values"][check.name] for check in checks)
    return assess(checks, [values])


def run(
    settings: CheckSettings,
    seeds: Sequence[int],
    out: Path,
    *,
    workers: int = 1,
    follow: Callable[[list[Any], int], Iterable[Any]] = lambda jobs, _: jobs,
) -> list[dict[str, Any]]:
    """Measure every group with every seed, and write the records after each patient.

    Args:
        settings: What to measure.
        seeds: Of the phantom.
        out: JSON file; what it has already is kept.
        workers: Processes.
        follow: Passes results through, given how many there will be.

    Returns:
        The records of these groups and seeds.
    """
    known: list[dict[str, Any]] = json.loads(out.read_text())["studies"] if out.exists() else []
    digests = {group.name: settings.digest(group) for group in settings.studies.groups}
    records = [record for record in known if digests.get(record["group"]) == record["digest"]]
    done = {(record["group"], record["seed"]) for record in records}
    left = {
        seed: [group for group in settings.studies.groups if (group.name, seed) not in done]
        for seed in seeds
    }
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(measure_patient, settings, groups, seed)
            for seed, groups in left.items()
            if groups
        ]
        for job in follow(jobs, len(jobs)):
            records += job.result()
            _write(out, settings, records)
    _write(out, settings, records)
    return [record for record in records if record["seed"] in seeds]


def _write(out: Path, settings: CheckSettings, records: Sequence[Mapping[str, Any]]) -> None:
    document = {
        "checks": [check.model_dump(mode="json") for check in settings.checks],
        "studies": records,
    }
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(out)


def worst(results: Iterable[CheckResult]) -> str:
    """The severest outcome."""
    return max((result.outcome for result in results), key=SEVERITY.index, default="passed")


def outcomes(
    settings: CheckSettings, group: GroupSettings, records: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """How many studies of a group are passed, flagged and refused, by their worst check."""
    found = [
        worst(judge(settings.checks, record)) for record in records if record["group"] == group.name
    ]
    return {outcome: found.count(outcome) for outcome in SEVERITY}


def margins(
    settings: CheckSettings, records: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float | None, float | None]]:
    """Every limit, by check and kind, with the largest value below it and the smallest above."""
    found = {}
    for check in settings.checks:
        values = [v for record in records if (v := record["values"][check.name]) is not None]
        for kind in LIMITS:
            if (limit := getattr(check, kind)) is not None:
                below = max((v for v in values if v < limit), default=None)
                above = min((v for v in values if v >= limit), default=None)
                found[f"{check.name}, {kind}"] = (limit, below, above)
    return found


def _groups_table(settings: CheckSettings, records: Sequence[Mapping[str, Any]]) -> Table:
    names = [f"{check.name} ({check.unit})" for check in settings.checks]
    table = Table("group", "must be", *SEVERITY, *names, title=f"{len(records)} studies")
    for group in settings.studies.groups:
        here = [record for record in records if record["group"] == group.name]
        ranges = []
        for check in settings.checks:
            values = sorted(v for r in here if (v := r["values"][check.name]) is not None)
            ranges.append(
                f"{values[0]:.4g} | {values[len(values) // 2]:.4g} | {values[-1]:.4g}"
                if values
                else "-"
            )
        counts = [str(count) for count in outcomes(settings, group, records).values()]
        wanted = f"{group.outcome}, {group.check}" if group.check else "passed"
        table.add_row(group.name, wanted, *counts, *ranges)
    return table


def _margins_table(settings: CheckSettings, records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("limit", "value", "nearest below", "nearest above")
    for name, row in margins(settings, records).items():
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in row))
    return table


def markdown(settings: CheckSettings, records: Sequence[Mapping[str, Any]]) -> str:
    """What came of every group, as a section of the model card."""
    seeds = sorted({int(record["seed"]) for record in records})
    lines = [
        "## Checks on phantoms made for them",
        "",
        f"{len(seeds)} patients, seeds {seeds[0]} to {seeds[-1]}, which neither training nor",
        "evaluation uses, and on which the limits were chosen. Outcomes by the worst check.",
        "",
        "| group | must be | passed | flagged | not processed |",
        "|---|---|---|---|---|",
    ]
    for group in settings.studies.groups:
        counts = outcomes(settings, group, records)
        wanted = "not processed" if group.outcome == "refused" else group.outcome
        shown = " | ".join(str(counts[outcome]) for outcome in SEVERITY)
        lines.append(f"| {group.name} | {wanted} | {shown} |")
    return "\n".join([*lines, ""])


app = typer.Typer(help="The limits of a bundle's checks of the images.")


@app.command("measure")
def measure_command(
    *,
    out: Annotated[Path, typer.Option(help="Where to write what was measured (JSON).")],
    system: Annotated[str, typer.Option(help="First part of the names in configs.")] = "pe",
    patients: Annotated[int, typer.Option(help="Seeds per group.", min=1)] = 10,
    first_seed: Annotated[int, typer.Option(help="Of the phantom.", min=FIRST_SEED)] = FIRST_SEED,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    section: Annotated[
        Path | None, typer.Option(help="Outcomes as Markdown, for the model card.")
    ] = None,
) -> None:
    """Measure checks on studies that they must let pass, flag or refuse."""
    console = Console()
    with reported(console):
        settings = CheckSettings.load(system)
        records = run(
            settings,
            range(first_seed, first_seed + patients),
            out,
            workers=workers,
            follow=lambda jobs, total: track(jobs, "patients", total=total, console=console),
        )
    if section is not None:
        section.write_text(markdown(settings, records))
    console.print("Ranges are smallest | median | largest of the group's studies.")
    console.print(_groups_table(settings, records))
    console.print(_margins_table(settings, records))


@app.command("store")
def store_command(
    *,
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle, which is changed.")],
    config: Annotated[Path, typer.Option(help="Its settings (TOML), with the checks.")],
    version: Annotated[str, typer.Option(help="Of the bundle from now on.")],
) -> None:
    """Put the checks of a configuration into a bundle; its graphs stay as they are."""
    console = Console()
    with reported(console):
        settings = load_settings(config, BundleSettings)
        changed = set_checks(Bundle.load(bundle), settings.checks, version)
    console.print(f"{changed.folder}: {len(changed.manifest.checks)} checks, {changed.sha256}")


if __name__ == "__main__":
    app()
