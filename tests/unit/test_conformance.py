"""docs/conformance.md, docs/node.md and the systemd unit say what the program does."""

import re
import tomllib
from pathlib import Path

import pytest
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGExtended12Bit
from pynetdicom import DEFAULT_TRANSFER_SYNTAXES
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification
from typer.testing import CliRunner

from pe_infer.cli import app as command_line
from pe_infer.dicom import storage_contexts
from pe_infer.dicom.results import envelope, report
from pe_infer.errors import Code
from pe_infer.node import commitment, receiver
from pe_infer.node.capacity import RESULT_BYTES
from pe_infer.node.configuration import options
from pe_infer.node.destinations import dicom as storing
from pe_infer.node.node import STOP_S
from pe_infer.node.settings import NodeSettings
from pe_infer.node.watch import Watch

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
_UID = re.compile(r"1\.2\.840\.10008(?:\.\d+)+")


def table(first_column: str, *, section: str) -> list[list[str]]:
    """Cells of the table of a section that begins with this heading."""
    _, found, after = TEXT.partition(f"{section}\n")
    assert found, section
    body = re.split(r"\n#{2,3} ", after)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.split(rf"(?m)^\| {re.escape(first_column)} \|", body)[1].splitlines()
    ]
    end = next((n for n, row in enumerate(rows) if n and row == [""]), len(rows))
    return rows[2:end]


def test_the_accepted_storage_classes_and_transfer_syntaxes_are_those_of_the_receiver() -> None:
    images = {
        row[1]
        for row in table(
            "Transfer syntax of images", section="### 2.3 Accepted presentation contexts"
        )
    }
    offered = storage_contexts()
    for syntaxes in offered.values():
        assert set(syntaxes) - {JPEGExtended12Bit} == images
    assert f"({JPEGExtended12Bit})" in TEXT
    classes = {
        row[1]: row for row in table("SOP class", section="### 2.3 Accepted presentation contexts")
    }
    assert set(classes) == {Verification, StorageCommitmentPushModel, *offered}
    assert set(_UID.findall(classes[Verification][3])) == set(DEFAULT_TRANSFER_SYNTAXES)


def test_names_of_uids_are_those_of_the_standard() -> None:
    for row in [
        *table("SOP class", section="### 2.3 Accepted presentation contexts"),
        *table("SOP class", section="### 2.5 C-STORE as SCU"),
    ]:
        assert UID(row[1]).name.removesuffix(" SOP Class") == row[0]


def test_statuses_of_c_store_are_those_of_the_receiver() -> None:
    statuses = {
        value
        for name, value in vars(receiver).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, int)
    }
    rows = table("Status", section="### 2.4 C-STORE as SCP")
    assert {int(row[0], 16) for row in rows} == statuses
    named = {name for row in rows for name in re.findall(r"`limits\.(\w+)`", row[2])}
    source = Path(receiver.__file__).read_text()
    assert named - {"free_disk_bytes", "slices_per_series", "waiting_slices"} == set(
        re.findall(r'\("([a-z_]+)", header', source)
    )


def test_the_room_for_a_result_is_what_is_stated() -> None:
    room = f"{RESULT_BYTES >> 20} MiB for every series whose result is"
    told = next(option for option in options() if option.flag == "--limits.free_disk_bytes")
    assert room in " ".join(told.about.split())
    assert room in TEXT


def test_rejections_are_those_of_the_receiver() -> None:
    rows = table("Reason", section="### 2.2 Association policies")
    assert {row[0]: tuple(map(int, row[1:])) for row in rows} == receiver._REJECT


def test_what_a_destination_may_answer_is_what_the_outbox_knows() -> None:
    rows = table("Status of the response", section="### 2.5 C-STORE as SCU")
    for status in (0x0122, 0xA900, 0xA9FF, 0xC000, 0xCFFF):
        assert storing._is_final(status)
    for status in (0xA700, 0x0110, 0x0124, 0xB000):
        assert not storing._is_final(status)
    assert re.findall(r"0x[0-9A-Fx]+", rows[1][0]) == ["0x0122", "0xA9xx", "0xCxxx"]


def test_statuses_of_commitment_reports_are_those_of_the_code() -> None:
    rows = table(
        "Status of the response to N-EVENT-REPORT", section="### 2.6 Storage commitment as SCU"
    )
    statuses = {value for value in vars(commitment).values() if isinstance(value, int)}
    assert {int(row[0], 16) for row in rows} == statuses


def test_objects_are_those_that_are_made() -> None:
    rows = table("Object", section="## 3 Objects")
    assert {row[0]: int(row[1]) for row in rows} == dict(envelope._SERIES_NUMBERS)
    classes = {row[1] for row in table("SOP class", section="### 2.5 C-STORE as SCU")}
    assert report.Comprehensive3DSRStorage in classes
    assert len(classes) == len(rows)
    assert ExplicitVRLittleEndian.name in TEXT
    assert envelope.UTF_8 in TEXT


def test_options_have_the_defaults_that_are_stated() -> None:
    stated = {row[0].strip("`"): row[1] for row in table("Option", section="## 6 Configuration")}
    known = {option.flag.removeprefix("--"): option for option in options()}
    assert set(stated) <= set(known)
    for name, default in stated.items():
        value = known[name].default
        assert default == ("any" if value == () else str(value)), name
    for section in ("listen", "limits", "retry"):
        expected = {name for name in known if name.startswith(f"{section}.") and ".tls" not in name}
        assert expected == {name for name in stated if name.startswith(f"{section}.")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)`", TEXT))))
def test_every_option_that_is_named_exists(name: str) -> None:
    known = [option.flag.removeprefix("--") for option in options()]
    assert name.startswith("destinations.") or any(
        full == name or full.startswith(f"{name}.") for full in known
    )


def test_no_code_of_an_error_is_promised_that_does_not_exist() -> None:
    promised = set(re.findall(r"`((?:node|dicom|series|scope)\.[a-z_]+)`", TEXT))
    assert promised <= {str(code) for code in Code}


# docs/node.md and docs/pe-infer-node.service

GUIDE = (DOCUMENT.parent / "node.md").read_text(encoding="utf-8")
UNIT = (DOCUMENT.parent / "pe-infer-node.service").read_text(encoding="utf-8")


def test_the_guide_explains_every_metric_and_no_other() -> None:
    rows = re.findall(r"(?m)^\| ((?:`[a-z_]+(?:\{[a-z,]+\})?`(?:, )?)+) \|", GUIDE)
    told = {name for row in rows for name in re.findall(r"`([a-z_]+)", row)}
    known = {
        metric.name.removeprefix("pe_infer_node_") + ("_total" if metric.type == "counter" else "")
        for metric in Watch(b"key").registry.collect()
    }
    assert {name for name in told if name in known or name.endswith("_total")} == known


@pytest.mark.parametrize(
    "block", re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL), ids=lambda block: block[:20]
)
def test_the_settings_in_the_guide_are_settings(block: str) -> None:
    told = {"state_dir": "/var/lib/pe-infer", **tomllib.loads(block)}
    NodeSettings.model_validate(told)


def test_the_guide_names_commands_and_flags_that_exist() -> None:
    commands = ("status", "replay", "drop", "purge")
    for command in commands:
        said = CliRunner().invoke(command_line.app, ["node", command, "--help"]).output
        for row in re.findall(rf"`pe-infer node {command}([^`]*)`", GUIDE):
            for flag in re.findall(r"--[a-z-]+", row):
                assert flag in said
    assert set(re.findall(r"`pe-infer node (\w+)", GUIDE)) == set(commands)


def test_the_unit_fits_the_program() -> None:
    told = dict(re.findall(r"(?m)^(\w+)=(.*)$", UNIT))
    assert told["Type"] == "notify"
    assert told["KillSignal"] == "SIGTERM"
    assert int(told["TimeoutStopSec"]) > sum(STOP_S.values())
    assert told["StateDirectoryMode"] == "0700"
    variables = re.findall(r"(?m)^Environment=(PE_INFER_NODE__\w+)=", UNIT)
    assert variables
    assert set(variables) <= {option.variable for option in options()}
