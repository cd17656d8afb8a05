"""What a self-check found."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a check measured, and the most that it may be.

    Attributes:
        value: Zero is perfect. Not a number, and infinity where there is nothing to compare, fail.
        limit: Largest value that passes.
        unit: Of both.
    """

    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """The verdict."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check of one bundle.

    Attributes:
        bundle: Its name.
        check: Name of the check.
        measured: ``None`` if it could not be measured.
        problem: Why not.
        seconds: How long it took.
    """

    bundle: str
    check: str
    measured: Measured | None
    problem: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """The verdict; what could not be measured did not pass."""
        return self.measured is not None and self.measured.passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long a stage takes, and how long it would at published peak rates.

    Attributes:
        bundle: Its name.
        stage: What was timed, from the call until its result is there.
        runs: How often.
        p50_ms: Half of them took no longer.
        p95_ms: 95 of 100 took no longer.
        p99_ms: 99 of 100 took no longer.
        computed_ms: By `pe_infer.roofline`; ``None`` where this GPU's peak rates are not known.
    """

    bundle: str
    stage: str
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    computed_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole self-check.

    Attributes:
        facts: Device, libraries, versions.
        outcomes: In the order in which they were run.
        latencies: Of every bundle.
    """

    facts: dict[str, str]
    outcomes: Sequence[Outcome]
    latencies: Sequence[Latency]

    @property
    def passed(self) -> bool:
        """Whether there were checks, and all of them passed."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)

    def to_json(self) -> str:
        """One JSON object; a value that is no finite number is null."""
        document = {
            "passed": self.passed,
            "facts": self.facts,
            "checks": [{**asdict(o), "passed": o.passed} for o in self.outcomes],
            "latencies": [asdict(latency) for latency in self.latencies],
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def unavailable_json(reason: str) -> str:
    """The JSON object of a self-check that found no GPU."""
    return json.dumps({"passed": False, "unavailable": reason}, indent=1) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
