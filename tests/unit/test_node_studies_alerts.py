"""Alerts of a process that has ended, whose bundle is not there any more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_bench import Bench, make_files, until
from toy_bundles import make

from pe_infer import Detector
from pe_infer.errors import Code, NodeError
from pe_infer.node.entries import ParcelKind
from pe_infer.node.parcels import Packer

CONSOLE = [{"kind": "webhook", "name": "console", "url": "http://127.0.0.1:1/"}]
NOTHING = {"bundles": [], "otherwise": "ignore"}


def alarming(folder: Path, **changes: Any) -> Detector:
    """Alerts at the first slab, and finds everything positive."""
    bundle = make(
        folder / "bundle",
        provisional_alert={"slab_probability": 0.01, "consecutive": 1},
        operating_points=[{"name": "balanced", "threshold": 0.0}],
        **changes,
    )
    return Detector(bundle, engine="onnxruntime", precision="float32", cache_dir=None)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    with alarming(tmp_path_factory.mktemp("toy")) as made:
        yield made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    with alarming(tmp_path_factory.mktemp("other"), name="other") as made:
        yield made


@pytest.fixture
def files(tmp_path: Path, toy: Detector) -> list[Path]:
    """Of a series whose alert a node has sent, which has ended then."""
    files = make_files(tmp_path)
    with Bench(tmp_path / "state", {"toy": toy}, destinations=CONSOLE) as before:
        before.studies.start()
        before.send(*files[:10])

        def alerted() -> bool:
            before.clock.now += 0.001
            return bool(before.parcels())

        until(alerted, what="the alert")
    return files


def after(folder: Path, detectors: dict[str, Detector], **routing: Any) -> Bench:
    """A node that goes on there."""
    told = {"routing": routing} if routing else {}
    return Bench(folder / "state", detectors, destinations=CONSOLE, **told)


def kinds(bench: Bench) -> list[ParcelKind]:
    return [made.kind for made in bench.parcels()]


def withdrawn(bench: Bench) -> dict[str, Any]:
    (made,) = (made for made in bench.parcels() if made.kind == "withdrawal")
    return bench.document(made)


def counted(bench: Bench, outcome: str, bundle: str = "toy") -> float | None:
    labels = {"bundle": bundle, "outcome": outcome}
    return bench.watch.registry.get_sample_value("pe_infer_node_alerts_total", labels)


def test_the_alert_of_a_series_that_nobody_judges_any_more_is_withdrawn(
    tmp_path: Path, files: list[Path], toy: Detector
) -> None:
    with after(tmp_path, {}, **NOTHING) as bench:
        bench.studies.start()
        bench.settle()
        assert bench.series()[0].state == "ignored"
        assert kinds(bench) == ["alert", "withdrawal"]
        said = withdrawn(bench)
        assert (said["event"], said["version"]) == ("alert_withdrawn", 1)
        assert (said["bundle"], said["bundle_hash"]) == ("toy", toy.bundle.sha256)
        assert [d.destination for d in bench.ledger.deliveries()] == ["console", "console"]
        until(lambda: bench.entered == 1)
        assert counted(bench, "withdrawn") == 1
        bench.restart()
        bench.send(*files[10:])
        bench.quiet()
        assert kinds(bench) == ["alert", "withdrawal"]


def test_the_alert_of_a_series_that_nobody_can_read_any_more_is_withdrawn(
    tmp_path: Path, files: list[Path]
) -> None:
    for path in (tmp_path / "state" / "slices").rglob("*.dcm"):
        path.write_bytes(b"damaged")
    with after(tmp_path, {}, **NOTHING) as bench:
        bench.studies.start()
        bench.settle()
        (entry,) = bench.series()
        assert (entry.state, entry.version) == ("concluded", 0)
        assert kinds(bench) == ["alert", "withdrawal"]
        until(lambda: bench.entered == 1)


def test_another_bundle_does_not_confirm_an_alert(
    tmp_path: Path, files: list[Path], other: Detector
) -> None:
    with after(tmp_path, {"other": other}) as bench:
        bench.studies.start()
        bench.send(*files[10:])
        bench.settle()
        assert kinds(bench) == ["alert", "withdrawal", "result"]
        assert withdrawn(bench)["bundle"] == "toy"
        result = bench.parcels()[-1]
        assert (result.verdict, bench.document(result)["bundle"]) == ("positive", "other")
        until(lambda: counted(bench, "withdrawn") == 1)


def test_a_bundle_under_another_name_of_the_settings_confirms_its_alert(
    tmp_path: Path, files: list[Path], toy: Detector
) -> None:
    with after(tmp_path, {"renamed": toy}) as bench:
        bench.studies.start()
        bench.send(*files[10:])
        bench.settle()
        assert kinds(bench) == ["alert", "result"]
        until(lambda: counted(bench, "confirmed") == 1)


def test_an_alert_is_withdrawn_once(tmp_path: Path, files: list[Path], other: Detector) -> None:
    """Also if the series is judged later, as the version that the alert was for."""
    with after(tmp_path, {}, **NOTHING) as bench:
        bench.studies.start()
        bench.settle()
    with after(tmp_path, {"other": other}) as bench:
        bench.ledger.reopen(bench.series()[0].id)
        bench.studies.start()
        bench.send(*files[10:])
        bench.settle()
        assert kinds(bench) == ["alert", "withdrawal", "result"]
        assert [made.version for made in bench.parcels()] == [1, 1, 1]


@pytest.mark.usefixtures("files")
def test_a_disk_that_is_full_delays_a_withdrawal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise NodeError("full", code=Code.NODE_FULL)

    with after(tmp_path, {}, **NOTHING) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(Packer, "withdrawal", full)
            bench.studies.start()
            until(lambda: '"study_delayed"' in bench.log.getvalue())
            assert bench.series()[0].state == "receiving"
        bench.settle()
        assert kinds(bench) == ["alert", "withdrawal"]
