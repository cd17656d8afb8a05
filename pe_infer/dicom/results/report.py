"""The structured report (TID 1500) of a result, of a refusal, or of a provisional alert."""

from collections.abc import Sequence
from typing import Final

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage

from pe_infer.dicom.results import codes
from pe_infer.dicom.results.envelope import (
    RESEARCH_USE,
    Envelope,
    replace_sequence,
)
from pe_infer.dicom.results.outcome import (
    MANUFACTURER,
    Alert,
    Identity,
    Outcome,
    ResultObject,
    Unjudged,
)
from pe_infer.dicom.results.sources import reference_to
from pe_infer.dicom.source_file import SourceFile
from pe_infer.result import (
    CodedConcept,
    NotProcessed,
    StudyResult,
    percent_text,
    probability_text,
    shown_percent,
)

Image = tuple[SourceFile, int | None]  # and the frame of a multi-frame instance

_LIBRARY_PLACE: Final = -1  # before the measurements


def write_report(
    outcome: Outcome,
    envelope: Envelope,
    images: Sequence[Image],
    predecessors: Sequence[Identity],
    notes: Sequence[str],
) -> ResultObject:
    """Write ``report.dcm``.

    Args:
        outcome: What there is to say.
        envelope: Of all objects.
        images: Those that the finding is best seen in.
        predecessors: Reports that this one takes the place of.
        notes: Further remarks, such as that an alert is withdrawn. They follow the verdict.
    """
    provisional = isinstance(outcome, Alert)
    seen = list({instance.sop_instance_uid: instance for instance, _ in images}.values())
    seen = seen or [envelope.sources.instances[0]]
    document = sr.Comprehensive3DSR(
        evidence=[envelope.sources.stand_in(instance) for instance in seen],
        content=_content(outcome, envelope, images, notes),
        is_complete=not provisional,
        is_final=not provisional,
        **envelope.identifiers("report"),
    )
    items = list(document.ContentSequence)
    items.insert(len(items) + _LIBRARY_PLACE, _image_library(envelope))
    replace_sequence(document, "ContentSequence", items)
    replace_sequence(
        document,
        "CurrentRequestedProcedureEvidenceSequence",
        [envelope.sources.evidence(envelope.sources.instances)],
    )
    if predecessors:
        replace_sequence(
            document, "PredecessorDocumentsSequence", [_predecessors(envelope, predecessors)]
        )
    title = f"{envelope.model}: {outcome.finding.code.meaning}"
    return envelope.write(
        document, "report", "report.dcm", f"PROVISIONAL {title}" if provisional else title
    )


def _content(
    outcome: Outcome, envelope: Envelope, images: Sequence[Image], notes: Sequence[str]
) -> sr.MeasurementReport:
    identity, finding = envelope.identity, outcome.finding
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=identity.device_uid(),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=envelope.model,
        serial_number=envelope.serial_number,
    )
    observer = sr.ObserverContext(sr.CodedConcept.from_code(codes.DEVICE), device)
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=identity.tracking_uid(), identifier=f"{identity.bundle}: {finding.code.meaning}"
        ),
        finding_type=_code(finding.code),
        algorithm_id=sr.AlgorithmIdentification(
            name=f"{MANUFACTURER} {identity.bundle}",
            version=identity.bundle_version,
            parameters=_parameters(outcome, identity),
        ),
        finding_sites=None if finding.site is None else [sr.FindingSite(_code(finding.site))],
        measurements=_certainty(outcome),
        qualitative_evaluations=_evaluations(outcome),
        source_images=[_source_image(*image) for image in images],
    )
    verdict, *rest = _sentences(outcome)
    for text in (verdict, *notes, *rest, RESEARCH_USE, outcome.intended_use):
        group[0].ContentSequence.append(
            sr.TextContentItem(codes.COMMENT, text, sr.RelationshipTypeValues.CONTAINS)
        )
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.PROCEDURE,
        imaging_measurements=[group],
        title=codes.REPORT,
    )


def _parameters(outcome: Outcome, identity: Identity) -> list[str]:
    parameters = [f"sha256 of the bundle: {identity.bundle_hash}"]
    if isinstance(outcome, StudyResult):
        point = outcome.operating_point
        parameters += [
            f"operating point: {point.name}, threshold {percent_text(point.threshold)}",
            f"engine: {outcome.provenance.engine}",
        ]
    return parameters


def _certainty(outcome: Outcome) -> list[sr.Measurement] | None:
    probability = None if isinstance(outcome, Unjudged) else outcome.probability
    if probability is None:
        return None
    percent = shown_percent(probability)
    return [sr.Measurement(name=codes.CERTAINTY, value=percent, unit=codes.PERCENT)]


def _evaluations(outcome: Outcome) -> list[sr.QualitativeEvaluation]:
    if isinstance(outcome, Alert):
        return []
    if isinstance(outcome, Unjudged) or outcome.positive is None:
        return [sr.QualitativeEvaluation(codes.SUMMARY, codes.NONE_SUCCEEDED)]
    summary = codes.WITH_FINDINGS if outcome.positive else codes.WITHOUT_FINDINGS
    presence = codes.PRESENT if outcome.positive else codes.ABSENT
    return [
        sr.QualitativeEvaluation(codes.SUMMARY, summary),
        sr.QualitativeEvaluation(_code(outcome.finding.code), presence),
    ]


def _sentences(outcome: Outcome) -> list[str]:
    meaning = outcome.finding.code.meaning
    if isinstance(outcome, Alert):
        alert = (
            f"PROVISIONAL ALERT while slices still arrive: {meaning} suspected near position "
            f"{outcome.position_mm:.1f} mm, after {outcome.slices} slices. This is no verdict: the "
            "report on the whole series takes its place."
        )
        certainty = probability_text(outcome.probability)
        part = f"Certainty: probability of this part of the series, {certainty}."
        return [alert, part]
    if isinstance(outcome, Unjudged):
        return [_not_processed(meaning, outcome.reason)]
    if outcome.not_processed is not None:
        sentences = [_not_processed(meaning, outcome.not_processed)]
    else:
        assert outcome.probability is not None  # noqa: S101  as it was processed
        verdict = "POSITIVE" if outcome.positive else "NEGATIVE"
        point = outcome.operating_point
        judged = (
            f"{meaning}: {verdict}. Probability {probability_text(outcome.probability)}, threshold "
            f"{probability_text(point.threshold)} ({point.name})."
        )
        sentences = [judged, "Certainty: the calibrated probability that the finding is present."]
    coverage = outcome.coverage
    sentences.append(
        f"Seen: {coverage.slices} slices from {coverage.lower_mm:.1f} to {coverage.upper_mm:.1f} "
        f"mm; {coverage.slabs} slabs, {coverage.gated_slabs} more without the organ."
    )
    return [*sentences, *(f"Quality: {flag.message}." for flag in outcome.quality)]


def _not_processed(meaning: str, reason: NotProcessed) -> str:
    return f"{meaning}: NOT PROCESSED, neither present nor absent. {reason.message} ({reason.code})"


def _source_image(instance: SourceFile, frame: int | None) -> sr.SourceImageForMeasurementGroup:
    return sr.SourceImageForMeasurementGroup(
        referenced_sop_class_uid=instance.sop_class_uid,
        referenced_sop_instance_uid=instance.sop_instance_uid,
        referenced_frame_numbers=None if frame is None else [frame],
    )


def _image_library(envelope: Envelope) -> Dataset:
    """Return the image library (TID 1600): every image that was looked at.

    Made of plain data sets, as highdicom's library takes minutes for a thousand images.
    """
    group = _container(codes.IMAGE_LIBRARY_GROUP)
    modality = _item("HAS ACQ CONTEXT", "CODE", codes.MODALITY)
    modality.ConceptCodeSequence = [sr.CodedConcept.from_code(codes.CT)]
    entries = [modality]
    if envelope.sources.frame_of_reference_uid is not None:
        frame = _item("HAS ACQ CONTEXT", "UIDREF", codes.FRAME_OF_REFERENCE)
        frame.UID = envelope.sources.frame_of_reference_uid
        entries.append(frame)
    for instance in envelope.sources.instances:
        image = _item("CONTAINS", "IMAGE")
        image.ReferencedSOPSequence = [reference_to(instance)]
        entries.append(image)
    group.ContentSequence = entries
    library = _container(codes.IMAGE_LIBRARY)
    library.ContentSequence = [group]
    return library


def _container(name: Code) -> Dataset:
    item = _item("CONTAINS", "CONTAINER", name)
    item.ContinuityOfContent = "CONTINUOUS"
    return item


def _item(relationship: str, value_type: str, name: Code | None = None) -> Dataset:
    item = Dataset()
    item.RelationshipType = relationship
    item.ValueType = value_type
    if name is not None:
        item.ConceptNameCodeSequence = [sr.CodedConcept.from_code(name)]
    return item


def _predecessors(envelope: Envelope, predecessors: Sequence[Identity]) -> Dataset:
    """Return the item of PredecessorDocumentsSequence (PS3.3 C.17.2): all are of one study."""
    study = Dataset()
    study.StudyInstanceUID = envelope.sources.study_instance_uid
    study.ReferencedSeriesSequence = []
    for identity in predecessors:
        document = Dataset()
        document.ReferencedSOPClassUID = Comprehensive3DSRStorage
        document.ReferencedSOPInstanceUID = identity.instance_uid("report")
        series = Dataset()
        series.SeriesInstanceUID = identity.series_uid("report")
        series.ReferencedSOPSequence = [document]
        study.ReferencedSeriesSequence.append(series)
    return study


def _code(concept: CodedConcept) -> Code:
    return Code(concept.value, concept.scheme, concept.meaning)
