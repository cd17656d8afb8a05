"""Which bundle judges a series: the first rule that holds, else what its headers ask for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from pe_infer.bundle import shipped
from pe_infer.choice import match
from pe_infer.errors import ConfigurationError, ScopeError
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope
from pe_infer.node.settings import Route, Routing

IGNORE: Final = "ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of a series.

    Attributes:
        bundle: Who judges it; ``None``: nobody.
        reason: The rule or the attributes that decided. No patient data.
    """

    bundle: str | None
    reason: str


class Router:
    """The rules, and the bundles to choose from. Thread-safe."""

    def __init__(self, routing: Routing, scopes: Mapping[str, Scope]) -> None:
        """Check that every bundle that the settings name is there.

        Args:
            routing: The settings.
            scopes: What the bundles that are loaded are for, by the name that rules use.

        Raises:
            ConfigurationError: A rule or ``routing.bundles`` names a bundle that is not loaded.
        """
        named = [*routing.bundles, *(rule.bundle for rule in routing.rules)]
        if missing := sorted(set(named) - set(scopes) - {IGNORE}):
            raise ConfigurationError(
                f"routing names bundles {missing} that are not loaded, expected some of "
                f"{sorted(scopes)}"
            )
        self._routing = routing
        candidates = routing.bundles or shipped()
        self._candidates = {name: scopes[name] for name in candidates if name in scopes}

    def decide(
        self, series: SeriesInfo, *, thickness_mm: float | None, calling_ae_title: str
    ) -> Decision:
        """Find who judges a series.

        A rule decides also for a bundle that is not made for the series: that is refused later,
        and said, rather than given to another one.

        Args:
            series: What it says of itself.
            thickness_mm: SliceThickness, if it says so.
            calling_ae_title: Who sent it.
        """
        for number, rule in enumerate(self._routing.rules, start=1):
            if _holds(rule, series, thickness_mm, calling_ae_title):
                ignored = rule.bundle == IGNORE
                return Decision(
                    bundle=None if ignored else rule.bundle,
                    reason=f"rule {number} of routing.rules: {rule.bundle}",
                )
        if self._routing.otherwise == IGNORE:
            return Decision(bundle=None, reason="no rule of routing.rules holds")
        try:
            found = match(series, self._candidates)
        except ScopeError as exc:
            return Decision(bundle=None, reason=f"{exc.code}: {exc}")
        return Decision(bundle=found.bundle, reason=found.reason)


def _holds(
    rule: Route, series: SeriesInfo, thickness_mm: float | None, calling_ae_title: str
) -> bool:
    named: Iterable[tuple[str | None, tuple[str | None, ...]]] = (
        (rule.modality, (series.modality,)),
        (rule.body_part, (series.body_part_examined,)),
        (rule.protocol, (series.protocol_name,)),
        (rule.description, (series.series_description, series.study_description)),
        (rule.calling_ae_title, (calling_ae_title,)),
    )
    texts_fit = all(
        any(fnmatchcase((text or "").casefold(), pattern.casefold()) for text in texts)
        for pattern, texts in named
        if pattern is not None
    )
    if rule.max_thickness_mm is None:
        return texts_fit
    return texts_fit and thickness_mm is not None and thickness_mm <= rule.max_thickness_mm
