"""``pe-infer node``: status, replay, drop and purge beside a node that runs, and without one."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from node_states import conclude, receive
from typer.testing import CliRunner

from pe_infer.cli import app as command_line
from pe_infer.errors import ConfigurationError, NodeError
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.state import StateFolder
from pe_infer.node.watch import alias_of

UID = "1.2.3.2"
Node = Callable[..., str]


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    state = StateFolder(tmp_path / "state")
    with state.claimed():
        state.key()
    return state


@pytest.fixture
def ledger(state: StateFolder) -> Iterator[Ledger]:
    """Of a node that runs: it is open, and the folder is claimed."""
    with state.claimed(), Ledger(state.ledger) as ledger:
        yield ledger


@pytest.fixture
def inbox(state: StateFolder, ledger: Ledger) -> Inbox:
    return Inbox(state.root, ledger)


@pytest.fixture
def node(state: StateFolder) -> Node:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(
            command_line.app,
            ["node", *arguments, "--state-dir", str(state.root)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_status_counts_and_names_no_uid(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node
) -> None:
    receive(inbox, "1")
    done = receive(inbox, "2")
    conclude(state.root, ledger, done, verdict="positive", destinations=("pacs", "console"))
    ledger.update_delivery(ledger.deliveries()[0].id, state="refused", error="no such AE title")
    text = node("status")
    for said in (
        f"runs as process {os.getpid()}",
        "1 receiving, 1 concluded",
        "1 positive",
        "1 refused, 1 waiting",
        "no such AE title",
        alias_of(UID, state.key()),
    ):
        assert said in text
    document = json.loads(node("status", "--json"))
    assert [entry["verdict"] for entry in document["series"]] == [None, "positive"]
    assert [entry["slices"] for entry in document["series"]] == [3, 3]
    assert {delivery["state"] for delivery in document["deliveries"]} == {"refused", "waiting"}
    assert "1.2.3" not in text + node("status", "--json")


def test_a_reason_names_instances_by_their_aliases(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node
) -> None:
    series_id = receive(inbox)
    instance = ledger.instances(series_id)[-1]
    reason = f"dicom.missing_attribute: instance {instance.sop_instance_uid}: Rows"
    ledger.set_aside(series_id, reason=reason, last_instance=instance.id)
    alias = alias_of(instance.sop_instance_uid, state.key())
    (entry,) = json.loads(node("status", "--json"))["series"]
    assert entry["reason"] == f"dicom.missing_attribute: instance {alias}: Rows"
    assert instance.sop_instance_uid not in node("status")


def test_status_works_without_a_node_that_runs(state: StateFolder, node: Node) -> None:
    with Ledger(state.ledger):
        pass
    text = node("status")
    assert "does not run" in text
    assert "last slice" not in text  # no headings over nothing
    assert json.loads(node("status", "--json"))["process"] is None


def test_status_reads_the_settings_of_the_node(state: StateFolder, ledger: Ledger) -> None:
    file = state.root / "node.toml"
    file.write_text(f'state_dir = "{state.root}"\n')
    run = CliRunner().invoke(command_line.app, ["node", "status", "--config", str(file)])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("named_by", ["alias", "uid"])
def test_replay_has_a_series_judged_again(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node, named_by: str
) -> None:
    series_id = receive(inbox)
    conclude(state.root, ledger, series_id)
    name = UID if named_by == "uid" else alias_of(UID, state.key())
    assert "judged again, as version 2, now" in node("replay", name)
    (entry,) = ledger.series()
    assert (entry.state, entry.version, entry.bundle) == ("receiving", 1, None)


def test_replay_can_only_deliver_again(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node
) -> None:
    series_id = receive(inbox)
    conclude(state.root, ledger, series_id, destinations=("pacs",))
    ledger.update_delivery(ledger.deliveries()[0].id, state="refused", error="no")
    assert "1 deliveries are made again" in node("replay", UID, "--deliver-only")
    assert ledger.deliveries()[0].state == "waiting"
    assert ledger.series()[0].state == "concluded"


def test_replay_waits_for_a_series_that_is_received(inbox: Inbox, node: Node) -> None:
    receive(inbox)
    with pytest.raises(ConfigurationError, match="still being received"):
        node("replay", UID)


def test_a_series_that_is_not_there_is_an_error(ledger: Ledger, node: Node) -> None:
    with pytest.raises(ConfigurationError, match="no such series"):
        node("replay", "deadbeef")


def test_purge_deletes_what_is_old_enough(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node
) -> None:
    conclude(state.root, ledger, receive(inbox))
    assert "0 series deleted" in node("purge")
    assert "0 series deleted" in node("purge", "--older-than", "1h")
    assert "1 series would go" in node("purge", "--older-than", "0s", "--dry-run")
    assert len(ledger.series()) == 1
    said = node("purge", "--older-than", "0s")
    assert f"{alias_of(UID, state.key())}: 3 slices\n1 series deleted" in said
    assert not ledger.series()
    assert not list((state.root / "slices").rglob("*.dcm"))


def test_purge_of_one_series_says_when_it_stays(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node
) -> None:
    series_id = receive(inbox)
    with pytest.raises(ConfigurationError, match="stays: it is receiving"):
        node("purge", "--series", UID)
    conclude(state.root, ledger, series_id)
    assert "1 series deleted" in node("purge", "--series", UID)


def test_purge_refuses_a_time_that_is_none(ledger: Ledger, node: Node) -> None:
    with pytest.raises(ConfigurationError, match="such as 24h"):
        node("purge", "--older-than", "yesterday")


def test_a_folder_that_no_node_has_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="no node has kept anything there"):
        CliRunner().invoke(
            command_line.app,
            ["node", "status", "--state-dir", str(tmp_path)],
            catch_exceptions=False,
        )
    assert not list(tmp_path.iterdir())


# drop


@pytest.fixture
def settings_file(state: StateFolder) -> Path:
    """A node with one destination, "pacs"."""
    file = state.root / "node.toml"
    destination = f'kind = "folder"\nname = "pacs"\npath = "{state.root}/results"'
    file.write_text(f'state_dir = "{state.root}"\n[[destinations]]\n{destination}\n')
    return file


def test_what_waits_for_a_destination_that_is_gone_is_told_and_dropped(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node, settings_file: Path
) -> None:
    told = ("--config", str(settings_file))
    conclude(state.root, ledger, receive(inbox), destinations=("pacs", "old"))
    ledger.update_delivery(ledger.deliveries()[0].id, state="done")
    assert "1 wait; not in the settings" in node("status", *told)
    assert json.loads(node("status", "--json", *told))["not_in_settings"] == {"old": 1}
    assert json.loads(node("status", "--json"))["not_in_settings"] == {}  # they are not known
    assert "0 series deleted" in node("purge", "--older-than", "0s")
    assert node("drop", "old", "--yes", *told) == "old: 1 deliveries dropped\n"
    assert json.loads(node("status", "--json", *told))["not_in_settings"] == {}
    assert "the settings do not name this destination" in node("status", *told)
    assert "1 series deleted" in node("purge", "--older-than", "0s")


def test_what_was_dropped_is_not_delivered_again(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node, settings_file: Path
) -> None:
    told = ("--config", str(settings_file))
    conclude(state.root, ledger, receive(inbox), destinations=("pacs", "old"))
    node("drop", "old", "--yes", *told)
    assert "1 deliveries are made again" in node("replay", UID, "--deliver-only", *told)
    assert ledger.open_deliveries() == {"pacs": 1}


def test_dropping_asks_first(
    state: StateFolder, ledger: Ledger, inbox: Inbox, settings_file: Path
) -> None:
    conclude(state.root, ledger, receive(inbox), destinations=("old",))
    arguments = ["node", "drop", "old", "--config", str(settings_file)]
    for answer, code, left in (("n\n", 1, {"old": 1}), ("", 1, {"old": 1}), ("y\n", 0, {})):
        done = CliRunner().invoke(command_line.app, arguments, input=answer)
        assert done.exit_code == code
        assert ledger.open_deliveries() == left


def test_what_the_settings_name_or_nothing_waits_for_is_not_dropped(
    state: StateFolder, ledger: Ledger, inbox: Inbox, node: Node, settings_file: Path
) -> None:
    told = ("--yes", "--config", str(settings_file))
    conclude(state.root, ledger, receive(inbox), destinations=("pacs", "old"))
    with pytest.raises(ConfigurationError, match="the settings name this destination"):
        node("drop", "pacs", *told)
    with pytest.raises(ConfigurationError, match=r"such a destination.*wait for: old"):
        node("drop", "odl", *told)
    with pytest.raises(ConfigurationError, match="--config FILE"):
        node("drop", "old", "--yes")
    assert ledger.open_deliveries() == {"pacs": 1, "old": 1}


# the state folder


def test_a_state_folder_is_private_and_has_one_process(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "a" / "state")
    assert state.pid() is None
    with state.claimed():
        assert state.pid() == os.getpid()
        assert stat.S_IMODE(state.root.stat().st_mode) == 0o700
        with pytest.raises(NodeError, match=rf"process {os.getpid()} uses this state_dir"):
            StateFolder(state.root).claimed().__enter__()
    assert state.pid() is None
    with state.claimed():
        pass


def test_a_state_folder_that_others_may_read_is_refused(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    tmp_path.chmod(0o750)
    with pytest.raises(NodeError, match="chmod 700"), state.claimed():
        pass


def test_the_key_is_random_private_and_stays(tmp_path: Path) -> None:
    keys = []
    for name in "ab":
        state = StateFolder(tmp_path / name)
        with state.claimed():
            keys.append(state.key())
            assert state.key() == keys[-1]
            assert len(keys[-1]) == 32
    assert keys[0] != keys[1]
