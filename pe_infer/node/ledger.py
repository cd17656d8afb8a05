"""What the node has taken, concluded and still has to deliver: one SQLite database.

Every method is one transaction, on disk when it returns (write-ahead log, ``synchronous = FULL``).
Other processes may read and write at the same time (``pe-infer node``).
"""

import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pe_infer.errors import Code, NodeError
from pe_infer.node.entries import (
    Delivery,
    DeliveryState,
    Instance,
    NewInstance,
    Parcel,
    ParcelKind,
    SeriesEntry,
    SeriesState,
    Verdict,
    Withdrawal,
)
from pe_infer.node.statements import (
    END_SERIES,
    GONE,
    IN_ORDER,
    OPEN,
    ROUTE_AGAIN,
    SCHEMA,
    SCHEMA_VERSION,
    SELECT_DELIVERIES,
    SELECT_SERIES,
    SETTLED,
)

BUSY_S: Final = 30.0  # how long another process may hold the database

Run = Callable[..., sqlite3.Cursor]  # ``execute`` within a transaction


class Ledger:
    """The node's database. Thread-safe; close it when done."""

    def __init__(self, path: Path) -> None:
        """Open or make the database.

        Args:
            path: The file; its folder exists and is private.

        Raises:
            NodeError: It cannot be opened, is no ledger, or is one of another version.
        """
        self._path = path
        self._lock = threading.Lock()
        with self._translated("open"):
            self._connection = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        """Return the ledger."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    # Slices.

    def add(self, new: NewInstance) -> Instance | None:
        """Enter a slice. A concluded series is being received again from here on.

        A series that was removed goes on counting its versions. One that was ignored is routed
        anew if this slice is the first of which it is known who sent it.

        Returns:
            The entry; ``None`` if the ledger has this very instance already.
        """
        now = time.time()
        with self._transaction("enter a slice") as run:
            uids = (new.study_instance_uid, new.series_instance_uid)
            run(
                "INSERT INTO series (study_instance_uid, series_instance_uid, state, version, "
                "first_at, last_at) VALUES (?, ?, 'receiving', "
                "coalesce((SELECT version FROM gone WHERE series = ?), 0), ?, ?) "
                "ON CONFLICT DO NOTHING",
                (*uids, _digest(*uids), now, now),
            )
            (series_id,) = run(
                "SELECT id FROM series WHERE study_instance_uid = ? AND series_instance_uid = ?",
                uids,
            ).fetchone()
            if new.calling_ae_title:
                run(ROUTE_AGAIN, (series_id,))
            added = run(
                "INSERT INTO instances (series_id, sop_instance_uid, sop_class_uid, "
                "transfer_syntax_uid, sha256, bytes, file, calling_ae_title, received_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (series_id, sop_instance_uid, sha256) DO NOTHING RETURNING id",
                (
                    series_id,
                    new.sop_instance_uid,
                    new.sop_class_uid,
                    new.transfer_syntax_uid,
                    new.sha256,
                    new.bytes,
                    new.file,
                    new.calling_ae_title,
                    now,
                ),
            ).fetchone()
            if added is None:
                run(
                    "UPDATE instances SET calling_ae_title = ? WHERE series_id = ? "
                    "AND sop_instance_uid = ? AND sha256 = ? AND calling_ae_title = ''",
                    (new.calling_ae_title, series_id, new.sop_instance_uid, new.sha256),
                )
                return None
            run(
                "UPDATE series SET last_at = ?, "
                "expected = iif(expected <> ?, 0, coalesce(expected, ?)), "
                "state = iif(state = 'concluded', 'receiving', state) WHERE id = ?",
                (now, new.expected, new.expected, series_id),
            )
        return Instance(
            id=added["id"],
            series_id=series_id,
            sop_instance_uid=new.sop_instance_uid,
            file=new.file,
            calling_ae_title=new.calling_ae_title,
        )

    def instances(
        self, series_id: int, *, after: int = 0, limit: int | None = None
    ) -> list[Instance]:
        """The slices of a series in order of arrival: the first after an entry of that number."""
        with self._transaction("list slices") as run:
            rows = run(
                "SELECT id, series_id, sop_instance_uid, file, calling_ae_title FROM instances "
                "WHERE series_id = ? AND id > ? ORDER BY id LIMIT ?",
                (series_id, after, -1 if limit is None else limit),
            ).fetchall()
        return [Instance(**row) for row in rows]

    def knows_file(self, file: str) -> bool:
        """Whether a file of the inbox is entered."""
        with self._transaction("look for a file") as run:
            return run("SELECT 1 FROM instances WHERE file = ?", (file,)).fetchone() is not None

    def count(self, study_instance_uid: str, series_instance_uid: str) -> int:
        """How many slices of a series are entered."""
        with self._transaction("count slices") as run:
            (count,) = run(
                "SELECT count(*) FROM instances JOIN series ON series.id = series_id "
                "WHERE study_instance_uid = ? AND series_instance_uid = ?",
                (study_instance_uid, series_instance_uid),
            ).fetchone()
        return int(count)

    # Series.

    def series(self, *, state: SeriesState | None = None) -> list[SeriesEntry]:
        """All series, or those of a state, in order of arrival."""
        with self._transaction("list series") as run:
            return self._series(run, "? IS NULL OR state = ?", (state, state))

    def series_entry(self, series_id: int) -> SeriesEntry | None:
        """One series."""
        with self._transaction("read a series") as run:
            return next(iter(self._series(run, "series.id = ?", (series_id,))), None)

    def route(
        self,
        series_id: int,
        *,
        bundle: str | None,
        reason: str,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        """Note which bundle is to judge a series; without one it is ignored from here on.

        ``withdrawal`` is that of an alert of a bundle that was to judge it before.
        """
        state = "ignored" if bundle is None else "receiving"
        with self._transaction("route a series") as run:
            self._withdraw(run, series_id, withdrawal)
            run(
                "UPDATE series SET bundle = ?, reason = ?, state = ? WHERE id = ?",
                (bundle, reason, state, series_id),
            )

    def set_aside(
        self,
        series_id: int,
        *,
        reason: str,
        last_instance: int,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        """End a series without a result: nothing in it says what it is.

        It stays open if a slice came after ``last_instance``, and is received again when one does.
        ``withdrawal`` as for `route`.
        """
        with self._transaction("set a series aside") as run:
            self._withdraw(run, series_id, withdrawal)
            run(f"{END_SERIES}, reason = ? WHERE id = ?", (last_instance, reason, series_id))

    def reopen(self, series_id: int) -> None:
        """Have a series routed and judged again, as a new version."""
        with self._transaction("reopen a series") as run:
            run(
                "UPDATE series SET state = 'receiving', bundle = NULL, reason = NULL WHERE id = ?",
                (series_id,),
            )

    def bring_back(self, now: float) -> None:
        """Let series that were received in the future be received now.

        The clock was ahead then: without this they would not be old for as long as it was.
        """
        with self._transaction("look for times to come") as run:
            run(
                "UPDATE series SET first_at = min(first_at, ?1), last_at = ?1 WHERE last_at > ?1",
                (now,),
            )

    def settled(self, *, before: float) -> list[SeriesEntry]:
        """Series with nothing left to do: concluded or ignored, and nothing to be delivered.

        Args:
            before: Only those whose newest slice came before, seconds since 1970.
        """
        with self._transaction("look for settled series") as run:
            return self._series(run, f"{SETTLED} AND last_at < ?", (before,))

    def remove(
        self, series_id: int, *, before: float, discard: Callable[[Sequence[str]], None]
    ) -> bool:
        """Forget a series, its slices, parcels and deliveries, if it is settled.

        Only a digest of its UIDs and the version of its latest result stay.

        Args:
            series_id: Of the ledger; the number is not given again.
            before: As in `settled`.
            discard: Takes its files away; gets the folders of its parcels. Nothing can happen to
                the series meanwhile. If it fails, nothing is forgotten.

        Returns:
            Whether it was settled.
        """
        with self._transaction("remove a series") as run:
            settled = f"{SETTLED} AND last_at < ? AND series.id = ?"
            entry = next(iter(self._series(run, settled, (before, series_id))), None)
            if entry is None:
                return False
            folders = run("SELECT folder FROM parcels WHERE series_id = ?", (series_id,))
            discard([row["folder"] for row in folders.fetchall()])
            if entry.version:
                digest = _digest(entry.study_instance_uid, entry.series_instance_uid)
                run("INSERT OR REPLACE INTO gone VALUES (?, ?)", (digest, entry.version))
            run("DELETE FROM series WHERE id = ?", (series_id,))
        return True

    # Parcels.

    def conclude(
        self,
        series_id: int,
        *,
        version: int,
        verdict: Verdict,
        folder: str,
        last_instance: int,
        destinations: Sequence[str],
        withdrawal: Withdrawal | None = None,
    ) -> Parcel:
        """Enter a result and its deliveries, and end the series.

        It stays open if a slice came after those that the result is made of.

        Args:
            series_id: Of the ledger.
            version: Of the result.
            verdict: What it says.
            folder: Where its files are, below the outbox.
            last_instance: Number of the newest slice that it is made of.
            destinations: Who is to get it.
            withdrawal: Of the version's alert, if it is to be withdrawn: delivered before the
                result.

        Raises:
            NodeError: The version is there already, or the database cannot be written.
        """
        with self._transaction("conclude a series") as run:
            self._withdraw(run, series_id, withdrawal)
            parcel = self._send(run, series_id, "result", version, verdict, folder, destinations)
            run(f"{END_SERIES}, version = ? WHERE id = ?", (last_instance, version, series_id))
        return parcel

    def alert(
        self, series_id: int, *, version: int, folder: str, destinations: Sequence[str]
    ) -> Parcel:
        """Enter a provisional alert and its deliveries."""
        with self._transaction("enter an alert") as run:
            return self._send(run, series_id, "alert", version, None, folder, destinations)

    def parcels(self, series_id: int) -> list[Parcel]:
        """What was made for a series, in order."""
        with self._transaction("list parcels") as run:
            rows = run(
                "SELECT * FROM parcels WHERE series_id = ? ORDER BY id", (series_id,)
            ).fetchall()
        return [Parcel(**row) for row in rows]

    def parcel_folders(self) -> set[str]:
        """Folders of all parcels."""
        with self._transaction("list parcels") as run:
            return {row["folder"] for row in run("SELECT folder FROM parcels")}

    # Deliveries.

    def due(
        self, destination: str, *, now: float, longest_s: float = math.inf, limit: int = 100
    ) -> list[Delivery]:
        """Deliveries to a destination whose time has come.

        Those with the fewest tries come first, so that what fails again and again keeps nothing
        newer waiting; of those the one that is due for longest; new ones in the order they were
        entered. Of a series only the first one that is waiting: what is entered later goes later,
        even if the first one fails for a while. ``"stored"`` ones are due when their commitment has
        not come in time. What would have to wait longer than ``longest_s``, the longest wait there
        is, is due too: the clock was set back.
        """
        with self._transaction("look for deliveries") as run:
            come = f"{OPEN} AND (due_at <= ? OR due_at > ?)"
            values = (destination, now, now + longest_s)
            return self._deliveries(run, come, values, limit, order=f"attempts, due_at, {IN_ORDER}")

    def next_due_at(self, destination: str) -> float | None:
        """When `due` has the next one, seconds since 1970; ``None``: there is none."""
        with self._transaction("look for deliveries") as run:
            first = run(
                f"{SELECT_DELIVERIES} WHERE {OPEN} ORDER BY due_at LIMIT 1", (destination,)
            ).fetchone()
        return None if first is None else float(first["due_at"])

    def open_deliveries(self) -> dict[str, int]:
        """How many deliveries are waiting or stored, by destination; none: not listed."""
        with self._transaction("count deliveries") as run:
            rows = run(
                "SELECT destination, count(*) AS n FROM deliveries "
                "WHERE state IN ('waiting', 'stored') GROUP BY destination"
            ).fetchall()
        return {row["destination"]: row["n"] for row in rows}

    def deliveries(self, *, state: DeliveryState | None = None) -> list[Delivery]:
        """All deliveries, or those of a state."""
        with self._transaction("list deliveries") as run:
            return self._deliveries(run, "? IS NULL OR deliveries.state = ?", (state, state), -1)

    def delivery(self, delivery_id: int) -> Delivery | None:
        """One delivery."""
        with self._transaction("read a delivery") as run:
            found = self._deliveries(run, "deliveries.id = ?", (delivery_id,), 1)
        return next(iter(found), None)

    def delivery_of(self, transaction_uid: str) -> Delivery | None:
        """The delivery for which this storage commitment was asked."""
        with self._transaction("look for a commitment") as run:
            found = self._deliveries(run, "transaction_uid = ?", (transaction_uid,), 1)
        return next(iter(found), None)

    def update_delivery(
        self,
        delivery_id: int,
        *,
        state: DeliveryState,
        due_at: float = 0.0,
        error: str | None = None,
        transaction_uid: str | None = None,
    ) -> bool:
        """Note what became of a try; it is counted.

        Returns:
            Whether the delivery was waiting or stored; otherwise nothing is noted.
        """
        with self._transaction("note a delivery") as run:
            return bool(
                run(
                    "UPDATE deliveries SET state = ?, due_at = ?, error = ?, transaction_uid = ?, "
                    "attempts = attempts + 1 WHERE id = ? AND state IN ('waiting', 'stored')",
                    (state, due_at, error, transaction_uid, delivery_id),
                ).rowcount
            )

    def drop(self, destination: str, *, reason: str) -> int:
        """Refuse all that is still to be delivered to a destination; returns how much that was."""
        with self._transaction("drop deliveries") as run:
            return run(
                "UPDATE deliveries SET state = 'refused', due_at = 0, error = ?, "
                "transaction_uid = NULL WHERE destination = ? "
                "AND state IN ('waiting', 'stored')",
                (reason, destination),
            ).rowcount

    def send_again(self, series_id: int, *, destinations: Sequence[str] | None = None) -> int:
        """Have all parcels of a series delivered again; returns how many deliveries that is.

        Args:
            series_id: Of the ledger.
            destinations: Only to these; ``None``: to all that they were made for.
        """
        told = json.dumps(destinations)
        with self._transaction("send again") as run:
            return run(
                "UPDATE deliveries SET state = 'waiting', attempts = 0, due_at = 0, error = NULL, "
                "transaction_uid = NULL WHERE parcel_id IN "
                "(SELECT id FROM parcels WHERE series_id = ?) "
                "AND (? = 'null' OR destination IN (SELECT value FROM json_each(?)))",
                (series_id, told, told),
            ).rowcount

    # Inside a transaction.

    @staticmethod
    def _send(
        run: Run,
        series_id: int,
        kind: ParcelKind,
        version: int,
        verdict: Verdict | None,
        folder: str,
        destinations: Sequence[str],
    ) -> Parcel:
        row = run(
            "INSERT INTO parcels (series_id, kind, version, verdict, folder, made_at) "
            "VALUES (?, ?, ?, ?, ?, ?) RETURNING *",
            (series_id, kind, version, verdict, folder, time.time()),
        ).fetchone()
        for destination in destinations:
            run(
                "INSERT INTO deliveries (parcel_id, destination, state, attempts, due_at) "
                "VALUES (?, ?, 'waiting', 0, 0)",
                (row["id"], destination),
            )
        return Parcel(**row)

    @classmethod
    def _withdraw(cls, run: Run, series_id: int, told: Withdrawal | None) -> None:
        if told is not None:
            cls._send(
                run, series_id, "withdrawal", told.version, None, told.folder, told.destinations
            )

    @staticmethod
    def _series(run: Run, condition: str, values: tuple[object, ...]) -> list[SeriesEntry]:
        rows = run(
            f"{SELECT_SERIES} WHERE {condition} ORDER BY id",
            values,
        ).fetchall()
        return [SeriesEntry(**row) for row in rows]

    @staticmethod
    def _deliveries(
        run: Run,
        condition: str,
        values: tuple[object, ...],
        limit: int,
        *,
        order: str = IN_ORDER,
    ) -> list[Delivery]:
        rows = run(
            f"{SELECT_DELIVERIES} WHERE {condition} ORDER BY {order} LIMIT ?",
            (*values, limit),
        ).fetchall()
        return [_delivery(row) for row in rows]

    def _open(self) -> None:
        with self._translated("open"):
            run = self._connection.execute
            for pragma in ("synchronous = FULL", "foreign_keys = ON"):
                run(f"PRAGMA {pragma}")
            (mode,) = run("PRAGMA journal_mode = WAL").fetchone()
            (health,) = run("PRAGMA quick_check(1)").fetchone()
        if mode != "wal" or health != "ok":
            raise NodeError(
                f"{self._path}: ledger is damaged or on a file system of no use for it "
                f"(journal {mode}, check: {health}). Restore it, or use another state_dir."
            )
        with self._transaction("open") as run:
            (version,) = run("PRAGMA user_version").fetchone()
            if version == 0 and not run("SELECT 1 FROM sqlite_master").fetchone():
                for statement in SCHEMA.split(";"):
                    run(statement)
                run(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise NodeError(
                    f"{self._path}: ledger of version {version}, this program writes version "
                    f"{SCHEMA_VERSION}: use the program that made it, or another state_dir"
                )
            run(GONE)

    @contextmanager
    def _transaction(self, action: str) -> Iterator[Run]:
        with self._lock, self._translated(action):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite ends some by itself
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            full = getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise NodeError(
                f"{self._path}: cannot {action}: {exc}. Check the disk, its space and who may "
                "write there.",
                code=Code.NODE_FULL if full else Code.NODE_STATE,
            ) from exc


def _digest(*uids: str) -> str:
    return hashlib.sha256("\0".join(uids).encode()).hexdigest()


def _delivery(row: sqlite3.Row) -> Delivery:
    return Delivery(
        id=row["id"],
        parcel=Parcel(
            id=row["parcel_id"],
            series_id=row["series_id"],
            kind=row["kind"],
            version=row["version"],
            verdict=row["verdict"],
            folder=row["folder"],
            made_at=row["made_at"],
        ),
        destination=row["destination"],
        state=row["state"],
        attempts=row["attempts"],
        due_at=row["due_at"],
        error=row["error"],
        transaction_uid=row["transaction_uid"],
    )
