"""The DICOM node beside the scanner: receives slices, streams them, sends what was found.

::

    receiver ─► inbox ─► studies ─► parcels ─► outbox ─► PACS, folder, webhook
       │          │         │          │          │
       └──────────┴───── ledger (SQLite) ─────────┘

What a slice, a study or a delivery is waiting for is always on disk: the ledger and the files
that it names. Threads only hold what can be made again from there, so that a node that was killed
goes on where it was. The only user of pynetdicom.
"""
