"""From what the networks put out to what is said: probabilities, alerts, evidence, the result."""

import importlib.metadata
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.checks import quality_flags, refused
from pe_infer.compiled import CompiledProgram
from pe_infer.errors import EngineError
from pe_infer.executor import StudyOutputs
from pe_infer.geometry import PatientGrid, SliceGeometry, Vector
from pe_infer.manifest import SLAB_LOGIT, STUDY_LOGIT, ConsecutiveRule, Manifest, OperatingPoint
from pe_infer.result import (
    Attention,
    CheckResult,
    Coverage,
    Flag,
    NotProcessed,
    Provenance,
    QualityFlag,
    SlabEvidence,
    StudyResult,
    Timings,
)
from pe_infer.result import OperatingPoint as ResultOperatingPoint
from pe_infer.sequencer import Sequencer

ATTENTION: Final = "attention"  # output of a bundle: (N, 1, rows, cols) activation per slab
NO_ORGAN: Final = "gate.no_organ"
UNDECIDED: Final = "rule.undecided"
CHECK: Final = "check"  # before the name of the check that refused
_PACKAGES: Final = (
    "pe-infer",
    "numpy",
    "pydicom",
    "openvino",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabRecord:
    """One slab that is done.

    Attributes:
        position_um: Its middle plane.
        probability: Stage-1 probability; ``None`` if gated, or if the bundle has no such output.
        gated: Whether the gate kept it from the network.
        measured: For the bundle's checks, in their order; empty if gated.
    """

    position_um: int
    probability: float | None
    gated: bool
    measured: tuple[float | None, ...] = ()


def refuse_nonfinite(outputs: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse what is not a number: it reaches no threshold and would pass for a negative.

    Raises:
        EngineError: A network put out NaN or infinity.
    """
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise EngineError(
                f"output {name!r} holds values that are not finite numbers: an overflow in reduced "
                "precision, or a damaged engine; use precision 'float32' or another engine"
            )


def slab_probability(manifest: Manifest, logit: float) -> float:
    """Probability of one slab: calibrated if the rule decides by slabs, else the plain sigmoid."""
    if isinstance(manifest.rule, ConsecutiveRule):
        return manifest.calibration.probability(logit)
    return _sigmoid(logit)


def update_probability(manifest: Manifest, logit: float) -> float:
    """Probability that an update gives a slab, of the logit ``manifest.update_output``.

    The calibration is for the logits that decide: ``online_logit`` gets the plain sigmoid.
    """
    if manifest.update_output == SLAB_LOGIT:
        return slab_probability(manifest, logit)
    return _sigmoid(logit)


def alerts(manifest: Manifest, records: Sequence[SlabRecord]) -> bool:
    """Whether the bundle's rule for a provisional alert holds over slabs in order of arrival."""
    rule = manifest.provisional_alert
    if rule is None:
        return False
    run = 0
    for record in records:
        if record.gated:
            continue
        above = record.probability is not None and record.probability >= rule.slab_probability
        run = run + 1 if above else 0
        if run >= rule.consecutive:
            return True
    return False


def package_versions() -> dict[str, str]:
    """Versions of pe-infer and of what it computes with, as installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What is the same for all studies of a detector.

    Attributes:
        compiled: Bundle, program and engines.
        operating_point: The threshold.
        packages: What computes, by version; looked up once, as that takes longer than a slab.
    """

    compiled: CompiledProgram
    operating_point: OperatingPoint
    packages: Mapping[str, str] = field(default_factory=package_versions)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.compiled.bundle.manifest

    def conclude(
        self,
        *,
        sequencer: Sequencer,
        records: Sequence[SlabRecord],
        outputs: StudyOutputs | None,
        checks: Sequence[CheckResult],
        flags: Sequence[QualityFlag],
        timings: Callable[[], Timings],
    ) -> StudyResult:
        """Make the study result.

        Args:
            sequencer: The slices.
            records: All slabs in ascending position.
            outputs: What `Executor.finish` returned, per-slab outputs in ascending position of the
                slabs that passed the gate; ``None`` if too few did, or a check refuses.
            checks: What `pe_infer.checks.assess` found.
            flags: What was tolerated.
            timings: Says where the time went; called last.
        """
        manifest = self.manifest
        has_gate = manifest.grid.gate is not None
        failed = quality_flags(manifest.checks, checks)
        probability = None if outputs is None else self._probability(records, outputs)
        reason = None
        if (refusal := refused(checks)) is not None:
            records = [replace(record, probability=None) for record in records]
            message = failed[refusal.name].message
            reason = NotProcessed(
                code=f"{CHECK}.{refusal.name}",
                message=f"{message}. Nothing can be said of this study.",
            )
        elif outputs is None:
            seen = sum(not record.gated for record in records)
            reason = NotProcessed(
                code=NO_ORGAN,
                message=f"{seen} of {len(records)} slabs show the organ that bundle "
                f"{manifest.name!r} looks at ({manifest.grid.gate}); at least {manifest.min_slabs} "
                "are needed. Nothing can be said of this study.",
            )
        elif probability is None:
            reason = NotProcessed(
                code=UNDECIDED,
                message=f"the rule of bundle {manifest.name!r} ({manifest.rule}) gives no answer "
                f"for {len(records)} slabs.",
            )
        return StudyResult(
            status="processed" if reason is None else "not_processed",
            not_processed=reason,
            finding=manifest.finding,
            probability=probability,
            positive=None if probability is None else probability >= self.operating_point.threshold,
            operating_point=ResultOperatingPoint(
                name=self.operating_point.name, threshold=self.operating_point.threshold
            ),
            evidence=tuple(self._evidence(sequencer, records, outputs)),
            quality=(
                *flags,
                *failed.values(),
                *(_coverage_flags(records) if has_gate else ()),
            ),
            checks=tuple(checks),
            coverage=_coverage(sequencer, records, gate=has_gate),
            provenance=self._provenance(sequencer),
            intended_use=manifest.intended_use,
            timings=timings(),
        )

    def _probability(self, records: Sequence[SlabRecord], outputs: StudyOutputs) -> float | None:
        manifest = self.manifest
        if isinstance(manifest.rule, ConsecutiveRule):
            logits = iter(outputs.slabs[SLAB_LOGIT].reshape(-1).tolist())
            return manifest.rule.score(
                [None if r.gated else slab_probability(manifest, next(logits)) for r in records]
            )
        return manifest.calibration.probability(float(outputs.study[STUDY_LOGIT].reshape(-1)[0]))

    def _evidence(
        self,
        sequencer: Sequencer,
        records: Sequence[SlabRecord],
        outputs: StudyOutputs | None,
    ) -> list[SlabEvidence]:
        maps = None if outputs is None else outputs.slabs.get(ATTENTION)
        logits = None if outputs is None else outputs.slabs.get(SLAB_LOGIT)
        evidence = []
        passed = 0
        for record in records:
            attention, probability = None, record.probability
            if not record.gated and outputs is not None:
                if logits is not None:  # of the whole program: a deferred node may have made them
                    logit = float(logits[passed].reshape(-1)[0])
                    probability = slab_probability(self.manifest, logit)
                if maps is not None:
                    values = maps[passed].reshape(maps.shape[-2:])
                    attention = attention_at(
                        values, record.position_um, sequencer, self.manifest.grid
                    )
                passed += 1
            nearest = sequencer.nearest(record.position_um)
            evidence.append(
                SlabEvidence(
                    position_mm=record.position_um / 1000.0,
                    probability=probability,
                    gated=record.gated,
                    attention=attention,
                    sop_instance_uid=nearest.sop_instance_uid,
                    frame_number=nearest.frame_number,
                )
            )
        return evidence

    def _provenance(self, sequencer: Sequencer) -> Provenance:
        first, info = sequencer.first, self.compiled.info
        manifest = self.manifest
        return Provenance(
            study_instance_uid=first.series.study_instance_uid if first else "",
            series_instance_uid=first.series.series_instance_uid if first else "",
            bundle=manifest.name,
            bundle_version=manifest.version,
            bundle_hash=self.compiled.bundle.sha256,
            preprocessing_version=manifest.preprocessing_version,
            engine=f"{info.name} {info.version} ({info.device})",
            precision=dict(info.precision),
            packages=dict(self.packages),
        )


def attention_at(
    values: NDArray[np.float32], position_um: int, sequencer: Sequencer, grid: PatientGrid
) -> Attention:
    """Place an attention map in the patient.

    Cell (i, j) of the map stands for the block of plane pixels that it covers when the map is laid
    over the plane.

    Args:
        values: (rows, cols) activations.
        position_um: Middle plane of the slab.
        sequencer: The slices, which say where the centre of a plane lies.
        grid: The plane.
    """
    centre, geometry = plane_centre(sequencer, position_um)
    rows, cols = values.shape
    left = _scaled(geometry.left_axis, grid.spacing_mm * grid.cols / cols)
    back = _scaled(geometry.back_axis, grid.spacing_mm * grid.rows / rows)
    origin = tuple(
        c - (cols - 1) / 2 * u - (rows - 1) / 2 * v
        for c, u, v in zip(centre, left, back, strict=True)
    )
    affine = tuple(
        (u, v, n, o) for u, v, n, o in zip(left, back, geometry.normal, origin, strict=True)
    )
    row, col = divmod(int(np.argmax(values)), cols)
    return Attention(
        values=values,
        patient_affine=(*affine, (0.0, 0.0, 0.0, 1.0)),
        peak=float(values[row, col]),
        peak_mm=(
            origin[0] + col * left[0] + row * back[0],
            origin[1] + col * left[1] + row * back[1],
            origin[2] + col * left[2] + row * back[2],
        ),
    )


def plane_centre(sequencer: Sequencer, position_um: int) -> tuple[Vector, SliceGeometry]:
    """Centre of a plane (LPS, mm), between those of the slices around it; and a slice's axes."""
    positions = sequencer.positions_um
    at = min(bisect_left(positions, position_um), len(positions) - 1)
    above = positions[at]
    below = above if above <= position_um else positions[max(0, at - 1)]
    low, high = sequencer.record_at(below).geometry, sequencer.record_at(above).geometry
    share = (position_um - below) / (above - below) if above > below else 0.0
    a, b = low.centre_mm, high.centre_mm
    return (
        a[0] + share * (b[0] - a[0]),
        a[1] + share * (b[1] - a[1]),
        a[2] + share * (b[2] - a[2]),
    ), low


def _sigmoid(logit: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * logit))


def _scaled(vector: Vector, factor: float) -> Vector:
    return (vector[0] * factor, vector[1] * factor, vector[2] * factor)


def _open_ends(records: Sequence[SlabRecord]) -> tuple[str, ...]:
    """Ends of the scan at which the gate still passes: the organ may go on beyond."""
    ends = {"feet": records[0], "head": records[-1]} if records else {}
    return tuple(end for end, record in ends.items() if not record.gated)


def _coverage(sequencer: Sequencer, records: Sequence[SlabRecord], *, gate: bool) -> Coverage:
    positions = sequencer.positions_um
    return Coverage(
        lower_mm=positions[0] / 1000.0,
        upper_mm=positions[-1] / 1000.0,
        slices=len(positions),
        slabs=sum(not record.gated for record in records),
        gated_slabs=sum(record.gated for record in records),
        complete=not gate or (bool(records) and not _open_ends(records)),
    )


def _coverage_flags(records: Sequence[SlabRecord]) -> tuple[QualityFlag, ...]:
    if not (ends := _open_ends(records)):
        return ()
    flag = QualityFlag(
        flag=Flag.INCOMPLETE_COVERAGE,
        message=f"the organ reaches the scan's end towards the {' and the '.join(ends)}",
        values={"ends": ", ".join(ends)},
    )
    return (flag,)
