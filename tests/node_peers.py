"""Programs around the node, as they run in a hospital: senders, a PACS, the node itself."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from peers import dcmtk

PATIENT = {"PatientName": "GEHEIM^ADA", "PatientID": "MRN-471108", "PatientBirthDate": "19151210"}
AE_TITLE = "CT_1"
T = TypeVar("T")
_ACKNOWLEDGED = re.compile(
    r"Sending file: (\S+)(?:(?!Sending file).)*?Received Store Response \(Success\)", re.DOTALL
)


def program(name: str) -> str | None:
    """A peer, if it is installed."""
    return dcmtk(name) if name.startswith(("store", "echo")) else shutil.which(name)


def need(*programs: str) -> None:
    """Skip, saying so, where a peer is not installed."""
    if missing := [name for name in programs if program(name) is None]:
        pytest.skip(
            f"{', '.join(missing)}: not installed (apt-get install dcmtk dicom3tools "
            "orthanc strace)"
        )


def wait_for(what: str, look: Callable[[], T | None], *, timeout_s: float = 300.0) -> T:
    """What ``look`` finds; an error if it finds nothing in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {timeout_s} s")


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def run(*arguments: object, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run a program; standard output and error are one text."""
    name, *rest = map(str, arguments)
    return subprocess.run(
        [program(name) or name, *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout_s,
    )


def checked(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


# Studies.


class Study:
    """The DICOM files of a study, in order of position."""

    def __init__(self, folder: Path, expected: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.dcm"))
        self.expected = expected
        text = checked(
            "dcmdump",
            "+P",
            "StudyInstanceUID",
            "+P",
            "SeriesInstanceUID",
            "+P",
            "SOPInstanceUID",
            *self.files,
        )
        found = re.findall(r"\[([0-9.]+)\].* (\w+)$", text, re.MULTILINE)
        uids = {name: [uid for uid, its in found if its == name] for _, name in found}
        self.study_uid = uids["StudyInstanceUID"][0]
        self.series_uid = uids["SeriesInstanceUID"][0]
        instances = uids["SOPInstanceUID"]
        assert len(instances) == len(self.files)
        self.instances = dict(zip(self.files, instances, strict=True))

    def secrets(self) -> list[str]:
        """What must not appear in a log."""
        return [
            *PATIENT.values(),
            "GEHEIM",
            self.study_uid,
            self.series_uid,
            *self.instances.values(),
        ]


def renamed(study: Study, folder: Path, digit: int) -> Study:
    """A copy with other UIDs."""
    folder.mkdir()
    for file in study.files:
        shutil.copy(file, folder)
    files = sorted(folder.glob("*.dcm"))
    checked(
        "dcmodify",
        "-nb",
        "-m",
        f"StudyInstanceUID={study.study_uid}{digit}",
        "-m",
        f"SeriesInstanceUID={study.series_uid}{digit}",
        *files,
    )
    for file, uid in zip(files, study.instances.values(), strict=True):
        checked("dcmodify", "-nb", "-m", f"SOPInstanceUID={uid}{digit}", file)
    return Study(folder, study.expected)


# Senders.


class Sent:
    """What a ``storescu`` saw."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.returncode = done.returncode
        self.output = done.stdout
        self.acknowledged = [Path(name) for name in _ACKNOWLEDGED.findall(done.stdout)]
        self.statuses = re.findall(r"Received Store Response \(([^)]*)\)", done.stdout)


def store(
    port: int,
    files: Sequence[Path],
    *options: str,
    called: str = "PE_INFER",
    calling: str = AE_TITLE,
) -> Sent:
    """Send files over one association."""
    return Sent(
        run(
            "storescu",
            "-v",
            "-nh",
            "-aet",
            calling,
            "-aec",
            called,
            *options,
            "127.0.0.1",
            port,
            *files,
        )
    )


def echo(port: int, *options: str, called: str = "PE_INFER", calling: str = AE_TITLE) -> bool:
    done = run(
        "echoscu",
        "-aet",
        calling,
        "-aec",
        called,
        "-to",
        "20",
        "-ta",
        "20",
        "-td",
        "20",
        *options,
        "127.0.0.1",
        port,
    )
    return done.returncode == 0


@contextmanager
def cutting_proxy(port: int, after_bytes: int) -> Iterator[int]:
    """A port that passes on so many bytes to another one and then cuts the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(inner: socket.socket, outer: socket.socket) -> None:
        try:
            while piece := inner.recv(1 << 16):
                outer.sendall(piece)
        except OSError:
            pass

    def serve() -> None:
        try:
            outer, _ = listener.accept()
        except OSError:
            return
        with outer, socket.create_connection(("127.0.0.1", port)) as inner:
            threading.Thread(target=answer, args=(inner, outer), daemon=True).start()
            left = after_bytes
            while left > 0 and (piece := outer.recv(min(left, 1 << 16))):
                inner.sendall(piece)
                left -= len(piece)
            for sock in (inner, outer):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(timeout=30)


# The node.


class Node:
    """``pe-infer serve`` as a process."""

    def __init__(self, folder: Path, cache: Path, **told: object) -> None:
        """Prepare a node; its options are ``section__option=value``."""
        self.folder = folder
        self.state = folder / "state"
        self.results = folder / "results"
        self.log = folder / "log"
        self.port = free_port()
        self.operations = free_port()
        self._cache = cache
        self._process: subprocess.Popen[bytes] | None = None
        self._destinations: list[dict[str, object]] = []
        self._told: dict[str, object] = {
            "state_dir": self.state,
            "listen__port": self.port,
            "operations__port": self.operations,
            "routing__bundles": '["ich"]',
            "studies__quiet_s": 600,
            "retry__first_s": 0.5,
            "retry__most_s": 2,
            "retry__timeout_s": 20,
            **told,
        }
        self.state = Path(str(self._told["state_dir"]))
        folder.mkdir(exist_ok=True)
        self.results.mkdir(exist_ok=True)
        self.send_to({"kind": "folder", "name": "results", "path": str(self.results)})

    def send_to(self, destination: dict[str, object]) -> None:
        """Tell it of one more destination, before it is started."""
        self._destinations.append(destination)
        self._told["destinations"] = json.dumps(self._destinations)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def arguments(self) -> list[str]:
        flags = [f"--{name.replace('__', '.')}={value}" for name, value in self._told.items()]
        return [sys.executable, "-m", "pe_infer", "serve", *flags]

    def start(self, *before: str) -> None:
        """Start it, behind the command ``before`` if there is one, and wait until it listens."""
        already = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*before, *self.arguments()],
                stdout=log,
                stderr=log,
                env={**os.environ, "XDG_CACHE_HOME": str(self._cache)},
            )

        def listening() -> bool:
            text = self.log.read_text()[already:]
            assert self.running, text
            return "listening on" in text

        wait_for("node that listens", listening)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=30)

    def stop(self) -> int:
        """End it in good order; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def close(self) -> None:
        if self.running:
            self.kill()

    def status(self) -> dict[str, Any]:
        arguments = ("status", "--json", "--state-dir", self.state)
        document: dict[str, Any] = json.loads(checked(*self.command(), *arguments))
        return document

    @staticmethod
    def command() -> list[str]:
        return [sys.executable, "-m", "pe_infer", "node"]

    def page(self, name: str) -> tuple[int, str]:
        """A page of its operations."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.operations}/{name}", timeout=20
            ) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def kept(self) -> dict[str, Path]:
        """Files of the slices that are entered, by instance."""
        with closing(sqlite3.connect(f"file:{self.state}/ledger.db?mode=ro", uri=True)) as ledger:
            rows = ledger.execute("SELECT sop_instance_uid, file FROM instances").fetchall()
        return {uid: self.state / "slices" / file for uid, file in rows}

    def documents(self, study: Study, event: str = "result") -> list[dict[str, Any]]:
        """What arrived in the folder for a study, by version."""
        paths = self.results.glob(f"{study.study_uid}/{study.series_uid}/*/document.json")
        found = [json.loads(path.read_text()) for path in paths]
        return sorted((d for d in found if d["event"] == event), key=lambda d: d["version"])

    def result(self, study: Study, version: int = 1) -> dict[str, Any]:
        """Wait for a version's result."""

        def arrived() -> dict[str, Any] | None:
            assert self.running, self.log.read_text()
            return next((d for d in self.documents(study) if d["version"] == version), None)

        return wait_for(f"result {version}", arrived)

    def assert_works(self) -> None:
        assert self.running
        assert echo(self.port)
        assert self.page("healthz")[0] == 200


def assert_right(document: dict[str, Any], study: Study) -> None:
    """The verdict is that of ``pe-infer detect``."""
    assert study.expected is not None
    assert document["result"]["status"] == "processed", document
    assert document["result"]["positive"] == study.expected["positive"]
    assert document["result"]["probability"] == pytest.approx(
        study.expected["probability"], abs=0.02
    )
    assert len(document["result"]["evidence"]) == len(study.expected["evidence"])


# The PACS.


class Pacs:
    """Orthanc on loopback."""

    def __init__(self, folder: Path, node_port: int) -> None:
        self.port = free_port()
        self.folder = folder
        self._http = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        (folder / "orthanc.json").write_text(
            json.dumps(
                {
                    "Name": "PACS",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "HttpPort": self._http,
                    "DicomPort": self.port,
                    "DicomAet": "PACS",
                    "DicomCheckCalledAet": True,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomModalities": {"pe_infer": ["PE_INFER", "127.0.0.1", node_port]},
                }
            )
        )

    def destination(self, **more: object) -> dict[str, object]:
        return {
            "kind": "dicom",
            "name": "pacs",
            "host": "127.0.0.1",
            "port": self.port,
            "ae_title": "PACS",
            **more,
        }

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["Orthanc", str(self.folder / "orthanc.json")], stdout=log, stderr=log
            )

        def up() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "log").read_text()
            with suppress(OSError):
                self._ask("system")
                return True
            return False

        wait_for("Orthanc that answers", up)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=60)
            self._process = None

    def objects(self, study_uid: str) -> list[dict[str, Any]]:
        """Tags of every instance of a study, with Orthanc's number as ``ID``."""
        query = {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid}}
        return [
            {**self._ask(f"instances/{number}/simplified-tags"), "ID": number}
            for number in self._ask("tools/find", query)
        ]

    def fetch(self, number: str, path: Path) -> Path:
        path.write_bytes(self._read(f"instances/{number}/file"))
        return path

    def _ask(self, what: str, body: object = None) -> Any:
        return json.loads(self._read(what, body))

    def _read(self, what: str, body: object = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http}/{what}",
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            content: bytes = answer.read()
            return content
