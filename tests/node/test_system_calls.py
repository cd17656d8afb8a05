"""The whole program under strace: what it acknowledges to storescu is on disk before."""

import os
import signal
from collections.abc import Callable

from node_peers import Node, Study, need, store, wait_for
from system_calls import STRACE, mistakes

SLICES = 5


def test_every_slice_is_on_disk_and_in_the_ledger_before_storescu_hears_of_it(
    make_node: Callable[..., Node], negative: Study
) -> None:
    need("strace")
    node = make_node(routing__bundles="[]", routing__otherwise="ignore")
    trace = node.folder / "trace"
    node.start(*STRACE, "-o", str(trace))
    files = negative.files[:SLICES]
    assert store(node.port, files).acknowledged == files
    os.kill(node.status()["process"], signal.SIGTERM)
    wait_for("end of the trace", lambda: not node.running)
    assert mistakes(trace.read_text(), node.state, SLICES) == []
