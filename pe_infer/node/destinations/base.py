"""What the outbox and a destination have to say to each other."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pe_infer.errors import NodeError
from pe_infer.node.entries import DeliveryState, Parcel
from pe_infer.node.parcels import Contents


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a try ended.

    Attributes:
        state: ``"done"``; ``"waiting"``: failed, to be tried again; ``"refused"``: it makes no
            sense to try again; ``"stored"``: commitment is asked for, or, with an error, to be
            asked for again.
        error: What failed or was refused, without patient data.
    """

    state: DeliveryState
    error: str | None = None


DONE: Final = Outcome(state="done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One try to deliver a parcel.

    Attributes:
        parcel: What it is.
        contents: Its files.
        stored: SOP instance UIDs of those that the destination has already; the sender adds to it.
        all_stored: Everything is there; only commitment is still to be asked for.
        ask: Notes that commitment is about to be asked for; returns the transaction UID to do it
            with.
        answered: Waits for the answer for at most so many seconds; whether it has come.
        stopping: Whether to come to an end.
    """

    parcel: Parcel
    contents: Contents
    stored: set[str]
    all_stored: bool
    ask: Callable[[], str]
    answered: Callable[[float], bool]
    stopping: Callable[[], bool]


class Sender(Protocol):
    """Sends parcels to one destination, one at a time, from one thread."""

    def send(self, errand: Errand) -> Outcome:
        """Try to deliver a parcel."""


def read_document(contents: Contents) -> dict[str, Any]:
    """The document of a parcel.

    Raises:
        NodeError: It cannot be read.
    """
    try:
        document = json.loads(contents.document.read_text(encoding="utf-8"))
        for name in ("event", "event_id", "study_instance_uid", "series_instance_uid"):
            if not isinstance(document[name], str):
                raise TypeError(name)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise NodeError(
            f"{contents.document}: cannot be read: {type(exc).__name__}. Make it again: "
            "pe-infer node replay."
        ) from exc
    checked: dict[str, Any] = document
    return checked


def reason(exc: OSError) -> str:
    """What went wrong, without the name of a file: a study's UID may be in it."""
    return exc.strerror or str(exc) or type(exc).__name__
