"""A sheet of synthetic patients, as they are and with their lesions, for the eye to judge.

``python -m export.contact_sheet --bundle ich --seeds 11,12,13 --out docs/head-phantoms.png``

A row per patient, at the slab with most lesion, on the bundle's grid: without lesions, with them,
the truth outlined, and what the network looked at.
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

from export.command_line import reported
from export.datasets.generate import to_grid
from pe_infer import Detector
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import Phantom
from pe_infer.result import StudyResult
from pe_infer.synthetic import phantom_for

CELL_INCHES: Final = 2.2
WINDOWS_HU: Final = {"chest": (100.0, 700.0), "head": (40.0, 80.0)}  # centre, width


@dataclass(frozen=True, kw_only=True)
class Row:
    """One patient at one plane.

    Attributes:
        title: Seed and largest lesion.
        without: (rows, cols) HU.
        lesions: (rows, cols) HU.
        mask: (rows, cols) bool.
        attention: (h, w) of the slab at that plane; ``None`` behind the gate.
        said: Probability of the study with lesions.
    """

    title: str
    without: NDArray[np.float32]
    lesions: NDArray[np.float32]
    mask: NDArray[np.bool_]
    attention: NDArray[np.float32] | None
    said: str


def make_row(phantom: Phantom, seed: int, detector: Detector) -> Row:
    """One patient at the slab with most lesion."""
    grid = detector.bundle.manifest.grid
    negative, positive = phantom.pair(seed)
    without, lesions = to_grid(negative, grid), to_grid(positive, grid)
    plane = max(lesions.slab_planes, key=lambda middle: int(lesions.mask[middle].sum()))
    result = detector.detect(positive.slices)
    largest = positive.lesions[0]
    said = "not processed" if result.probability is None else f"{result.probability:.2f}"
    return Row(
        title=f"{seed}: {largest.kind}, {largest.place}, {largest.volume_mm3 / 1000:.1f} ml",
        without=without.hu[plane],
        lesions=lesions.hu[plane],
        mask=lesions.mask[plane],
        attention=_attention(result, int(lesions.positions_um[plane])),
        said=said,
    )


def draw(rows: Sequence[Row], window_hu: tuple[float, float], out: Path) -> None:
    """Write the sheet as PNG.

    Args:
        rows: At least one.
        window_hu: Centre and width.
        out: The file.
    """
    figure = Figure(figsize=(4 * CELL_INCHES, len(rows) * (CELL_INCHES + 0.25)))
    grid = figure.subplots(len(rows), 4, squeeze=False)
    low, high = window_hu[0] - window_hu[1] / 2, window_hu[0] + window_hu[1] / 2
    for row, axes in zip(rows, grid, strict=True):
        titles = ("without", row.title, "truth", f"attention; study: {row.said}")
        for axis, title in zip(axes, titles, strict=True):
            image = row.without if axis is axes[0] else row.lesions
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(title, fontsize=6)
            axis.set_axis_off()
        axes[2].contour(row.mask, levels=[0.5], colors=["red"], linewidths=0.6)
        if row.attention is not None:
            bottom, right = (size - 0.5 for size in row.mask.shape)
            box = (-0.5, right, bottom, -0.5)
            axes[3].imshow(row.attention, cmap="inferno", alpha=0.55, extent=box)
    figure.savefig(out, dpi=110, bbox_inches="tight")


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
) -> None:
    """Draw synthetic patients, and where a bundle looks in them."""
    console = Console()
    with reported(console), Detector(bundle) as detector:
        phantom = phantom_for(detector.bundle.manifest)
        rows = [
            make_row(phantom, seed, detector)
            for seed in track(_numbers(seeds), "patients", console=console)
        ]
        draw(rows, WINDOWS_HU[phantom.anatomy], out)
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
