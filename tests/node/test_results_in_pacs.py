"""A study is sent by DCMTK's storescu; what was found arrives in Orthanc."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from node_peers import Node, Pacs, Study, assert_right, checked, need, run, store, wait_for

REPORT = "1.2.840.10008.5.1.4.1.1.88.34"
KEY_IMAGES = {"1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.4"}
KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
ATTENTION = {"1.2.840.10008.5.1.4.1.1.30", "1.2.840.10008.5.1.4.1.1.66.4"}
SCANNER_SLICES_PER_S = 8.0


@pytest.fixture(params=["at full speed", "at the scanner's pace"])
def at_pace(request: pytest.FixtureRequest) -> bool:
    return bool(request.param != "at full speed")


def send(node: Node, study: Study, *, paced: bool) -> None:
    """All slices over one association, or one at a time."""
    for files in [[file] for file in study.files] if paced else [study.files]:
        began = time.monotonic()
        sent = store(node.port, files)
        assert sent.acknowledged == files, sent.output
        if paced:
            time.sleep(max(0.0, began + 1 / SCANNER_SLICES_PER_S - time.monotonic()))


def arrived(pacs: Pacs, study: Study) -> dict[str, dict[str, str]]:
    """What the PACS has of a study besides its slices: SOP class and tags by Orthanc's number."""
    return {
        found["ID"]: found
        for found in pacs.objects(study.study_uid)
        if found["SOPInstanceUID"] not in study.instances.values()
    }


def delivered(node: Node) -> bool:
    return all(entry["state"] == "done" for entry in node.status()["deliveries"])


def test_report_key_images_and_attention_arrive_in_the_study(
    make_node: Callable[..., Node],
    make_pacs: Callable[[int], Pacs],
    positive: Study,
    at_pace: bool,
    tmp_path: Path,
) -> None:
    need("dciodvfy", "dsrdump")
    node = make_node()
    pacs = make_pacs(node.port)
    node.send_to(pacs.destination(alerts=False, commitment=True))
    pacs.start()
    node.start()
    assert store(pacs.port, positive.files, called="PACS").returncode == 0
    send(node, positive, paced=at_pace)
    assert_right(node.result(positive), positive)
    wait_for("delivery to the PACS", lambda: delivered(node))

    objects = arrived(pacs, positive)
    classes = [found["SOPClassUID"] for found in objects.values()]
    assert classes.count(REPORT) == 1
    assert classes.count(KEY_OBJECTS) == 1
    assert len(KEY_IMAGES & set(classes)) == 1
    assert len(ATTENTION & set(classes)) == 1
    for number, found in objects.items():
        assert found["StudyInstanceUID"] == positive.study_uid
        assert found["SeriesInstanceUID"] != positive.series_uid
        path = pacs.fetch(number, tmp_path / f"{found['SOPInstanceUID']}.dcm")
        verdict = run("dciodvfy", path).stdout
        assert "Error" not in verdict, f"{found['SOPClassUID']}:\n{verdict}"
        if found["SOPClassUID"] == REPORT:
            text = checked("dsrdump", "+Pc", path)
            for said in (
                "Intracranial hemorrhage",
                '52101004,SCT,"Present"',
                '111012,DCM,"Certainty of Finding"',
            ):
                assert said in text.replace(", ", ","), text
            referenced = [
                uid
                for uid in positive.instances.values()
                if uid in checked("dcmdump", "+P", "ReferencedSOPInstanceUID", path)
            ]
            assert referenced
    assert node.stop() == 0


def test_a_negative_study_has_a_report_too(
    make_node: Callable[..., Node],
    make_pacs: Callable[[int], Pacs],
    negative: Study,
    tmp_path: Path,
) -> None:
    need("dciodvfy", "dsrdump")
    node = make_node()
    pacs = make_pacs(node.port)
    node.send_to(pacs.destination())
    pacs.start()
    node.start()
    send(node, negative, paced=False)
    assert_right(node.result(negative), negative)
    wait_for("delivery to the PACS", lambda: delivered(node))
    reports = [
        pacs.fetch(number, tmp_path / "report.dcm")
        for number, found in arrived(pacs, negative).items()
        if found["SOPClassUID"] == REPORT
    ]
    assert len(reports) == 1
    assert "Error" not in run("dciodvfy", reports[0]).stdout
    assert "Absent" in checked("dsrdump", reports[0])


def test_a_provisional_alert_comes_while_slices_still_arrive(
    make_node: Callable[..., Node], make_pacs: Callable[[int], Pacs], positive: Study
) -> None:
    node = make_node()
    pacs = make_pacs(node.port)
    node.send_to(pacs.destination(alerts=True))
    pacs.start()
    node.start()
    *most, last = positive.files[::-1] if head_is_last(positive) else positive.files
    for file in most:
        assert store(node.port, [file]).acknowledged == [file]

    def alerted() -> list[dict[str, object]]:
        return node.documents(positive, "provisional_alert")

    (alert,) = wait_for("provisional alert", alerted)
    assert alert["version"] == 1
    assert not node.documents(positive)
    wait_for("preliminary report", lambda: arrived(pacs, positive))
    assert node.status()["series"][0]["state"] == "receiving"
    assert store(node.port, [last]).acknowledged == [last]
    assert_right(node.result(positive), positive)
    assert not node.documents(positive, "alert_withdrawn")


def head_is_last(study: Study) -> bool:
    """Whether the files are in order from feet to head."""
    heights = [
        float(
            checked("dcmdump", "+P", "ImagePositionPatient", file)
            .split("[")[1]
            .split("]")[0]
            .split("\\")[2]
        )
        for file in (study.files[0], study.files[-1])
    ]
    return heights[1] > heights[0]


def test_last_slice_to_result_over_the_network(
    node: Node, positive: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    *most, last = positive.files
    for file in most:
        assert store(node.port, [file]).acknowledged == [file]
        time.sleep(1 / SCANNER_SLICES_PER_S)
    wait_for("slices that are judged", lambda: "waiting_slices 0.0" in node.page("metrics")[1])
    began = time.monotonic()
    assert store(node.port, [last]).acknowledged == [last]
    acknowledged = time.monotonic()
    node.result(positive)
    seconds = time.monotonic() - acknowledged
    with capsys.disabled():
        print(  # noqa: T201  a measurement, not an assertion
            f"\nlast slice acknowledged after {acknowledged - began:.2f} s, result in the folder "
            f"{seconds:.2f} s later"
        )
    assert node.stop() == 0
