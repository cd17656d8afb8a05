"""Small series, and outcomes made up for them, from which result objects are written."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from dicom_files import enhanced_dataset, save
from pydicom.dataset import Dataset

from pe_infer.dicom import slices_of, write_series
from pe_infer.dicom.results import Alert, Outcome, ResultObject, Unjudged, write_results
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry, Vector
from pe_infer.result import (
    Attention,
    CodedConcept,
    Coverage,
    Finding,
    Flag,
    NotProcessed,
    OperatingPoint,
    Provenance,
    QualityFlag,
    SlabEvidence,
    StudyResult,
    Timings,
)

STUDY, SERIES, FRAME_OF_REFERENCE = "2.25.7001", "2.25.7002", "2.25.7003"
INFO = SeriesInfo(
    study_instance_uid=STUDY,
    series_instance_uid=SERIES,
    frame_of_reference_uid=FRAME_OF_REFERENCE,
    body_part_examined="CHEST",
    patient_position="HFS",
    series_number=4,
)
FINDING = Finding(
    code=CodedConcept(value="59282003", scheme="SCT", meaning="Pulmonary embolism"),
    site=CodedConcept(value="81040000", scheme="SCT", meaning="Pulmonary artery"),
)
MADE_AT = datetime(2026, 11, 22, 12, 30, 15, 250000)  # noqa: DTZ001  without zone: as it is
HASH = "7fa26face19e2402" + "0" * 48
INTENDED_USE = "Research use only, not a medical device."
SIDE, CELLS, STEP_MM, SPACING_MM = 48, 6, 5.0, 4.0


def slices(
    count: int = 12,
    *,
    row_direction: Vector = (1.0, 0.0, 0.0),
    col_direction: Vector = (0.0, 1.0, 0.0),
    info: SeriesInfo = INFO,
) -> list[Slice]:
    """Slices of soft tissue, ascending, centred on x = y = 0."""
    rng = np.random.default_rng(3)
    row, col = np.asarray(row_direction), np.asarray(col_direction)
    half = (SIDE - 1) / 2 * SPACING_MM
    made = []
    for number in range(count):
        corner = np.array([0.0, 0.0, number * STEP_MM]) - half * row - half * col
        geometry = SliceGeometry(
            rows=SIDE,
            cols=SIDE,
            row_spacing_mm=SPACING_MM,
            col_spacing_mm=SPACING_MM,
            image_position_mm=(float(corner[0]), float(corner[1]), float(corner[2])),
            row_direction=row_direction,
            col_direction=col_direction,
            thickness_mm=STEP_MM,
        )
        pixels = rng.integers(20, 60, (SIDE, SIDE)).astype(np.int16)
        uid = f"{SERIES}.{number + 1}"
        made.append(Slice(pixels=pixels, geometry=geometry, series=info, sop_instance_uid=uid))
    return made


def write(folder: Path, images: Sequence[Slice] | None = None) -> list[Path]:
    """Write slices, ascending."""
    return write_series(slices() if images is None else images, folder)


def attention_of(image: Slice, values: np.ndarray) -> Attention:
    """Lay a map over a slice, as a bundle does whose plane is the slice."""
    rows, cols = values.shape
    geometry = image.geometry
    left = np.asarray(geometry.left_axis) * SIDE * SPACING_MM / cols
    back = np.asarray(geometry.back_axis) * SIDE * SPACING_MM / rows
    centre = np.asarray(geometry.centre_mm)
    origin = centre - (cols - 1) / 2 * left - (rows - 1) / 2 * back
    affine = np.eye(4)
    affine[:3] = np.stack([left, back, np.asarray(geometry.normal), origin], axis=1)
    row, col = divmod(int(values.argmax()), cols)
    peak = origin + col * left + row * back
    return Attention(
        values=values,
        patient_affine=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine),
        peak=float(values.max()),
        peak_mm=(float(peak[0]), float(peak[1]), float(peak[2])),
    )


def evidence(
    images: Sequence[Slice], *, attention: bool = True, gated: int = 2
) -> tuple[SlabEvidence, ...]:
    """One slab per slice; the first ``gated`` do not show the organ. Peaks lie off the centre."""
    rng = np.random.default_rng(5)
    made = []
    for number, image in enumerate(images):
        values = rng.normal(-2.0, 0.5, (CELLS, CELLS)).astype(np.float32)
        values[1, 4] = 1.0 + 5.0 * number % 7
        shows = number >= gated
        made.append(
            SlabEvidence(
                position_mm=image.position_um / 1000,
                probability=round(0.05 + 0.07 * number, 3) if shows else None,
                gated=not shows,
                attention=attention_of(image, values) if shows and attention else None,
                sop_instance_uid=image.sop_instance_uid,
                frame_number=image.frame_number,
            )
        )
    return tuple(made)


def result(
    images: Sequence[Slice] | None = None,
    *,
    positive: bool | None = True,
    attention: bool = True,
    finding: Finding = FINDING,
) -> StudyResult:
    """A result on ``images``: positive, negative, or (``None``) not processed."""
    images = slices() if images is None else images
    processed = positive is not None
    reason = NotProcessed(code="gate.no_organ", message="2 of 12 slabs show the organ.")
    flag = QualityFlag(flag=Flag.GANTRY_TILT, message="the gantry was tilted by 3.0 degrees")
    return StudyResult(
        status="processed" if processed else "not_processed",
        not_processed=None if processed else reason,
        finding=finding,
        probability={True: 0.9714, False: 0.0312, None: None}[positive],
        positive=positive,
        operating_point=OperatingPoint(name="balanced", threshold=0.418),
        evidence=evidence(images, attention=attention and processed),
        quality=(flag,),
        coverage=Coverage(
            lower_mm=0.0, upper_mm=55.0, slices=12, slabs=10, gated_slabs=2, complete=True
        ),
        timings=Timings(
            total_s=1.0,
            push_s=0.1,
            slabs_s=0.1,
            online_s=0.1,
            deferred_s=0.1,
            last_slice_to_result_s=0.1,
            recomputed_slabs=0,
        ),
        provenance=Provenance(
            study_instance_uid=images[0].series.study_instance_uid,
            series_instance_uid=images[0].series.series_instance_uid,
            bundle="toy",
            bundle_version="1.2.0",
            bundle_hash=HASH,
            preprocessing_version=1,
            engine="onnxruntime 1.20 (CPU)",
            precision={},
            packages={},
        ),
        intended_use=INTENDED_USE,
    )


def unjudged() -> Unjudged:
    """A refusal."""
    message = "slices are missing between 10.0 and 30.0 mm"
    return Unjudged(
        finding=FINDING,
        reason=NotProcessed(code="series.gap", message=message),
        study_instance_uid=STUDY,
        series_instance_uid=SERIES,
        bundle="toy",
        bundle_version="1.2.0",
        bundle_hash=HASH,
        intended_use=INTENDED_USE,
    )


def alert() -> Alert:
    """A provisional alert, nearest to the sixth slice."""
    return Alert(
        finding=FINDING,
        probability=0.987,
        position_mm=26.0,
        slices=9,
        study_instance_uid=STUDY,
        series_instance_uid=SERIES,
        bundle="toy",
        bundle_version="1.2.0",
        bundle_hash=HASH,
        intended_use=INTENDED_USE,
    )


OUTCOMES: dict[str, Outcome] = {
    "positive": result(),
    "negative": result(positive=False),
    "not_processed": result(positive=None),
    "unjudged": unjudged(),
    "alert": alert(),
}


def made_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A fixture: the files of the series."""
    return write(tmp_path_factory.mktemp("source"))


def made_objects(
    sources: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[ResultObject]]:
    """A fixture: the objects of every outcome."""
    return {
        name: write_results(outcome, sources, tmp_path_factory.mktemp(name), made_at=MADE_AT)
        for name, outcome in OUTCOMES.items()
    }


def of_other_weights(outcome: StudyResult) -> StudyResult:
    """The same result by a bundle with another hash."""
    made = outcome.provenance.model_copy(update={"bundle_hash": "b" * 64})
    return outcome.model_copy(update={"provenance": made})


def renamed(images: Sequence[Slice], **changes: str | None) -> list[Slice]:
    """Slices whose series says something else."""
    return [replace(image, series=replace(image.series, **changes)) for image in images]  # type: ignore[arg-type]


def multi_frame(folder: Path) -> tuple[list[Path], StudyResult]:
    """One enhanced CT image, and a result on its frames."""
    positions = [5.0 * number for number in range(12)]
    shape = (12, SIDE, SIDE)
    volume = np.random.default_rng(1).integers(0, 80, shape).astype(np.int16)
    dataset = enhanced_dataset(positions, volume)
    groups = dataset.SharedFunctionalGroupsSequence[0]
    groups.PixelMeasuresSequence[0].PixelSpacing = [SPACING_MM] * 2
    window = Dataset()
    window.WindowCenter, window.WindowWidth = "60", "360"
    groups.FrameVOILUTSequence = [window]
    path = save(dataset, folder / "enhanced.dcm")
    images = slices_of(path)
    return [path], result(images)
