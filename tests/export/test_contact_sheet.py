"""The sheet of synthetic patients."""

import dataclasses
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import typer
from phantoms import coarse_phantom
from typer.testing import CliRunner, Result

from export import contact_sheet
from export.contact_sheet import Panel
from pe_infer import Detector
from pe_infer.dicom import write_series
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import ANATOMIES, Phantom


def row(*, attention: bool) -> list[Panel]:
    plane = np.zeros((32, 32), np.float32)
    mask = np.zeros((32, 32), np.bool_)
    mask[8:12, 8:12] = True
    looked = np.zeros((8, 8), np.float32)
    lesions = np.where(mask, np.float32(70), plane)
    return [
        Panel(title="without", hu=plane),
        Panel(title="1: subdural, left convexity, 3.0 ml", hu=lesions),
        Panel(title="truth", hu=lesions, mask=mask),
        Panel(title="attention", hu=lesions, attention=looked if attention else None),
    ]


def test_a_sheet_has_a_row_per_patient(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 3):
        rows = [row(attention=bool(i)) for i in range(count)]
        contact_sheet.draw(rows, (40.0, 80.0), tmp_path / "sheet.png")
        image = matplotlib.image.imread(tmp_path / "sheet.png")
        red = (image[..., 0] > 0.8) & (image[..., 1] < 0.3)
        assert red.any()  # the outline of the truth
        sizes.append(image.shape[0])
    assert 2.5 < sizes[1] / sizes[0] < 3.5


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Phantom, Path]:
    """A phantom, and one of its patients as a series on disk."""
    folder = tmp_path_factory.mktemp("head")
    phantom = coarse_phantom("head")
    write_series(phantom.pair(3)[1].slices, folder)
    return phantom, folder


def test_rows_show_the_patient_as_the_bundle_gets_him(head: tuple[Phantom, Path]) -> None:
    phantom, folder = head
    with Detector("ich") as detector:
        made = contact_sheet.synthetic_row(phantom, 3, detector)
        read = contact_sheet.real_row(folder, detector)
        said = detector.detect(folder)
    changed = made[0].hu != made[1].hu
    assert made[2].mask is not None
    assert made[2].mask.any()
    assert changed[made[2].mask].mean() > 0.9
    assert changed[~made[2].mask].mean() < changed[made[2].mask].mean()
    assert len(made) == len(read) == 4
    assert len({panel.title for panel in read[:3]}) == 3
    for panels in (made, read):
        assert panels[3].attention is not None
        assert panels[3].title == f"attention; study: {said.probability:.2f}"
    assert np.array_equal(read[1].hu, read[3].hu)


def test_a_series_that_hardly_shows_the_head_is_refused(
    head: tuple[Phantom, Path], tmp_path: Path
) -> None:
    phantom, _ = head
    slices = list(phantom.pair(3)[1].slices)
    middle = len(slices) // 2
    for i, image in enumerate(slices):
        if i not in (middle, middle + 1):
            air = np.full_like(image.host_pixels, image.host_pixels.min())
            slices[i] = dataclasses.replace(image, pixels=air)
    write_series(slices, tmp_path / "few")
    with Detector("ich") as detector, pytest.raises(ConfigurationError, match="too few for 3"):
        contact_sheet.real_row(tmp_path / "few", detector)


def test_pictures_of_a_series_are_of_different_heights() -> None:
    assert contact_sheet.heights_of([]) == []
    for count in range(5, 60):
        assert len(set(contact_sheet.heights_of(range(count)))) == 3


def drawn(*options: str) -> Result:
    app = typer.Typer()
    app.command()(contact_sheet.main)
    return CliRunner().invoke(app, ["--bundle", "pe", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1,x"], "--seeds '1,x'"),
        (["--seeds", "1", "--window", "40", "0"], "--window 40.0 0.0: the width is above 0 HU"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    done = drawn(*options, "--out", str(tmp_path / "sheet.png"))
    assert done.exit_code != 0
    assert message in done.output
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("options", "window"),
    [([], (100.0, 700.0)), (["--window", "-600", "1500"], (-600.0, 1500.0))],
)
def test_the_window_is_that_of_the_anatomy_or_the_one_that_is_asked_for(
    options: list[str],
    window: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contact_sheet, "synthetic_row", lambda *_: row(attention=True))
    windows = []
    monkeypatch.setattr(contact_sheet, "draw", lambda _rows, used, _out: windows.append(used))
    done = drawn("--seeds", "1", "--out", str(tmp_path / "sheet.png"), *options)
    assert done.exit_code == 0, done.output
    assert windows == [window]


def test_every_anatomy_has_a_window() -> None:
    assert contact_sheet.WINDOWS_HU.keys() == ANATOMIES.keys()
