"""Whether a slice was on disk when it was acknowledged: the order of system calls in a trace.

A kill cannot show a missing fsync: the system goes on and writes what it has in memory.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

TRACED = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
STRACE = ("strace", "-f", "-yy", "-s", "256", "-e", f"trace={TRACED}")

_LINE = re.compile(r"^(?:\[pid +)?(\d+)\]? +(.*)$")
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)")
_FILE = re.compile(r"^\d+<([^<>]+)>")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SYNCS = {"fsync", "fdatasync"}
_WRITES = {"write", "pwrite64", "writev"}


@dataclass(frozen=True)
class Call:
    """A system call that succeeded: its name, its arguments, the lines where it began and ended."""

    name: str
    arguments: str
    began: int
    ended: int

    @property
    def file(self) -> str:
        """The file of its descriptor."""
        found = _FILE.match(self.arguments)
        return found.group(1) if found else ""

    @property
    def paths(self) -> list[str]:
        """Its quoted arguments."""
        return _QUOTED.findall(self.arguments)


def calls(trace: str) -> list[Call]:
    """Read what strace wrote, in order of beginning."""
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    found = []
    for number, line in enumerate(trace.splitlines()):
        matched = _LINE.match(line)
        if matched is None:
            continue
        thread, text = matched.groups()
        began = number
        if text.endswith(_UNFINISHED):
            text = text.removesuffix(_UNFINISHED)
            begun[thread, text.partition("(")[0]] = (number, text)
            continue
        if resumed := _RESUMED.match(text):
            began, start = begun.pop((thread, resumed.group(1)))
            text = start + resumed.group(2)
        if (call := _CALL.match(text)) and int(call.group(3)) >= 0:
            found.append(Call(call.group(1), call.group(2), began, number))
    return sorted(found, key=lambda call: call.began)


def mistakes(trace: str, folder: Path, slices: int) -> list[str]:
    """What is wrong with a trace of a receiver that got slices on one association, one by one."""
    seen = calls(trace)
    renames = [
        call for call in seen if call.name.startswith("rename") and call.paths[1].endswith(".dcm")
    ]
    responses = [call for call in seen if _is_response(call)]
    if (len(renames), len(responses)) != (slices, slices):
        return [f"{len(renames)} slices and {len(responses)} responses, expected {slices} each"]
    found = []
    for number, (rename, response) in enumerate(zip(renames, responses, strict=True)):
        wrong = _mistake(seen, folder, rename, response)
        if wrong is not None:
            found.append(f"slice {number}: {wrong}")
    return found


def _is_response(call: Call) -> bool:
    """Whether this sends a P-DATA-TF PDU."""
    return "<TCP" in call.arguments and bool(call.paths) and call.paths[0].startswith(r"\4\0")


def _mistake(seen: list[Call], folder: Path, rename: Call, response: Call) -> str | None:
    part, target = rename.paths

    def last(names: set[str], file: str, within: Callable[[Call], bool]) -> Call | None:
        fitting = [c for c in seen if c.name in names and c.file == file and within(c)]
        return fitting[-1] if fitting else None

    written = last(_WRITES, part, lambda _: True)
    if written is None or written.ended > rename.began:
        return "its file was not written, or after it had its name"
    if not last(_SYNCS, part, lambda c: c.began > written.ended and c.ended < rename.began):
        return "no fsync of its file between the last write and its name"
    parent = str(PurePath(target).parent)
    named = last(_SYNCS, parent, lambda c: c.began > rename.ended and c.ended < response.began)
    if named is None:
        return "no fsync of its folder between its name and the response"
    log = str(folder / "ledger.db-wal")
    entered = last(_WRITES, log, lambda c: c.began > named.ended and c.ended < response.began)
    if entered is None:
        return "no entry in the ledger between its folder's fsync and the response"
    if not last(_SYNCS, log, lambda c: c.began > entered.ended and c.ended < response.began):
        return "no fsync of the ledger between its entry and the response"
    return None
