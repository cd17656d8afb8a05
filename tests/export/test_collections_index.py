"""Indexes on disk: patient-wise splits, counts, refusals; the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from collection_layouts import write_rsna
from typer import Typer
from typer.testing import CliRunner

from export.datasets import index as command
from export.datasets.collections.base import SPLITS, Found, Fractions, IndexedStudy, split_of
from export.datasets.collections.index import (
    counts,
    left_out_path,
    read_index,
    split_studies,
    write_index,
)
from pe_infer.errors import ConfigurationError, InputError


def study(patient: str, number: int = 0, *, positive: bool = False) -> IndexedStudy:
    return IndexedStudy(
        study=f"{patient}-{number}",
        patient=patient,
        form="dicom",
        files=("a.dcm",),
        positive=positive,
        types={"subdural": positive},
        slices={"1": ("subdural",) if positive else (), "2": ()},
    )


@pytest.fixture
def found() -> Found:
    """300 patients with two studies each; every third is positive."""
    return Found(
        studies=[study(f"p{n}", k, positive=n % 3 == 0) for n in range(300) for k in range(2)]
    )


def app() -> Typer:
    app = Typer()
    app.command()(command.main)
    return app


def test_all_studies_of_a_patient_come_to_one_split(found: Found, tmp_path: Path) -> None:
    index = split_studies("c", tmp_path, found, Fractions(validation=0.2, test=0.3))
    places: dict[str, set[str]] = {}
    for entry in index.entries:
        places.setdefault(entry.study.patient, set()).add(entry.split)
    assert all(len(splits) == 1 for splits in places.values())
    shares = {s: sum(splits == {s} for splits in places.values()) / 300 for s in SPLITS}
    assert shares["test"] == pytest.approx(0.3, abs=0.08)
    assert shares["validation"] == pytest.approx(0.2, abs=0.08)


def test_a_patient_stays_where_the_hash_says_whatever_else_is_there() -> None:
    fractions = Fractions(validation=0.2, test=0.3)
    assert [split_of("c", f"p{n}", fractions) for n in range(8)] == [
        split_of("c", f"p{n}", fractions) for n in range(8)
    ]
    one = {n: split_of("c", f"p{n}", fractions) for n in range(100)}
    other = {n: split_of("d", f"p{n}", fractions) for n in range(100)}
    assert one != other
    more_tested = {n: split_of("c", f"p{n}", Fractions(test=0.5)) for n in range(100)}
    assert all(more_tested[n] == "test" for n in one if one[n] == "test")


def test_everybody_can_be_tested_on(found: Found, tmp_path: Path) -> None:
    index = split_studies("c", tmp_path, found, Fractions(validation=0.0, test=1.0))
    assert len(index.chosen("test")) == 600
    with pytest.raises(ConfigurationError, match="is empty"):
        index.chosen("train")
    with pytest.raises(ConfigurationError, match="none of"):
        index.chosen("tset")


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.2), (0.6, 0.5), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(validation: float, test: float) -> None:
    with pytest.raises(ConfigurationError, match="shares of the patients"):
        Fractions(validation=validation, test=test)


def test_an_index_comes_back_as_it_was(found: Found, tmp_path: Path) -> None:
    found.leave_out("x.dcm", "truncated", "x.dcm: short")
    index = split_studies("c", tmp_path, found, Fractions())
    path = tmp_path / "index.jsonl"
    write_index(path, index, found)
    assert read_index(path) == index
    assert read_index(path, root=tmp_path / "moved").root == tmp_path / "moved"
    left = [json.loads(line) for line in left_out_path(path).read_text().splitlines()]
    assert left == [{"what": "x.dcm", "reason": "truncated", "message": "x.dcm: short"}]


def test_counts_are_of_patients_studies_types_and_slices(found: Found, tmp_path: Path) -> None:
    index = split_studies("c", tmp_path, found, Fractions())
    assert counts(index.entries) == {
        "patients": 300,
        "studies": 600,
        "positive": 200,
        "subdural": 200,
        "with mask": 0,
        "labelled slices": 1200,
        "positive slices": 200,
    }


def test_a_patient_moved_into_a_second_split_is_refused(found: Found, tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    write_index(
        path, split_studies("c", tmp_path, found, Fractions(test=1.0, validation=0.0)), found
    )
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"split": "test"', '"split": "train"')
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="row 3: ValueError: a patient in train and test"):
        read_index(path)


def test_a_damaged_index_is_refused_with_its_row(found: Found, tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    write_index(path, split_studies("c", tmp_path, found, Fractions()), found)
    lines = path.read_text().splitlines()
    for text, said in (
        ("\n".join(lines[:-1]), "row 1"),
        ("\n".join([lines[0], "{", *lines[2:]]), "row 2"),
        ("\n".join([*lines[:4], lines[4].replace("files", "fils"), *lines[5:]]), "row 5"),
        ("", "row 1"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_index(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_index(tmp_path / "absent.jsonl")


def test_the_command_writes_an_index_and_says_what_it_left_out(tmp_path: Path) -> None:
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a", "b"], "p2": ["c"]}, positive={"b": [1]})
    (root / "stage_2_train/ID_a0000.dcm").unlink()
    out = tmp_path / "out/index.jsonl"
    arguments = ["--collection", "rsna-ich-2019", "--root", str(root), "--out", str(out)]
    done = CliRunner().invoke(app(), [*arguments, "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "no file" in done.output
    assert "positive" in done.output
    assert len(read_index(out).entries) == 3


def test_the_command_ends_with_the_code_of_its_error(tmp_path: Path) -> None:
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a"]})
    out = ["--root", str(root), "--out", str(tmp_path / "i.jsonl")]
    assert CliRunner().invoke(app(), ["--collection", "nothing", *out]).exit_code == 2
    for file in (root / "stage_2_train").iterdir():
        file.write_bytes(b"damaged")
    done = CliRunner().invoke(app(), ["--collection", "rsna-ich-2019", *out, "--workers", "1"])
    assert done.exit_code == 3
    assert "can be used" in done.output
    assert not (tmp_path / "i.jsonl").exists()


def test_readers_and_index_need_no_pytorch() -> None:
    code = (
        "import sys, export.datasets.index, export.datasets.collections.gridded; "
        "print(*({'torch', 'nibabel', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
