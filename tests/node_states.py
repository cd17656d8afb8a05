"""State folders of a node with series in them."""

from pathlib import Path

from pe_infer.node.entries import Verdict
from pe_infer.node.inbox import Header, Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.parcels import StoredObject, write_contents

CT = "1.2.840.10008.5.1.4.1.1.2"
LITTLE = "1.2.840.10008.1.2.1"


def header(series: str = "2", instance: str = "1", *, study: str = "1.2.3") -> Header:
    return Header(
        study_instance_uid=study,
        series_instance_uid=f"{study}.{series}",
        sop_instance_uid=f"{study}.{series}.{instance}",
        sop_class_uid=CT,
        transfer_syntax_uid=LITTLE,
    )


def receive(inbox: Inbox, series: str = "2", *, count: int = 3) -> int:
    """Keep some slices; returns the number of their series."""
    taken = [
        inbox.keep(header(series, str(number)), b"slice %d" % number, calling_ae_title="CT_1")
        for number in range(1, count + 1)
    ]
    assert taken[0] is not None
    return taken[0].series_id


def conclude(
    state_dir: Path,
    ledger: Ledger,
    series_id: int,
    *,
    verdict: Verdict = "negative",
    destinations: tuple[str, ...] = (),
) -> str:
    """Enter a result with one object; returns its folder."""
    entry = ledger.series_entry(series_id)
    assert entry is not None
    name = f"result-{series_id}-{entry.version + 1}"
    folder = state_dir / "parcels" / name
    folder.mkdir(parents=True)
    path = folder / "sr.dcm"
    path.write_bytes(b"report")
    found = StoredObject(
        path=path, sop_class_uid=CT, sop_instance_uid="1.2.9", transfer_syntax_uid=LITTLE
    )
    write_contents(folder, '{"event": "result"}', [found])
    ledger.route(series_id, bundle="toy", reason="a test says so")
    ledger.conclude(
        series_id,
        version=entry.version + 1,
        verdict=verdict,
        folder=name,
        last_instance=ledger.instances(series_id)[-1].id,
        destinations=destinations,
    )
    return name
