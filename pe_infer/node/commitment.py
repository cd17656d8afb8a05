"""Storage commitment on the network: reports that a destination sends.

A destination answers on the association on which it was asked, or, more often, on one of its own
to the receiver. Both take reports with `take_report`.
"""

from collections.abc import Callable

from pynetdicom.events import Event

from pe_infer.dicom.commitment import CommitmentReport, read_commitment_report
from pe_infer.errors import DicomError
from pe_infer.node.watch import Watch

__all__ = ["CommitmentReport", "take_report"]

_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_INVALID_ARGUMENT = 0x0115


def take_report(
    event: Event, on_report: Callable[[CommitmentReport], None], watch: Watch
) -> tuple[int, None]:
    """Handle an N-EVENT-REPORT request (``evt.EVT_N_EVENT_REPORT``).

    Args:
        event: The request.
        on_report: Has noted the report when it returns.
        watch: Where it is logged.

    Returns:
        Status of the response: success only after the report was noted, so that the other side can
        send it again; and no event reply.
    """
    try:
        on_report(read_commitment_report(event.event_information))
    except DicomError as exc:
        watch.failed("commitment_report_unreadable", exc)
        return _INVALID_ARGUMENT, None
    except Exception as exc:  # noqa: BLE001 (the other side is told, whatever it is)
        watch.failed("commitment_report_not_noted", exc)
        return _PROCESSING_FAILURE, None
    return _SUCCESS, None
