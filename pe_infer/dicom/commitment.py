"""Storage commitment: what is asked for, and what the other side says (PS3.4 annex J)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from pe_infer.dicom.reading import Quiet
from pe_infer.errors import Code, DicomError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitmentReport:
    """An answer to a request for storage commitment.

    Attributes:
        transaction_uid: Of the request.
        committed: SOP instance UIDs that the other side will keep: of those that it names as both,
            none.
        failed: Those that it will not, with its failure reason (PS3.3 section C.14.1.1).
    """

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int] = field(default_factory=dict)


def commitment_request(transaction_uid: str, instances: Sequence[tuple[str, str]]) -> Dataset:
    """The action information of a request.

    Args:
        transaction_uid: New for every request.
        instances: SOP class UID and SOP instance UID of each.
    """
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = [_reference(*instance) for instance in instances]
    return request


def read_commitment_report(information: Dataset) -> CommitmentReport:
    """Read the event information of an answer.

    Raises:
        DicomError: It does not say what it answers, or what it is about.
    """
    try:
        with Quiet():
            failed = {
                str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason") or 0)
                for item in information.get("FailedSOPSequence") or ()
            }
            committed = {
                str(item.ReferencedSOPInstanceUID)
                for item in information.get("ReferencedSOPSequence") or ()
            }
            return CommitmentReport(
                transaction_uid=str(information.TransactionUID),
                committed=frozenset(committed - failed.keys()),
                failed=failed,
            )
    except Exception as exc:  # what pydicom raises for damaged values is not documented
        raise DicomError(
            "the storage commitment report cannot be read, or has no TransactionUID, or items "
            "without ReferencedSOPInstanceUID: the sender has to mend it",
            code=Code.MISSING_ATTRIBUTE,
        ) from exc


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = sop_instance_uid
    return item
