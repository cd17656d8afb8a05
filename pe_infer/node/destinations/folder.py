"""Parcels into a folder: ``<study UID>/<series UID>/<kind>-v<version>/``."""

import filecmp
import shutil
from pathlib import Path

from pe_infer.errors import NodeError
from pe_infer.node.destinations.base import DONE, Errand, Outcome, read_document, reason
from pe_infer.node.durable import make_private_folder, translated, write_folder
from pe_infer.node.inbox import checked_uid
from pe_infer.node.parcels import Contents
from pe_infer.node.settings import FolderDestination


class FolderSender:
    """Copies parcels; each is there as a whole or not at all.

    What is not whole yet is in ``.arriving-<name of the destination>`` beside the studies, so that
    the folder may lie on any file system. One node writes to a folder.
    """

    def __init__(self, destination: FolderDestination) -> None:
        """Use a folder; it is made when something is sent."""
        self._folder = destination.path
        self._scratch = destination.path / f".arriving-{destination.name}"

    def send(self, errand: Errand) -> Outcome:
        """Copy a parcel, unless it is there."""
        document = read_document(errand.contents)
        target = self._folder.joinpath(
            checked_uid(document["study_instance_uid"], "StudyInstanceUID"),
            checked_uid(document["series_instance_uid"], "SeriesInstanceUID"),
            f"{errand.parcel.kind}-v{errand.parcel.version}",
        )
        try:
            with translated(target):
                return self._put(target, errand.contents)
        except NodeError as exc:
            cause = exc.__cause__
            why = reason(cause) if isinstance(cause, OSError) else "cannot be written"
            return Outcome(state="waiting", error=f"{self._folder}: {why}")

    def _put(self, target: Path, contents: Contents) -> Outcome:
        if target.exists():
            return _compared(target, contents)
        shutil.rmtree(self._scratch, ignore_errors=True)  # of a process that has ended
        make_private_folder(self._scratch)
        make_private_folder(target.parent)
        write_folder(target, lambda part: _fill(part, contents), scratch=self._scratch)
        return DONE


def _files(contents: Contents) -> list[Path]:
    return [contents.document, *(found.path for found in contents.objects)]


def _fill(part: Path, contents: Contents) -> None:
    for path in _files(contents):
        shutil.copyfile(path, part / path.name)


def _compared(target: Path, contents: Contents) -> Outcome:
    names = {path.name for path in _files(contents)}
    same = {path.name for path in target.iterdir()} == names and all(
        filecmp.cmp(path, target / path.name, shallow=False) for path in _files(contents)
    )
    if same:
        return DONE
    return Outcome(
        state="refused",
        error=f"{target.name} of the series is there already and holds something else: move it "
        "away, then send again with pe-infer node replay",
    )
