"""Which bundle a series asks for: by modality, body part, contrast, and the words of its protocol.

Nothing is guessed: where the headers do not say it, or say two things, the choice is the user's.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pe_infer import dicom
from pe_infer.bundle import read_manifest, shipped
from pe_infer.errors import BundleError, Code, ScopeError
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope
from pe_infer.result import Flag, QualityFlag
from pe_infer.scope import mismatch, says_body_part
from pe_infer.series import says_contrast

_WORD: Final = re.compile(r"[^\W_]+")
_NAME_ONE: Final = "Name one with --bundle (Detector(NAME))"
_OTHER_SERIES: Final = "name another series with --series (series=)"
_SHOWN_CHARACTERS: Final = 80
_SHOWN_SERIES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The one bundle that a series asks for.

    Attributes:
        bundle: Its name among the candidates.
        reason: The attributes that decided, with their values.
    """

    bundle: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundleChoice:
    """A bundle for a study, and the series that it is for.

    Attributes:
        bundle: What `Detector` takes: the name of a shipped bundle, or a folder.
        version: The bundle's version.
        reason: The attributes that decided, with their values.
        series: What `Detector.detect` takes; its flags say how both were chosen.
    """

    bundle: str | Path
    version: str
    reason: str
    series: dicom.Series


def choose_bundle(
    source: dicom.Source,
    series: str | int | None = None,
    *,
    bundles: Sequence[str | Path] | None = None,
) -> BundleChoice:
    """Find the bundle that a study asks for, and the series to give it, from headers alone.

    Every axial CT series is matched (see `match`), or the one that is named. If all that match ask
    for one bundle, it is that one, and the best of these series by the rules of
    `pe_infer.dicom.open_series`.

    Args:
        source: A folder, DICOM files or data sets.
        series: SeriesInstanceUID or SeriesNumber.
        bundles: Candidates: names or folders; ``None`` is all shipped ones.

    Raises:
        ScopeError: No bundle is for any series (``scope.mismatch``), or the headers do not tell
            which one, or different ones for different series (``scope.undecided``).
        InputError: The source holds no series that can be read, or equally good ones.
        BundleError: A manifest is missing or damaged.
    """
    candidates = {str(bundle): bundle for bundle in (shipped() if bundles is None else bundles)}
    if not candidates:
        raise BundleError(
            "there is no bundle to choose from: name a bundle's folder with --bundle "
            "(Detector(FOLDER))",
            code=Code.BUNDLE_NOT_FOUND,
        )
    manifests = {name: read_manifest(bundle) for name, bundle in candidates.items()}
    scopes = {name: manifest.scope for name, manifest in manifests.items()}
    found = dicom.survey(source)
    if series is not None:
        opened = found.open(series)
        chosen = match(opened.info, scopes)
    else:
        matches = _matches(found, scopes)
        scope = scopes[next(iter(matches.values())).bundle]
        opened = found.open(prefer_contrast=scope.contrast != "forbidden", fitting=matches.keys())
        chosen = matches[opened.summary.series_instance_uid]
    version = manifests[chosen.bundle].version
    opened.flags.append(
        QualityFlag(
            flag=Flag.BUNDLE_CHOSEN,
            message=f"bundle {chosen.bundle!r} {version} was chosen: {chosen.reason}",
            values={"bundle": chosen.bundle, "candidates": len(candidates)},
        )
    )
    return BundleChoice(
        bundle=candidates[chosen.bundle], version=version, reason=chosen.reason, series=opened
    )


def shipped_scopes() -> dict[str, Scope]:
    """What the shipped bundles are for, by name."""
    return {name: read_manifest(name).scope for name in shipped()}


def match(series: SeriesInfo, scopes: Mapping[str, Scope]) -> Match:
    """Find the one bundle that a series asks for.

    Bundles that the series contradicts (Modality, BodyPartExamined, ContrastBolusAgent) are out,
    whatever else it says. Of the others, the one that accepts its BodyPartExamined is taken. Where
    that is missing, or several accept it, whole words of ProtocolName, SeriesDescription and
    StudyDescription decide, in any case and without accents: the one is taken that is named, by its
    body parts or keywords, wherever any of them is.

    Args:
        series: What the series says of itself.
        scopes: The candidates by name.

    Raises:
        ScopeError: The series contradicts all (``scope.mismatch``), or names none or several
            (``scope.undecided``).
    """
    problems: dict[str, str] = {}
    for name, scope in scopes.items():
        if (found := mismatch(scope, series, bundle=name)) is not None:
            problems[name] = found[0]
    possible = {name: scope for name, scope in scopes.items() if name not in problems}
    if not possible:
        raise ScopeError(
            f"no bundle is for this series: {'; '.join(problems.values())}. Use a bundle that was "
            f"made for it with --bundle (Detector(FOLDER)), or {_OTHER_SERIES}."
        )
    stated = says_body_part(series)
    by_part = {name: scope for name, scope in possible.items() if scope.body_part and stated}
    left = by_part or possible
    evidence = {name: _confirmed(series, scope) for name, scope in left.items()}
    named = set(by_part)
    if len(by_part) != 1:
        told = [words for words in _told(series, left) if words]
        named = set(left).intersection(*told) if told else set()
        for words in told:
            for name, phrase in words.items():
                evidence[name].append(phrase)
    if len(named) == 1:
        bundle = named.pop()
        return Match(bundle=bundle, reason=", ".join(evidence[bundle]))
    states = [
        problems.get(name) or f"bundle {name!r}: {', '.join(evidence.get(name, ())) or 'not named'}"
        for name in scopes
    ]
    raise ScopeError(
        f"cannot tell which bundle this series asks for. {_said(series)}; {'; '.join(states)}. "
        f"{_NAME_ONE}, or {_OTHER_SERIES}.",
        code=Code.UNDECIDED_BUNDLE,
    )


def _matches(found: dicom.Survey, scopes: Mapping[str, Scope]) -> dict[str, Match]:
    """The series, by SeriesInstanceUID, that ask for a bundle; all for the same."""
    if not found.readable:
        found.open()  # says why
    matches: dict[str, Match] = {}
    told: list[str] = []
    refusals: list[tuple[str, ScopeError]] = []
    for summary, info in found.readable:
        try:
            fit = match(info, scopes)
        except ScopeError as exc:
            refusals.append((summary.label, exc))
        else:
            matches[summary.series_instance_uid] = fit
            told.append(f"{summary.label}: bundle {fit.bundle!r}, {fit.reason}")
    if len({fit.bundle for fit in matches.values()}) > 1:
        raise ScopeError(
            f"the series ask for different bundles: {_listed(told)}. Name one with --series "
            "(series=).",
            code=Code.UNDECIDED_BUNDLE,
        )
    if matches:
        return matches
    if len(refusals) == 1:
        raise refusals[0][1]
    raise ScopeError(
        f"none of {len(refusals)} series asks for a bundle: "
        + _listed([f"{label}: {exc}" for label, exc in refusals]),
        code=max((exc.code for _, exc in refusals), key=lambda code: code is Code.UNDECIDED_BUNDLE),
    )


def _confirmed(series: SeriesInfo, scope: Scope) -> list[str]:
    """What a bundle asks for and the series says."""
    confirmed = []
    if scope.body_part and says_body_part(series):
        confirmed.append(f"BodyPartExamined {_quoted(series.body_part_examined)}")
    if scope.contrast != "any" and says_contrast(series.contrast_bolus_agent) is not None:
        confirmed.append(f"ContrastBolusAgent {_quoted(series.contrast_bolus_agent)}")
    return confirmed


def _told(series: SeriesInfo, scopes: Mapping[str, Scope]) -> list[dict[str, str]]:
    """For each text of the series, the bundles that it names, and by which words."""
    told = []
    for attribute, text in _texts(series):
        named = {}
        for name, scope in scopes.items():
            terms = (*scope.body_part, *scope.keywords)
            if (term := next((t for t in terms if _holds(text, t)), None)) is not None:
                named[name] = f"{attribute} {_quoted(text)} says {term!r}"
        told.append(named)
    return told


def _texts(series: SeriesInfo) -> list[tuple[str, str | None]]:
    return [
        ("ProtocolName", series.protocol_name),
        ("SeriesDescription", series.series_description),
        ("StudyDescription", series.study_description),
    ]


def _holds(text: str | None, term: str) -> bool:
    """Whether a text holds a word, or several in a row."""
    sought = _words(term)
    return bool(sought.strip()) and sought in _words(text)


def _words(text: str | None) -> str:
    """Words in lower case, without accents, each between two spaces."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text or "") if not unicodedata.combining(c)
    )
    return f" {' '.join(_WORD.findall(plain.casefold()))} "


def _said(series: SeriesInfo) -> str:
    facts = [("BodyPartExamined", series.body_part_examined), *_texts(series)]
    return ", ".join(f"{name} is {_quoted(text) if text else 'missing'}" for name, text in facts)


def _quoted(text: str | None) -> str:
    shown = text or ""
    return repr(shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}...")


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN_SERIES
    return " ".join(
        [" | ".join(texts[:_SHOWN_SERIES]), *([f"and {more} more"] if more > 0 else [])]
    )
