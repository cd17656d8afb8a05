"""Key images, key objects and attention: that they lie where the network looked."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import outcomes
import pydicom
import pytest
from pydicom.dataset import Dataset
from strategies import AXIAL_ORIENTATIONS

from pe_infer.dicom.results import ResultObject, write_results
from pe_infer.dicom.results.key_images import BURNT_IN, patient_orientation, sides_of
from pe_infer.dicom.results.rendering import (
    DEFAULT_WINDOW,
    DisplayWindow,
    attention_on,
    display_window,
    rendered,
)
from pe_infer.dicom.results.selection import select
from pe_infer.geometry import SliceGeometry, Vector
from pe_infer.result import Attention

WINDOW = DisplayWindow(40.0, 400.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[ResultObject]:
    sources = outcomes.write(tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("objects")
    return write_results(outcomes.result(), sources, folder, made_at=outcomes.MADE_AT)


def read(written: list[ResultObject], kind: str) -> list[Dataset]:
    return [pydicom.dcmread(item.path) for item in written if item.kind == kind]


def pixel_of(geometry: SliceGeometry, place_mm: Vector) -> tuple[int, int]:
    """Row and column of the pixel nearest to a place in the patient."""
    offset = np.asarray(place_mm) - np.asarray(geometry.image_position_mm)
    row = offset @ np.asarray(geometry.col_direction) / geometry.row_spacing_mm
    col = offset @ np.asarray(geometry.row_direction) / geometry.col_spacing_mm
    return round(float(row)), round(float(col))


def spot(row: int = 1, col: int = 4) -> np.ndarray:
    values = np.zeros((6, 6), np.float32)
    values[row, col] = 2.0
    return values


@pytest.mark.parametrize(("row_direction", "col_direction"), AXIAL_ORIENTATIONS)
def test_attention_lies_at_its_place_whatever_the_orientation(
    row_direction: Vector, col_direction: Vector
) -> None:
    (image,) = outcomes.slices(1, row_direction=row_direction, col_direction=col_direction)
    attention = outcomes.attention_of(image, spot())
    found = attention_on(image.geometry, attention)
    row, col = np.unravel_index(found.argmax(), found.shape)
    expected = pixel_of(image.geometry, attention.peak_mm)
    # The centre of the cell lies between pixels.
    assert abs(int(row) - expected[0]) <= 1
    assert abs(int(col) - expected[1]) <= 1
    assert found.max() == pytest.approx(2.0, rel=0.15)
    assert attention.peak_mm[0] > 0  # column 4 of 6: to the patient's left
    assert attention.peak_mm[1] < 0  # row 1 of 6: to the front


def test_attention_is_zero_where_the_network_did_not_look() -> None:
    image, wide = outcomes.slices(2)
    attention = outcomes.attention_of(image, np.ones((6, 6), np.float32))
    larger = replace(wide.geometry, row_spacing_mm=8.0, col_spacing_mm=8.0)
    shifted = replace(larger, image_position_mm=(-188.0, -188.0, 0.0))
    found = attention_on(shifted, attention)
    assert found[0, 0] == 0
    assert found[24, 24] == 1
    assert 0.2 < found.mean() < 0.3  # a quarter of the area


def test_the_wash_colours_the_peak_and_nothing_else() -> None:
    image = outcomes.slices(1)[0]
    attention = outcomes.attention_of(image, spot())
    drawn = partial(rendered, image, strongest=2.0, window=WINDOW, above=[BURNT_IN], below=["a"])
    plain, shown = drawn(attention=None), drawn(attention=attention)
    factor, top = 11, 22  # 48 pixels to 528; a line of words above
    row, col = pixel_of(image.geometry, attention.peak_mm)
    red, green, blue = shown[top + factor * row, factor * col].astype(int)
    assert red > blue + 50
    assert green > blue
    grey = plain.reshape(-1, 3)
    assert (grey[:, 0] == grey[:, 2]).all()
    changed = np.argwhere((shown != plain).any(axis=2))
    rows, cols = (changed - (top, 0)).T / factor
    assert abs(rows - row).max() < 16  # two cells of 8 pixels
    assert abs(cols - col).max() < 16


def test_weak_and_negative_attention_is_not_coloured() -> None:
    image = outcomes.slices(1)[0]
    plain = rendered(image, None, strongest=2.0, window=WINDOW, above=[], below=[])
    for values, strongest in ((spot() * 0.1, 2.0), (spot() - 5, -3.0)):
        attention = outcomes.attention_of(image, values)
        shown = rendered(image, attention, strongest=strongest, window=WINDOW, above=[], below=[])
        np.testing.assert_array_equal(shown, plain)


def test_words_hide_nothing_of_the_slice() -> None:
    image = outcomes.slices(1)[0]
    bare = rendered(image, None, strongest=0.0, window=WINDOW, above=[], below=[])
    labelled = rendered(image, None, strongest=0.0, window=WINDOW, above=["A"], below=["B", "C"])
    top = 22
    np.testing.assert_array_equal(labelled[top : top + 528], bare[4 : 4 + 528])
    assert labelled[:top].max() == 255
    assert labelled[top + 528 :].max() == 255


def test_the_sides_of_the_patient_stand_beside_the_slice() -> None:
    image = outcomes.slices(1)[0]
    bare = rendered(image, None, strongest=0.0, window=WINDOW, above=[], below=[])
    marked = rendered(
        image, None, strongest=0.0, window=WINDOW, above=[], below=[], sides=("R", "L")
    )
    np.testing.assert_array_equal(marked[:, 18:-18], bare)
    left, right = marked[:, :18], marked[:, -18:]
    assert left.max() == right.max() == 255
    assert (left != right).any()


@pytest.mark.parametrize(
    ("row", "col", "expected"),
    [
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), ("R", "L")),
        ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), ("L", "R")),
        ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), ("P", "A")),
    ],
)
def test_the_sides_follow_the_orientation(
    row: Vector, col: Vector, expected: tuple[str, str]
) -> None:
    (image,) = outcomes.slices(1, row_direction=row, col_direction=col)
    assert sides_of(image.geometry) == expected


def test_long_lines_are_folded_and_lose_nothing() -> None:
    image = outcomes.slices(1)[0]
    words = "a finding of many words " * 5
    folded = rendered(image, None, strongest=0.0, window=WINDOW, above=[words], below=[])
    whole = rendered(image, None, strongest=0.0, window=WINDOW, above=["a"], below=[])
    assert folded.shape[0] - whole.shape[0] == 18  # one line more
    assert folded[:, -4:].max() <= whole.max()
    assert not folded[:40, -3:].any()  # no letter is cut at the edge


def test_padding_is_black() -> None:
    image = replace(outcomes.slices(1)[0], padding=(20, 59))
    assert rendered(image, None, strongest=0.0, window=WINDOW, above=[], below=[]).max() == 0


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ([(100.0, 700.0)], (100.0, 700.0)),
        ([(-600.0, 1500.0), (50.0, 350.0)], (50.0, 350.0)),  # lung first
        ([(40.0, 80.0), (500.0, 2000.0)], (40.0, 80.0)),
        ([(500.0, 2000.0)], DEFAULT_WINDOW),  # bone only
        ([(40.0, 0.0)], DEFAULT_WINDOW),
        ([(40.0, float("inf")), (float("nan"), 400.0)], DEFAULT_WINDOW),
        ([], DEFAULT_WINDOW),
    ],
)
def test_the_window_is_the_first_for_soft_tissue(
    stated: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    assert display_window(stated) == expected


@pytest.mark.parametrize(
    ("row", "col", "expected"),
    [
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), ("L", "P")),
        ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), ("R", "A")),
        ((1.0, 0.0, 0.0), (0.0, 0.9483, -0.3173), ("L", "P")),  # a tilted gantry
        ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), ("A", "L")),
    ],
)
def test_patient_orientation(row: Vector, col: Vector, expected: tuple[str, str]) -> None:
    (image,) = outcomes.slices(1, row_direction=row, col_direction=col)
    assert patient_orientation(image.geometry) == expected


def test_key_slabs_are_the_strongest_and_lie_apart() -> None:
    evidence = list(outcomes.evidence(outcomes.slices()))
    peaks = [float("-inf")] * len(evidence)
    for number, peak in ((5, 9.0), (6, 8.0), (4, 7.0), (10, 6.0), (8, 5.0), (2, 4.0)):
        peaks[number] = peak
    for number, slab in enumerate(evidence):
        if slab.attention is not None:
            weak = max(peaks[number], -50.0)
            attention = slab.attention.model_copy(update={"peak": weak})
            evidence[number] = slab.model_copy(update={"attention": attention})
    chosen = select(evidence)
    # 6 and 4 are 5 mm from 5: the same lesion, perhaps.
    assert [evidence.index(key.slab) for key in chosen.slabs] == [5, 10, 8]
    assert [key.rank for key in chosen.slabs] == [1, 4, 5]
    assert "3 of 10 slabs" in chosen.reason


def test_gated_slabs_are_never_chosen() -> None:
    evidence = outcomes.evidence(outcomes.slices(4), gated=4)
    assert select(evidence).slabs == ()
    assert select(()).slabs == ()


def test_key_images_are_marked_and_point_at_their_slices(written: list[ResultObject]) -> None:
    keys, (document,) = read(written, "key_image"), read(written, "key_object_selection")
    images = [item for item in document.ContentSequence if item.ValueType == "IMAGE"]
    for number, (key, item) in enumerate(zip(keys, images, strict=True), start=1):
        (source,) = key.SourceImageSequence
        (reference,) = item.ReferencedSOPSequence
        assert source.ReferencedSOPInstanceUID == reference.ReferencedSOPInstanceUID
        assert item.ConceptNameCodeSequence[0].CodeMeaning == "Best illustration of finding"
        assert key.BurnedInAnnotation == "NO"  # as the source says: our words identify nobody
        assert key.ConversionType == "SYN"
        assert key.PhotometricInterpretation == "RGB"
        assert key.PatientOrientation == ["L", "P"]
        assert key.BodyPartExamined == "CHEST"
        assert key.InstanceNumber == number
        assert "window C 100 W 700 HU;" in key.DerivationDescription  # as the source says
        assert "attention peak" in key.DerivationDescription
        assert len(np.unique(key.pixel_array[:20])) > 2  # words on black
    (evidence,) = document.CurrentRequestedProcedureEvidenceSequence
    assert len(evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 3
    texts = [item.TextValue for item in document.ContentSequence if item.ValueType == "TEXT"]
    assert any("3 of 10 slabs: those with the strongest attention peaks" in t for t in texts)


@pytest.mark.parametrize(
    ("row_spacing_mm", "expected"), [(4.0, None), (4.00001, None), (4.2, [4200, 4000])]
)
def test_only_pixels_that_are_not_square_are_said_to_be_so(
    row_spacing_mm: float, expected: list[int] | None, tmp_path: Path
) -> None:
    images = [
        replace(image, geometry=replace(image.geometry, row_spacing_mm=row_spacing_mm))
        for image in outcomes.slices()
    ]
    sources = outcomes.write(tmp_path / "source", images)
    made = write_results(
        outcomes.result(images), sources, tmp_path / "objects", made_at=outcomes.MADE_AT
    )
    for key in read(made, "key_image"):
        assert key.get("PixelAspectRatio") == expected


def test_the_attention_map_gives_values_and_places_back(tmp_path: Path) -> None:
    for number, (row, col) in enumerate(AXIAL_ORIENTATIONS):
        images = outcomes.slices(row_direction=row, col_direction=col)
        sources = outcomes.write(tmp_path / f"source-{number}", images)
        result = outcomes.result(images, positive=False)
        folder = tmp_path / str(number)
        written = write_results(result, sources, folder, made_at=outcomes.MADE_AT)
        (dataset,) = read(written, "attention")
        check_map(dataset, [s.attention for s in result.evidence if s.attention is not None])


def check_map(dataset: Dataset, expected: list[Attention]) -> None:
    assert dataset.FrameOfReferenceUID == outcomes.FRAME_OF_REFERENCE
    shared = dataset.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    (quantity,) = mapping.QuantityDefinitionSequence
    assert quantity.ConceptCodeSequence[0].CodeMeaning == "Saliency"
    stored = dataset.pixel_array.reshape(-1, outcomes.CELLS, outcomes.CELLS)
    values = stored * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
    measures = shared.PixelMeasuresSequence[0]
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    groups = dataset.PerFrameFunctionalGroupsSequence
    assert len(groups) == len(values) == len(expected)
    by_height = sorted(zip(groups, values, strict=True), key=height)
    for (group, frame), attention in zip(by_height, expected, strict=True):
        np.testing.assert_allclose(frame, attention.values, atol=mapping.RealWorldValueSlope)
        peak_row, peak_col = np.unravel_index(frame.argmax(), frame.shape)
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        place += axes[:3] * float(measures.PixelSpacing[1]) * peak_col
        place += axes[3:] * float(measures.PixelSpacing[0]) * peak_row
        np.testing.assert_allclose(place, attention.peak_mm, atol=0.01)


def height(pair: tuple[Dataset, np.ndarray]) -> float:
    return float(pair[0].PlanePositionSequence[0].ImagePositionPatient[2])


def test_the_frames_of_the_map_point_at_their_slices(written: list[ResultObject]) -> None:
    (dataset,) = read(written, "attention")
    found = [
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for group in dataset.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(found) == sorted(f"{outcomes.SERIES}.{number}" for number in range(3, 13))
    (series,) = dataset.ReferencedSeriesSequence
    assert len(series.ReferencedInstanceSequence) == 12
    window = dataset.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    assert float(window.WindowCenter) + float(window.WindowWidth) / 2 == pytest.approx(65535, abs=1)


def test_a_map_of_equal_values_is_written(tmp_path: Path) -> None:
    images = outcomes.slices(3)
    sources = outcomes.write(tmp_path / "source", images)
    same = outcomes.attention_of(images[1], np.full((6, 6), -2.5, np.float32))
    result = outcomes.result(images, positive=False)
    only = result.evidence[2].model_copy(update={"attention": same})
    result = result.model_copy(update={"evidence": (*result.evidence[:2], only)})
    written = write_results(result, sources, tmp_path / "x", made_at=outcomes.MADE_AT)
    check_map(read(written, "attention")[0], [same])
