"""A slice is on disk before it is acknowledged: the receiver under strace, call by call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dicom_files import ct_dataset
from receiving import free_port, store
from system_calls import STRACE, calls, mistakes

FOLDER = Path("/state")
PART = "/state/arriving/0.part"
SLICE = "/state/slices/1.2/1.3/1.4-0.dcm"
GOOD = f"""\
10 write(9<{PART}>, "DICM"..., 600) = 600
10 fsync(9<{PART}>) = 0
10 rename("{PART}", "{SLICE}") = 0
10 fsync(9</state/slices/1.2/1.3>) = 0
10 pwrite64(4</state/ledger.db-wal>, "x"..., 4096, 32) = 4096
10 fdatasync(4</state/ledger.db-wal>) = 0
11 sendto(7<TCP:[127.0.0.1:104->127.0.0.1:5]>, "\\4\\0\\0\\0"..., 90, 0, NULL, 0) = 90
""".splitlines()
WRITE, SYNC, RENAME, SYNC_FOLDER, ENTER, SYNC_LEDGER, RESPOND = range(7)


def judged(lines: list[str]) -> list[str]:
    return mistakes("\n".join(lines), FOLDER, 1)


def test_the_right_order_is_found_right() -> None:
    assert judged(GOOD) == []
    assert judged(["[pid   " + line.replace(" ", "] ", 1) for line in GOOD]) == []


@pytest.mark.parametrize("missing", range(7))
def test_every_step_that_is_missing_is_found(missing: int) -> None:
    assert judged([line for number, line in enumerate(GOOD) if number != missing])


@pytest.mark.parametrize("step", range(6))
def test_every_step_that_comes_after_the_response_is_found(step: int) -> None:
    late = [line for number, line in enumerate(GOOD) if number != step]
    assert judged([*late, GOOD[step]])


@pytest.mark.parametrize("step", range(5))
def test_two_steps_in_the_wrong_order_are_found(step: int) -> None:
    swapped = [*GOOD[:step], GOOD[step + 1], GOOD[step], *GOOD[step + 2 :]]
    assert judged(swapped)


@pytest.mark.parametrize("step", [SYNC, RENAME, SYNC_FOLDER, SYNC_LEDGER])
def test_a_step_that_failed_is_none(step: int) -> None:
    failed = GOOD[step].replace("= 0", "= -1 EIO (Input/output error)")
    assert judged([*GOOD[:step], failed, *GOOD[step + 1 :]])


def test_a_response_that_begins_before_a_step_has_ended_is_found() -> None:
    begun = GOOD[SYNC_LEDGER].removesuffix(") = 0") + " <unfinished ...>"
    ended = "10 <... fdatasync resumed>) = 0"
    assert judged([*GOOD[:SYNC_LEDGER], begun, ended, GOOD[RESPOND]]) == []
    assert judged([*GOOD[:SYNC_LEDGER], begun, GOOD[RESPOND], ended])


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_slice_is_on_disk_and_in_the_ledger_before_it_is_acknowledged(
    tmp_path: Path,
) -> None:
    port, trace, state = free_port(), tmp_path / "trace", tmp_path / "state"
    state.mkdir()
    script = Path(__file__).parents[1] / "receiver_process.py"
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [*STRACE, "-o", str(trace), sys.executable, str(script), str(state), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("strace may not trace here")
        slices = [ct_dataset(float(z), SeriesInstanceUID=f"2.25.5{z // 3}") for z in range(5)]
        responses = store(port, *slices, slices[0])
        process.communicate(timeout=60)
    assert [response.Status for response in responses] == [0] * 6
    # The sixth is the first again: written once more, but entered already.
    first_five = _until_response(trace.read_text(), 5)
    assert len(calls(first_five)) >= 5 * len(GOOD)
    assert mistakes(first_five, state, 5) == []


def _until_response(trace: str, count: int) -> str:
    lines = trace.splitlines()
    sent = [n for n, line in enumerate(lines) if "<TCP" in line and r'"\4\0' in line]
    return "\n".join(lines[: sent[count - 1] + 1])
