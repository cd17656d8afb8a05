"""How the slices of one series lie together: steps, gaps, gantry tilt, drift of the centres.

Pure geometry, without pixels and without judgement: who refuses what is decided by the callers (the
sequencer for a study, ``inspect`` for a report), with the limits given here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from pe_infer.geometry import SeriesInfo, SliceGeometry, Vector
from pe_infer.result import Flag, QualityFlag

# A step is irregular if it differs from the median by more than this share of it, and by more than
# this absolute amount: positions are often written with one decimal.
IRREGULAR_STEP_FRACTION = 0.10
IRREGULAR_STEP_UM = 100
# A step longer than this many medians is a gap: at least one slice is missing. Not where the slices
# are thicker by as much, as in head scans that change from 4 to 7 mm half-way.
GAP_RATIO = 1.5
GANTRY_TILT_DEG = 0.5  # below this, the drift of the centres is rounding of the header
CENTRE_DRIFT_MM = 1.0  # centres further than this from a line are not explained by a tilted gantry
ORIENTATION_SPREAD_DEG = 0.5  # axes that differ by more than this do not belong to one stack
IN_PLANE_ROTATION_DEG = 5.0  # beyond what a head or a table lies askew; it is not undone
MIN_PRONE_COSINE = 0.7  # an image this far turned round is upside down
_NO_CONTRAST_WORDS = frozenset({"NONE", "NO", "N", "WITHOUT", "NATIVE"})  # as a first word


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Two neighbouring slices that lie too far apart.

    Attributes:
        lower_um: Position of the slice below the gap.
        upper_um: Position of the slice above the gap.
        missing: How many slices at the usual step are missing between them, at least 1.
    """

    lower_um: int
    upper_um: int
    missing: int

    @property
    def step_um(self) -> int:
        """Distance of the two slices."""
        return self.upper_um - self.lower_um


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesGeometry:
    """How the slices of one series lie together.

    Attributes:
        count: Number of slices.
        positions_um: Different positions, ascending; shorter than ``count`` if slices share a
            position.
        shared_positions_um: Positions that more than one slice has, ascending.
        nominal_step_um: Median of the steps (the lower one of two); ``None`` with fewer than two
            positions.
        irregular: Whether a step differs from the median by more than ``IRREGULAR_STEP_FRACTION``
            and ``IRREGULAR_STEP_UM``. A gap is irregular too.
        irregular_steps: How many steps do.
        gaps: Steps longer than ``GAP_RATIO`` medians, also relative to the thickness of their two
            slices where both are known; ascending.
        tilt_deg: Angle between the slice normal and the line of the centres, 0 or more: the gantry
            tilt.
        rotation_deg: Angle in the transverse plane from the patient's left to the axis of growing
            grid columns, -45 to 45: only quarter turns of the image are undone.
        drift_left_per_mm: How far the centres move to the left per mm of position.
        drift_back_per_mm: How far the centres move to the back per mm of position.
        drift_residual_mm: Largest distance of a centre from the straight line, measured in the
            slice plane.
        orientation_spread_deg: Largest angle between an axis (normal, left or back) of a slice and
            its mean.
    """

    count: int
    positions_um: tuple[int, ...]
    shared_positions_um: tuple[int, ...]
    nominal_step_um: int | None
    irregular: bool
    irregular_steps: int
    gaps: tuple[Gap, ...]
    tilt_deg: float
    rotation_deg: float
    drift_left_per_mm: float
    drift_back_per_mm: float
    drift_residual_mm: float
    orientation_spread_deg: float

    @property
    def steps_um(self) -> tuple[int, ...]:
        """Distances of neighbouring positions, ascending position; all positive."""
        return tuple(b - a for a, b in pairwise(self.positions_um))

    @property
    def extent_um(self) -> int:
        """Distance of the outermost slices."""
        return self.positions_um[-1] - self.positions_um[0] if self.positions_um else 0

    @property
    def tilted(self) -> bool:
        """Whether the gantry was tilted (more than ``GANTRY_TILT_DEG``)."""
        return self.tilt_deg > GANTRY_TILT_DEG

    @property
    def straight(self) -> bool:
        """Whether the centres lie on a straight line (within ``CENTRE_DRIFT_MM``)."""
        return self.drift_residual_mm <= CENTRE_DRIFT_MM

    @property
    def parallel(self) -> bool:
        """Whether all slices have the same orientation (within ``ORIENTATION_SPREAD_DEG``)."""
        return self.orientation_spread_deg <= ORIENTATION_SPREAD_DEG

    def quality_flags(self) -> list[QualityFlag]:
        """Return what is tolerated: gantry tilt, in-plane rotation, irregular spacing."""
        flags = []
        if self.tilted:
            flags.append(
                QualityFlag(
                    flag=Flag.GANTRY_TILT,
                    message=f"the gantry was tilted by {self.tilt_deg:.1f} degrees",
                    values={
                        "tilt_deg": round(self.tilt_deg, 2),
                        "drift_residual_mm": round(self.drift_residual_mm, 3),
                    },
                )
            )
        if abs(self.rotation_deg) > IN_PLANE_ROTATION_DEG:
            flags.append(
                QualityFlag(
                    flag=Flag.IN_PLANE_ROTATION,
                    message=f"the images are turned by {abs(self.rotation_deg):.1f} degrees in "
                    "their plane against the patient; this is not undone",
                    values={"rotation_deg": round(self.rotation_deg, 2)},
                )
            )
        if self.irregular and self.nominal_step_um is not None:
            mid = self.nominal_step_um / 1000.0
            low, high = min(self.steps_um) / 1000.0, max(self.steps_um) / 1000.0
            flags.append(
                QualityFlag(
                    flag=Flag.IRREGULAR_SPACING,
                    message=(
                        f"{self.irregular_steps} of {len(self.steps_um)} steps between slices "
                        f"differ from the median of {mid:.2f} mm: they range from {low:.2f} to "
                        f"{high:.2f} mm"
                    ),
                    values={
                        "irregular_steps": self.irregular_steps,
                        "min_step_mm": low,
                        "median_step_mm": mid,
                        "max_step_mm": high,
                    },
                )
            )
        return flags


def analyse(geometries: Sequence[SliceGeometry]) -> SeriesGeometry:
    """Measure how slices lie together, whatever order they come in.

    Positions are those along each slice's own normal. The centres are split along the mean left and
    back axes of the series, and a straight line over the position is fitted to each (least
    squares): a table that moves along the body while the gantry is tilted by t moves the centres by
    tan(t) mm in the plane per mm along the normal.

    Args:
        geometries: Any number of slices, none included.

    Returns:
        The measurements. With one position, or none, there are no steps and no tilt; with two, the
        centres lie on a straight line by definition.
    """
    ordered = sorted(geometries, key=lambda g: (g.position_um, g.centre_mm))
    every = [g.position_um for g in ordered]
    positions = sorted(set(every))
    shared = sorted({a for a, b in pairwise(every) if a == b})
    steps = [b - a for a, b in pairwise(positions)]
    nominal = median_low(steps) if steps else None
    irregular = 0
    gaps: list[Gap] = []
    if nominal is not None:
        allowed = max(IRREGULAR_STEP_FRACTION * nominal, IRREGULAR_STEP_UM)
        irregular = sum(abs(step - nominal) > allowed for step in steps)
        missing = gap_steps(positions, {g.position_um: g.thickness_mm for g in ordered})
        gaps = [
            Gap(lower_um=low, upper_um=low + step, missing=max(1, round(step / nominal) - 1))
            for low, step, is_gap in zip(positions, steps, missing, strict=False)
            if is_gap
        ]
    left, back, residual, spread = _drift(ordered)
    axis = ordered[0].left_axis if ordered else (1.0, 0.0, 0.0)
    return SeriesGeometry(
        count=len(ordered),
        positions_um=tuple(positions),
        shared_positions_um=tuple(shared),
        nominal_step_um=nominal,
        irregular=irregular > 0,
        irregular_steps=irregular,
        gaps=tuple(gaps),
        tilt_deg=math.degrees(math.atan(math.hypot(left, back))),
        rotation_deg=math.degrees(math.atan2(axis[1], axis[0])),
        drift_left_per_mm=left,
        drift_back_per_mm=back,
        drift_residual_mm=residual,
        orientation_spread_deg=spread,
    )


def gap_steps(positions_um: Sequence[int], thickness_mm: Mapping[int, float | None]) -> list[bool]:
    """Tell which steps between neighbouring slices are gaps: longer than ``GAP_RATIO`` medians.

    Where the thickness of both slices is known, the step must be that long relative to it too: a
    head scan that changes from 4 to 7 mm half-way has no gap.

    Args:
        positions_um: Ascending, no position twice.
        thickness_mm: Of the slice at every position; ``None`` where it is unknown.

    Returns:
        One value per step.
    """
    steps = [high - low for low, high in pairwise(positions_um)]
    if not steps:
        return []
    limit = GAP_RATIO * median_low(steps)
    if max(steps) <= limit:
        return [False] * len(steps)
    relative: list[float | None] = []
    for low, high in pairwise(positions_um):
        below, above = thickness_mm[low], thickness_mm[high]
        relative.append((high - low) / (below + above) if below and above else None)
    known = [ratio for ratio in relative if ratio is not None]
    relative_limit = GAP_RATIO * median_low(known) if known else 0.0
    return [
        step > limit and (ratio is None or ratio > relative_limit)
        for step, ratio in zip(steps, relative, strict=True)
    ]


def posture_flags(info: SeriesInfo, geometry: SliceGeometry) -> list[QualityFlag]:
    """Return a flag for a patient who did not lie on the back.

    PatientPosition decides (PS3.3 C.7.3.1.1.2: the third letter is S, P, or D after R or L). Where
    it is missing, an image whose rows run to the right and whose columns run to the front shows a
    patient who lies face down. Coordinates are the patient's in any posture, so nothing is turned;
    lungs and vessels look different.
    """
    stated = (info.patient_position or "").upper()
    if stated in {"HFP", "FFP"}:
        return [
            QualityFlag(
                flag=Flag.PRONE, message=f"the patient lies prone (PatientPosition {stated})"
            )
        ]
    if stated in {"HFDR", "HFDL", "FFDR", "FFDL"}:
        return [
            QualityFlag(
                flag=Flag.DECUBITUS,
                message=f"the patient lies on the side (PatientPosition {stated})",
            )
        ]
    if (
        not stated
        and geometry.row_direction[0] < -MIN_PRONE_COSINE
        and geometry.col_direction[1] < -MIN_PRONE_COSINE
    ):
        return [
            QualityFlag(
                flag=Flag.PRONE,
                message="the patient seems to lie prone: PatientPosition is missing and the "
                "image is upside down",
            )
        ]
    return []


def _drift(ordered: Sequence[SliceGeometry]) -> tuple[float, float, float, float]:
    """Return drift left and back (mm per mm), largest residual (mm), orientation spread (deg)."""
    if not ordered:
        return (0.0, 0.0, 0.0, 0.0)
    spread = 0.0
    means = []
    for axes in (
        [g.left_axis for g in ordered],
        [g.back_axis for g in ordered],
        [g.normal for g in ordered],
    ):
        mean, angle_deg = _mean_axis(axes)
        means.append(mean)
        spread = max(spread, angle_deg)
    centres = np.array([g.centre_mm for g in ordered], dtype=np.float64)  # (n, 3)
    in_plane = centres @ np.array(means[:2]).T  # (n, 2): left, back
    in_plane -= in_plane.mean(axis=0)
    along = np.array([g.position_um for g in ordered], dtype=np.float64) / 1000.0
    along -= along.mean()
    power = float(along @ along)
    slope = (along @ in_plane) / power if power > 0 else np.zeros(2)
    residual = float(np.hypot(*(in_plane - np.outer(along, slope)).T).max())
    return (float(slope[0]), float(slope[1]), residual, spread)


def _mean_axis(axes: Sequence[Vector]) -> tuple[NDArray[np.float64], float]:
    """Return the mean direction of unit vectors, and the largest angle to it in degrees."""
    vectors = np.array(axes, dtype=np.float64)
    mean = vectors.mean(axis=0)
    mean = mean / np.linalg.norm(mean)
    # Exact for small angles, where acos is not.
    half_chord = np.linalg.norm(vectors - mean, axis=1).max() / 2.0
    return mean, math.degrees(2.0 * math.asin(min(1.0, float(half_chord))))


def says_contrast(agent: str | None) -> bool | None:
    """Whether ContrastBolusAgent says that an agent was given; ``None`` if it says nothing."""
    words = re.findall(r"[A-Z0-9]+", (agent or "").upper())
    return words[0] not in _NO_CONTRAST_WORDS if words else None
