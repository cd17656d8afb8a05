"""Where parcels go: one module per kind of destination behind one protocol.

A try may be made twice: a process can end between the destination's success and the note of it in
the ledger. Therefore what is sent is the same every time: DICOM objects keep their UIDs, a webhook
gets the same event id and body, a folder the same name.
"""

from collections.abc import Callable

from pe_infer.node.commitment import CommitmentReport
from pe_infer.node.destinations.base import Sender
from pe_infer.node.destinations.dicom import DicomSender
from pe_infer.node.destinations.folder import FolderSender
from pe_infer.node.destinations.webhook import WebhookSender
from pe_infer.node.settings import (
    Destination,
    DicomDestination,
    FolderDestination,
    NodeSettings,
)
from pe_infer.node.tls import client_context
from pe_infer.node.watch import Watch


def sender_to(
    destination: Destination,
    settings: NodeSettings,
    watch: Watch,
    on_commitment: Callable[[CommitmentReport], None],
) -> Sender:
    """Who sends to a destination.

    Args:
        destination: One of the settings'.
        settings: For this node's AE title and for timeouts.
        watch: For what is not an error of a parcel.
        on_commitment: Takes the storage commitment reports that come while one asks for them.

    Raises:
        NodeError: A certificate of the destination cannot be used.
    """
    timeout_s = settings.retry.timeout_s
    if isinstance(destination, DicomDestination):
        return DicomSender(
            destination,
            calling_ae_title=settings.listen.ae_title,
            timeout_s=timeout_s,
            watch=watch,
            on_commitment=on_commitment,
            context=None if destination.tls is None else client_context(destination.tls),
        )
    if isinstance(destination, FolderDestination):
        return FolderSender(destination)
    return WebhookSender(destination, timeout_s=timeout_s)
