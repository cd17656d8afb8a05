"""Storage commitment: on the association that asked, on another one, failed, never, not offered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deliveries import (
    Pacs,
    Sending,
    eventually,
    pacs,
    report_on,
    running,
    send_report,
)
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel

from pe_infer.dicom.commitment import CommitmentReport, read_commitment_report
from pe_infer.errors import Code, DicomError, NodeError
from pe_infer.node.commitment import take_report
from pe_infer.node.destinations import dicom
from pe_infer.node.ledger import Ledger
from pe_infer.node.outbox import Outbox
from pe_infer.node.parcels import read_contents
from pe_infer.node.watch import Watch


@pytest.fixture
def archive() -> Iterator[Pacs]:
    with pacs(commits=True) as peer:
        yield peer


@pytest.fixture(autouse=True)
def _does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "_ANSWER_S", 0.01)


@pytest.fixture
def sending(tmp_path: Path, archive: Pacs) -> Sending:
    destination = archive.destination(commitment=True, commitment_s=300.0)
    made = Sending(tmp_path, (destination,))
    made.result(made.series())
    return made


def transaction(sending: Sending) -> str | None:
    return sending.ledger.deliveries()[0].transaction_uid


def asked(sending: Sending, archive: Pacs, times: int = 1) -> None:
    eventually(lambda: sending.states() == ["stored"] and len(archive.requests) == times)


def test_a_report_on_the_association_that_asked_ends_the_delivery(
    sending: Sending, archive: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "_ANSWER_S", 20.0)
    statuses = []
    archive.on_request = lambda event, request: statuses.append(
        send_report(event.assoc, report_on(request))
    )
    with running(sending):
        eventually(sending.all_done)
        eventually(lambda: statuses == [0x0000])
    (request,) = archive.requests
    references = [
        (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID)
        for item in request.ReferencedSOPSequence
    ]
    assert [uid for _, uid in references] == archive.order
    assert len({sop_class for sop_class, _ in references}) == 3
    assert len(archive.stored) == 3


def test_the_request_is_in_the_ledger_before_it_is_sent(sending: Sending, archive: Pacs) -> None:
    noted = []

    def look(_event: Any, request: Dataset) -> None:
        with Ledger(sending.folder / "ledger.db") as other:
            delivery = other.delivery_of(request.TransactionUID)
            noted.append(delivery and (delivery.state, delivery.due_at))

    archive.on_request = look
    with running(sending):
        eventually(lambda: noted == [("stored", sending.clock.now + 300.0)])


def test_a_report_on_an_association_of_its_own_ends_the_delivery(
    sending: Sending, archive: Pacs
) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        entity = AE()
        entity.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        server = entity.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[
                (evt.EVT_N_EVENT_REPORT, take_report, [outbox.commitment, sending.watch])
            ],
        )
        try:
            peer = AE()
            peer.add_requested_context(StorageCommitmentPushModel)
            association = peer.associate(
                *server.socket.getsockname(),
                ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)],
            )
            assert send_report(association, report_on(archive.requests[0])) == 0x0000
            association.release()
        finally:
            server.shutdown()
        eventually(sending.all_done)


def test_objects_that_are_not_committed_are_stored_again_and_asked_for_again(
    sending: Sending, archive: Pacs
) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        first = archive.requests[0]
        lost = archive.order[1]
        report = read_commitment_report(report_on(first, failed={lost: 0x0112}))
        outbox.commitment(report)
        (delivery,) = sending.ledger.deliveries()
        assert delivery.state == "waiting"
        assert delivery.error == "1 of 3 objects not committed: reason 0x0112"
        sending.clock.now = delivery.due_at
        outbox.wake()
        asked(sending, archive, 2)
        assert archive.order[3:] == [lost]
        second = archive.requests[1]
        assert second.TransactionUID != first.TransactionUID
        outbox.commitment(read_commitment_report(report_on(second)))
        eventually(sending.all_done)


def test_an_object_that_a_report_does_not_mention_is_not_committed(
    sending: Sending, archive: Pacs
) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        report = report_on(archive.requests[0])
        del report.ReferencedSOPSequence[0]
        outbox.commitment(read_commitment_report(report))
        assert sending.states() == ["waiting"]


def test_a_class_that_can_not_be_committed_is_refused(sending: Sending, archive: Pacs) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        report = report_on(archive.requests[0], failed={archive.order[0]: 0x0122})
        outbox.commitment(read_commitment_report(report))
        assert sending.states() == ["refused"]


def test_without_an_answer_commitment_is_asked_for_again(sending: Sending, archive: Pacs) -> None:
    with running(sending) as outbox:
        eventually(lambda: len(archive.requests) == 1)
        sending.clock.now += 299.0
        outbox.wake()
        sending.clock.now += 1.0
        outbox.wake()
        eventually(lambda: len(archive.requests) == 2)
        assert transaction(sending) == archive.requests[1].TransactionUID
        assert archive.requests[0].TransactionUID != archive.requests[1].TransactionUID
        assert len(archive.order) == 3
        outbox.commitment(read_commitment_report(report_on(archive.requests[0])))
        assert sending.states() == ["stored"]
        outbox.commitment(read_commitment_report(report_on(archive.requests[1])))
        eventually(sending.all_done)


def test_commitment_is_awaited_across_a_restart(sending: Sending, archive: Pacs) -> None:
    with running(sending):
        asked(sending, archive)
    with running(sending) as outbox:
        outbox.commitment(read_commitment_report(report_on(archive.requests[0])))
        eventually(sending.all_done)
    assert len(archive.order) == 3


def test_a_later_version_is_stored_after_an_earlier_one_and_does_not_wait_for_its_commitment(
    sending: Sending, archive: Pacs
) -> None:
    sending.result(1, version=2)
    with running(sending):
        eventually(lambda: sending.states() == ["stored", "stored"])
    listed = (
        read_contents(sending.parcels / made.folder).objects for made in sending.ledger.parcels(1)
    )
    assert archive.order == [found.sop_instance_uid for objects in listed for found in objects]


@pytest.mark.parametrize("status", [0x0110, 0x0213])
def test_a_request_that_fails_is_made_again_after_a_while(
    sending: Sending, archive: Pacs, status: int
) -> None:
    archive.action_status = status
    with running(sending) as outbox:
        eventually(lambda: sending.ledger.deliveries()[0].error)
        (delivery,) = sending.ledger.deliveries()
        assert delivery.state == "stored"
        assert delivery.error == f"request for commitment: status 0x{status:04X}"
        assert delivery.due_at == sending.clock.now + 20.0
        archive.action_status = 0x0000
        sending.clock.now = delivery.due_at
        outbox.wake()
        eventually(lambda: len(archive.requests) == 2)
        eventually(lambda: sending.ledger.deliveries()[0].error is None)
        outbox.commitment(read_commitment_report(report_on(archive.requests[1])))
        eventually(sending.all_done)
    assert len(archive.order) == 3


def test_a_destination_that_is_down_when_asked_again_is_asked_later(
    sending: Sending, archive: Pacs
) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        archive.stop()
        sending.clock.now += 300.0
        outbox.wake()
        eventually(lambda: sending.ledger.deliveries()[0].error)
        assert sending.states() == ["stored"]
        archive.start()
        sending.clock.now += 60.0
        outbox.wake()
        asked(sending, archive, 2)
    assert len(archive.order) == 3


@pytest.mark.parametrize("offers", ["no context", "status 0x0122"])
def test_where_commitment_is_not_offered_stored_is_done(tmp_path: Path, offers: str) -> None:
    with pacs(commits=offers == "status 0x0122") as archive:
        archive.action_status = 0x0122
        sending = Sending(tmp_path, (archive.destination(commitment=True),))
        for _ in range(2):
            sending.result(sending.series())
        with running(sending):
            eventually(sending.all_done)
        assert len(archive.stored) == 6
    assert sending.logged.getvalue().count("commitment_not_offered") == 1


@pytest.mark.parametrize("transaction_uid", ["1.2.3", ""])
def test_a_report_that_answers_nothing_is_ignored(
    sending: Sending, archive: Pacs, transaction_uid: str
) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        outbox.commitment(
            CommitmentReport(transaction_uid=transaction_uid, committed=frozenset(archive.order))
        )
        assert sending.states() == ["stored"]


def test_a_report_that_answers_twice_is_ignored(sending: Sending, archive: Pacs) -> None:
    with running(sending) as outbox:
        asked(sending, archive)
        report = read_commitment_report(report_on(archive.requests[0]))
        outbox.commitment(report)
        outbox.commitment(report)
    assert sending.states() == ["done"]


class Received:
    """An event with a data set, as pynetdicom hands it to a handler."""

    def __init__(self, information: Dataset) -> None:
        self.event_information = information


def test_a_report_without_transaction_is_answered_as_invalid() -> None:
    reports: list[CommitmentReport] = []
    answer = take_report(Received(Dataset()), reports.append, Watch(b"key"))  # type: ignore[arg-type]
    assert answer == (0x0115, None)
    assert reports == []


def test_a_report_that_cannot_be_noted_is_not_acknowledged(sending: Sending) -> None:
    def full(_report: CommitmentReport) -> None:
        raise NodeError("the disk is full", code=Code.NODE_FULL)

    information = Dataset()
    information.TransactionUID = "1.2.3"
    answer = take_report(Received(information), full, sending.watch)  # type: ignore[arg-type]
    assert answer == (0x0110, None)
    assert sending.log()[-1]["code"] == "node.full"


def test_a_report_with_an_item_without_instance_is_unreadable() -> None:
    information = Dataset()
    information.TransactionUID = "1.2.3"
    information.ReferencedSOPSequence = [Dataset()]
    with pytest.raises(DicomError, match="ReferencedSOPInstanceUID"):
        read_commitment_report(information)


def test_a_delivery_to_a_destination_that_was_removed_can_still_be_committed(
    sending: Sending, archive: Pacs
) -> None:
    with running(sending):
        asked(sending, archive)
    settings = sending.settings.model_copy(update={"destinations": ()})
    outbox = Outbox(settings, sending.ledger, sending.parcels, sending.watch)
    outbox.commitment(read_commitment_report(report_on(archive.requests[0])))
    assert sending.states() == ["done"]


def test_what_is_said_to_have_failed_is_not_committed() -> None:
    def item(uid: str) -> Dataset:
        made = Dataset()
        made.ReferencedSOPInstanceUID = uid
        return made

    report = Dataset()
    report.TransactionUID = "2.25.1"
    report.ReferencedSOPSequence = [item("2.25.2"), item("2.25.3")]
    report.FailedSOPSequence = [item("2.25.3")]
    report.FailedSOPSequence[0].FailureReason = 0x0110
    found = read_commitment_report(report)
    assert found.committed == {"2.25.2"}
    assert found.failed == {"2.25.3": 0x0110}
