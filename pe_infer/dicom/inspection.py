"""What files hold and whether they can be read: a report without patient data."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pe_infer.dicom.conversion import flags_of
from pe_infer.dicom.opening import Group, Series, groups_of
from pe_infer.dicom.scanning import Source, scan
from pe_infer.dicom.selection import Refusal, SeriesSummary, is_named, ordered, unknown_series
from pe_infer.errors import InputError
from pe_infer.geometry import SeriesInfo, Vector
from pe_infer.result import QualityFlag
from pe_infer.series import SeriesGeometry, analyse


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelReport:
    """What decoding found.

    Attributes:
        sha256: Digest of the stored values of all images, ascending position: each as a
            little-endian 32-bit signed integer, row by row. It does not depend on transfer syntax,
            container or byte order, and is ``None`` if an image could not be decoded.
        low_hu: Lowest value outside of padding.
        high_hu: Highest value outside of padding.
        padded_fraction: Share of pixels that are padding.
        padding_ignored: Images whose declared padding is taken for tissue (see
            ``pixels.believable_padding``).
    """

    sha256: str | None
    low_hu: float | None
    high_hu: float | None
    padded_fraction: float
    padding_ignored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesReport:
    """One series.

    Attributes:
        summary: What the headers say; ``summary.refusal`` tells why it is no axial CT series.
        info: What the series says of itself; ``None`` without a readable slice.
        geometry: How its slices lie together; ``None`` without a readable slice.
        sizes: Different pairs of rows and columns, ascending; of one stack there is one.
        frames_of_reference: How many different frames of reference, one that is not stated
            included: positions compare within one only.
        row_spacing_mm: Distance of rows, different values ascending.
        col_spacing_mm: Distance of columns, different values ascending.
        thicknesses_mm: SliceThickness, different values ascending.
        row_direction: Direction of the rows of the lowest slice.
        col_direction: Direction of its columns.
        rescales: Different pairs of slope and intercept, ascending.
        paddings: Different declared ranges of stored values, ascending.
        pixels: What decoding found; ``None`` if not asked for.
        flags: What would be tolerated.
        refusals: Instances that cannot be read, with the remedy.
    """

    summary: SeriesSummary
    info: SeriesInfo | None
    geometry: SeriesGeometry | None
    sizes: tuple[tuple[int, int], ...]
    frames_of_reference: int
    row_spacing_mm: tuple[float, ...]
    col_spacing_mm: tuple[float, ...]
    thicknesses_mm: tuple[float, ...]
    row_direction: Vector | None
    col_direction: Vector | None
    rescales: tuple[tuple[float, float], ...]
    paddings: tuple[tuple[int, int], ...]
    pixels: PixelReport | None
    flags: tuple[QualityFlag, ...]
    refusals: tuple[Refusal, ...]

    @property
    def usable(self) -> bool:
        """Whether the series is an axial CT series of which every image can be read."""
        return self.summary.refusal is None and not self.refusals


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """What a source holds.

    Attributes:
        series: Usable series first, in the order in which ``open_series`` prefers them.
        skipped: How many files were left aside, by reason.
        refusals: Files whose series is not known, because they cannot be read.
    """

    series: tuple[SeriesReport, ...]
    skipped: dict[str, int]
    refusals: tuple[Refusal, ...]

    @property
    def usable(self) -> bool:
        """Whether there is an axial CT series, and all CT series and files can be read."""
        ct = [report for report in self.series if report.summary.refusal is None]
        return bool(ct) and not self.refusals and all(report.usable for report in ct)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "usable": self.usable,
            "series": [_series_dict(report) for report in self.series],
            "skipped": dict(sorted(self.skipped.items())),
            "refusals": [asdict(refusal) for refusal in self.refusals],
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def inspect(
    source: Source, *, series: str | int | None = None, decode: bool = True
) -> InspectReport:
    """Report what a source holds. Damaged files are reported, not raised.

    Args:
        source: A folder, a file, a data set, or several of them.
        series: SeriesInstanceUID or SeriesNumber; ``None`` reports all.
        decode: Whether pixels are decoded, for ``SeriesReport.pixels``.

    Raises:
        ConfigurationError: The source is empty or does not exist.
        SeriesError: ``NO_CT_SERIES`` if ``series`` names one that is not there.
    """
    found = scan(source)
    groups = groups_of(found)
    if series is not None:
        every = [group.summary for group in groups]
        groups = [group for group in groups if is_named(group.summary, series)]
        if not groups:
            raise unknown_series(series, every)
    by_identity = {id(group.summary): group for group in groups}
    return InspectReport(
        series=tuple(
            _report(by_identity[id(summary)], decode=decode)
            for summary in ordered([group.summary for group in groups])
        ),
        skipped=dict(found.skipped),
        refusals=tuple(_refusal(exc) for exc in found.broken),
    )


def _report(group: Group, *, decode: bool) -> SeriesReport:
    headers = [reference.header for reference in group.references]
    places = [header.geometry for header in headers]
    geometry = analyse(places) if places else None
    flags = flags_of(headers)
    if geometry is not None:
        flags += geometry.quality_flags()
    refusals = (
        [] if group.summary.refusal is not None else [_refusal(exc) for exc in group.refusals]
    )
    pixels = None
    if decode and headers:
        pixels, failures = _decode(group)
        refusals += failures
    return SeriesReport(
        summary=group.summary,
        info=headers[0].series if headers else None,
        geometry=geometry,
        sizes=tuple(sorted({(place.rows, place.cols) for place in places})),
        frames_of_reference=len({h.series.frame_of_reference_uid for h in headers}),
        row_spacing_mm=tuple(sorted({place.row_spacing_mm for place in places})),
        col_spacing_mm=tuple(sorted({place.col_spacing_mm for place in places})),
        thicknesses_mm=tuple(
            sorted({p.thickness_mm for p in places if p.thickness_mm is not None})
        ),
        row_direction=places[0].row_direction if places else None,
        col_direction=places[0].col_direction if places else None,
        rescales=tuple(sorted({(h.rescale_slope, h.rescale_intercept) for h in headers})),
        paddings=tuple(sorted({h.padding for h in headers if h.padding is not None})),
        pixels=pixels,
        flags=tuple(flags),
        refusals=tuple(refusals),
    )


def _decode(group: Group) -> tuple[PixelReport, list[Refusal]]:
    opened = Series(group.summary, group.references, [])
    digest = hashlib.sha256()
    refusals: list[Refusal] = []
    lows: list[float] = []
    highs: list[float] = []
    padded = total = ignored = 0
    for reference in opened.references:
        try:
            (image,) = opened.read(reference)
        except InputError as exc:
            refusals.append(_refusal(exc))
            continue
        pixels = image.host_pixels
        digest.update(pixels.astype("<i4").tobytes())
        total += pixels.size
        ignored += image.padding_ignored
        tissue = pixels
        if image.padding is not None:
            low, high = image.padding
            inside = (pixels >= low) & (pixels <= high)
            padded += int(inside.sum())
            tissue = pixels[~inside]
        if tissue.size:
            ends = [
                image.rescale_slope * float(value) + image.rescale_intercept
                for value in (tissue.min(), tissue.max())
            ]
            lows.append(min(ends))
            highs.append(max(ends))
    return (
        PixelReport(
            sha256=None if refusals else digest.hexdigest(),
            low_hu=min(lows, default=None),
            high_hu=max(highs, default=None),
            padded_fraction=padded / total if total else 0.0,
            padding_ignored=ignored,
        ),
        refusals,
    )


def _refusal(exc: InputError) -> Refusal:
    return Refusal(code=exc.code, message=str(exc))


def _series_dict(report: SeriesReport) -> dict[str, Any]:
    summary = {key: value for key, value in asdict(report.summary).items() if key != "problems"}
    return {
        **summary,
        "usable": report.usable,
        "sizes": [{"rows": rows, "cols": cols} for rows, cols in report.sizes],
        "frames_of_reference": report.frames_of_reference,
        "row_spacing_mm": list(report.row_spacing_mm),
        "col_spacing_mm": list(report.col_spacing_mm),
        "thicknesses_mm": list(report.thicknesses_mm),
        "row_direction": report.row_direction,
        "col_direction": report.col_direction,
        "geometry": None if report.geometry is None else _geometry_dict(report.geometry),
        "rescales": [
            {"slope": slope, "intercept": intercept} for slope, intercept in report.rescales
        ],
        "paddings": [list(padding) for padding in report.paddings],
        "pixels": None if report.pixels is None else asdict(report.pixels),
        "flags": [
            {"flag": flag.flag, "message": flag.message, "values": dict(flag.values)}
            for flag in report.flags
        ],
        "refusals": [asdict(refusal) for refusal in report.refusals],
    }


def _geometry_dict(geometry: SeriesGeometry) -> dict[str, Any]:
    steps_um = geometry.steps_um
    return {
        "lowest_mm": geometry.positions_um[0] / 1000.0,
        "highest_mm": geometry.positions_um[-1] / 1000.0,
        "min_step_mm": min(steps_um) / 1000.0 if steps_um else None,
        "median_step_mm": None
        if geometry.nominal_step_um is None
        else geometry.nominal_step_um / 1000.0,
        "max_step_mm": max(steps_um) / 1000.0 if steps_um else None,
        "irregular_spacing": geometry.irregular,
        "gaps": [
            {
                "lower_mm": gap.lower_um / 1000.0,
                "upper_mm": gap.upper_um / 1000.0,
                "missing": gap.missing,
            }
            for gap in geometry.gaps
        ],
        "shared_positions_mm": [um / 1000.0 for um in geometry.shared_positions_um],
        "gantry_tilt_deg": geometry.tilt_deg,
        "centre_drift_residual_mm": geometry.drift_residual_mm,
        "orientation_spread_deg": geometry.orientation_spread_deg,
    }
