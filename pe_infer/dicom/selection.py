"""Which of several CT series is the one to read: summaries, and the order of preference."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pe_infer.dicom.attributes import brief
from pe_infer.errors import Code, SeriesError
from pe_infer.series import says_contrast

MIN_EXTENT_MM = 50.0  # a series that covers less is a bolus tracking or a test slice
MAX_THICKNESS_MM = 3.0  # thicker slices are preferred only to none
REFORMATTED_WORDS = frozenset({"MPR", "REFORMATTED", "REFORMAT", "RESAMPLED", "CPR"})

# Names of convolution kernels for lung and bone. Siemens and Canon number theirs: higher is
# sharper.
_SHARP_NAMES = frozenset(
    {"LUNG", "BONE", "BONEPLUS", "EDGE", "ULTRA", "L", "D", "E", "YA", "YB", "YC", "YD"}
)
_CANON_KERNEL = re.compile(r"FC(\d{2})")
_CANON_SHARP = 30
_SIEMENS_KERNEL = re.compile(r"[A-Z]{1,2}(\d{2})")
_SIEMENS_SHARP = 50
_NUMBER = re.compile(r"[+-]?[0-9]{1,12}")  # an integer string (PS3.5 6.2)
_MAX_LISTED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something cannot be read.

    Attributes:
        code: Stable reason.
        message: The same in words, with the file and the remedy.
    """

    code: Code
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesSummary:
    """One series that was found, from headers only. No patient data.

    Attributes:
        series_instance_uid: SeriesInstanceUID; empty if missing.
        study_instance_uid: StudyInstanceUID; empty if missing.
        series_number: SeriesNumber.
        description: SeriesDescription.
        modality: Modality.
        sop_class: Name of the SOP class.
        image_type: ImageType of the first instance, upper case.
        instances: Number of instances (files).
        slices: Number of images (frames) that have a place in the patient.
        rows: Rows of the first image.
        cols: Columns of the first image.
        thickness_mm: SliceThickness of the first image.
        step_mm: Median distance of neighbouring slices.
        extent_mm: Distance of the outermost slices.
        contrast_bolus_agent: ContrastBolusAgent.
        convolution_kernel: ConvolutionKernel.
        body_part_examined: BodyPartExamined.
        transfer_syntaxes: Names of the encodings, sorted.
        refusal: Why the series is no axial CT series at all, ``None`` if it is one.
        problems: Instances that cannot be read; opening the series raises the first.
    """

    series_instance_uid: str
    study_instance_uid: str
    series_number: int | None
    description: str | None
    modality: str | None
    sop_class: str
    image_type: tuple[str, ...]
    instances: int
    slices: int
    rows: int | None
    cols: int | None
    thickness_mm: float | None
    step_mm: float | None
    extent_mm: float
    contrast_bolus_agent: str | None
    convolution_kernel: str | None
    body_part_examined: str | None
    transfer_syntaxes: tuple[str, ...]
    refusal: Refusal | None
    problems: tuple[Refusal, ...]

    @property
    def label(self) -> str:
        """Number, description and size for a message."""
        number = "without number" if self.series_number is None else str(self.series_number)
        description = f" '{self.description}'" if self.description else ""
        thickness = "" if self.thickness_mm is None else f" of {self.thickness_mm:g} mm"
        count = f"{self.slices} slices{thickness}" if self.slices else f"{self.instances} instances"
        uid = self.series_instance_uid or "no SeriesInstanceUID"
        return f"series {number}{description} ({count}, {uid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A series, and why it was preferred: ``None`` if it is the only one or the caller named it."""

    summary: SeriesSummary
    reason: str | None


# A reason in words, and a value that is smaller for the better series.
_Criterion: TypeAlias = tuple[str, Callable[[SeriesSummary], float]]


def choose(
    summaries: Sequence[SeriesSummary],
    series: str | int | None = None,
    *,
    prefer_contrast: bool = True,
    fitting: Collection[str] | None = None,
) -> Choice:
    """Pick one axial CT series.

    If the caller names one by SeriesInstanceUID or SeriesNumber, it is that one. Otherwise all must
    be of one study, and the first of these criteria on which the two best differ decides:

    0. it is one of ``fitting`` (only if given);
    1. ImageType ORIGINAL before DERIVED;
    2. ImageType PRIMARY before SECONDARY;
    3. no reformatted series (MPR and the like);
    4. ImageType AXIAL before others;
    5. covers 50 mm or more: no bolus tracking, no test slice;
    6. a contrast agent is given (only with ``prefer_contrast``);
    7. slices of at most 3 mm;
    8. a soft-tissue kernel before one for lung or bone;
    9. thinner slices.

    Nothing is guessed beyond these: two series that are equal in all of them (such as two contrast
    phases) are refused, for the caller to name one.

    Args:
        summaries: Series found, in any order.
        series: SeriesInstanceUID, or SeriesNumber as a number or as digits.
        prefer_contrast: Whether criterion 6 applies.
        fitting: SeriesInstanceUIDs of those that a bundle is for.

    Raises:
        SeriesError: ``NO_CT_SERIES`` if none is usable, or none is the one named;
            ``AMBIGUOUS_SERIES`` if several are equally good, come from several studies, or share
            the number given.
    """
    if series is not None:
        return _named(summaries, series)
    usable = [s for s in summaries if s.refusal is None]
    if not usable:
        raise SeriesError(
            "no axial CT series was found. "
            + (f"Found: {_reasons(summaries)}. " if summaries else "There is no DICOM image. ")
            + "Give the folder of the axial CT reconstruction.",
            code=Code.NO_CT_SERIES,
        )
    if len(usable) == 1:
        return Choice(summary=usable[0], reason=None)
    studies = {s.study_instance_uid for s in usable}
    if len(studies) > 1:
        raise SeriesError(
            f"CT series of {len(studies)} studies were found, expected one study: {_list(usable)}. "
            "Give the folder of one study, or name a series with --series (series=).",
            code=Code.AMBIGUOUS_SERIES,
        )
    criteria = [c for c in _CRITERIA if prefer_contrast or c is not _CONTRAST]
    if fitting is not None:
        criteria.insert(0, ("the bundle is for it", lambda s: s.series_instance_uid not in fitting))
    ranked = sorted(usable, key=lambda s: (_rank(s, criteria), s.series_instance_uid))
    best = ranked[0]
    tied = [s for s in ranked if _rank(s, criteria) == _rank(best, criteria)]
    if len(tied) > 1:
        raise SeriesError(
            f"{len(tied)} CT series are equally suitable: {_list(tied)}. "
            "Name one by its number or SeriesInstanceUID with --series (series=).",
            code=Code.AMBIGUOUS_SERIES,
        )
    why = next(label for (label, key) in criteria if key(best) < key(ranked[1]))
    return Choice(
        summary=best,
        reason=f"{best.label} was chosen among {len(usable)} CT series: {why}; "
        f"next best was {ranked[1].label}",
    )


def ordered(summaries: Sequence[SeriesSummary]) -> list[SeriesSummary]:
    """Sort series for a listing: usable ones by preference, then the others by number and UID."""
    return sorted(
        summaries,
        key=lambda s: (
            s.refusal is not None,
            _rank(s, _CRITERIA) if s.refusal is None else (),
            s.series_number if s.series_number is not None else -1,
            s.series_instance_uid,
        ),
    )


def unknown_series(wanted: str | int, summaries: Sequence[SeriesSummary]) -> SeriesError:
    """Return the refusal for a series that was named and is not there."""
    return SeriesError(
        f"series {brief(str(wanted))} was not found. "
        f"Found: {_list(summaries) or 'no DICOM image'}. "
        "Name one by its number or SeriesInstanceUID.",
        code=Code.NO_CT_SERIES,
    )


def is_named(summary: SeriesSummary, series: str | int) -> bool:
    """Tell whether ``series`` is the SeriesInstanceUID or the SeriesNumber of a series."""
    wanted = str(series).strip()
    if not wanted:  # what has no SeriesInstanceUID has no name
        return False
    if _NUMBER.fullmatch(wanted) and summary.series_number == int(wanted):
        return True
    return summary.series_instance_uid == wanted


def is_sharp_kernel(kernel: str | None) -> bool:
    """Tell whether a convolution kernel is one for lung or bone, as far as its name says so."""
    words = re.findall(r"[A-Z0-9]+", (kernel or "").upper())
    first = words[0] if words else ""
    canon = _CANON_KERNEL.match(first)
    if canon:
        return int(canon.group(1)) >= _CANON_SHARP
    siemens = _SIEMENS_KERNEL.match(first)
    if siemens:
        return int(siemens.group(1)) >= _SIEMENS_SHARP
    return first in _SHARP_NAMES


def _has_word(summary: SeriesSummary, words: frozenset[str]) -> bool:
    return any(
        word in words for text in summary.image_type for word in re.findall(r"[A-Z0-9]+", text)
    )


def _spacing_mm(summary: SeriesSummary) -> float:
    """Return what limits the resolution along the body."""
    known = [mm for mm in (summary.thickness_mm, summary.step_mm) if mm is not None]
    return round(max(known), 2) if known else float("inf")


_CONTRAST: _Criterion = (
    "a contrast agent is given",
    lambda s: not says_contrast(s.contrast_bolus_agent),
)
_CRITERIA: tuple[_Criterion, ...] = (
    ("ImageType is ORIGINAL", lambda s: s.image_type[:1] != ("ORIGINAL",)),
    ("ImageType is PRIMARY", lambda s: s.image_type[1:2] != ("PRIMARY",)),
    ("it is not reformatted", lambda s: _has_word(s, REFORMATTED_WORDS)),
    ("ImageType is AXIAL", lambda s: not _has_word(s, frozenset({"AXIAL"}))),
    (f"it covers {MIN_EXTENT_MM:g} mm or more", lambda s: s.extent_mm < MIN_EXTENT_MM),
    _CONTRAST,
    (
        f"its slices are at most {MAX_THICKNESS_MM:g} mm thick",
        lambda s: _spacing_mm(s) > MAX_THICKNESS_MM,
    ),
    ("its kernel is not one for lung or bone", lambda s: is_sharp_kernel(s.convolution_kernel)),
    ("its slices are thinner", _spacing_mm),
)


def _rank(summary: SeriesSummary, criteria: Sequence[_Criterion]) -> tuple[float, ...]:
    return tuple(float(key(summary)) for _, key in criteria)


def _named(summaries: Sequence[SeriesSummary], series: str | int) -> Choice:
    matching = [s for s in summaries if is_named(s, series)]
    usable = [s for s in matching if s.refusal is None]
    if len(usable) == 1:
        return Choice(summary=usable[0], reason=None)
    if usable:
        raise SeriesError(
            f"{len(usable)} CT series have the number {series}: {_list(usable)}. "
            "Name one by its SeriesInstanceUID with --series (series=).",
            code=Code.AMBIGUOUS_SERIES,
        )
    if matching:
        raise SeriesError(
            f"series {series} is no axial CT series: {_reasons(matching)}. Name another one.",
            code=Code.NO_CT_SERIES,
        )
    raise unknown_series(series, summaries)


def _list(summaries: Sequence[SeriesSummary]) -> str:
    return _joined([s.label for s in summaries])


def _reasons(summaries: Sequence[SeriesSummary]) -> str:
    return _joined(
        [
            f"{s.label}: {s.refusal.message.removesuffix('.') if s.refusal else 'usable'}"
            for s in summaries
        ]
    )


def _joined(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_LISTED
    return "; ".join(texts[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
