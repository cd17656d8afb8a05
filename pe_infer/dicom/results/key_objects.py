"""The Key Object Selection: which source slices show a finding best."""

from collections.abc import Sequence

from highdicom import ko, sr

from pe_infer.dicom.results import codes
from pe_infer.dicom.results.envelope import RESEARCH_USE, Envelope, replace_sequence
from pe_infer.dicom.results.outcome import MANUFACTURER, ResultObject
from pe_infer.dicom.results.report import Image
from pe_infer.dicom.results.selection import Selection
from pe_infer.result import StudyResult


def write_key_objects(
    result: StudyResult, selection: Selection, images: Sequence[Image], envelope: Envelope
) -> ResultObject:
    """Write ``key-objects.dcm``."""
    sources, identity = envelope.sources, envelope.identity
    instances = list({instance.sop_instance_uid: instance for instance, _ in images}.values())
    evidence = [sources.stand_in(instance) for instance in instances]
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=identity.device_uid(), manufacturer_name=MANUFACTURER, model_name=envelope.model
    )
    meaning = result.finding.code.meaning
    content = ko.KeyObjectSelection(
        document_title=codes.OF_INTEREST,
        referenced_objects=evidence,
        observer_device_context=sr.ObserverContext(sr.CodedConcept.from_code(codes.DEVICE), device),
        description=f"{meaning}, {selection.reason} {RESEARCH_USE}",
    )
    document = ko.KeyObjectSelectionDocument(
        evidence=evidence, content=content, **envelope.identifiers("key_object_selection")
    )
    # highdicom references neither frames nor names the purpose.
    kept = [item for item in document.ContentSequence if item.ValueType != "IMAGE"]
    shown = [
        sr.ImageContentItem(
            name=codes.BEST_ILLUSTRATION,
            referenced_sop_class_uid=instance.sop_class_uid,
            referenced_sop_instance_uid=instance.sop_instance_uid,
            referenced_frame_numbers=None if frame is None else [frame],
            relationship_type=sr.RelationshipTypeValues.CONTAINS,
        )
        for instance, frame in images
    ]
    replace_sequence(document, "ContentSequence", [*kept, *shown])
    replace_sequence(
        document, "CurrentRequestedProcedureEvidenceSequence", [sources.evidence(instances)]
    )
    return envelope.write(
        document,
        "key_object_selection",
        "key-objects.dcm",
        f"{envelope.model}: key slices of {meaning}",
    )
