"""Plots of an evaluation as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from export.measures import StudyCase

SIZE = (5.0, 4.5)
BEFORE, AFTER = ("#D55E00", "--", "s"), ("#0072B2", "-", "o")  # told apart with any colour vision


def write_plots(studies: Sequence[StudyCase], folder: Path, *, lesion_name: str) -> None:
    """Write ``roc.png`` (studies and slabs) and ``probabilities.png`` to a folder.

    Args:
        studies: At least one pair, all at one threshold.
        folder: Must be there.
        lesion_name: What the positive ones have, in the plural.
    """
    slabs = [slab for study in studies for slab in study.slabs]
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for name, truth, scores in (
        ("studies", [s.positive for s in studies], [s.probability for s in studies]),
        ("slabs", [s.positive for s in slabs], [s.probability for s in slabs]),
    ):
        false_share, true_share, _ = roc_curve(truth, scores)
        axes.plot(false_share, true_share, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="synthetic studies")
    axes.legend()
    figure.savefig(folder / "roc.png", dpi=120, bbox_inches="tight")

    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    edges = [i / 20 for i in range(21)]
    for name, positive in ((lesion_name, True), (f"no {lesion_name}", False)):
        chosen = [s.probability for s in studies if s.positive is positive]
        axes.hist(chosen, bins=edges, alpha=0.6, label=name)
    axes.axvline(studies[0].threshold, color="black", linewidth=0.8, label="threshold")
    axes.set(xlabel="probability", ylabel="studies", title="synthetic studies")
    axes.legend()
    figure.savefig(folder / "probabilities.png", dpi=120, bbox_inches="tight")


def write_reliability(calibration: Mapping[str, Any], folder: Path) -> None:
    """Write ``reliability.png``: what is said and what is so, and how often each is said.

    Args:
        calibration: ``before`` and ``after``, each with ``ece`` and ``bins``, as
            ``export.calibration.calibration_report`` returns them.
        folder: Must be there.
    """
    figure = Figure(figsize=(5.0, 6.0), layout="constrained")
    shares, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    shares.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    for name, (color, line, marker) in (("before", BEFORE), ("after", AFTER)):
        bins, error = calibration[name]["bins"], calibration[name]["ece"]["value"]
        said = [row["probability"] for row in bins]
        style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4}
        label = f"{name} calibration, expected error {error:.3f}"
        shares.plot(said, [row["positive"] for row in bins], label=label, **style)
        counts.plot(said, [row["studies"] for row in bins], **style)
    shares.set(ylabel="share of studies that are positive", title="synthetic studies")
    shares.legend(fontsize=8)
    counts.set(xlabel="probability that was said (mean of a bin)", ylabel="studies")
    counts.set_ylim(bottom=0)
    figure.savefig(folder / "reliability.png", dpi=120)
