"""Series without the finding beside negative studies of evaluations: the command and its rules."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cli_runs import chest
from strategies import REGULAR, body, study
from toy_bundles import make
from typer import Typer
from typer.testing import CliRunner, Result

from export import real_studies as command
from export.measures import StudyCase
from export.real_studies import Negatives, read_negatives, told_apart
from pe_infer import Detector
from pe_infer.bundle import Bundle
from pe_infer.dicom.writing import write_series
from pe_infer.errors import ConfigurationError, InputError
from pe_infer.geometry import Slice

TRAINING = {
    "stage1": {"sha256": "1" * 64},
    "stage2": {"sha256": "2" * 64},
    "all_backgrounds": True,
    "backgrounds": {"empty": "of nobody"},
}
WEIGHTS = {"stage1": "1" * 64, "stage2": "2" * 64}
OTHER_HASH = "f" * 64  # of the bundle before it got a model card
BRIGHTNESS = {
    "name": "brightness",
    "measure": {"kind": "level", "low_hu": -200, "high_hu": 1500, "quantile": 0.5, "cell_px": 1},
    "over": 0.5,
    "flag_below": 60.0,
    "meaning": "dark",
}


def evaluation(folder: Path, negatives: Sequence[float], **changes: Any) -> Path:
    """What ``export.evaluate`` would have written; positive studies have a probability of 1."""
    folder.mkdir()
    studies = [
        StudyCase(
            seed=100 + number,
            positive=positive,
            probability=1.0 if positive else probability,
            called=positive,
            threshold=0.5,
            alerted=False,
            largest_mm3=1.0,
            largest_place="right main",
            largest_kind="central",
            kinds=["central"],
            seconds_after_last_slice=0.1,
            gated_positives=0,
        )
        for number, probability in enumerate(negatives)
        for positive in (True, False)
    ]
    (folder / "studies.jsonl").write_text("".join(json.dumps(asdict(s)) + "\n" for s in studies))
    document = {
        "bundle_hash": OTHER_HASH,
        "checkpoints": WEIGHTS,
        "engine": "onnxruntime 1",
        "semi_synthetic": None,
        "shifted": False,
        "phantom_configuration": "abcdef0123456789",
        "first_seed": 100,
        "pairs": len(negatives),
        "cases": "studies.jsonl",
        **changes,
    }
    (folder / "evaluation.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of known checkpoints that flags what is dark."""
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}
    folder = tmp_path / "bundle"
    return make(
        folder, grid={"gate": gate}, min_slabs=2, checks=[BRIGHTNESS], training={**TRAINING}
    )


def series(folder: Path, organ_um: range, body_part: str = "CHEST") -> Path:
    """A phantom as DICOM files."""
    images: list[Slice] = chest(body(study(REGULAR), organ_um))
    named = [replace(i, series=replace(i.series, body_part_examined=body_part)) for i in images]
    write_series(named, folder)
    return folder


def invoked(*arguments: object) -> Result:
    app = Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_every_series_is_reported_as_it_is(bundle: Path, tmp_path: Path) -> None:
    one = series(tmp_path / "one|two", range(30_000, 70_001))
    empty = series(tmp_path / "empty", range(0))
    head = series(tmp_path / "head", range(30_000, 70_001), "HEAD")
    with Detector(bundle, engine="onnxruntime", cache_dir=None) as detector:
        result = detector.detect(one)
    assert result.probability is not None
    usual = evaluation(tmp_path / "a", [0.0, 0.0, result.probability, 1.0])
    other = evaluation(tmp_path / "b", [0.0], shifted=True, bundle_hash=OTHER_HASH)
    asked: list[object] = ["--bundle", bundle, "--negatives", usual, "--negatives", other]
    asked += ["--dicom", one, "--dicom", empty, "--dicom", head, "--engine", "onnxruntime"]
    done = invoked(*asked, "--out", tmp_path / "new" / "real.md")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "new" / "real.json").read_text())
    assert document["bundle_hash"] == Bundle.load(bundle).sha256
    assert document["operating_point"] == {"name": "balanced", "threshold": 0.5}
    assert document["negatives"]["phantoms"]["studies"] == 4
    processed, *others = document["studies"]
    assert processed["probability"] == pytest.approx(result.probability)
    assert processed["positive"] is (result.probability >= 0.5)
    # Two of four are lower and one is equal, if the same bits come out again.
    assert processed["percentiles"] == {"phantoms": 62.5, "shifted phantoms": 100.0}
    assert processed["flags"] == ["image_check (brightness)"]
    peaks = [slab.attention for slab in result.evidence if slab.attention]
    highest = max(peaks, key=lambda attention: attention.peak)
    assert processed["peak"] == pytest.approx(highest.peak)
    assert processed["peak_mm"] == pytest.approx(list(highest.peak_mm))
    assert [(each["name"], each["not_processed"]) for each in others] == [
        ("empty", "gate.no_organ"),
        ("head", "scope.mismatch"),
    ]
    assert all(each["probability"] is each["positive"] is None for each in others)
    text = (tmp_path / "new" / "real.md").read_text()
    assert text.startswith("## Real studies without the finding\n")
    assert "those with the same one counted half" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| one\\|two | no | processed | ")
    assert "| 62.5 | 100.0 | image_check (brightness) |" in rows[1]
    assert rows[2].startswith("| empty | yes | not processed: gate.no_organ | ")
    assert rows[3] == "| head | no | not processed: scope.mismatch | - | - | - | - | - | - |"
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_a_percentile_counts_what_is_lower_and_half_of_what_is_equal() -> None:
    negatives = Negatives(
        label="phantoms",
        configuration="abc",
        first_seed=0,
        engine="onnxruntime 1",
        probabilities=[0.1, 0.2, 0.2, 0.9],
    )
    found = [negatives.percentile(probability) for probability in (0.05, 0.1, 0.2, 0.5, 0.95)]
    assert found == [0.0, 12.5, 50.0, 75.0, 100.0]


def test_an_evaluation_of_other_weights_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", [0.1])
    found = read_negatives(folder, "e" * 64, TRAINING)  # the same weights in another bundle
    assert found.probabilities == [0.1]
    other = {**TRAINING, "stage2": {"sha256": "3" * 64}}
    with pytest.raises(InputError, match=f"{OTHER_HASH}.*{'2' * 64}.*{'e' * 64}.*{'3' * 64}"):
        read_negatives(folder, "e" * 64, other)
    nameless = evaluation(tmp_path / "b", [0.1], checkpoints={})
    assert read_negatives(nameless, OTHER_HASH, {}).probabilities == [0.1]
    with pytest.raises(InputError, match="is of bundle"):
        read_negatives(nameless, "e" * 64, {})


def test_an_evaluation_without_its_studies_is_refused(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", [0.1], cases="elsewhere/studies.jsonl")
    with pytest.raises(InputError, match="are not there"):
        read_negatives(folder, OTHER_HASH, TRAINING)
    with pytest.raises(InputError, match=r"evaluation\.json: is not there"):
        read_negatives(tmp_path, OTHER_HASH, TRAINING)


def test_evaluations_are_told_apart(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"shifted": True},
        {"semi_synthetic": "chest_contrast"},
        {"shifted": True, "first_seed": 101, "pairs": 1},
    ]
    found = [
        read_negatives(evaluation(tmp_path / str(i), [0.1, 0.2], **kind), OTHER_HASH, TRAINING)
        for i, kind in enumerate(kinds)
    ]
    assert list(told_apart(found)) == [
        "phantoms",
        "shifted phantoms abcdef01 from seed 100",
        "semi-synthetic studies made of chest_contrast",
        "shifted phantoms abcdef01 from seed 101",
    ]
    assert found[3].probabilities == [0.2]  # only the seeds that the evaluation is of
    with pytest.raises(ConfigurationError, match="given twice"):
        told_apart([found[0], found[0]])


def test_the_name_of_the_file_says_that_it_is_markdown(bundle: Path, tmp_path: Path) -> None:
    negatives = evaluation(tmp_path / "a", [0.1])
    asked = ["--bundle", bundle, "--negatives", negatives, "--dicom", tmp_path]
    done = invoked(*asked, "--out", tmp_path / "real.json")
    assert done.exit_code == ConfigurationError.exit_code
    assert "ends in .md" in " ".join(done.output.split())
