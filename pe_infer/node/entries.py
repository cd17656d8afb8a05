"""What the ledger holds: slices, series, parcels, deliveries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SeriesState = Literal["receiving", "concluded", "ignored"]
ParcelKind = Literal["alert", "withdrawal", "result"]
Verdict = Literal["positive", "negative", "not_processed"]
DeliveryState = Literal["waiting", "stored", "done", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewInstance:
    """A slice that is on disk and is to be entered.

    Attributes:
        study_instance_uid: Validated, as are all UIDs here.
        series_instance_uid: Its series.
        sop_instance_uid: The instance.
        sop_class_uid: Its storage class.
        transfer_syntax_uid: Encoding of the file.
        sha256: Of the data set as it came.
        bytes: Size of the file.
        file: Path below the inbox.
        calling_ae_title: Who sent it; empty: not known, it was found on disk.
        expected: How many instances its series says it has; ``None`` if it does not say.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: str
    bytes: int
    file: str
    calling_ae_title: str
    expected: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A slice of the ledger; ``id`` grows in order of arrival."""

    id: int
    series_id: int
    sop_instance_uid: str
    file: str
    calling_ae_title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesEntry:
    """A series of the ledger.

    Attributes:
        id: Of the ledger.
        study_instance_uid: Its study.
        series_instance_uid: Its UID.
        state: ``"receiving"``: slices arrive, or are there and not judged yet; ``"concluded"``: its
            latest result is in a parcel, or it holds no axial CT image and has none (version 0);
            ``"ignored"``: no bundle is to judge it.
        bundle: Which one is to; ``None`` as long as nothing is decided.
        reason: Why that one, or why none.
        version: Of its latest result, which may have been deleted; 0 before the first.
        expected: How many instances it says it has; ``None`` if none of them says, 0 if they do not
            agree.
        first_at: When its first instance came, seconds since 1970.
        last_at: When its newest instance came.
        instances: How many came.
    """

    id: int
    study_instance_uid: str
    series_instance_uid: str
    state: SeriesState
    bundle: str | None
    reason: str | None
    version: int
    expected: int | None
    first_at: float
    last_at: float
    instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A folder of files that belong together and go to every destination.

    Attributes:
        id: Of the ledger; grows.
        series_id: The series that it is about.
        kind: A provisional alert, its withdrawal, or a result.
        version: Of the result, or of the one that was to come when the alert was raised.
        verdict: Of a result.
        folder: Path below the outbox.
        made_at: Seconds since 1970.
    """

    id: int
    series_id: int
    kind: ParcelKind
    version: int
    verdict: Verdict | None
    folder: str
    made_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """A parcel that takes an alert back, to be entered.

    Attributes:
        version: Of the result that was to come when the alert was raised.
        folder: Path below the outbox.
        destinations: Who is to get it.
    """

    version: int
    folder: str
    destinations: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A parcel on its way to one destination.

    Attributes:
        id: Of the ledger.
        parcel: What is to be delivered.
        destination: Name in the settings.
        state: ``"waiting"``; ``"stored"``: taken, commitment is asked for and not there yet;
            ``"done"``; ``"refused"``: taken back only by ``replay``.
        attempts: Tries so far.
        due_at: When to try again, seconds since 1970.
        error: Why the last try failed.
        transaction_uid: Of the storage commitment that was asked for.
    """

    id: int
    parcel: Parcel
    destination: str
    state: DeliveryState
    attempts: int
    due_at: float
    error: str | None
    transaction_uid: str | None
