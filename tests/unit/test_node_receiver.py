"""The receiver towards peers that mean well: who is let in, what is taken, what is answered."""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dicom_files import ct_dataset, enhanced_dataset, ramp, save, save_series
from peers import dcmtk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE, build_role
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    StorageCommitmentPushModel,
    Verification,
)
from receiving import (
    CALLING,
    Running,
    associated,
    cut_after,
    eventually,
    forget,
    receiving,
    refuses_connections,
    send_as,
    store,
)

from pe_infer.errors import Code, NodeError
from pe_infer.node.commitment import CommitmentReport
from pe_infer.node.inbox import Inbox
from pe_infer.node.ledger import Ledger
from pe_infer.node.receiver import Receiver, read_kept
from pe_infer.node.settings import NodeSettings
from pe_infer.node.watch import Watch


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Running]:
    with receiving(tmp_path) as running:
        yield running


def status_of(node: Running, dataset: Dataset) -> int:
    (response,) = store(node.port, dataset)
    return int(response.Status)


def test_an_echo_is_answered(node: Running) -> None:
    assert node.echoes()


def test_a_slice_is_kept_offered_and_then_acknowledged(node: Running) -> None:
    dataset = ct_dataset(3.0)
    assert status_of(node, dataset) == 0x0000
    (kept,) = node.intake.offered
    read = dcmread(node.inbox.path(kept))
    assert read.SOPInstanceUID == dataset.SOPInstanceUID
    assert (read.pixel_array == dataset.pixel_array).all()
    assert node.ledger.instances(kept.series_id) == [kept]
    assert node.count("slices_total", status="0x0000") == 1
    assert node.count("store_seconds_count") == 1


def test_what_was_sent_is_kept_byte_for_byte_whoever_sends_it(
    node: Running, tmp_path: Path
) -> None:
    dataset = ct_dataset()
    save(dataset, tmp_path / "sent.dcm")
    store(node.port, dataset)
    store(node.port, dataset, calling="OTHER")
    (kept,) = node.files()
    content = kept.read_bytes()
    sent = (tmp_path / "sent.dcm").read_bytes()
    assert content.endswith(sent[sent.index(b"\x08\x00\x08\x00CS") :])
    assert len(node.intake.offered) == 1
    assert node.count("slices_total", status="0x0000") == 2


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
    ],
)
def test_a_slice_in_every_kind_of_encoding_is_taken(node: Running, syntax: str) -> None:
    dataset = ct_dataset(pixels=ramp(16, 16))
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    elif syntax == ExplicitVRBigEndian:
        dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax != RLELossless:
        dataset._pixel_array = None
    assert status_of(node, dataset) == 0x0000
    read = dcmread(node.files()[0])
    assert read.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read.pixel_array, ramp(16, 16))


def test_an_enhanced_image_larger_than_what_is_held_in_memory_is_taken(node: Running) -> None:
    volume = np.zeros((3, 1200, 1200), np.int16)
    assert status_of(node, enhanced_dataset([0.0, 1.0, 2.0], volume)) == 0x0000
    assert node.files()[0].stat().st_size > volume.nbytes
    assert node.arriving() == []


def test_only_ct_in_encodings_that_can_be_decoded_is_negotiated(node: Running) -> None:
    association = associated(node.port, MRImageStorage, CTImageStorage)
    assert [cx.abstract_syntax for cx in association.accepted_contexts] == [CTImageStorage]
    association.release()
    for syntaxes, chosen in (
        ((JPEGExtended12Bit,), []),
        ((JPEG2000Lossless, RLELossless, ExplicitVRLittleEndian), [ExplicitVRLittleEndian]),
        ((JPEG2000Lossless, RLELossless), [RLELossless]),
    ):
        association = associated(node.port, CTImageStorage, syntaxes=syntaxes)
        accepted = [cx.transfer_syntax[0] for cx in association.accepted_contexts]
        assert accepted == chosen
        association.abort()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Modality": "MR"}, 0xA900),
        ({"Modality": None}, 0xA900),
        ({"StudyInstanceUID": "../../etc"}, 0xC001),
        ({"SeriesInstanceUID": "1.2.03"}, 0xC001),
        ({"StudyInstanceUID": None}, 0xC000),
        ({"Rows": None}, 0xC000),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_what_cannot_be_used_is_refused_with_its_status(
    node: Running, changes: dict[str, object], status: int
) -> None:
    (response,) = store(node.port, ct_dataset(**changes))
    assert response.Status == status
    assert 0 < len(response.ErrorComment) <= 64
    assert "SECRET" not in response.ErrorComment + node.output.getvalue()
    assert node.files() == []
    assert node.intake.offered == []
    assert node.echoes()


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID"])
def test_a_data_set_that_is_not_what_the_request_says_is_refused(
    node: Running, keyword: str
) -> None:
    sent, claimed = ct_dataset(), ct_dataset()
    if keyword == "SOPClassUID":
        claimed.SOPInstanceUID = sent.SOPInstanceUID
        sent.SOPClassUID = MRImageStorage
    association = associated(node.port, CTImageStorage)
    response = send_as(association, claimed, sent)
    association.release()
    assert response.Status == 0xA900
    assert keyword in response.ErrorComment
    assert node.files() == []


def test_a_request_of_another_class_than_its_context_is_refused(node: Running) -> None:
    sent = ct_dataset()
    claimed = ct_dataset(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    association = associated(node.port, CTImageStorage)
    assert send_as(association, claimed, sent).Status == 0x0122
    association.release()


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"rows": 7}, "rows"),
        ({"columns": 9}, "columns"),
        ({"object_bytes": 1 << 20, "rows": 2048}, "object_bytes"),
        ({"decoded_bytes": 1 << 20, "object_bytes": 1 << 30}, "decoded_bytes"),
    ],
)
def test_an_image_beyond_a_limit_is_refused_and_the_limit_named(
    tmp_path: Path, limits: dict[str, int], name: str
) -> None:
    pixels = ramp() if name in {"rows", "columns"} else np.zeros((1000, 1000), np.int16)
    with receiving(tmp_path, limits=limits) as node:
        (response,) = store(node.port, ct_dataset(pixels=pixels))
        assert response.Status == 0xA900
        assert f"limits.{name}" in response.ErrorComment
        assert node.files() == node.arriving() == []
        assert node.echoes()


def test_an_image_of_too_many_frames_is_refused(tmp_path: Path) -> None:
    with receiving(tmp_path, limits={"frames": 2}) as node:
        (response,) = store(node.port, enhanced_dataset([0.0, 1.0, 2.0]))
        assert (response.Status, "limits.frames" in response.ErrorComment) == (0xA900, True)


def test_without_room_the_sender_is_to_try_again(node: Running) -> None:
    dataset = ct_dataset()
    node.intake.has_room = False
    assert status_of(node, dataset) == 0xA700
    assert node.files() == []
    node.intake.has_room = True
    assert status_of(node, dataset) == 0x0000


def test_a_disk_with_too_little_left_takes_nothing(tmp_path: Path) -> None:
    with receiving(tmp_path, limits={"free_disk_bytes": 1 << 60}) as node:
        large = enhanced_dataset([0.0], np.zeros((1, 2048, 2048), np.int16), NumberOfFrames=1)
        for dataset in (ct_dataset(), large):
            (response,) = store(node.port, dataset)
            assert response.Status == 0xA700
            assert "free_disk_bytes" in response.ErrorComment
        assert node.files() == node.arriving() == []
        assert node.echoes()


def test_room_for_results_that_are_to_come_is_not_given_to_slices(node: Running) -> None:
    dataset = ct_dataset()
    node.intake.owed = 1 << 50
    (response,) = store(node.port, dataset)
    assert response.Status == 0xA700
    assert f"free_disk_bytes + {1 << 50} for results" in response.ErrorComment
    assert len(response.ErrorComment) <= 64
    assert node.files() == node.arriving() == []
    node.intake.owed = 0
    assert status_of(node, dataset) == 0x0000


def test_a_disk_that_is_full_is_told_and_the_slice_taken_when_there_is_room(
    node: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset = ct_dataset()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert status_of(node, dataset) == 0xA700
    assert node.files() == node.arriving() == []
    assert status_of(node, dataset) == 0x0000


def test_a_series_has_at_most_so_many_slices_and_knows_those_it_has(tmp_path: Path) -> None:
    first, second, third = (ct_dataset(z) for z in (0.0, 1.0, 2.0))
    with receiving(tmp_path, limits={"slices_per_series": 2}) as node:
        statuses = [r.Status for r in store(node.port, first, second, third, first)]
        assert statuses == [0, 0, 0xA700, 0]


def test_a_ledger_that_fails_is_an_answer_and_no_loss(node: Running) -> None:
    node.ledger.close()
    assert status_of(node, ct_dataset()) == 0xA700
    assert node.events("slice_not_kept")


def test_a_slice_that_is_kept_is_acknowledged_even_if_nobody_takes_it(node: Running) -> None:
    node.intake.failure = RuntimeError("SECRET")
    assert status_of(node, ct_dataset()) == 0x0000
    (line,) = node.events("slice_not_offered")
    assert line["error"] == "RuntimeError"
    assert "SECRET" not in node.output.getvalue()


def test_an_association_that_ends_in_mid_slice_leaves_nothing(node: Running) -> None:
    large = enhanced_dataset([0.0, 1.0, 2.0], np.zeros((3, 1200, 1200), np.int16))
    association = associated(node.port, str(large.SOPClassUID))
    cut_after(association, 40)
    threading.Thread(target=association.send_c_store, args=(large,), daemon=True).start()
    eventually(lambda: bool(node.events("association_ended")))
    eventually(lambda: not node.threads())
    assert node.files() == node.arriving() == []
    assert node.ledger.series() == []
    assert store(node.port, ct_dataset())[0].Status == 0
    assert node.count("associations_total", outcome="aborted") == 1


def test_slices_of_two_series_on_four_associations_at_once_are_all_kept(node: Running) -> None:
    sent = [
        [ct_dataset(z, SeriesInstanceUID=f"2.25.7{n % 2}", InstanceNumber=z + 1) for z in range(6)]
        for n in range(4)
    ]
    statuses: list[int] = []
    threads = [
        threading.Thread(
            target=lambda part=part: statuses.extend(r.Status for r in store(node.port, *part))
        )
        for part in sent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 24
    assert {i.sop_instance_uid for i in node.intake.offered} == {
        dataset.SOPInstanceUID for part in sent for dataset in part
    }
    assert [series.instances for series in node.ledger.series()] == [12, 12]


@pytest.mark.parametrize(
    ("listen", "named", "reason"),
    [
        ({}, {"called": "OTHER"}, "called_ae_title"),
        ({"allowed_ae_titles": ["CT1"]}, {}, "calling_ae_title"),
    ],
)
def test_an_association_that_is_not_allowed_is_rejected_logged_and_counted(
    tmp_path: Path, listen: dict[str, object], named: dict[str, str], reason: str
) -> None:
    with receiving(tmp_path, listen=listen) as node:
        association = associated(node.port, Verification, **named)
        assert association.is_rejected
        (line,) = node.events("association_rejected")
        assert (line["reason"], line["calling"], line["peer"]) == (reason, CALLING, "127.0.0.1")
        eventually(lambda: node.count("associations_total", outcome="rejected") == 1)


def test_an_allowed_title_and_network_are_let_in(tmp_path: Path) -> None:
    listen = {"allowed_ae_titles": [CALLING, "CT1"], "allowed_addresses": ["127.0.0.0/8"]}
    with receiving(tmp_path, listen=listen) as node:
        assert node.echoes()


def test_a_network_that_is_not_allowed_is_turned_away_unheard(tmp_path: Path) -> None:
    with receiving(tmp_path, listen={"allowed_addresses": ["10.0.0.0/8"]}) as node:
        with node.connect() as connection:
            assert connection.recv(1) == b""
        (line,) = node.events("connection_turned_away")
        assert (line["peer"], line["reason"]) == ("127.0.0.1", "address")
        assert node.count("associations_total", outcome="turned_away") == 1


def test_associations_beyond_the_limit_are_rejected_and_those_within_work(tmp_path: Path) -> None:
    with receiving(tmp_path, listen={"associations": 2}) as node:
        two = [associated(node.port, Verification) for _ in range(2)]
        third = associated(node.port, Verification)
        assert third.is_rejected
        assert [a.send_c_echo().Status for a in two] == [0, 0]
        two.pop().release()
        eventually(node.echoes)
        two.pop().release()


def test_a_storage_commitment_report_comes_on_an_association_of_its_own(node: Running) -> None:
    pacs = AE("PACS")
    pacs.add_requested_context(StorageCommitmentPushModel)
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    association = pacs.associate(
        "127.0.0.1", node.port, ae_title="PE_INFER", ext_neg=[role], evt_handlers=[]
    )
    assert association.is_established
    report = Dataset()
    report.TransactionUID = "2.25.5"
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.3", "2.25.6"
    report.ReferencedSOPSequence = [item]
    status, _ = association.send_n_event_report(
        report, 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1"
    )
    association.release()
    assert status.Status == 0x0000
    assert node.reports == [
        CommitmentReport(transaction_uid="2.25.5", committed=frozenset({"2.25.6"}))
    ]


def test_stopping_lets_an_association_end_and_then_ends_it(tmp_path: Path) -> None:
    with receiving(tmp_path) as node:
        association = associated(node.port, CTImageStorage)
        stopper = threading.Thread(target=node.receiver.stop, args=(30.0,))
        stopper.start()
        eventually(lambda: refuses_connections(node.port))
        assert association.send_c_store(ct_dataset()).Status == 0  # runs on
        association.release()
        stopper.join(20)
        assert not stopper.is_alive()
        assert node.threads() == []
    with receiving(tmp_path) as node:
        association = associated(node.port, CTImageStorage)
        node.receiver.stop(0.1)
        eventually(lambda: association.is_aborted)
        assert node.threads() == []
        node.receiver.stop(0.1)  # again: nothing to do


def test_a_port_that_is_taken_is_an_error_that_names_it(node: Running, tmp_path: Path) -> None:
    settings = NodeSettings(state_dir=tmp_path / "b", listen={"port": node.port})
    (tmp_path / "b").mkdir()
    with Ledger(tmp_path / "b" / "l") as ledger:
        receiver = Receiver(
            settings, Inbox(tmp_path / "b", ledger), node.intake, Watch(b"k"), print
        )
        with pytest.raises(NodeError, match=str(node.port)) as caught:
            receiver.start()
        assert caught.value.code is Code.NODE_NETWORK
        receiver.stop(0.1)


def test_stopping_right_after_starting_ends(tmp_path: Path) -> None:
    for _ in range(5):
        with receiving(tmp_path):
            pass


def test_what_was_kept_and_not_entered_is_read_and_entered(node: Running) -> None:
    store(node.port, ct_dataset(NumberOfSeriesRelatedInstances=7), ct_dataset(1.0))
    (series,) = node.ledger.series()
    files = [entry.file for entry in node.ledger.instances(series.id)]
    forget(node.ledger, series.id)
    assert node.inbox.recover(read_kept) == 2
    (series,) = node.ledger.series()
    assert series.expected == 7
    assert sorted(entry.file for entry in node.ledger.instances(series.id)) == sorted(files)
    node.files()[0].write_text("no DICOM")
    assert read_kept(node.files()[0]) is None


@pytest.mark.skipif(dcmtk("storescu") is None, reason="DCMTK is not installed")
def test_dcmtk_echoes_and_stores(node: Running, tmp_path: Path) -> None:
    paths = save_series(tmp_path / "study", [0.0, 1.0, 2.0])
    call = ["-aec", "PE_INFER", "127.0.0.1", str(node.port)]
    subprocess.run([str(dcmtk("echoscu")), *call], check=True, timeout=60)
    subprocess.run([str(dcmtk("storescu")), *call, *map(str, paths)], check=True, timeout=60)
    assert len(node.files()) == 3


@pytest.mark.skipif(dcmtk("storescu") is None, reason="DCMTK is not installed")
def test_a_slice_from_dcmtk_and_one_from_pynetdicom_are_the_same_file(
    node: Running, tmp_path: Path
) -> None:
    path = save(ct_dataset(SOPInstanceUID=generate_uid()), tmp_path / "a.dcm")
    dataset = dcmread(path)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    save(dataset, path)
    subprocess.run(
        [str(dcmtk("storescu")), "-aec", "PE_INFER", "127.0.0.1", str(node.port), str(path)],
        check=True,
        timeout=60,
    )
    assert store(node.port, dataset)[0].Status == 0
    assert len(node.files()) == 1
