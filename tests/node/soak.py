"""The node under load (``make soak``): four senders, memory, throughput beside DCMTK, kills.

Environment: SOAK_MINUTES (10), SOAK_KILLS (20), SOAK_SEED, SOAK_FOLDER (scratch, a local disk).
Ends with 1 if something acknowledged was lost, a result is missing, double or wrong, or if from
study 10 to study 100 memory grew by more than a tenth or more and more files stayed open.
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from node_peers import Node, Study, checked, echo, free_port, store, wait_for
from peers import dcmtk

SENDERS = 4
MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
KILLS = int(os.environ.get("SOAK_KILLS", "20"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
MEMORY_LIMIT = 1.1
FIRST, LAST = 10, 100  # studies between which memory may grow by a tenth
MORE_FILES = 24  # connections come and go
THROUGHPUT_ROUNDS = 5
WAITING_SLICES = 400
PATIENCE_S = 600.0


class Copies:
    """Studies of other patients, byte for byte but for their UIDs."""

    def __init__(self, model: Study, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._lock = threading.Lock()
        self._made = 0

    def next(self) -> Study:
        with self._lock:
            self._made += 1
            number = self._made
        folder = self._folder / str(number)
        folder.mkdir(parents=True)
        new = {
            uid: altered(uid, number)
            for uid in (
                self._model.study_uid,
                self._model.series_uid,
                *self._model.instances.values(),
            )
        }
        pattern = re.compile("|".join(map(re.escape, new)).encode())
        for file in self._model.files:
            content = pattern.sub(lambda found: new[found[0].decode()].encode(), file.read_bytes())
            (folder / file.name).write_bytes(content)
        return Study(folder, self._model.expected)


def altered(uid: str, number: int) -> str:
    """Another UID of the same length."""
    return f"{uid[:-6]}{(int(uid[-6:]) + number) % 10**6:06d}"


class Load:
    """Senders that send studies one after the other until they are told to stop."""

    def __init__(self, node: Node, copies: Copies) -> None:
        self._node = node
        self._copies = copies
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.sent: list[Study] = []
        self.refused = 0
        self._threads = [threading.Thread(target=self._run) for _ in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """After the studies in hand."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            study = self._copies.next()
            left = set(study.files)
            while left:  # a scanner does not give up
                done = store(self._node.port, sorted(left))
                left -= set(done.acknowledged)
                with self._lock:
                    self.refused += sum(status != "Success" for status in done.statuses)
                if left:
                    time.sleep(0.5)
            with self._lock:
                self.sent.append(study)


class Held(NamedTuple):
    """What the node holds: resident memory, and files and sockets that are open."""

    memory_bytes: int
    files: int


def held_by(node: Node) -> Held:
    process = Path(f"/proc/{node.pid}")
    (memory_kib,) = re.findall(r"VmRSS:\s+(\d+)", (process / "status").read_text())
    return Held(int(memory_kib) * 1024, sum(1 for _ in (process / "fd").iterdir()))


def results(node: Node) -> int:
    return sum(1 for _ in node.results.glob("[0-9]*/*/result-v*/document.json"))


def held_under_load(node: Node, until: float) -> dict[int, Held]:
    """What the node holds by number of results, until a time."""
    samples: dict[int, Held] = {}
    while time.monotonic() < until:
        samples.setdefault(results(node), held_by(node))
        time.sleep(0.2)
    return samples


def kill_under_load(node: Node, chance: random.Random) -> None:
    for number in range(KILLS):
        time.sleep(chance.uniform(0.5, 8.0))
        node.kill()
        node.start()
        say(f"kill {number + 1} of {KILLS}: {results(node)} results, {len(node.kept())} slices")


def failures(node: Node, sent: Sequence[Study]) -> list[str]:
    """What is lost, missing, double or wrong."""
    found = []
    kept = node.kept()
    for study in sent:
        lost = [uid for uid in study.instances.values() if uid not in kept]
        if lost:
            found.append(f"{study.folder.name}: {len(lost)} acknowledged slices are lost")
        documents = node.documents(study)
        if [document["version"] for document in documents] != [1]:
            found.append(f"{study.folder.name}: results {[d['version'] for d in documents]}")
        elif documents[0]["result"]["positive"] != study.expected["positive"]:  # type: ignore[index]
            found.append(f"{study.folder.name}: wrong verdict")
    return found


def throughput(port: int, studies: Sequence[Study], called: str) -> float:
    """Acknowledged slices per second over four associations at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(SENDERS) as pool:
        sent = list(pool.map(lambda study: store(port, study.files, called=called), studies))
    seconds = time.perf_counter() - began
    acknowledged = sum(len(one.acknowledged) for one in sent)
    assert acknowledged == sum(len(study.files) for study in studies), sent[0].output
    return acknowledged / seconds


def beside_dcmtk(folder: Path, cache: Path, copies: Copies) -> dict[str, float]:
    """Throughput of the node, which judges nothing meanwhile, and of storescp.

    The node has every slice on disk (fsync) before it answers, storescp in the page cache.
    """
    node = Node(folder / "throughput", cache, routing__bundles="[]", routing__otherwise="ignore")
    node.start()
    (folder / "storescp").mkdir()
    port = free_port()
    peer = subprocess.Popen(
        [
            str(dcmtk("storescp")),
            "--fork",
            "-aet",
            "PEER",
            "-uf",
            "-od",
            str(folder / "storescp"),
            str(port),
        ],
        stderr=subprocess.DEVNULL,
    )
    studies = [copies.next() for _ in range(SENDERS * THROUGHPUT_ROUNDS)]
    try:
        wait_for("storescp", lambda: echo(port, called="PEER"))
        return {
            "storescp": throughput(port, studies, "PEER"),
            "pe-infer": throughput(node.port, studies, "PE_INFER"),
        }
    finally:
        peer.terminate()
        peer.wait(timeout=30)
        node.close()


def percentiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return str(list(values))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return ", ".join(f"p{n} {cuts[n - 1]:.2f}" for n in (50, 90, 99)) + f", max {max(values):.2f}"


def logged(node: Node, event: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for text in node.log.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a kill may cut a line
            line = json.loads(text)
            if line["event"] == event:
                found.append(line)
    return found


def make_study(folder: Path) -> Study:
    checked(
        sys.executable,
        "-m",
        "pe_infer",
        "phantom",
        folder,
        "--anatomy",
        "head",
        "--seed",
        3,
        "--positive",
        "--slice-spacing",
        5,
    )
    (files,) = folder.glob("*/dicom")
    slices = sorted(files.glob("*.dcm"))
    checked("dcmodify", "-nb", "-i", f"ImagesInAcquisition={len(slices)}", *slices)
    checked(sys.executable, "-m", "pe_infer", "detect", files, "--json", folder / "expected.json")
    return Study(files, json.loads((folder / "expected.json").read_text()))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


def soak(folder: Path) -> list[str]:
    """Run it all; what is wrong."""
    chance = random.Random(SEED)
    say(f"SOAK_SEED={SEED} SOAK_MINUTES={MINUTES:g} SOAK_KILLS={KILLS}")
    cache = folder / "cache"
    study = make_study(folder / "model")
    node = Node(
        folder / "node",
        cache,
        studies__quiet_s=PATIENCE_S,
        limits__waiting_slices=WAITING_SLICES,
        operations__log_level="info",
    )
    node.start()
    copies = Copies(study, folder / "copies")
    load = Load(node, copies)
    wrong: list[str] = []
    try:
        began = time.monotonic()
        samples = held_under_load(node, began + MINUTES * 60)
        store_page = node.page("metrics")[1]
        kill_under_load(node, chance)
    finally:
        load.stop()
    wait_for("results", lambda: results(node) >= len(load.sent), timeout_s=PATIENCE_S)
    status = node.stop()
    if status != 0:
        wrong.append(f"the node ended with {status}")
    wrong += failures(node, load.sent)
    say(
        f"{len(load.sent)} studies sent by {SENDERS} senders, {results(node)} results, "
        f"{load.refused} slices refused for lack of room and sent again"
    )
    say(
        f"result after the last slice, s: "
        f"{percentiles([line['result_s'] for line in logged(node, 'result')])}"
    )
    say(f"C-STORE request to response: {histogram(store_page)}")
    first, last = (
        next((samples[k] for k in sorted(samples) if k >= n), None) for n in (FIRST, LAST)
    )
    if first and last:
        ratio = last.memory_bytes / first.memory_bytes
        say(
            f"after study {FIRST}: {first.memory_bytes >> 20} MiB, {first.files} open files; "
            f"after study {LAST}: {last.memory_bytes >> 20} MiB, {last.files} open files; "
            f"memory ratio {ratio:.3f}"
        )
        if ratio > MEMORY_LIMIT:
            wrong.append(f"memory grew by a factor of {ratio:.3f}")
        if last.files > first.files + MORE_FILES:
            wrong.append(f"{last.files - first.files} more files and sockets are open")
    else:
        wrong.append(
            f"only {max(samples, default=0)} results in {MINUTES:g} minutes: memory after "
            f"study {LAST} is not known"
        )
    rates = beside_dcmtk(folder, cache, copies)
    say(
        "acknowledged slices/s, 4 associations: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    )
    return wrong


def histogram(page: str) -> str:
    """Shares of requests up to the limits of the buckets."""
    buckets = re.findall(r'store_seconds_bucket\{le="([^"]+)"\} ([0-9.]+)', page)
    total = float(buckets[-1][1]) or 1.0
    return ", ".join(f"<= {le} s: {float(n) / total:.1%}" for le, n in buckets[:-1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=os.environ.get("SOAK_FOLDER")) as scratch:
        problems = soak(Path(scratch))
    for problem in problems:
        say(f"WRONG: {problem}")
    say("soak: " + ("FAILED" if problems else "passed"))
    raise SystemExit(bool(problems))
