"""Which slices of a study are there, and which of its slabs are final: no pixels.

While slices arrive from one end of the scan, everything behind a *frontier* is complete. The
frontier is the newest slice, or the last one in front of a gap: there a slice is missing that may
still come. A slice that arrives behind the frontier invalidates the slabs it would have changed and
all after them. Once that has happened the frontier stays ``REORDER_WINDOW`` slices behind the
newest one, and after ``MAX_REWINDS`` times slabs wait for the end of the study: no order of arrival
costs more than a few repetitions.
"""

import copy
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, Self, TypeAlias

from pe_infer.errors import Code, SeriesError
from pe_infer.geometry import PatientGrid, Slice, SliceGeometry
from pe_infer.lattice import PlaneLattice, lattice_for
from pe_infer.result import Flag, QualityFlag
from pe_infer.series import ORIENTATION_SPREAD_DEG, SeriesGeometry, analyse, gap_steps

Direction: TypeAlias = Literal["down", "up"]

DIRECTION_SLICES: Final = 5  # so many slices show the direction of arrival
REORDER_WINDOW: Final = 4
MAX_REWINDS: Final = 3
MAX_FILLED_STEP_MM: Final = 10.0  # neighbouring slices further apart than this are refused
MAX_SLICES: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRecord:
    """What is remembered of a slice beside its pixels."""

    geometry: SliceGeometry
    sop_instance_uid: str
    frame_number: int | None
    acquisition_number: int | None
    padding_ignored: bool
    pixel_digest: bytes
    source: str

    @classmethod
    def of(cls, image: Slice, pixel_digest: bytes) -> Self:
        """Describe ``image``; ``pixel_digest`` stands for its decoded pixels and rescale."""
        return cls(
            geometry=image.geometry,
            sop_instance_uid=image.sop_instance_uid,
            frame_number=image.frame_number,
            acquisition_number=image.acquisition_number,
            padding_ignored=image.padding_ignored,
            pixel_digest=pixel_digest,
            source=image.source,
        )

    @property
    def name(self) -> str:
        """For messages."""
        frame = f" frame {self.frame_number}" if self.frame_number is not None else ""
        return f"{self.source}{frame}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """What became final.

    Attributes:
        kept: How many of the slabs handed out before are still valid; the ones after them must be
            forgotten.
        centres_um: Slabs that are final now, in order of arrival.
    """

    kept: int
    centres_um: tuple[int, ...]


class Sequencer:
    """The slices of one study as they arrive. Not thread-safe.

    A failed call leaves it unchanged.
    """

    def __init__(self, grid: PatientGrid) -> None:
        """Start empty."""
        self._grid = grid
        self._lattice: PlaneLattice = lattice_for(grid, ())
        self._first: Slice | None = None
        self._records: dict[int, SliceRecord] = {}
        self._instances: dict[tuple[str, int | None], SliceRecord] = {}
        self._positions: list[int] = []
        self._direction: Direction | None = None
        self._handed_out: list[int] = []
        self._kept = 0  # how many of those are still valid
        self._late = False  # whether a slice has come behind the frontier since the last advance
        self._rewinds = 0
        self._duplicates = 0
        self._chosen = 0

    def copy(self) -> Self:
        """Return an independent sequencer in the same state."""
        twin = copy.copy(self)
        for name in ("_records", "_instances", "_positions", "_handed_out"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        return twin

    @property
    def direction(self) -> Direction | None:
        """Direction of arrival, once ``DIRECTION_SLICES`` slices have shown it."""
        return self._direction

    @property
    def lattice(self) -> PlaneLattice:
        """Where planes lie."""
        return self._lattice

    @property
    def positions_um(self) -> Sequence[int]:
        """Ascending positions of the slices."""
        return self._positions

    @property
    def first(self) -> Slice | None:
        """The slice that defines the series: the first that came."""
        return self._first

    def record_at(self, position_um: int) -> SliceRecord:
        """The slice at a position."""
        return self._records[position_um]

    def nearest(self, position_um: int) -> SliceRecord:
        """The slice nearest to a position; of two at the same distance the lower one."""
        at = bisect_left(self._positions, position_um)
        around = self._positions[max(0, at - 1) : at + 1]
        return self._records[min(around, key=lambda p: (abs(p - position_um), p))]

    def add(self, image: Slice, pixel_digest: bytes) -> bool:
        """Take one slice.

        Args:
            image: The slice.
            pixel_digest: Stands for its decoded pixels and rescale, to tell duplicates from
                conflicts.

        Returns:
            Whether its pixels are to be kept: ``False`` for a duplicate, or if the slice already
            there wins.

        Raises:
            SeriesError: It belongs to another series or stack, conflicts with a slice that is
                there, or is one too many.
        """
        self._check_kinship(image)
        position = image.position_um
        record = SliceRecord.of(image, pixel_digest)
        self._check_identity(record)
        present = self._records.get(position)
        if present is not None and not self._replaces(record, present):
            return False
        if present is None and len(self._positions) >= MAX_SLICES:
            raise SeriesError(
                f"{image.source}: more than {MAX_SLICES} slices in one study; "
                "send the series with a larger slice spacing",
                code=Code.TOO_MANY_SLICES,
            )
        kept = min(self._kept, self._first_touched(position))
        self._first = self._first or image
        self._records[position] = record
        self._instances[record.sop_instance_uid, record.frame_number] = record
        if present is None:
            insort(self._positions, position)
        lattice = lattice_for(self._grid, (r.geometry.thickness_mm for r in self._records.values()))
        relaid = type(lattice) is not type(self._lattice)
        self._lattice = lattice
        if self._direction is None and len(self._positions) == DIRECTION_SLICES:
            self._direction = "up" if position > self._first.position_um else "down"
        if not relaid:
            kept = min(kept, self._common_prefix(kept))
        self._late = self._late or kept < self._kept
        self._kept = 0 if relaid else kept  # planes that lie elsewhere are nobody's delay
        return True

    def advance(self, *, final: bool = False, direction: Direction = "up") -> Advance:
        """Hand out the slabs that became final since the last call.

        Args:
            final: The study has ended: everything is final.
            direction: Order to hand them out in if ``final`` and the direction of arrival never
                showed.
        """
        kept = self._kept
        if self._late:
            self._rewinds += 1
            self._late = False
        if final and self._direction is None:
            self._direction = direction
        fresh = []
        if final or (self._direction is not None and self._rewinds <= MAX_REWINDS):
            low, high = (-math.inf, math.inf) if final else self._complete()
            for centre in self._centres()[kept:]:
                reach_low, reach_high = self._lattice.slab_reach(self._positions, centre)
                if not final and not (low <= reach_low and reach_high <= high):
                    break
                fresh.append(centre)
        self._handed_out = self._handed_out[:kept] + fresh
        self._kept = len(self._handed_out)
        return Advance(kept=kept, centres_um=tuple(fresh))

    def judge(self) -> list[QualityFlag]:
        """Judge the study as a whole, at its end.

        Returns:
            What was tolerated.

        Raises:
            SeriesError: There are fewer than two slices, their centres do not lie on a line, their
                orientations differ, or neighbours are more than ``MAX_FILLED_STEP_MM`` apart.
        """
        if len(self._positions) < 2:  # noqa: PLR2004
            raise SeriesError(
                f"the study has {len(self._positions)} slice(s); at least 2 are needed for a "
                "volume",
                code=Code.TOO_FEW_SLICES,
            )
        geometry = analyse([record.geometry for record in self._records.values()])
        if not geometry.parallel:
            raise SeriesError(
                f"slice orientations differ by up to {geometry.orientation_spread_deg:.2f} "
                "degrees: "
                "this is not one stack; select one reconstruction",
                code=Code.ORIENTATION_DIFFERS,
            )
        if not geometry.straight:
            raise SeriesError(
                f"slice centres lie up to {geometry.drift_residual_mm:.1f} mm off a straight line: "
                "the field of view "
                "moved during the scan; send a reconstruction with a fixed centre",
                code=Code.CENTRE_DRIFT,
            )
        self._refuse_gaps()
        return [*geometry.quality_flags(), *self._own_flags(geometry)]

    def _own_flags(self, geometry: SeriesGeometry) -> list[QualityFlag]:
        flags = []
        if geometry.gaps:
            widest = max(gap.step_um for gap in geometry.gaps) / 1000.0
            flags.append(
                QualityFlag(
                    flag=Flag.GAP_FILLED,
                    message=f"{len(geometry.gaps)} gap(s) of up to {widest:.2f} mm interpolated",
                    values={"gaps": len(geometry.gaps), "widest_mm": widest},
                )
            )
        counted = (
            (
                Flag.OUT_OF_ORDER,
                self._rewinds,
                "time(s) slices came late, out of their order: what they change was judged again",
            ),
            (Flag.DUPLICATE_IGNORED, self._duplicates, "duplicate slice(s) were ignored"),
            (
                Flag.POSITION_CHOSEN,
                self._chosen,
                "position(s) had two slices: the higher AcquisitionNumber was taken",
            ),
            (
                Flag.PADDING_IGNORED,
                sum(record.padding_ignored for record in self._records.values()),
                "slice(s) declare a padding that is not used: it would erase tissue",
            ),
        )
        flags += [
            QualityFlag(flag=flag, message=f"{count} {text}", values={"count": count})
            for flag, count, text in counted
            if count
        ]
        if self._grid.through_plane == "source" and any(
            record.geometry.thickness_mm is None for record in self._records.values()
        ):
            flags.append(
                QualityFlag(
                    flag=Flag.THICKNESS_UNKNOWN,
                    message="SliceThickness is missing: the series was resampled through the plane",
                )
            )
        return flags

    def _refuse_gaps(self) -> None:
        for low, high in pairwise(self._positions):
            if (step_mm := (high - low) / 1000.0) > MAX_FILLED_STEP_MM:
                raise SeriesError(
                    f"{self._records[high].name}: the slice at {high / 1000:.1f} mm lies "
                    f"{step_mm:.2f} mm above its "
                    f"neighbour, at most {MAX_FILLED_STEP_MM:g} mm can be filled: slices are "
                    "missing. "
                    "Send the whole series",
                    code=Code.GAP,
                )

    def _check_kinship(self, image: Slice) -> None:
        first = self._first
        if first is None:
            return
        for what in (
            "study_instance_uid",
            "series_instance_uid",
            "frame_of_reference_uid",
            "modality",
        ):
            expected, found = getattr(first.series, what), getattr(image.series, what)
            if found != expected:
                raise SeriesError(
                    f"{image.source}: {what} {found} differs from {expected} of this study's first "
                    "slice "
                    f"({first.source}); open one stream per series",
                    code=Code.FOREIGN_SLICE,
                )
        pairs = (
            (image.geometry.left_axis, first.geometry.left_axis),
            (image.geometry.back_axis, first.geometry.back_axis),
        )
        limit = math.cos(math.radians(2 * ORIENTATION_SPREAD_DEG))
        if any(sum(a * b for a, b in zip(u, v, strict=True)) < limit for u, v in pairs):
            raise SeriesError(
                f"{image.source}: its orientation differs from that of this study's first slice "
                f"({first.source}) by "
                f"more than {2 * ORIENTATION_SPREAD_DEG:g} degrees; open one stream per "
                "reconstruction",
                code=Code.ORIENTATION_DIFFERS,
            )

    def _check_identity(self, record: SliceRecord) -> None:
        """Refuse an identity that a slice in another place has: which one would a result mean?"""
        if not record.sop_instance_uid:
            return
        known = self._instances.get((record.sop_instance_uid, record.frame_number))
        if known and known.geometry.position_um != record.geometry.position_um:
            raise SeriesError(
                f"{record.name}: SOPInstanceUID is {record.sop_instance_uid}, the same as in "
                f"{known.name}, though the slices lie at {record.geometry.position_mm:.3f} and "
                f"{known.geometry.position_mm:.3f} mm; send the original images",
                code=Code.CONFLICTING_DUPLICATE,
            )

    def _replaces(self, record: SliceRecord, present: SliceRecord) -> bool:
        """Whether ``record`` replaces the slice at its position; refuse what no rule decides."""
        where = f"at {record.geometry.position_um / 1000:.3f} mm"
        if record.pixel_digest == present.pixel_digest and record.geometry == present.geometry:
            self._duplicates += 1
            return False
        if record.sop_instance_uid and (record.sop_instance_uid, record.frame_number) == (
            present.sop_instance_uid,
            present.frame_number,
        ):
            raise SeriesError(
                f"{record.name}: a second version of {present.name} {where} with other pixels or "
                "geometry; "
                "send each instance once",
                code=Code.CONFLICTING_DUPLICATE,
            )
        new, old = record.acquisition_number, present.acquisition_number
        if new is None or old is None or new == old:
            raise SeriesError(
                f"{record.name} and {present.name} are different slices {where} and "
                "AcquisitionNumber "
                f"({new}, {old}) does not choose between them; select one reconstruction",
                code=Code.DUPLICATE_POSITION,
            )
        self._chosen += 1
        return new > old

    def _centres(self) -> list[int]:
        """Centres of all whole slabs in order of arrival."""
        centres = self._lattice.centres(self._positions)
        return centres[::-1] if self._direction == "down" else centres

    def _first_touched(self, position_um: int) -> int:
        """Index of the first slab handed out that a new slice at this position changes."""
        for index, centre in enumerate(self._handed_out[: self._kept]):
            low, high = self._lattice.slab_reach(self._positions, centre)
            if low <= position_um <= high:
                return index
        return self._kept

    def _common_prefix(self, kept: int) -> int:
        """How many of the first ``kept`` slabs handed out are still the first ones of the study."""
        for index, (handed, now) in enumerate(
            zip(self._handed_out[:kept], self._centres(), strict=False)
        ):
            if handed != now:
                return index
        return kept

    def _complete(self) -> tuple[float, float]:
        """Closed interval of positions within which no further slice is expected."""
        positions = self._positions
        newest = len(positions) - 1 - (REORDER_WINDOW if self._rewinds else 0)
        if newest < 1:
            return math.inf, -math.inf
        upward = self._direction == "up"
        ordered = positions if upward else positions[::-1]
        gaps = gap_steps(
            positions, {at: record.geometry.thickness_mm for at, record in self._records.items()}
        )
        in_order = gaps if upward else gaps[::-1]
        frontier = ordered[next((i for i in range(newest) if in_order[i]), newest)]
        return (-math.inf, frontier) if upward else (frontier, math.inf)
