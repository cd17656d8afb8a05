"""What is done with goes: slices, parcels and entries of series that need nothing any more.

A series' slices are moved away first, in one step, then its parcels, then its entries are deleted.
A process that ends in between leaves entries without slices, which the next purge deletes too, or
files in a folder that nothing names, which the next start deletes; never slices without entries,
which `Inbox.recover` would take for new ones.
"""

import math
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from pe_infer.errors import NodeError
from pe_infer.node.durable import make_private_folder, sync_folder, taken, translated
from pe_infer.node.entries import SeriesEntry
from pe_infer.node.inbox import FILES
from pe_infer.node.ledger import Ledger

PARCELS: Final = "parcels"
_REMOVED: Final = "removing"


class Retention:
    """Deletes series of a state folder. Another process may use the folder at the same time."""

    def __init__(
        self, state_dir: Path, ledger: Ledger, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Look after a folder.

        Args:
            state_dir: Folder of a node.
            ledger: Its ledger.
            clock: Seconds since 1970.
        """
        self._clock = clock
        self._slices = state_dir / FILES
        self._parcels = state_dir / PARCELS
        self._removed = state_dir / _REMOVED
        self._ledger = ledger

    def clear(self) -> None:
        """Delete what a process that has ended was about to delete. Before the node starts.

        The folder for it is the node's from here on, also if another user is the first to purge.
        """
        shutil.rmtree(self._removed, ignore_errors=True)
        make_private_folder(self._removed)
        self._finish()

    def due(self, *, before: float) -> list[SeriesEntry]:
        """What `purge` would delete; its argument."""
        return self._ledger.settled(before=before)

    def purge(self, *, before: float, series_id: int | None = None) -> list[SeriesEntry]:
        """Delete what is settled (`Ledger.settled`).

        A series that was received in the future, by a clock that was ahead, counts from now on as
        received now.

        Args:
            before: Only series whose newest slice came before, seconds since 1970.
            series_id: Only this one.

        Returns:
            The series that are gone.

        Raises:
            NodeError: Files of a series cannot be moved or deleted; what was not moved is still
                entered. The other series are gone.
        """
        self._ledger.bring_back(self._clock())
        self._finish()
        gone: list[SeriesEntry] = []
        failure: NodeError | None = None
        for entry in self.due(before=before):
            if series_id not in {None, entry.id}:
                continue
            try:
                if self._remove(entry, before):
                    gone.append(entry)
            except NodeError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure
        return gone

    def _finish(self) -> None:
        """Delete the entries of series whose slices a process that has ended had moved away."""
        for entry in self._ledger.settled(before=math.inf):
            if not self._folder(entry).exists():
                self._remove(entry, math.inf)

    def _remove(self, entry: SeriesEntry, before: float) -> bool:
        folder = self._folder(entry)
        away = self._removed / uuid.uuid4().hex
        with taken(folder) as there:

            def discard(parcels: Sequence[str]) -> None:
                make_private_folder(away)
                with translated(folder):
                    if there:  # otherwise what is there by now is not of this entry
                        _move(folder, away / FILES)
                    for number, parcel in enumerate(parcels):
                        _move(self._parcels / parcel, away / str(number))
                    sync_folder(away)

            removed = self._ledger.remove(entry.id, before=before, discard=discard)
        shutil.rmtree(away, ignore_errors=True)
        with suppress(OSError):  # the study has other series
            folder.parent.rmdir()
        return removed

    def _folder(self, entry: SeriesEntry) -> Path:
        return self._slices / entry.study_instance_uid / entry.series_instance_uid


def _move(folder: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        folder.rename(target)
        sync_folder(folder.parent)
