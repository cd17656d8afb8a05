"""Order, frontier, duplicates, gaps and foreign slices."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import positions, study

from pe_infer.errors import Code, SeriesError
from pe_infer.geometry import PatientGrid, Slice, Window
from pe_infer.result import Flag
from pe_infer.sequencer import DIRECTION_SLICES, MAX_REWINDS, REORDER_WINDOW, Sequencer

GRID = PatientGrid(
    rows=4,
    cols=4,
    spacing_mm=1.0,
    pitch_um=2500,
    planes_per_slab=3,
    slab_step=2,
    windows=(Window(low_hu=0, high_hu=1),),
)
SOURCE = replace(GRID, through_plane="source", slab_step=1)
REGULAR = list(range(0, 60_000, 1000))


def digest(image: Slice) -> bytes:
    return image.pixels.tobytes()


def whole(images: list[Slice], grid: PatientGrid = GRID) -> list[int]:
    """Slabs of a study whose slices were all there from the start, ascending."""
    sequencer = Sequencer(grid)
    for image in images:
        sequencer.add(image, digest(image))
    return sorted(sequencer.advance(final=True).centres_um)


def stream(images: list[Slice], grid: PatientGrid = GRID) -> tuple[list[list[int]], int, Sequencer]:
    """Push one by one; the valid slabs after every push and at the end, how many were forgotten."""
    sequencer = Sequencer(grid)
    valid: list[int] = []
    history, forgotten = [], 0
    for image in [*images, None]:
        if image is not None:
            sequencer.add(image, digest(image))
        advance = sequencer.advance(final=image is None)
        forgotten += len(valid) - advance.kept
        valid = [*valid[: advance.kept], *advance.centres_um]
        history.append(valid)
    return history, forgotten, sequencer


@pytest.mark.parametrize("grid", [GRID, SOURCE])
@given(positions(), st.randoms(use_true_random=False))
def test_any_order_ends_with_the_same_slabs(
    grid: PatientGrid, where: list[int], shuffle: random.Random
) -> None:
    images = study(where, thickness_mm=5.0)
    expected = whole(images, grid)
    for order in (images, images[::-1], shuffle.sample(images, len(images))):
        history, _, _ = stream(order, grid)
        assert sorted(history[-1]) == expected


@pytest.mark.parametrize("upward", [True, False])
def test_slabs_come_while_slices_arrive(upward: bool) -> None:
    images = study(REGULAR if upward else REGULAR[::-1])
    history, forgotten, sequencer = stream(images)
    assert sequencer.direction == ("up" if upward else "down")
    assert forgotten == 0
    assert not history[DIRECTION_SLICES - 2]
    assert history[-1] == sorted(history[-1], reverse=not upward)
    for image, valid in zip(
        images[DIRECTION_SLICES - 1 :], history[DIRECTION_SLICES - 1 :], strict=False
    ):
        # A slab is there as soon as the slice a pitch beyond its last plane is.
        newest = image.position_um
        assert valid == [
            c for c in history[-1] if (c + 5000 <= newest if upward else c - 5000 >= newest)
        ]


def test_after_a_late_slice_the_frontier_keeps_a_distance() -> None:
    images = study([*REGULAR, 20_500])
    order = [*images[:40], images[60], *images[40:60]]
    history, _, _ = stream(order)
    for image, valid in list(zip(order, history, strict=False))[41:]:
        frontier = image.position_um - 1000 * REORDER_WINDOW
        assert valid == [c for c in history[-1] if c + 5000 <= frontier]


def test_a_change_to_thicker_slices_is_no_gap_and_a_missing_thick_slice_is() -> None:
    where = [*range(0, 60_000, 4000), *range(63_000, 120_000, 7000)]
    images = [
        replace(image, geometry=replace(image.geometry, thickness_mm=4.0 if at < 60_000 else 7.0))
        for at, image in zip(where, study(where), strict=True)
    ]
    history, _, _ = stream(images)
    assert max(history[-2]) + 5000 + 7000 > where[-1]
    history, _, _ = stream([*images[:20], *images[21:]])
    assert max(history[-2]) + 2500 <= where[19]


@given(st.integers(0, 2**32))
def test_jitter_in_a_regular_series_costs_nothing(seed: int) -> None:
    rng = random.Random(seed)
    order = sorted(range(60), key=lambda i: i + rng.uniform(0, 2.9) if i >= DIRECTION_SLICES else i)
    images = study(REGULAR)
    history, forgotten, _ = stream([images[i] for i in order])
    assert forgotten == 0
    assert history[-1] == whole(images)


def test_a_late_slice_forgets_only_what_it_changes() -> None:
    images = study(REGULAR)
    late = images.pop(30)
    images.insert(50, late)
    sequencer = Sequencer(GRID)
    handed: list[int] = []
    for image in images[:50]:
        sequencer.add(image, digest(image))
        handed += sequencer.advance().centres_um
    # The missing slice makes a step of 2 mm, a gap: the frontier waits in front of it.
    assert max(handed) + 2500 + 2500 <= 29_000
    sequencer.add(late, digest(late))
    advance = sequencer.advance()
    assert advance.kept == len(handed)
    assert advance.centres_um


def test_a_slice_behind_the_frontier_is_counted_and_flagged() -> None:
    regular = study([*REGULAR, 20_500])
    history, forgotten, sequencer = stream([*regular[:40], regular[60], *regular[40:60]])
    assert history[-1] == whole(regular)
    before, after = history[39], history[40]
    changed = next(i for i, c in enumerate(before) if c + 2500 + 2500 >= 20_500)
    assert after[:changed] == before[:changed]
    assert forgotten == len(before) - changed
    (flag,) = (flag for flag in sequencer.judge() if flag.flag is Flag.OUT_OF_ORDER)
    assert flag.message == (
        "1 time(s) slices came late, out of their order: what they change was judged again"
    )


@given(st.permutations(range(60)))
def test_random_arrival_is_bounded(order: list[int]) -> None:
    images = study(REGULAR)
    history, forgotten, _ = stream([images[i] for i in order])
    assert sorted(history[-1]) == whole(images)
    assert forgotten <= (MAX_REWINDS + 1) * len(history[-1])


def test_a_duplicate_is_ignored_and_a_second_version_refused() -> None:
    images = study(REGULAR)
    sequencer = Sequencer(GRID)
    for image in [*images, images[7]]:
        kept = sequencer.add(image, digest(image))
    assert not kept
    assert Flag.DUPLICATE_IGNORED in {flag.flag for flag in sequencer.judge()}
    with pytest.raises(SeriesError, match="second version") as caught:
        sequencer.add(replace(images[7], pixels=images[7].pixels + 1), b"other")
    assert caught.value.code is Code.CONFLICTING_DUPLICATE


def test_one_identity_in_two_places_is_refused_and_nothing_changes() -> None:
    images = study(REGULAR)
    sequencer = Sequencer(GRID)
    for image in images[:30]:
        sequencer.add(image, digest(image))
    impostor = replace(images[30], sop_instance_uid=images[3].sop_instance_uid)
    with pytest.raises(SeriesError, match=r"at 30\.000 and 3\.000 mm") as caught:
        sequencer.add(impostor, digest(impostor))
    assert caught.value.code is Code.CONFLICTING_DUPLICATE
    assert list(sequencer.positions_um) == REGULAR[:30]
    frames = [
        replace(image, sop_instance_uid="1", frame_number=n) for n, image in enumerate(images)
    ]
    assert judged(frames) == set()


def test_padding_that_is_not_used_is_flagged() -> None:
    images = study(REGULAR)
    images[7] = replace(images[7], padding_ignored=True)
    assert judged(images) == {Flag.PADDING_IGNORED}


@pytest.mark.parametrize("newer_first", [True, False])
def test_acquisition_number_chooses_between_two_slices_at_one_position(newer_first: bool) -> None:
    images = [replace(image, acquisition_number=1) for image in study(REGULAR)]
    newer = replace(images[7], acquisition_number=2, sop_instance_uid="9", source="newer")
    order = [newer, *images] if newer_first else [*images, newer]
    sequencer = Sequencer(GRID)
    for image in order:
        sequencer.add(image, image.source.encode())
    assert sequencer.record_at(7000).source == "newer"
    assert Flag.POSITION_CHOSEN in {flag.flag for flag in sequencer.judge()}


@pytest.mark.parametrize("number", [None, 1])
def test_two_slices_at_one_position_are_refused_where_nothing_chooses(number: int | None) -> None:
    first, *_ = (replace(image, acquisition_number=number) for image in study(REGULAR))
    sequencer = Sequencer(GRID)
    sequencer.add(first, b"1")
    with pytest.raises(SeriesError, match="AcquisitionNumber") as caught:
        sequencer.add(replace(first, sop_instance_uid="9"), b"2")
    assert caught.value.code is Code.DUPLICATE_POSITION


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("series_instance_uid", "9"),
        ("study_instance_uid", "9"),
        ("frame_of_reference_uid", "9"),
        ("modality", "MR"),
    ],
)
def test_a_slice_of_another_series_is_refused_and_nothing_changes(
    attribute: str, value: str
) -> None:
    images = study(REGULAR)
    sequencer = Sequencer(GRID)
    for image in images:
        sequencer.add(image, digest(image))
    foreign = replace(images[0], series=replace(images[0].series, **{attribute: value}))
    with pytest.raises(SeriesError, match=attribute) as caught:
        sequencer.add(foreign, b"")
    assert caught.value.code is Code.FOREIGN_SLICE
    assert list(sequencer.advance(final=True).centres_um) == whole(images)


def test_another_orientation_is_refused() -> None:
    first, second = study([0, 1000])
    turned = replace(
        second.geometry, row_direction=(0.999, 0.0436, 0.0), col_direction=(-0.0436, 0.999, 0.0)
    )
    sequencer = Sequencer(GRID)
    sequencer.add(first, b"")
    with pytest.raises(SeriesError, match="orientation") as caught:
        sequencer.add(replace(second, geometry=turned), b"")
    assert caught.value.code is Code.ORIENTATION_DIFFERS


def judged(images: list[Slice]) -> set[Flag]:
    sequencer = Sequencer(GRID)
    for image in images:
        sequencer.add(image, digest(image))
    return {flag.flag for flag in sequencer.judge()}


def test_a_regular_series_has_no_flags() -> None:
    assert judged(study(REGULAR)) == set()


def test_gaps_are_filled_up_to_a_limit() -> None:
    assert judged(study([*range(0, 20_000, 1000), *range(29_000, 40_000, 1000)])) == {
        Flag.GAP_FILLED,
        Flag.IRREGULAR_SPACING,
    }
    with pytest.raises(SeriesError, match=r"10\.01 mm above") as caught:
        judged(study([*range(0, 20_000, 1000), *range(29_010, 40_000, 1000)]))
    assert caught.value.code is Code.GAP


def test_linear_drift_is_a_tilted_gantry_and_a_jump_is_refused() -> None:
    assert judged(study(REGULAR, tilt=0.3)) == {Flag.GANTRY_TILT}
    images = study(REGULAR)
    moved = replace(images[30].geometry, image_position_mm=(5.0, 0.0, 30.0))
    with pytest.raises(SeriesError, match="straight line") as caught:
        judged([*images[:30], replace(images[30], geometry=moved), *images[31:]])
    assert caught.value.code is Code.CENTRE_DRIFT


def test_one_slice_is_not_a_volume() -> None:
    with pytest.raises(SeriesError, match="at least 2") as caught:
        judged(study([0]))
    assert caught.value.code is Code.TOO_FEW_SLICES


def test_too_many_slices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_infer.sequencer.MAX_SLICES", 10)
    with pytest.raises(SeriesError, match="more than 10 slices") as caught:
        judged(study(REGULAR))
    assert caught.value.code is Code.TOO_MANY_SLICES


@given(positions())
def test_a_copy_is_independent(where: list[int]) -> None:
    images = study(where)
    sequencer = Sequencer(GRID)
    for image in images[:-1]:
        sequencer.add(image, digest(image))
    twin = sequencer.copy()
    twin.add(images[-1], digest(images[-1]))
    twin.advance(final=True)
    assert list(sequencer.positions_um) == sorted(where[:-1])
    assert len(twin.positions_um) == len(where)


@given(positions(), st.integers(-400_000, 400_000))
def test_nearest_is_the_nearest_of_all(where: list[int], position: int) -> None:
    sequencer = Sequencer(GRID)
    for image in study(where):
        sequencer.add(image, digest(image))
    expected = min(where, key=lambda p: (abs(p - position), p))
    assert sequencer.nearest(position).geometry.position_um == expected


def test_nearest_takes_the_lower_of_two() -> None:
    sequencer = Sequencer(GRID)
    for image in study([0, 1000]):
        sequencer.add(image, digest(image))
    assert sequencer.nearest(500).sop_instance_uid == "1.2.3.0"
    assert sequencer.nearest(501).sop_instance_uid == "1.2.3.1"


@pytest.mark.parametrize("backwards", [False, True])
def test_planes_that_move_when_slices_become_thin_are_nobodys_delay(backwards: bool) -> None:
    steps = [5000] * 12 + [2500] * 12
    images = [
        replace(image, geometry=replace(image.geometry, thickness_mm=step / 1000))
        for image, step in zip(
            study([700 + sum(steps[:k]) for k in range(len(steps))]), steps, strict=True
        )
    ]
    arriving = images[::-1] if backwards else images
    history, forgotten, sequencer = stream(arriving, SOURCE)
    assert (forgotten > 0) == (not backwards)  # thick ones first: their slabs lay elsewhere
    assert sorted(history[-1]) == whole(images, SOURCE)
    assert Flag.OUT_OF_ORDER not in {flag.flag for flag in sequencer.judge()}
    late = [*arriving[1:], arriving[0]]
    assert Flag.OUT_OF_ORDER in {flag.flag for flag in stream(late, SOURCE)[2].judge()}
