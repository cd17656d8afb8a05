"""Whether a series is what a bundle was made for, as far as its headers say."""

from pe_infer.errors import ScopeError
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope
from pe_infer.result import Flag, QualityFlag
from pe_infer.series import says_contrast


def check_scope(scope: Scope, series: SeriesInfo, *, bundle: str) -> list[QualityFlag]:
    """Compare what a series says with what a bundle accepts.

    Args:
        scope: The bundle's.
        series: What the series says of itself.
        bundle: Name of the bundle, for messages.

    Returns:
        A flag for what the bundle asks for and the series does not say.

    Raises:
        ScopeError: The series says that it is something else.
    """
    if (found := mismatch(scope, series, bundle=bundle)) is not None:
        problem, remedy = found
        raise ScopeError(f"{problem}; {remedy}")
    unsaid = []
    if scope.body_part and not says_body_part(series):
        unsaid.append("BodyPartExamined")
    if scope.contrast == "required" and says_contrast(series.contrast_bolus_agent) is None:
        unsaid.append("ContrastBolusAgent")
    if not unsaid:
        return []
    return [
        QualityFlag(
            flag=Flag.SCOPE_UNCONFIRMED,
            message=f"bundle {bundle!r} needs what the series does not say: {', '.join(unsaid)}",
            values={"attributes": ", ".join(unsaid)},
        )
    ]


def mismatch(scope: Scope, series: SeriesInfo, *, bundle: str) -> tuple[str, str] | None:
    """What a series says that a bundle is not for, and the remedy; ``None`` if it says no such."""
    if scope.modality and series.modality not in scope.modality:
        return (
            f"Modality is {series.modality!r}, bundle {bundle!r} is for {list(scope.modality)}",
            "select another series or another bundle",
        )
    if scope.body_part and says_body_part(series):
        said = _normal(series.body_part_examined)
        if not any(_normal(part) in said for part in scope.body_part):
            problem = f"BodyPartExamined is {series.body_part_examined!r}"
            return (
                f"{problem}, bundle {bundle!r} is for {list(scope.body_part)}",
                "select another series or another bundle",
            )
    given = says_contrast(series.contrast_bolus_agent)
    problem = f"ContrastBolusAgent is {series.contrast_bolus_agent!r}"
    if scope.contrast == "forbidden" and given:
        return (
            f"{problem}, bundle {bundle!r} is for series without contrast agent",
            "select the native series",
        )
    if scope.contrast == "required" and given is False:
        return (
            f"{problem}, bundle {bundle!r} is for series with contrast agent",
            "select the enhanced series",
        )
    return None


def says_body_part(series: SeriesInfo) -> bool:
    """Whether BodyPartExamined is there and says anything."""
    return bool(_normal(series.body_part_examined))


def _normal(text: str | None) -> str:
    return "".join(character for character in (text or "").upper() if character.isalnum())
