"""A sheet of synthetic patients, as they are and with their lesions, for the eye to judge.

``python -m export.contact_sheet --bundle ich --seeds 11,12,13 --out docs/head-phantoms.png``

A row per patient, at the slab with most lesion, on the bundle's grid: without lesions, with them,
the truth outlined, and what the network looked at. ``--real FOLDER`` adds a row of a real series,
in the same window and at the same zoom: three heights, and what the network looked at. Such a sheet
has a patient on it: keep it to yourself. ``--window -600 1500`` shows lungs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from export.command_line import PhantomOption, reported
from export.datasets.generate import to_grid
from export.phantoms import chosen_phantom
from pe_infer import Detector, dicom, preprocess
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import Phantom
from pe_infer.result import StudyResult

CELL_INCHES: Final = 2.2
WINDOWS_HU: Final = {"chest": (100.0, 700.0), "head": (40.0, 80.0)}  # centre, width
REAL_HEIGHTS: Final = (0.3, 0.5, 0.7)  # of the slabs that pass the gate, from the lowest one


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a row.

    Attributes:
        title: Above it.
        hu: (rows, cols).
        mask: (rows, cols) bool to outline.
        attention: (h, w) of the slab at that plane, laid over it.
    """

    title: str
    hu: NDArray[np.float32]
    mask: NDArray[np.bool_] | None = None
    attention: NDArray[np.float32] | None = None


def synthetic_row(phantom: Phantom, seed: int, detector: Detector) -> list[Panel]:
    """One patient at the slab with most lesion.

    Raises:
        ConfigurationError: No slab of it passes the gate.
    """
    grid = detector.bundle.manifest.grid
    negative, positive = phantom.pair(seed)
    without, lesions = to_grid(negative, grid), to_grid(positive, grid)
    if not lesions.slab_planes:
        raise ConfigurationError(f"seed {seed}: no slab passes the gate of the bundle")
    plane = max(lesions.slab_planes, key=lambda middle: int(lesions.mask[middle].sum()))
    result = detector.detect(positive.slices)
    largest = positive.lesions[0]
    kind = f"{seed}: {largest.kind}, {largest.place}, {largest.volume_mm3 / 1000:.1f} ml"
    hu = lesions.hu[plane]
    return [
        Panel(title="without", hu=without.hu[plane]),
        Panel(title=kind, hu=hu),
        Panel(title="truth", hu=hu, mask=lesions.mask[plane]),
        Panel(
            title=f"attention; study: {_said(result)}",
            hu=hu,
            attention=_attention(result, int(lesions.positions_um[plane])),
        ),
    ]


def real_row(folder: Path, detector: Detector) -> list[Panel]:
    """A real series at three heights, the middle one with attention.

    Raises:
        ConfigurationError: Too few slabs of it pass the gate for three different heights.
        PeInferError: It cannot be read.
    """
    slices = list(dicom.open_series(folder).slices())
    positions, hu = preprocess.planes(slices, detector.bundle.manifest.grid)
    result = detector.detect(slices)
    passed = [round(each.position_mm * 1000) for each in result.evidence if not each.gated]
    heights = heights_of(passed)
    if len(set(heights)) < len(REAL_HEIGHTS):
        raise ConfigurationError(
            f"{folder}: {len(passed)} slabs pass the gate of the bundle, too few for "
            f"{len(REAL_HEIGHTS)} pictures"
        )
    pictures = {at: hu[positions.tolist().index(at)] for at in heights}
    panels = [Panel(title=f"{folder.name}, {at / 1000:.0f} mm", hu=pictures[at]) for at in heights]
    middle = heights[len(heights) // 2]
    looked = Panel(
        title=f"attention; study: {_said(result)}",
        hu=pictures[middle],
        attention=_attention(result, middle),
    )
    return [*panels, looked]


def heights_of(passed: Sequence[int]) -> list[int]:
    """Those at ``REAL_HEIGHTS`` of some positions in ascending order; none of none."""
    return [passed[int(share * len(passed))] for share in REAL_HEIGHTS] if passed else []


def draw(rows: Sequence[Sequence[Panel]], window_hu: tuple[float, float], out: Path) -> None:
    """Write the sheet as PNG.

    Args:
        rows: At least one, all of one length.
        window_hu: Centre and width.
        out: The file.
    """
    columns = len(rows[0])
    figure = Figure(figsize=(columns * CELL_INCHES, len(rows) * (CELL_INCHES + 0.25)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    low, high = window_hu[0] - window_hu[1] / 2, window_hu[0] + window_hu[1] / 2
    for row, axes in zip(rows, grid, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            axis.imshow(panel.hu, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(panel.title, fontsize=6)
            axis.set_axis_off()
            if panel.mask is not None:
                axis.contour(panel.mask, levels=[0.5], colors=["red"], linewidths=0.6)
            if panel.attention is not None:
                bottom, right = (size - 0.5 for size in panel.hu.shape)
                box = (-0.5, right, bottom, -0.5)
                axis.imshow(panel.attention, cmap="inferno", alpha=0.55, extent=box)
    figure.savefig(out, dpi=110, bbox_inches="tight")


def _said(result: StudyResult) -> str:
    return "not processed" if result.probability is None else f"{result.probability:.2f}"


def _attention(result: StudyResult, position_um: int) -> NDArray[np.float32] | None:
    for evidence in result.evidence:
        if round(evidence.position_mm * 1000) == position_um and evidence.attention is not None:
            values: NDArray[np.float32] = evidence.attention.values
            return values
    return None


def main(
    *,
    bundle: Annotated[str, typer.Option(help="Folder or name of the bundle that looks at them.")],
    seeds: Annotated[str, typer.Option(help="Of the patients, with commas between.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    phantom: PhantomOption = None,
    real: Annotated[
        list[Path] | None, typer.Option(help="Folder of a real series; may be repeated.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Centre and width in HU, in place of those of the anatomy."),
    ] = None,
) -> None:
    """Draw synthetic patients, and where a bundle looks in them."""
    console = Console()
    with reported(console), Detector(bundle) as detector:
        if window is not None and not window[1] > 0:
            raise ConfigurationError(f"--window {window[0]} {window[1]}: the width is above 0 HU")
        made = chosen_phantom(detector.bundle.manifest, configuration=phantom)
        rows = [
            synthetic_row(made, seed, detector)
            for seed in track(_numbers(seeds), "patients", console=console)
        ]
        rows += [real_row(folder, detector) for folder in real or []]
        draw(rows, window or WINDOWS_HU[made.anatomy], out)
    console.print(f"written to {out}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(
            f"--seeds {text!r}: name whole numbers with commas between, e.g. 11,12,13"
        ) from None


if __name__ == "__main__":
    typer.run(main)
