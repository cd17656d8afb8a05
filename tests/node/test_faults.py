"""What goes wrong in a hospital: power, disk, network, senders. Nothing acknowledged is lost."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from node_peers import (
    Node,
    Pacs,
    Sent,
    Study,
    assert_right,
    cutting_proxy,
    echo,
    run,
    store,
    wait_for,
)

SEED = int(os.environ.get("NODE_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
REPORT = "1.2.840.10008.5.1.4.1.1.88.34"


@pytest.fixture
def chance(capsys: pytest.CaptureFixture[str]) -> random.Random:
    with capsys.disabled():
        print(f"\nNODE_TEST_SEED={SEED}")  # noqa: T201  to have it again
    return random.Random(SEED)


def assert_kept(node: Node, study: Study, *sent: Sent) -> None:
    """Every slice that a sender saw acknowledged is entered, and its file is there."""
    kept = node.kept()
    for file in {file for one in sent for file in one.acknowledged}:
        uid = study.instances[file]
        assert uid in kept, f"{file.name} was acknowledged and is not entered"
        assert kept[uid].stat().st_size > file.stat().st_size // 2


def assert_one_result(node: Node, study: Study) -> None:
    """One result, in the folder and in the ledger, and it is right."""
    document = node.result(study)
    wait_for("deliveries that are done", lambda: all_done(node))
    assert_right(document, study)
    assert [found["version"] for found in node.documents(study)] == [1]


def all_done(node: Node) -> bool:
    status = node.status()
    return {entry["state"] for entry in status["series"]} <= {"concluded", "ignored"} and {
        entry["state"] for entry in status["deliveries"]
    } <= {"done"}


def test_a_node_that_is_killed_loses_no_slice_and_no_result_and_sends_none_twice(
    make_node: Callable[..., Node],
    make_pacs: Callable[[int], Pacs],
    positive: Study,
    chance: random.Random,
) -> None:
    node = make_node()
    pacs = make_pacs(node.port)
    node.send_to(pacs.destination(alerts=False))
    pacs.start()
    node.start()
    seen: list[Sent] = []
    for _ in range(2):  # while slices arrive
        thread = threading.Thread(target=lambda: seen.append(store(node.port, positive.files)))
        thread.start()
        some = chance.randrange(1, len(positive.files))
        wait_for("slices", lambda some=some: entered(node) >= some)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 0.2))
        node.kill()
        thread.join(timeout=60)
        node.start()
        assert_kept(node, positive, *seen)
    seen.append(store(node.port, positive.files))
    assert seen[-1].acknowledged == positive.files
    time.sleep(chance.uniform(0.0, 5.0))  # while it is judged, or delivered
    node.kill()
    node.start()
    assert_one_result(node, positive)
    assert_kept(node, positive, *seen)
    assert reports(pacs, positive) == 1
    node.assert_works()


def entered(node: Node) -> int:
    return len(node.kept()) if (node.state / "ledger.db").exists() else 0


def reports(pacs: Pacs, study: Study) -> int:
    return sum(found["SOPClassUID"] == REPORT for found in pacs.objects(study.study_uid))


def test_a_study_in_progress_goes_on_after_a_restart_in_good_order(
    make_node: Callable[..., Node], negative: Study
) -> None:
    node = make_node()
    node.start()
    half = len(negative.files) // 2
    assert store(node.port, negative.files[:half]).acknowledged == negative.files[:half]
    assert node.stop() == 0
    assert not echo(node.port)
    node.start()
    store(node.port, negative.files[half:])
    assert_one_result(node, negative)
    node.assert_works()


def test_a_destination_that_is_down_gets_the_result_when_it_is_up(
    make_node: Callable[..., Node], make_pacs: Callable[[int], Pacs], positive: Study
) -> None:
    node = make_node()
    pacs = make_pacs(node.port)
    node.send_to(pacs.destination(alerts=False))
    node.start()
    store(node.port, positive.files)
    node.result(positive)

    def tried() -> bool:
        return any(
            entry["destination"] == "pacs" and entry["attempts"] > 1 and entry["error"]
            for entry in node.status()["deliveries"]
        )

    wait_for("tries that fail", tried)
    node.assert_works()
    pacs.start()
    wait_for("delivery to the PACS", lambda: all_done(node))
    assert reports(pacs, positive) == 1
    assert_one_result(node, positive)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m,mode=0700", "tmpfs", folder]
    if os.geteuid() != 0 or shutil.which("mount") is None or run(*mount).returncode:
        pytest.skip("mounting a small tmpfs needs root: a full disk was not tested")
    yield folder
    run("umount", "-l", folder)


def test_a_full_disk_refuses_slices_and_loses_none(
    make_node: Callable[..., Node], positive: Study, small_disk: Path
) -> None:
    node = make_node(state_dir=small_disk / "state", limits__free_disk_bytes=1 << 20)
    node.start()
    first = store(node.port, positive.files)
    assert 0 < len(first.acknowledged) < len(positive.files)
    assert "Success" not in first.statuses[-1], first.statuses
    assert echo(node.port)
    assert_kept(node, positive, first)
    assert store(node.port, positive.files[-1:]).acknowledged == []
    assert run("mount", "-o", "remount,size=200m", small_disk).returncode == 0
    again = store(node.port, positive.files)
    assert again.acknowledged == positive.files
    assert_one_result(node, positive)
    node.assert_works()


def test_a_disk_that_somebody_else_fills_delays_the_result_and_changes_nothing_in_it(
    make_node: Callable[..., Node], positive: Study, small_disk: Path
) -> None:
    assert run("mount", "-o", "remount,size=40m", small_disk).returncode == 0
    node = make_node(state_dir=small_disk / "state", limits__free_disk_bytes=0, studies__quiet_s=10)
    node.start()
    most = positive.files[:-1]  # the last one would end the series
    assert store(node.port, most).acknowledged == most
    other = small_disk / "other"
    other.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2_000_000))  # no key images fit
    wait_for("second try", lambda: node.log.read_text().count('"study_delayed"') > 1)
    node.assert_works()
    assert node.documents(positive) == []
    other.unlink()
    assert node.result(positive)["result"]["positive"]
    wait_for("deliveries that are done", lambda: all_done(node))
    folder = node.results / positive.study_uid / positive.series_uid / "result-v1"
    assert len(list(folder.glob("key-image-*.dcm"))) == 3


def test_an_association_that_breaks_in_a_slice_keeps_the_slices_before(
    node: Node, positive: Study
) -> None:
    size = positive.files[0].stat().st_size
    with cutting_proxy(node.port, after_bytes=int(2.5 * size)) as port:
        broken = store(port, positive.files)
    assert broken.returncode != 0
    assert len(broken.acknowledged) == 2
    assert_kept(node, positive, broken)
    node.assert_works()
    assert len(node.kept()) == 2
    store(node.port, positive.files)
    assert_one_result(node, positive)


def test_a_study_that_is_sent_twice_has_one_result(node: Node, negative: Study) -> None:
    assert store(node.port, negative.files).acknowledged == negative.files
    node.result(negative)
    assert store(node.port, negative.files).acknowledged == negative.files
    assert_one_result(node, negative)
    assert len(node.kept()) == len(negative.files)
    node.assert_works()


def test_shuffled_slices_give_the_same_verdict(
    node: Node, positive: Study, chance: random.Random
) -> None:
    files = chance.sample(positive.files, k=len(positive.files))
    assert store(node.port, files).acknowledged == files
    assert_one_result(node, positive)


def test_two_studies_interleaved_on_four_associations(
    node: Node, positive: Study, negative: Study, chance: random.Random
) -> None:
    shares = [study.files[half::2] for study in (positive, negative) for half in (0, 1)]
    with ThreadPoolExecutor(len(shares)) as pool:
        sent = list(pool.map(lambda share: store(node.port, share), shares))
    assert [one.acknowledged for one in sent] == shares
    for study in (positive, negative):
        assert_one_result(node, study)
    node.assert_works()


def test_a_late_slice_makes_a_new_version_that_supersedes(
    make_node: Callable[..., Node], positive: Study
) -> None:
    node = make_node(studies__quiet_s=5)
    node.start()
    *most, last = positive.files
    store(node.port, most)
    assert node.result(positive)["supersedes"] is None
    store(node.port, [last])
    second = node.result(positive, version=2)
    assert second["supersedes"] == 1
    assert_right(second, positive)
    assert second["event_id"] != node.result(positive)["event_id"]


def test_replay_judges_again_while_the_node_runs(node: Node, negative: Study) -> None:
    store(node.port, negative.files)
    node.result(negative)
    wait_for("deliveries that are done", lambda: all_done(node))
    (series,) = node.status()["series"]
    subprocess.run(
        [*node.command(), "replay", series["series"], "--state-dir", node.state], check=True
    )
    assert_right(node.result(negative, version=2), negative)
    wait_for("deliveries that are done", lambda: all_done(node))
    purge = [*node.command(), "purge", "--older-than", "0s", "--state-dir", node.state]
    subprocess.run(purge, check=True)
    assert not node.status()["series"]
    assert not list(node.state.glob("slices/**/*.dcm"))
    assert not list(node.state.glob("parcels/*"))
    node.assert_works()


def test_one_process_per_state_folder(node: Node) -> None:
    arguments = [argument for argument in node.arguments() if "port=" not in argument]
    done = run(*arguments, "--operations.port=0", "--listen.port=1")
    assert done.returncode == 8
    assert f"process {node.pid} uses this state_dir" in done.stdout
    node.assert_works()
