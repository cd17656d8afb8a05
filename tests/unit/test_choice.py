"""Which bundle a study asks for, and that nothing is guessed where it does not say."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dicom_files import SERIES, save_series
from strategies import REGULAR, body, study
from toy_bundles import make

from pe_infer import BundleError, Detector, Flag, ScopeError, SeriesError, choose_bundle
from pe_infer import bundle as bundles
from pe_infer.choice import match
from pe_infer.cli import app as command_line
from pe_infer.dicom import write_series
from pe_infer.errors import Code
from pe_infer.geometry import SeriesInfo
from pe_infer.manifest import Scope

HEAD = Scope(body_part=("HEAD", "SKULL"), keywords=("CCT", "Schädel", "circle of Willis"))
CHEST = Scope(body_part=("CHEST", "THORAX"), contrast="required", keywords=("PE",))
BOTH = {"chest": CHEST, "head": HEAD}
POSITIONS_MM = [float(z) for z in range(0, 80, 5)]


def matched(scopes: dict[str, Scope] = BOTH, **said: str) -> tuple[str, str]:
    found = match(SeriesInfo(**said), scopes)
    return found.bundle, found.reason


def refusal(scopes: dict[str, Scope] = BOTH, **said: str) -> ScopeError:
    with pytest.raises(ScopeError) as caught:
        match(SeriesInfo(**said), scopes)
    return caught.value


# one series


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("HEAD", "head"),
        ("head", "head"),
        ("HEADNECK", "head"),
        ("CHEST", "chest"),
        ("CHEST_ABDOMEN", "chest"),
        ("Thorax", "chest"),
    ],
)
def test_the_body_part_decides(part: str, expected: str) -> None:
    assert matched(body_part_examined=part) == (expected, f"BodyPartExamined {part!r}")


def test_what_the_series_says_wins_over_the_words_of_its_protocol() -> None:
    assert matched(body_part_examined="HEAD", protocol_name="CT Angio PE")[0] == "head"
    error = refusal({"chest": CHEST}, body_part_examined="HEAD", protocol_name="CT Angio PE")
    assert error.code is Code.OUT_OF_SCOPE


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"protocol_name": "CT Angio PE"}, "chest"),
        ({"protocol_name": "R/O pe"}, "chest"),
        ({"series_description": "Thorax^01_Routine"}, "chest"),
        ({"study_description": "CT HEAD W/O"}, "head"),
        ({"study_description": "CCT nativ"}, "head"),
        ({"series_description": "SCHADEL 5 mm"}, "head"),
        ({"series_description": "Scha\u0308del 5 mm"}, "head"),
        ({"protocol_name": "CTA circle_of/willis"}, "head"),
    ],
)
def test_words_decide_where_the_body_part_is_missing(said: dict[str, str], expected: str) -> None:
    assert matched(**said)[0] == expected
    assert matched(body_part_examined=" ", **said)[0] == expected


def test_the_reason_holds_attribute_value_and_word() -> None:
    reason = matched(protocol_name="Thorax Routine", contrast_bolus_agent="OMNI")[1]
    assert reason == "ContrastBolusAgent 'OMNI', ProtocolName 'Thorax Routine' says 'THORAX'"
    assert len(matched(protocol_name="PE " + 999 * "x")[1]) < 200


@pytest.mark.parametrize("words", ["SPEED", "headline", "circle Willis", "P E", ""])
def test_parts_of_words_and_of_phrases_do_not_decide(words: str) -> None:
    assert refusal(protocol_name=words).code is Code.UNDECIDED_BUNDLE


def test_a_keyword_without_letters_names_nothing() -> None:
    scopes = {"dash": Scope(keywords=("-",)), "head": HEAD}
    assert matched(scopes, protocol_name="head - native")[0] == "head"
    assert refusal(scopes, protocol_name="-").code is Code.UNDECIDED_BUNDLE


def test_a_protocol_of_both_is_settled_by_the_series_description() -> None:
    assert matched(protocol_name="Head and Chest", series_description="Head 5 mm")[0] == "head"
    assert matched(protocol_name="Chest", study_description="CT HEAD CHEST")[0] == "chest"


def test_texts_that_contradict_each_other_are_refused() -> None:
    error = refusal(protocol_name="Head Routine", series_description="Chest 1.0")
    assert error.code is Code.UNDECIDED_BUNDLE
    assert "'head': ProtocolName 'Head Routine' says 'HEAD'" in str(error)
    assert "'chest': SeriesDescription 'Chest 1.0' says 'CHEST'" in str(error)
    assert "--bundle" in str(error)


def test_two_bundles_for_one_body_part_are_told_apart_by_words_or_contrast() -> None:
    native = replace_scope(CHEST, contrast="forbidden", keywords=("nodule",))
    scopes = {"angio": CHEST, "native": native}
    assert refusal(scopes, body_part_examined="CHEST").code is Code.UNDECIDED_BUNDLE
    assert matched(scopes, body_part_examined="CHEST", contrast_bolus_agent="NONE") == (
        "native",
        "BodyPartExamined 'CHEST', ContrastBolusAgent 'NONE'",
    )
    assert matched(scopes, body_part_examined="CHEST", protocol_name="R/O PE") == (
        "angio",
        "BodyPartExamined 'CHEST', ProtocolName 'R/O PE' says 'PE'",
    )


def test_a_series_that_says_nothing_is_refused_though_only_one_bundle_is_there() -> None:
    error = refusal({"chest": CHEST})
    assert error.code is Code.UNDECIDED_BUNDLE
    for expected in ("BodyPartExamined is missing", "ProtocolName is missing", "--bundle"):
        assert expected in str(error)
    assert matched({"chest": CHEST}, protocol_name="PE")[0] == "chest"


def test_a_bundle_that_accepts_everything_is_never_preferred() -> None:
    scopes = {"any": Scope(), "head": HEAD}
    assert matched(scopes, body_part_examined="HEAD")[0] == "head"
    assert refusal(scopes, body_part_examined="FOOT").code is Code.UNDECIDED_BUNDLE


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ({"body_part_examined": "ABDOMEN", "protocol_name": "PE"}, "'ABDOMEN'"),
        ({"modality": "MR", "body_part_examined": "HEAD"}, "'MR'"),
    ],
)
def test_a_series_that_no_bundle_is_for_is_refused_with_every_reason(
    said: dict[str, str], quoted: str
) -> None:
    error = refusal(**said)
    assert error.code is Code.OUT_OF_SCOPE
    for name in BOTH:
        assert f"{quoted}, bundle {name!r} is for" in str(error)
    assert "--bundle" in str(error)


def replace_scope(scope: Scope, **changes: object) -> Scope:
    return scope.model_copy(update=changes)


# a study


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bundles, for a chest and for a head."""
    folder = tmp_path_factory.mktemp("package")
    for name, scope in BOTH.items():
        make(folder / name, name=name, scope=scope.model_dump(mode="json"))
    return folder


@pytest.fixture
def two_shipped(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "SHIPPED", package)


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., Path]:
    """Add a series to a study."""

    def write(number: int, **said: object) -> Path:
        save_series(
            tmp_path / "study" / str(number),
            POSITIONS_MM,
            SeriesNumber=number,
            SeriesInstanceUID=f"{SERIES}.{number}",
            **said,
        )
        return tmp_path / "study"

    return write


@pytest.mark.usefixtures("two_shipped")
def test_the_series_that_a_bundle_is_for_is_opened(add: Callable[..., Path]) -> None:
    add(1, BodyPartExamined="ABDOMEN")  # better by every other rule: original, and contrast
    folder = add(
        2,
        BodyPartExamined="HEAD",
        ContrastBolusAgent=None,
        ImageType=["DERIVED", "SECONDARY", "AXIAL"],
    )
    choice = choose_bundle(folder)
    assert (choice.bundle, choice.version) == ("head", "0.1.0")
    assert choice.reason == "BodyPartExamined 'HEAD'"
    assert choice.series.summary.series_number == 2
    flags = {flag.flag: flag for flag in choice.series.flags}
    assert "the bundle is for it" in flags[Flag.SERIES_CHOSEN].message
    assert flags[Flag.BUNDLE_CHOSEN].values == {"bundle": "head", "candidates": 2}
    assert choice.reason in flags[Flag.BUNDLE_CHOSEN].message


@pytest.mark.usefixtures("two_shipped")
def test_of_several_fitting_series_the_usual_rules_choose(add: Callable[..., Path]) -> None:
    add(1, BodyPartExamined="CHEST", SliceThickness=5.0)
    add(2, BodyPartExamined="CHEST", ConvolutionKernel="LUNG")
    folder = add(3, BodyPartExamined="CHEST", ContrastBolusAgent="OMNI")
    choice = choose_bundle(folder)
    assert (choice.bundle, choice.series.summary.series_number) == ("chest", 3)
    add(4, BodyPartExamined="CHEST", ContrastBolusAgent="OMNI")
    with pytest.raises(SeriesError, match="equally suitable") as caught:
        choose_bundle(folder)
    assert caught.value.code is Code.AMBIGUOUS_SERIES


@pytest.mark.usefixtures("two_shipped")
def test_a_study_of_a_head_and_a_chest_asks_which(add: Callable[..., Path]) -> None:
    add(1, BodyPartExamined="HEAD")
    folder = add(2, SeriesDescription="CHEST PE")
    with pytest.raises(ScopeError, match="different bundles") as caught:
        choose_bundle(folder)
    assert caught.value.code is Code.UNDECIDED_BUNDLE
    message = str(caught.value)
    for expected in ("series 1", "bundle 'head'", "series 2 'CHEST PE'", "bundle 'chest'"):
        assert expected in message
    assert "--series" in message
    assert choose_bundle(folder, 1).bundle == "head"
    assert choose_bundle(folder, f"{SERIES}.2").bundle == "chest"


@pytest.mark.usefixtures("two_shipped")
def test_a_named_series_that_no_bundle_is_for_is_refused(add: Callable[..., Path]) -> None:
    add(1, BodyPartExamined="HEAD")
    folder = add(2, BodyPartExamined="KNEE")
    with pytest.raises(ScopeError, match="KNEE"):
        choose_bundle(folder, "2")
    with pytest.raises(SeriesError, match="series 9 was not found"):
        choose_bundle(folder, 9)


@pytest.mark.usefixtures("two_shipped")
def test_a_study_that_no_bundle_is_for_is_refused_series_by_series(
    add: Callable[..., Path],
) -> None:
    for number in range(1, 8):
        folder = add(number, BodyPartExamined="KNEE")
    with pytest.raises(ScopeError, match=r"none of 7 series") as caught:
        choose_bundle(folder)
    assert caught.value.code is Code.OUT_OF_SCOPE
    assert "and 2 more" in str(caught.value)
    folder = add(8)
    with pytest.raises(ScopeError) as caught:
        choose_bundle(folder)
    assert caught.value.code is Code.UNDECIDED_BUNDLE


@pytest.mark.usefixtures("two_shipped")
def test_a_damaged_slice_is_not_left_out(add: Callable[..., Path]) -> None:
    folder = add(1, BodyPartExamined="HEAD")
    (folder / "1" / "0003.dcm").write_bytes(b"\0" * 128 + b"DICM damaged")
    with pytest.raises(Exception, match=r"0003\.dcm"):
        choose_bundle(folder)


@pytest.mark.usefixtures("two_shipped")
def test_a_source_without_a_series_is_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="no DICOM image was found"):
        choose_bundle(tmp_path)


def test_any_bundles_can_be_chosen_from(
    add: Callable[..., Path], package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = add(1, BodyPartExamined="HEAD")
    choice = choose_bundle(folder, bundles=[package / "chest", package / "head"])
    assert choice.bundle == package / "head"
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(BundleError, match="no bundle to choose from"):
        choose_bundle(folder)


@pytest.mark.usefixtures("two_shipped")
def test_a_manifest_alone_is_read(add: Callable[..., Path], package: Path) -> None:
    graph = package / "chest" / "encoder.onnx"
    data = graph.read_bytes()
    graph.write_bytes(b"damaged")
    try:
        assert choose_bundle(add(1, BodyPartExamined="HEAD")).bundle == "head"
    finally:
        graph.write_bytes(data)


# to the verdict


def write_study(folder: Path, part: str | None, protocol: str | None = None) -> Path:
    images = body(study(REGULAR[:40]), range(40_000))
    said = {"body_part_examined": part, "protocol_name": protocol}
    write_series([replace(i, series=replace(i.series, **said)) for i in images], folder)
    return folder


@pytest.mark.usefixtures("two_shipped")
def test_the_result_says_how_the_bundle_was_chosen(tmp_path: Path) -> None:
    choice = choose_bundle(write_study(tmp_path, "HEAD"))
    with Detector(choice.bundle, engine="onnxruntime", cache_dir=None) as detector:
        result = detector.detect(choice.series)
        again = detector.detect(tmp_path)
    (flag,) = (q for q in result.quality if q.flag is Flag.BUNDLE_CHOSEN)
    assert flag.message == "bundle 'head' 0.1.0 was chosen: BodyPartExamined 'HEAD'"
    assert result.provenance.bundle == "head"
    assert Flag.BUNDLE_CHOSEN not in {q.flag for q in again.quality}  # it was named
    assert again.probability == result.probability


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    two_shipped: None,
) -> Callable[..., tuple[int, str, str]]:
    """Run ``pe-infer`` here, with the two bundles as if they were shipped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pe-infer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize("pace", [(), ("--stream-rate", "100000")])
def test_detect_says_which_bundle_before_it_reads(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, pace: tuple[str, ...]
) -> None:
    folder = write_study(tmp_path / "study", None, "Head Routine")
    code, out, err = cli("detect", folder, "--engine", "onnxruntime", *pace)
    assert code == 0, err
    assert out.splitlines()[0] == "bundle head 0.1.0: ProtocolName 'Head Routine' says 'HEAD'"
    assert "flag bundle_chosen" in out


def test_detect_keeps_the_choice_out_of_the_json_on_standard_output(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = write_study(tmp_path / "study", "CHEST")
    code, out, err = cli("detect", folder, "--engine", "onnxruntime", "--json", "-")
    assert code == 0, err
    assert "bundle chest 0.1.0: BodyPartExamined 'CHEST'" in err
    document = json.loads(out)
    assert document["provenance"]["bundle"] == "chest"
    assert "bundle_chosen" in {flag["flag"] for flag in document["quality"]}


@pytest.mark.parametrize(
    ("part", "wrong", "right"), [("HEAD", "chest", "head"), ("CHEST", "head", "chest")]
)
def test_another_part_of_the_body_is_refused_and_the_right_bundle_named(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, part: str, wrong: str, right: str
) -> None:
    folder = write_study(tmp_path / "study", part)
    code, out, err = cli("detect", folder, "--bundle", wrong, "--engine", "onnxruntime")
    assert code == 4
    assert not out
    assert f"[scope.mismatch] BodyPartExamined is {part!r}, bundle {wrong!r} is for" in err
    assert f"Bundle {right!r} is for it (BodyPartExamined {part!r}): --bundle {right}" in err


@pytest.mark.parametrize(("part", "code"), [("KNEE", "mismatch"), (None, "undecided")])
def test_a_study_that_asks_for_no_bundle_ends_with_4(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, part: str | None, code: str
) -> None:
    folder = write_study(tmp_path / "study", part)
    status, out, err = cli("detect", folder)
    assert status == 4
    assert not out
    assert f"[scope.{code}]" in err
    assert "--bundle" in err
    if part is not None:
        status, _, err = cli("detect", folder, "--bundle", "head", "--engine", "onnxruntime")
        assert status == 4
        assert "is for it" not in err  # there is none to name


def test_inspect_names_the_bundle_of_every_series(
    cli: Callable[..., tuple[int, str, str]], add: Callable[..., Path]
) -> None:
    add(1, BodyPartExamined="HEAD")
    add(2, BodyPartExamined="KNEE")
    folder = add(3, BodyPartExamined="HEAD", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    code, out, _ = cli("inspect", folder)
    assert code == 0
    lines = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  bundle ")]
    assert len(lines) == 2
    assert lines[0] == "head: BodyPartExamined 'HEAD'"
    assert lines[1].startswith("none: no bundle is for this series: BodyPartExamined is 'KNEE'")
