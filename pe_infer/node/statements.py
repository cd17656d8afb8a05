"""The ledger's tables, and what is asked of them in more than a line."""

from typing import Final

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE series (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  study_instance_uid TEXT NOT NULL,
  series_instance_uid TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('receiving', 'concluded', 'ignored')),
  bundle TEXT,
  reason TEXT,
  version INTEGER NOT NULL,
  expected INTEGER,
  first_at REAL NOT NULL,
  last_at REAL NOT NULL,
  UNIQUE (study_instance_uid, series_instance_uid)
) STRICT;
CREATE TABLE instances (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  series_id INTEGER NOT NULL REFERENCES series ON DELETE CASCADE,
  sop_instance_uid TEXT NOT NULL,
  sop_class_uid TEXT NOT NULL,
  transfer_syntax_uid TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  file TEXT NOT NULL UNIQUE,
  calling_ae_title TEXT NOT NULL,
  received_at REAL NOT NULL,
  UNIQUE (series_id, sop_instance_uid, sha256)
) STRICT;
CREATE TABLE parcels (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  series_id INTEGER NOT NULL REFERENCES series ON DELETE CASCADE,
  kind TEXT NOT NULL CHECK (kind IN ('alert', 'withdrawal', 'result')),
  version INTEGER NOT NULL,
  verdict TEXT CHECK (verdict IN ('positive', 'negative', 'not_processed')),
  folder TEXT NOT NULL UNIQUE,
  made_at REAL NOT NULL,
  UNIQUE (series_id, kind, version)
) STRICT;
CREATE TABLE deliveries (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  parcel_id INTEGER NOT NULL REFERENCES parcels ON DELETE CASCADE,
  destination TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('waiting', 'stored', 'done', 'refused')),
  attempts INTEGER NOT NULL,
  due_at REAL NOT NULL,
  error TEXT,
  transaction_uid TEXT,
  UNIQUE (parcel_id, destination)
) STRICT;
CREATE INDEX deliveries_due ON deliveries (destination, state, due_at);
CREATE INDEX series_state ON series (state);
"""
# Versions of series that were deleted, by digest: objects of a later result get other UIDs.
GONE: Final = (
    "CREATE TABLE IF NOT EXISTS gone "
    "(series TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT, WITHOUT ROWID"
)

# What is under way, and what no earlier parcel of its series has to go before.
OPEN: Final = (
    "destination = ? AND (deliveries.state = 'stored' OR deliveries.state = 'waiting' "
    "AND NOT EXISTS (SELECT 1 FROM parcels AS earlier JOIN deliveries AS before "
    "ON before.parcel_id = earlier.id WHERE earlier.series_id = parcels.series_id "
    "AND earlier.id < parcels.id AND before.destination = deliveries.destination "
    "AND before.state = 'waiting'))"
)
SELECT_SERIES: Final = (
    "SELECT series.*, (SELECT count(*) FROM instances WHERE series_id = series.id) AS instances "
    "FROM series"
)
END_SERIES: Final = (  # unless a slice came after the one of that number
    "UPDATE series SET state = iif(EXISTS (SELECT 1 FROM instances "
    "WHERE series_id = series.id AND instances.id > ?), 'receiving', 'concluded')"
)
ROUTE_AGAIN: Final = (  # nobody knew who sends the series when it was ignored
    "UPDATE series SET state = 'receiving', bundle = NULL, reason = NULL WHERE id = ? "
    "AND state = 'ignored' AND NOT EXISTS (SELECT 1 FROM instances "
    "WHERE series_id = series.id AND calling_ae_title <> '')"
)
SELECT_DELIVERIES: Final = (
    "SELECT deliveries.*, series_id, kind, version, verdict, folder, made_at "
    "FROM deliveries JOIN parcels ON parcels.id = parcel_id"
)
IN_ORDER: Final = "parcel_id, deliveries.id"
SETTLED: Final = (
    "state <> 'receiving' AND NOT EXISTS (SELECT 1 FROM deliveries JOIN parcels "
    "ON parcels.id = parcel_id WHERE series_id = series.id "
    "AND deliveries.state IN ('waiting', 'stored'))"
)
