"""A receiver as a process: folder and port are arguments; it ends when its input does."""

import sys
from pathlib import Path

from receiving import Taken

from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.receiver import Receiver
from pe_infer.node.settings import NodeSettings
from pe_infer.node.watch import Watch


def main(folder: Path, port: int) -> None:
    settings = NodeSettings(state_dir=folder, listen={"port": port}, limits={"free_disk_bytes": 0})
    with Ledger(folder / "ledger.db") as ledger:
        watch = Watch(b"key", level="error")
        receiver = Receiver(settings, Inbox(folder, ledger), Taken(), watch, print)
        receiver.start()
        print("ready", flush=True)  # noqa: T201
        sys.stdin.read()
        receiver.stop(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
