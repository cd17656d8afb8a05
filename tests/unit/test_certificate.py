"""Precision certificates: what they say, where they are stored, which are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy_bundles as toy
from altered_bundles import Edit, edit_manifest, replace_file
from certificates import certificate_of, flips, half_range, tensor_error
from pydantic import ValidationError
from typer.testing import CliRunner

from pe_infer.bundle import Bundle, add_certificate, shipped, write_bundle
from pe_infer.bundle_check import build_bundle
from pe_infer.certificate import Certificate, certificate_schema
from pe_infer.cli.bundles_command import app
from pe_infer.errors import BundleError, Code
from pe_infer.half import CONVERSION_VERSION


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = toy.write_toy(tmp_path_factory.mktemp("bundles") / "toy")
    return add_certificate(bundle, certificate_of(bundle)).folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "toy")
    return tmp_path / "toy"


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder)
    assert caught.value.code == Code.BUNDLE_INVALID
    return str(caught.value)


def show(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["show", str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# the model


def test_what_is_written_is_read_again(original: Path) -> None:
    certificate = certificate_of(Bundle.load(original))
    assert Certificate.model_validate_json(certificate.to_bytes()) == certificate


def test_what_is_written_follows_the_published_schema(original: Path) -> None:
    jsonschema.validate(
        json.loads(certificate_of(Bundle.load(original)).to_bytes()), certificate_schema()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1},
        {"format_version": 2},
        {"studies": 7},
        {"inner_studies": 7},
        {"study_scores": (1, 2)},
        {"largest_score_error": float("nan")},
        {"graphs": {}},
        {"program": "abc"},
        {"first_seed": "2900000"},
    ],
)
def test_refuses_what_makes_no_sense(original: Path, changes: dict[str, Any]) -> None:
    bundle = Bundle.load(original)
    with pytest.raises(ValidationError):
        certificate_of(bundle, **changes)


def test_says_nothing_where_all_is_well(original: Path) -> None:
    near = (flips(within=2),)
    assert certificate_of(Bundle.load(original), flips=near).shortcomings() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"errors": (tensor_error(node="up", largest=3.403e38),)},
            "node 'up': some values of y are not finite",
        ),
        ({"ranges": (half_range(largest=70000.0),)}, "'encoder' overflows: conv_1 reaches 7e+04"),
        ({"flips": (flips(beyond=1),)}, "1 verdicts flip further than 0.01"),
        (
            {"logits": ({"output": "slab_logit", "count": 9, "p99": 0.06, "max": 0.02},)},
            "99 % of slab logits are within 0.06, wanted 0.05",
        ),
        (
            {"logits": ({"output": "online_logit", "count": 9, "p99": 0.06, "max": 0.07},)},
            "99 % of online logits are within 0.06, wanted 0.05",
        ),
    ],
)
def test_names_its_shortcomings(original: Path, changes: dict[str, Any], said: str) -> None:
    (shortcoming,) = certificate_of(Bundle.load(original), **changes).shortcomings()
    assert said in shortcoming


# in a bundle


def test_a_bundle_may_do_without(tmp_path: Path) -> None:
    assert toy.write_toy(tmp_path / "toy").certificate is None


def test_adding_one_changes_neither_graphs_nor_anything_else(tmp_path: Path) -> None:
    plain = toy.write_toy(tmp_path / "toy")
    files = {path.name: path.read_bytes() for path in plain.folder.iterdir()}
    certificate = certificate_of(plain)

    added = add_certificate(plain, certificate)

    assert added.certificate == certificate
    assert added.sha256 != plain.sha256
    assert dict(added.files) == {**plain.files, "certificate.json": certificate.to_bytes()}
    kept = plain.folder.iterdir()
    assert {path.name for path in kept} == {*files, "certificate.json"}
    for name in files.keys() - {"bundle.json"}:
        assert (plain.folder / name).read_bytes() == files[name]
    before, after = (
        b.manifest.model_dump(exclude={"files", "certificate"}) for b in (plain, added)
    )
    assert before == after


def test_a_new_one_takes_the_place_of_an_old_one(folder: Path) -> None:
    bundle = Bundle.load(folder)
    newer = certificate_of(bundle, slabs=301)
    again = add_certificate(bundle, newer)
    assert again.certificate == newer
    assert again.files.keys() == bundle.files.keys()


def other_programs() -> dict[str, Edit]:
    def calibrate(document: dict[str, Any]) -> None:
        document["calibration"] = {"scale": 2.0, "offset": 0.0}

    def in_float32(document: dict[str, Any]) -> None:
        document["nodes"][0]["precision"] = "float32"

    def brighter(document: dict[str, Any]) -> None:
        document["grid"]["windows"][0]["high_hu"] = 400

    def stricter(document: dict[str, Any]) -> None:
        document["operating_points"][0]["threshold"] = 0.6

    return {edit.__name__: edit for edit in (calibrate, in_float32, brighter, stricter)}


@pytest.mark.parametrize("kind", other_programs())
def test_refuses_the_certificate_of_another_program(folder: Path, kind: str) -> None:
    edit_manifest(folder, other_programs()[kind])
    message = refused(folder)
    assert "certificate.json: the certificate does not belong to this bundle" in message
    assert "python -m export.certify" in message


def test_refuses_the_certificate_of_other_weights(folder: Path) -> None:
    replace_file(folder, "up.onnx", toy.recurrence(77))
    assert "made from another graph 'up.onnx'" in refused(folder)


def test_verifying_refuses_it_too(folder: Path) -> None:
    replace_file(folder, "up.onnx", toy.recurrence(77))
    with pytest.raises(BundleError, match="does not belong to this bundle"):
        CliRunner().invoke(app, ["verify", str(folder)], catch_exceptions=False)


def test_what_says_nothing_of_precision_may_change(folder: Path) -> None:
    edit_manifest(folder, lambda d: d.update(intended_use="something else", version="0.2.0"))
    edit_manifest(folder, lambda d: d["operating_points"][0].update(description="new words"))
    assert Bundle.load(folder).certificate is not None


@pytest.mark.parametrize("data", [b"", b"{}", b"[1, 2]", b"\xff\xfe"])
def test_refuses_what_is_no_certificate(folder: Path, data: bytes) -> None:
    replace_file(folder, "certificate.json", data)
    assert "certificate.json: not a certificate" in refused(folder)


def test_refuses_an_altered_one(folder: Path) -> None:
    (folder / "certificate.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"certificate\.json: sha256") as caught:
        Bundle.load(folder)
    assert caught.value.code == Code.BUNDLE_ALTERED


def test_refuses_one_that_is_not_listed(folder: Path) -> None:
    edit_manifest(folder, lambda d: d["files"].pop("certificate.json"))
    assert "no sha256 in 'files' for ['certificate.json']" in refused(folder)


def test_a_foreign_one_is_not_written(folder: Path, tmp_path: Path) -> None:
    other = toy.write_toy(tmp_path / "other", "radnet_like")
    before = (other.folder / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="does not belong"):
        add_certificate(other, certificate_of(Bundle.load(folder)))
    assert (other.folder / "bundle.json").read_bytes() == before
    assert not (other.folder / "certificate.json").exists()


def test_a_bundle_made_anew_has_none(folder: Path) -> None:
    document, files = toy.pe_like()
    anew = build_bundle(folder, document, {**files, "up.onnx": toy.recurrence(77)})
    assert anew.certificate is None
    assert not (folder / "certificate.json").exists()


def test_a_bundle_with_other_weights_cannot_be_written_with_it(
    folder: Path, tmp_path: Path
) -> None:
    bundle = Bundle.load(folder)
    files = {**bundle.files, "up.onnx": toy.recurrence(77)}
    with pytest.raises(BundleError, match="does not belong"):
        write_bundle(tmp_path / "new", bundle.manifest.model_dump(mode="json"), files)
    assert not (tmp_path / "new").exists()


# shown


def test_shows_what_was_measured(folder: Path) -> None:
    output = show(folder)
    for expected in (
        "float16 on 6 synthetic studies, 300 slabs, ONNX Runtime 1.27.0 on the CPU",
        "1000 steps",
        "0.1 (0.5)",  # growth, per cent
        "5.2e+03 x",
        "error p99 0.004, max 0.02 of 300",
        "0 of 6 verdicts at 0.5: 0 within 0.01 of it, 0 beyond",
        "2900000 to 2900002",
        "#" * 40,
    ):
        assert expected in output
    assert next(line for line in output.splitlines() if "shortcomings" in line).endswith("none")


def test_shows_where_float16_falls_short(tmp_path: Path) -> None:
    bundle = toy.write_toy(tmp_path / "toy")
    weak = certificate_of(
        bundle, flips=(flips(within=1, beyond=2),), conversion_version=999, held_out=False
    )
    output = show(add_certificate(bundle, weak).folder)
    assert "3 of 6 verdicts at 0.5: 1 within 0.01 of it, 2 beyond" in output
    assert "2 verdicts flip further" in output
    assert "version 999 of the conversion" in output
    assert "that training may have seen" in output


def test_says_that_nothing_was_measured(tmp_path: Path) -> None:
    output = show(toy.write_toy(tmp_path / "toy").folder)
    assert "none: what float16 costs was not measured" in output
    assert "shortcomings" not in output


def test_shows_all_of_it_as_json(folder: Path) -> None:
    found = json.loads(show(folder, "--json"))
    assert found["name"] == "toy"
    bundle = Bundle.load(folder)
    assert bundle.certificate is not None
    assert found["certificate"] == json.loads(bundle.certificate.to_bytes())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_bundle_has_a_certificate_that_is_good_enough(name: str) -> None:
    certificate = Bundle.load(name).certificate
    assert certificate is not None
    assert certificate.shortcomings() == []
    assert certificate.conversion_version == CONVERSION_VERSION
    assert certificate.held_out
    assert 2 * certificate.pairs >= 100
