"""What is kept of a file for result objects: they are the same as if it were read again."""

import sys
import tracemalloc
from pathlib import Path

import outcomes
import pydicom
import pytest
from dicom_files import changed, ct_dataset, save

from pe_infer.dicom import SourceFile, convert, open_series
from pe_infer.dicom.results import ResultObject, write_results
from pe_infer.errors import Code, ConfigurationError, DicomError

MOST_BYTES = 2048


def converted(paths: list[Path]) -> list[SourceFile]:
    found = [convert(path).source for path in paths]
    return [source for source in found if source is not None]


def contents(objects: list[ResultObject]) -> list[tuple[str, bytes]]:
    return [(item.path.name, item.path.read_bytes()) for item in objects]


@pytest.mark.parametrize("name", outcomes.OUTCOMES)
def test_conversions_give_the_objects_of_their_files(name: str, tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    given = {
        "files": paths,
        "conversions": converted(paths[::-1]),
        "series": open_series(paths).source_files(),
        "both": [*paths[:5], *converted(paths[5:])],
    }
    made = {
        how: contents(
            write_results(
                outcomes.OUTCOMES[name], sources, tmp_path / how, made_at=outcomes.MADE_AT
            )
        )
        for how, sources in given.items()
    }
    assert made["conversions"] == made["series"] == made["both"] == made["files"]


def test_conversions_give_the_objects_of_a_multi_frame_file(tmp_path: Path) -> None:
    (path,), result = outcomes.multi_frame(tmp_path / "source")
    at = outcomes.MADE_AT
    expected = contents(write_results(result, [path], tmp_path / "files", made_at=at))
    for how, sources in (
        ("conversions", converted([path])),
        ("series", open_series(path).source_files()),
    ):
        assert contents(write_results(result, sources, tmp_path / how, made_at=at)) == expected


def test_an_alert_finds_its_frame(tmp_path: Path) -> None:
    (path,), _ = outcomes.multi_frame(tmp_path / "source")
    (source,) = converted([path])
    assert source.positions_mm == tuple(5.0 * number for number in range(12))
    assert [source.frame_number(index) for index in (0, 11)] == [1, 12]


@pytest.mark.parametrize("name", ["negative", "unjudged", "alert"])
def test_of_converted_files_only_the_first_is_read_again(name: str, tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    sources, at = converted(paths), outcomes.MADE_AT
    expected = contents(
        write_results(outcomes.OUTCOMES[name], paths, tmp_path / "whole", made_at=at)
    )
    for path in paths[1:]:
        path.unlink()
    assert (
        contents(write_results(outcomes.OUTCOMES[name], sources, tmp_path / "x", made_at=at))
        == expected
    )


def test_a_data_set_is_no_file() -> None:
    assert convert(ct_dataset()).source is None


def test_what_is_kept_of_a_file_is_small(tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    converted(paths)  # what is made once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = converted(paths)
        each = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()
    assert each < MOST_BYTES
    assert kept[0].series_instance_uid is kept[1].series_instance_uid
    assert sys.getsizeof(kept[0]) < MOST_BYTES


@pytest.mark.parametrize(
    ("series", "match"),
    [("2.25.9", "is not that of the outcome"), (None, "SeriesInstanceUID is missing")],
)
def test_files_of_another_series_are_refused(
    series: str | None, match: str, tmp_path: Path
) -> None:
    paths = outcomes.write(tmp_path / "source")
    dataset = changed(pydicom.dcmread(paths[3]), SeriesInstanceUID=series)
    save(dataset, paths[3])
    with pytest.raises((ConfigurationError, DicomError), match=match):
        write_results(outcomes.unjudged(), paths[3:4], tmp_path / "x", made_at=outcomes.MADE_AT)


def test_a_file_that_names_no_study_is_refused(tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    save(changed(pydicom.dcmread(paths[3]), StudyInstanceUID=None), paths[3])
    with pytest.raises(DicomError, match="StudyInstanceUID is missing") as caught:
        write_results(outcomes.result(), converted(paths), tmp_path / "x", made_at=outcomes.MADE_AT)
    assert caught.value.code == Code.MISSING_ATTRIBUTE


def test_an_annotation_that_is_stated_twice_is_not_repeated(tmp_path: Path) -> None:
    paths = outcomes.write(tmp_path / "source")
    for path in paths:
        save(changed(pydicom.dcmread(path), BurnedInAnnotation=["YES", "NO"]), path)
    made = write_results(outcomes.result(), paths, tmp_path / "x", made_at=outcomes.MADE_AT)
    (key, *_) = [item for item in made if item.kind == "key_image"]
    assert "BurnedInAnnotation" not in pydicom.dcmread(key.path)
