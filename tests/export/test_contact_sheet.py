"""The sheet of synthetic patients."""

from pathlib import Path

import matplotlib.image
import numpy as np
import typer
from typer.testing import CliRunner

from export import contact_sheet
from pe_infer.phantom import ANATOMIES


def row(*, attention: bool) -> contact_sheet.Row:
    plane = np.zeros((32, 32), np.float32)
    mask = np.zeros((32, 32), np.bool_)
    mask[8:12, 8:12] = True
    looked = np.zeros((8, 8), np.float32)
    return contact_sheet.Row(
        title="1: subdural, left convexity, 3.0 ml",
        without=plane,
        lesions=np.where(mask, np.float32(70), plane),
        mask=mask,
        attention=looked if attention else None,
        said="0.70",
    )


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


def test_seeds_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(contact_sheet.main)
    done = CliRunner().invoke(
        app, ["--bundle", "pe", "--seeds", "1,x", "--out", str(tmp_path / "sheet.png")]
    )
    assert done.exit_code != 0
    assert "--seeds '1,x'" in done.output


def test_every_anatomy_has_a_window() -> None:
    assert contact_sheet.WINDOWS_HU.keys() == ANATOMIES.keys()
