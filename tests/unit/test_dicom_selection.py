"""The order of preference among series."""

from dataclasses import replace

import pytest

from pe_infer.dicom.selection import (
    Refusal,
    SeriesSummary,
    choose,
    is_sharp_kernel,
    ordered,
)
from pe_infer.errors import Code, SeriesError
from pe_infer.series import says_contrast

GOOD = SeriesSummary(
    series_instance_uid="2.25.1",
    study_instance_uid="2.25.100",
    series_number=1,
    description="CTPA",
    modality="CT",
    sop_class="CT Image Storage",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    instances=300,
    slices=300,
    rows=512,
    cols=512,
    thickness_mm=1.25,
    step_mm=1.25,
    extent_mm=300.0,
    contrast_bolus_agent="OMNI",
    convolution_kernel="STANDARD",
    body_part_examined="CHEST",
    transfer_syntaxes=("Explicit VR Little Endian",),
    refusal=None,
    problems=(),
)
WORSE = {
    "ORIGINAL": {"image_type": ("DERIVED", "PRIMARY", "AXIAL")},
    "PRIMARY": {"image_type": ("ORIGINAL", "SECONDARY", "AXIAL")},
    "not reformatted": {"image_type": ("ORIGINAL", "PRIMARY", "AXIAL", "CSA MPR")},
    "AXIAL": {"image_type": ("ORIGINAL", "PRIMARY", "OTHER")},
    "50 mm": {"extent_mm": 20.0},
    "contrast agent": {"contrast_bolus_agent": None},
    "at most 3 mm": {"thickness_mm": 5.0},
    "kernel": {"convolution_kernel": "LUNG"},
    "thinner": {"thickness_mm": 2.5},
}


def other(**changes: object) -> SeriesSummary:
    return replace(GOOD, series_instance_uid="2.25.2", series_number=2, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", WORSE)
@pytest.mark.parametrize("first", [True, False])
def test_each_criterion_decides_and_is_told(reason: str, first: bool) -> None:
    worse = other(**WORSE[reason])
    choice = choose([GOOD, worse] if first else [worse, GOOD])
    assert choice.summary is GOOD
    assert choice.reason is not None
    assert reason in choice.reason
    assert "'CTPA'" in choice.reason


def test_criteria_apply_in_their_order() -> None:
    names = list(WORSE)
    for better, worse in zip(names[1:], names, strict=False):
        late, early = replace(GOOD, **WORSE[better]), other(**WORSE[worse])  # type: ignore[arg-type]
        if "image_type" in WORSE[better] or better == "thinner":
            continue
        assert choose([early, late]).summary is late, (better, worse)


def test_contrast_may_be_ignored() -> None:
    native = other(contrast_bolus_agent=None, thickness_mm=0.6, step_mm=0.6)
    assert choose([GOOD, native]).summary is GOOD
    assert choose([GOOD, native], prefer_contrast=False).summary is native


def test_the_only_series_needs_no_reason() -> None:
    refused = other(refusal=Refusal(code=Code.NOT_AXIAL_IMAGE, message="a localizer"))
    choice = choose([refused, GOOD])
    assert choice.summary is GOOD
    assert choice.reason is None


def test_series_of_several_studies_are_refused() -> None:
    with pytest.raises(SeriesError, match="2 studies") as caught:
        choose([GOOD, other(study_instance_uid="2.25.200", thickness_mm=5.0)])
    assert caught.value.code is Code.AMBIGUOUS_SERIES


def test_ties_are_refused() -> None:
    with pytest.raises(SeriesError, match=r"2\.25\.1.*2\.25\.2") as caught:
        choose([GOOD, other(extent_mm=450.0)])
    assert caught.value.code is Code.AMBIGUOUS_SERIES


def test_long_lists_are_cut() -> None:
    many = [replace(GOOD, series_instance_uid=f"2.25.{n}") for n in range(15)]
    with pytest.raises(SeriesError, match="and 5 more"):
        choose(many)


@pytest.mark.parametrize("name", [2, "2", " 2 ", "002", "+2", "2.25.2"])
def test_series_is_named_by_number_or_uid(name: str | int) -> None:
    assert choose([GOOD, other()], name).summary.series_number == 2


def test_number_of_two_series_is_refused() -> None:
    with pytest.raises(SeriesError, match="have the number 1") as caught:
        choose([GOOD, replace(other(), series_number=1)], 1)
    assert caught.value.code is Code.AMBIGUOUS_SERIES


def test_number_shared_with_a_localizer_is_the_axial_series() -> None:
    scout = replace(
        other(refusal=Refusal(code=Code.NOT_AXIAL_IMAGE, message="a localizer")), series_number=1
    )
    assert choose([scout, GOOD], 1).summary is GOOD


def test_number_may_be_negative() -> None:
    assert choose([GOOD, replace(other(), series_number=-1)], -1).summary.series_number == -1


@pytest.mark.parametrize("name", [9, "9.9", "²", "-1", "", "None", "9" * 5000])
def test_unknown_series_lists_what_there_is(name: str | int) -> None:
    nameless = replace(other(), series_instance_uid="", series_number=None)
    with pytest.raises(SeriesError, match="CTPA") as caught:
        choose([GOOD, nameless], name)
    assert caught.value.code is Code.NO_CT_SERIES
    assert len(str(caught.value)) < 1000


def test_named_localizer_is_refused_with_its_reason() -> None:
    scout = other(refusal=Refusal(code=Code.NOT_AXIAL_IMAGE, message="a localizer"))
    with pytest.raises(SeriesError, match="a localizer"):
        choose([GOOD, scout], 2)


def test_listing_puts_usable_series_first() -> None:
    scout = other(refusal=Refusal(code=Code.NOT_AXIAL_IMAGE, message="a localizer"))
    thick = replace(other(thickness_mm=5.0), series_number=None)
    assert ordered([scout, thick, GOOD]) == [GOOD, thick, scout]


@pytest.mark.parametrize(
    ("kernel", "sharp"),
    [
        (None, False),
        ("STANDARD", False),
        ("SOFT", False),
        ("LUNG", True),
        ("BONEPLUS", True),
        ("B30f", False),
        ("I31f\\3", False),
        ("Br40d", False),
        ("B70f", True),
        ("Bl57d", True),
        ("FC08", False),
        ("FC51", True),
        ("YC", True),
        ("B", False),
        ("L", True),
    ],
)
def test_sharp_kernels(kernel: str | None, sharp: bool) -> None:
    assert is_sharp_kernel(kernel) is sharp


@pytest.mark.parametrize(
    ("agent", "given"),
    [(None, False), ("", False), ("NONE", False), ("no contrast", False), ("Omnipaque 350", True)],
)
def test_contrast_agents(agent: str | None, given: bool) -> None:
    assert bool(says_contrast(agent)) is given


def test_what_a_bundle_is_for_comes_before_everything_else() -> None:
    worse = other(image_type=("DERIVED", "SECONDARY"), extent_mm=20.0)
    assert choose([GOOD, worse]).summary is GOOD
    choice = choose([GOOD, worse], fitting={"2.25.2"})
    assert choice.summary is worse
    assert choice.reason is not None
    assert "the bundle is for it" in choice.reason
    elsewhere = replace(worse, study_instance_uid="2.25.200")
    with pytest.raises(SeriesError, match="2 studies"):
        choose([GOOD, elsewhere], fitting={"2.25.2"})
