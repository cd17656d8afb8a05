"""Who is let in, and that the log says nothing of patients."""

from collections.abc import Callable
from pathlib import Path

import pytest
from node_peers import Node, Study, checked, echo, need, store

NO_BUNDLES = {"routing__bundles": "[]", "routing__otherwise": "ignore"}


class Certificates:
    """An authority and certificates of it, made with openssl."""

    def __init__(self, folder: Path, authority: str) -> None:
        need("openssl")
        folder.mkdir()
        self._folder = folder
        self.authority = folder / "authority.pem"
        self._authority_key = folder / "authority.key"
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2]
        checked(
            *new,
            "-subj",
            f"/CN={authority}",
            "-keyout",
            self._authority_key,
            "-out",
            self.authority,
        )

    def make(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of a machine at 127.0.0.1."""
        key, request, certificate, more = (
            self._folder / f"{name}.{kind}" for kind in ("key", "csr", "pem", "ext")
        )
        more.write_text("subjectAltName=IP:127.0.0.1\n")
        checked(
            "openssl",
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={name}",
            "-keyout",
            key,
            "-out",
            request,
        )
        checked(
            "openssl",
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            self.authority,
            "-CAkey",
            self._authority_key,
            "-CAcreateserial",
            "-days",
            2,
            "-extfile",
            more,
            "-out",
            certificate,
        )
        return certificate, key

    def options(self, name: str, trusting: "Certificates | None" = None) -> list[str]:
        """Of DCMTK's senders."""
        certificate, key = self.make(name)
        return ["+tls", str(key), str(certificate), "+cf", str((trusting or self).authority)]


def test_mutual_tls(make_node: Callable[..., Node], negative: Study, tmp_path: Path) -> None:
    hospital = Certificates(tmp_path / "hospital", "hospital")
    stranger = Certificates(tmp_path / "stranger", "stranger")
    certificate, key = hospital.make("node")
    node = make_node(
        listen__tls__certificate=certificate,
        listen__tls__key=key,
        listen__tls__authority=hospital.authority,
        **NO_BUNDLES,
    )
    node.start()
    good = hospital.options("scanner")
    assert echo(node.port, *good)
    assert store(node.port, negative.files[:2], *good).acknowledged == negative.files[:2]
    assert not echo(node.port)
    assert not echo(node.port, "+tla", "+cf", str(hospital.authority))
    assert not echo(node.port, *stranger.options("scanner", trusting=hospital))
    assert not store(node.port, negative.files[:1], *stranger.options("two", hospital)).acknowledged
    assert len(node.kept()) == 2
    assert echo(node.port, *good)
    assert_says_nothing_of(node, negative)


def test_ae_titles_that_are_not_allowed_are_refused(
    make_node: Callable[..., Node], negative: Study
) -> None:
    node = make_node(listen__allowed_ae_titles="CT_1,CT_2", **NO_BUNDLES)
    node.start()
    assert echo(node.port, calling="CT_2")
    assert not echo(node.port, calling="CT_3")
    assert not echo(node.port, called="OTHER")
    assert not store(node.port, negative.files[:1], calling="CT_3").acknowledged
    node.assert_works()
    assert not node.kept()
    assert_says_nothing_of(node, negative)


def test_addresses_that_are_not_allowed_are_refused(
    make_node: Callable[..., Node], negative: Study
) -> None:
    node = make_node(listen__allowed_addresses="10.0.0.0/8", **NO_BUNDLES)
    node.start()
    assert not echo(node.port)
    assert not store(node.port, negative.files[:1]).acknowledged
    assert node.running
    assert node.page("healthz")[0] == 200
    assert_says_nothing_of(node, negative)


def test_no_more_associations_than_allowed(make_node: Callable[..., Node]) -> None:
    from pynetdicom import AE  # noqa: PLC0415

    node = make_node(listen__associations=2, **NO_BUNDLES)
    node.start()
    ae = AE(ae_title="CT_1")
    ae.add_requested_context("1.2.840.10008.1.1")
    held = [ae.associate("127.0.0.1", node.port, ae_title="PE_INFER") for _ in range(2)]
    assert all(association.is_established for association in held)
    assert not echo(node.port)
    for association in held:
        association.release()
    node.assert_works()


@pytest.mark.parametrize("form", ["json", "text"])
def test_logs_metrics_and_status_say_nothing_of_the_patient(
    make_node: Callable[..., Node], positive: Study, negative: Study, form: str
) -> None:
    if form == "text":
        node = make_node(operations__log_level="debug", operations__log_format=form, **NO_BUNDLES)
        node.start()
        store(node.port, positive.files)
    else:
        node = make_node(operations__log_level="debug")
        node.start()
        store(node.port, positive.files[:-1])
        store(node.port, negative.files[:3])
        store(node.port, positive.files[-1:])
        node.result(positive)
    metrics, status = node.page("metrics")[1], str(node.status())
    assert node.stop() == 0
    for study in (positive, negative):
        assert_says_nothing_of(node, study, metrics, status)
    assert "stopping" in node.log.read_text()


def assert_says_nothing_of(node: Node, study: Study, *texts: str) -> None:
    for text in (node.log.read_text(), *texts):
        found = [secret for secret in study.secrets() if secret in text]
        assert not found, found
