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
    unsaid = []
    if scope.modality and series.modality not in scope.modality:
        raise ScopeError(
            f"Modality is {series.modality!r}, bundle {bundle!r} is for {list(scope.modality)}; "
            "select another series or another bundle"
        )
    if scope.body_part:
        said = _normal(series.body_part_examined)
        if not said:
            unsaid.append("BodyPartExamined")
        elif not any(_normal(part) in said for part in scope.body_part):
            raise ScopeError(
                f"BodyPartExamined is {series.body_part_examined!r}, bundle {bundle!r} is for "
                f"{list(scope.body_part)}; select another series or another bundle"
            )
    if scope.contrast != "any":
        agent = series.contrast_bolus_agent
        given = says_contrast(agent)
        if scope.contrast == "forbidden" and given:
            raise ScopeError(
                f"ContrastBolusAgent is {agent!r}, bundle {bundle!r} is for series without "
                "contrast agent; select the native series"
            )
        if scope.contrast == "required" and not given:
            if given is False:
                raise ScopeError(
                    f"ContrastBolusAgent is {agent!r}, bundle {bundle!r} is for series with "
                    "contrast agent; select the enhanced series"
                )
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


def _normal(text: str | None) -> str:
    return "".join(character for character in (text or "").upper() if character.isalnum())
