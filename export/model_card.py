"""``MODEL_CARD.md`` of a bundle, written from its manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from export.training.validation import HIT_DISTANCE_MM

HEADLINES = {
    "study_auc": "study AUC",
    "sensitivity": "sensitivity at the default operating point",
    "specificity": "specificity at the default operating point",
    "slab_auc": "slab AUC",
    "peak_hit": f"attention peak within {HIT_DISTANCE_MM:.0f} mm of the lesion, all positive slabs",
    "peak_control": "the same places in the patients without it (control)",
}


def model_card(document: Mapping[str, Any], what_it_is: Sequence[str]) -> str:
    """Markdown text; every number in it comes from the manifest.

    Args:
        document: The manifest of the bundle; ``training.evaluation`` is what ``export.evaluate``
            wrote, or ``None``.
        what_it_is: Lines about the system.
    """
    training = document["training"]
    lines = [
        f"# Model card: {document['name']} {document['version']}",
        "",
        document["intended_use"].strip(),
        "",
        "## What it is",
        "",
        *what_it_is,
        "",
        "## Training",
        "",
        f"- Data: {training['data']}. Every patient is there twice, with the finding and without.",
        f"- Stage 1: {_progress(training['stage1'])}.",
        f"- Stage 2: {_progress(training['stage2'])}.",
        f"- Last loss of stage 1: {_loss(training['stage1']['loss'])}.",
    ]
    start = training.get("stage1_start")
    while start:
        lines.append(f"- Stage 1 started from a run on {start['data']}: {_progress(start)}.")
        start = start.get("start")
    lines += [
        "",
        "## Operating points",
        "",
        "What is measured on the very studies that a threshold was chosen on is too good.",
        "",
        "| name | threshold | measured on the studies it was chosen on |",
        "|---|---|---|",
    ]
    for point in document["operating_points"]:
        measured = ", ".join(
            f"{k} {v:.2f}" if isinstance(v, float) else f"{k}: {v}"
            for k, v in point.get("measured", {}).items()
        )
        lines.append(
            f"| {point['name']} | {point['threshold']:.4f} | {measured or 'not measured'} |"
        )
    lines += ["", "## Evaluation", ""]
    lines += _evaluation(training.get("evaluation"))
    return "\n".join([*lines, ""])


def _progress(stage: Mapping[str, Any]) -> str:
    at = stage["progression"]
    return f"{at['step']} steps, {at['minutes']:.0f} minutes"


def _loss(weights: Mapping[str, float]) -> str:
    names = {"cross_entropy": "cross-entropy", "dice": "Dice", "focal": "focal loss per cell"}
    return " + ".join(f"{weights[key]:g} {name}" for key, name in names.items())


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    first, count = evaluation["first_seed"], evaluation["pairs"]
    unseen = "that training never saw" if evaluation["held_out"] else "that training may have seen"
    slabs = evaluation["positive_slabs"]
    lines = [
        f"On {count} pairs of synthetic studies {unseen} (seeds {first} to",
        f"{first + count - 1}), with {evaluation['engine']}. {slabs['scored']} slabs are positive;",
        f"{slabs['gated']} more did not pass the gate and are in no measure of slabs.",
        "",
        "| measure | value | 95 % interval |",
        "|---|---|---|",
    ]
    for key, name in HEADLINES.items():
        if key in evaluation:
            value = evaluation[key]
            low, high = value["interval"]
            lines.append(f"| {name} | {value['value']:.3f} | {low:.3f} to {high:.3f} |")
    trivial = evaluation.get("trivial_auc", {})
    if trivial:
        lines += [
            "",
            "Study AUC of scores that need no network, each in the direction that suits it. The",
            "last one is a logistic regression, cross-validated over patients.",
            "",
            "| score | AUC |",
            "|---|---|",
        ]
        lines += [f"| {name} | {value:.3f} |" for name, value in trivial.items()]
    return lines
