"""An outcome into a folder of DICOM objects."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
from highdicom.sc import SCImage

from pe_infer.dicom.reading import Quiet
from pe_infer.dicom.results.attention import write_attention
from pe_infer.dicom.results.envelope import Envelope
from pe_infer.dicom.results.key_images import write_key_images
from pe_infer.dicom.results.key_objects import write_key_objects
from pe_infer.dicom.results.outcome import (
    MANUFACTURER,
    Alert,
    Identity,
    Outcome,
    ResultObject,
    Unjudged,
    derived_uid,
    identity_of,
)
from pe_infer.dicom.results.report import Image, write_report
from pe_infer.dicom.results.selection import Selection, select
from pe_infer.dicom.results.sources import SourceSeries, read_sources
from pe_infer.dicom.source_file import SourceFile
from pe_infer.errors import ConfigurationError
from pe_infer.result import StudyResult

for _vendor in ("highdicom", "pydicom"):  # they quote values, of patients too, in what they log
    logging.getLogger(_vendor).setLevel(logging.ERROR)


@Quiet()
def write_results(
    outcome: Outcome,
    sources: Sequence[Path | SourceFile],
    folder: Path,
    *,
    version: int = 1,
    made_at: datetime,
    supersedes: int | None = None,
    after_alert: int | None = None,
) -> list[ResultObject]:
    """Write what there is to say of a series as DICOM objects of its study.

    A structured report (``report.dcm``) always; for a processed study with attention a Parametric
    Map of it (``attention.dcm``); for a positive one up to three key images (``key-image-1.dcm``
    and on) and a Key Object Selection that points at their slices (``key-objects.dcm``).

    All UIDs are derived from study, series, bundle, its hash, version, and from whether the outcome
    is an alert; with the same ``made_at`` the files are the same byte for byte.

    Args:
        outcome: A result, a refusal, or a provisional alert.
        sources: The files of the series, any order, as conversions describe them
            (``Conversion.source``) or by name; those are read. Localizers and the like may be among
            them.
        folder: Empty, or not there yet.
        version: Counts the outcomes of one series.
        made_at: When. Written in the time zone that the study states, else that of the machine; a
            time without zone as it is.
        supersedes: The version of the earlier report, by the same bundle, that this one replaces.
        after_alert: The version of the provisional alert that went out before.

    Returns:
        What was written, the report first.

    Raises:
        ConfigurationError: The folder holds files or cannot be written, sources are missing or of
            another series, or a version makes no sense.
        DicomError: A source file cannot be read.
            After an error, what was written so far stays in the folder.
    """
    _check_versions(version, supersedes, after_alert)
    identity = identity_of(outcome, version)
    series = read_sources(
        sources,
        study_instance_uid=identity.study_instance_uid,
        series_instance_uid=identity.series_instance_uid,
        skip_unreadable=isinstance(outcome, Unjudged),
    )
    selection = Selection(slabs=(), reason="")
    if isinstance(outcome, StudyResult) and outcome.status == "processed":
        selection = select(outcome.evidence)
    images = _images(outcome, selection, series)
    prepare_folder(folder)
    envelope = Envelope(identity=identity, sources=series, made_at=made_at, folder=folder)
    predecessors: list[Identity] = []
    notes: list[str] = []
    if supersedes is not None:
        predecessors.append(replace(identity, version=supersedes, preliminary=False))
        notes.append(f"Version {version}. Replaces version {supersedes}.")
    if after_alert is not None:
        predecessors.append(replace(identity, version=after_alert, preliminary=True))
        notes.append(_word_on_alert(outcome))
    positive = isinstance(outcome, StudyResult) and outcome.positive and images
    if positive:
        notes.append(f"Key images: {selection.reason}")
    written = [write_report(outcome, envelope, images, predecessors, notes)]
    if isinstance(outcome, StudyResult):
        if positive:
            written += write_key_images(outcome, selection, envelope)
            written.append(write_key_objects(outcome, selection, images, envelope))
        if outcome.status == "processed":
            attention = write_attention(outcome, envelope)
            written += [] if attention is None else [attention]
    return written


def warm_up() -> None:
    """Load the tables of highdicom, which would hold up the first outcome for some 0.3 s."""
    SCImage(
        pixel_array=np.zeros((1, 1), np.uint8),
        photometric_interpretation="MONOCHROME2",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        study_instance_uid=derived_uid("study"),
        series_instance_uid=derived_uid("series"),
        series_number=1,
        sop_instance_uid=derived_uid("instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
    )


def prepare_folder(folder: Path) -> None:
    """Make a folder for objects.

    Raises:
        ConfigurationError: It holds files already, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = next(folder.iterdir(), None) is None
    except OSError as exc:
        raise ConfigurationError(
            f"{folder}: the folder cannot be made or read: {exc.strerror}. Give another one."
        ) from exc
    if not empty:
        raise ConfigurationError(
            f"{folder}: the folder holds files already, and none is overwritten. Give an empty one."
        )


def _check_versions(version: int, supersedes: int | None, after_alert: int | None) -> None:
    replaced = supersedes is None or 1 <= supersedes < version
    if version < 1 or not replaced or (after_alert is not None and after_alert < 1):
        raise ConfigurationError(
            f"version={version}, supersedes={supersedes}, after_alert={after_alert}: versions "
            "count from 1, and a report replaces an earlier one"
        )


def _word_on_alert(outcome: Outcome) -> str:
    if isinstance(outcome, Alert):
        return "Takes the place of an earlier provisional alert."
    if isinstance(outcome, StudyResult) and outcome.positive:
        return "The provisional alert that was sent before is confirmed."
    if isinstance(outcome, StudyResult) and outcome.positive is not None:
        return (
            "The provisional alert that was sent before is WITHDRAWN: the whole series does not "
            "bear it out."
        )
    return (
        "The provisional alert that was sent before is WITHDRAWN, as the series cannot be judged: "
        "what it was about is neither confirmed nor excluded."
    )


def _images(outcome: Outcome, selection: Selection, series: SourceSeries) -> list[Image]:
    """Return the images that the finding is best seen in."""
    if isinstance(outcome, Alert):
        nearest = series.nearest(outcome.position_mm)
        return [] if nearest is None else [nearest]
    shown = (key.slab for key in selection.slabs)
    return [(series.find(slab.sop_instance_uid), slab.frame_number) for slab in shown]
