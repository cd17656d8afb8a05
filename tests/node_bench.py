"""A node's state folder with toy series, without a network: what tests of its parts share."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pydicom
import pytest
from strategies import study
from toy_bundles import make

from pe_infer import Detector
from pe_infer.dicom import write_series
from pe_infer.geometry import SeriesInfo
from pe_infer.node.entries import Instance, Parcel, SeriesEntry
from pe_infer.node.inbox import Header, Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.objects import Alert, Outcome, SourceFile, Unjudged
from pe_infer.node.parcels import DOCUMENT, StoredObject, read_contents
from pe_infer.node.settings import NodeSettings
from pe_infer.node.studies import Studies
from pe_infer.node.watch import Watch

SERIES = SeriesInfo(
    series_instance_uid="1.2.3",
    study_instance_uid="1.2",
    frame_of_reference_uid="1.9",
    body_part_examined="CHEST",
    protocol_name="PE",
)
EVERY_4_MM = list(range(0, 56_000, 4000))
DEADLINE_S = 300.0
WITHIN_S = 0.005


def make_files(
    folder: Path, *, number: int = 1, positions_um: Sequence[int] = EVERY_4_MM, **series: Any
) -> list[Path]:
    """The files of a series of noise, ascending position; each number gives another series."""
    info = replace(SERIES, series_instance_uid=f"1.2.3.{number}", **series)
    images = [
        replace(image, series=info, sop_instance_uid=f"1.2.3.{number}.{index}")
        for index, image in enumerate(study(list(positions_um), seed=number), start=1)
    ]
    return write_series(images, folder / f"series {number}")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], Any], *, what: str = "it") -> None:
    """Wait for a condition; fail if it does not come true."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(WITHIN_S)


@dataclass
class FakeObjects:
    """Writes a file for every outcome, whose UID depends on what it is about."""

    written: list[tuple[Outcome, list[str]]] = field(default_factory=list)
    follows: list[tuple[int, int | None, int | None]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __call__(
        self,
        outcome: Outcome,
        sources: Sequence[Path | SourceFile],
        folder: Path,
        *,
        version: int = 1,
        made_at: datetime,
        supersedes: int | None = None,
        after_alert: int | None = None,
    ) -> Sequence[StoredObject]:
        assert made_at.tzinfo is not None
        if self.failures:
            raise self.failures.pop(0)
        paths = [s.path if isinstance(s, SourceFile) else s for s in sources]
        assert all(path.is_file() for path in paths)
        about = outcome if isinstance(outcome, Unjudged | Alert) else outcome.provenance
        identity = (about.series_instance_uid, about.bundle, version, isinstance(outcome, Alert))
        digest = int(hashlib.sha256(repr(identity).encode()).hexdigest()[:16], 16)
        path = folder / "report.dcm"
        path.write_bytes(b"object")
        self.written.append((outcome, [path.name for path in paths]))
        self.follows.append((version, supersedes, after_alert))
        return [
            StoredObject(
                path=path,
                sop_class_uid="1.2.840.10008.5.1.4.1.1.88.33",
                sop_instance_uid=f"2.25.{digest}",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
            )
        ]


class Bench:
    """One state folder. ``studies`` may be made several times: that is a restart.

    Time stands still: series that do not say how many slices they have end with `quiet`. Nothing
    is flushed to the disk: a power failure is for other tests.
    """

    def __init__(
        self,
        folder: Path,
        detectors: Mapping[str, Detector],
        **sections: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    ) -> None:
        sections.setdefault("routing", {"bundles": list(detectors)})
        self.clock = Clock()
        self.settings = NodeSettings.model_validate({"state_dir": folder, **sections})
        self.detectors = detectors
        self.objects = FakeObjects()
        self.log = io.StringIO()
        self.watch = Watch(b"key", output=self.log)
        self.parcels_folder = folder / "parcels"
        folder.mkdir(exist_ok=True)
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(os, "fsync", lambda _descriptor: None)
        self.ledger = Ledger(folder / "ledger.db")
        self.ledger._connection.execute("PRAGMA synchronous = OFF")
        self.inbox = Inbox(folder, self.ledger)
        self.entered = 0
        self.studies = self.new_studies()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.studies.stop(DEADLINE_S)
        self.ledger.close()
        self._patch.undo()

    def new_studies(self) -> Studies:
        def on_parcel() -> None:
            self.entered += 1

        self.studies = Studies(
            self.settings,
            self.ledger,
            self.inbox,
            self.parcels_folder,
            self.detectors,
            self.watch,
            on_parcel,
            write_results=self.objects,
            clock=self.clock,
            poll_s=0.02,
        )
        return self.studies

    def restart(self) -> None:
        self.studies.stop(DEADLINE_S)
        self.new_studies().start()

    def keep(
        self, file: Path, *, expected: int | None = None, calling_ae_title: str = "SCANNER"
    ) -> Instance | None:
        """Put a file on disk and in the ledger, and tell nobody."""
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        header = Header(
            study_instance_uid=dataset.StudyInstanceUID,
            series_instance_uid=dataset.SeriesInstanceUID,
            sop_instance_uid=dataset.SOPInstanceUID,
            sop_class_uid=dataset.SOPClassUID,
            transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
            expected=expected,
        )
        return self.inbox.keep(header, file.read_bytes(), calling_ae_title=calling_ae_title)

    def send(self, *files: Path, **options: Any) -> None:
        """What a receiver does."""
        for file in files:
            if (instance := self.keep(file, **options)) is not None:
                self.studies.offer(instance)

    def waiting(self) -> float:
        """What the gauge of slices that are not judged yet shows."""
        value = self.watch.registry.get_sample_value("pe_infer_node_waiting_slices")
        assert value is not None
        return value

    def quiet(self) -> None:
        """Wait until every slice has had its turn, and let a long time pass."""
        until(lambda: self.waiting() == 0, what="the last slice's turn")
        self.clock.now += 100

    def series(self) -> list[SeriesEntry]:
        return self.ledger.series()

    def parcels(self) -> list[Parcel]:
        found = [made for entry in self.series() for made in self.ledger.parcels(entry.id)]
        return sorted(found, key=lambda made: made.id)

    def results(self) -> list[Parcel]:
        return [made for made in self.parcels() if made.kind == "result"]

    def until_results(self, count: int) -> list[Parcel]:
        until(lambda: len(self.results()) >= count, what=f"result {count}")
        return self.results()

    def until_settled(self) -> None:
        """Wait until no series is in progress."""
        until(
            lambda: all(entry.state != "receiving" for entry in self.series()), what="the last end"
        )

    def settle(self) -> None:
        """Let time pass until no series is in progress."""

        def settled() -> bool:
            self.clock.now += 1
            return all(entry.state != "receiving" for entry in self.series())

        until(settled, what="the last end")

    def document(self, parcel: Parcel) -> dict[str, Any]:
        text = (self.parcels_folder / parcel.folder / DOCUMENT).read_text()
        document: dict[str, Any] = json.loads(text)
        return document

    def objects_of(self, parcel: Parcel) -> list[str]:
        contents = read_contents(self.parcels_folder / parcel.folder)
        return [stored.sop_instance_uid for stored in contents.objects]


def toy_detector(folder: Path, **changes: Any) -> Detector:
    """The toy bundle, with other entries in its manifest."""
    bundle = make(folder / "bundle", **changes)
    return Detector(bundle, engine="onnxruntime", precision="float32", cache_dir=None)


def alerting(folder: Path, *, threshold: float) -> Detector:
    """It alerts at the first slab, and finds everything beyond the threshold positive."""
    return toy_detector(
        folder,
        provisional_alert={"slab_probability": 0.01, "consecutive": 1},
        operating_points=[{"name": "balanced", "threshold": threshold}],
    )


def plain_detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    """A fixture."""
    with toy_detector(tmp_path_factory.mktemp("toy")) as made:
        yield made


def running_bench(tmp_path: Path, detector: Detector) -> Iterator[Bench]:
    """A fixture: the studies have started."""
    with Bench(tmp_path / "state", {"toy": detector}) as made:
        made.studies.start()
        yield made
