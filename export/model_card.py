"""``MODEL_CARD.md`` of a bundle, written from its manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from export.anatomies import ARRIVAL
from export.measures import reasons_text
from export.training.validation import HIT_DISTANCE_MM

HEADLINES = {
    "study_auc": "study AUC",
    "highest_peak_auc": "study AUC of the highest attention peak by itself",
    "three_peaks_auc": "study AUC of the mean of the three highest peaks",
    "sensitivity": "sensitivity at the default operating point",
    "specificity": "specificity at the default operating point",
    "alerted": "positive studies with a provisional alert while slices arrive",
    "alerted_falsely": "negative studies with one",
    "slab_auc": "slab AUC",
    "peak_hit": f"attention peak within {HIT_DISTANCE_MM:.0f} mm of the lesion, all positive slabs",
    "peak_control": "the same places in the patients without it (control)",
}

POSITIVE_SHARES = {
    "pairs": "positive there and here; among patients of whom fewer are, probabilities are too "
    "high.",
    "real studies": "positive here, there as many as the collections have.",
}

SHIFTED = (
    "Studies drawn from other ranges than those of the training: another scanner and protocol,",
    "other patients. The ranges were chosen before the evaluation.",
)


def model_card(
    document: Mapping[str, Any], what_it_is: Sequence[str], sections: Sequence[str] = ()
) -> str:
    """Markdown text; every number in it comes from the manifest, or from a section.

    Args:
        document: The manifest of the bundle; ``training.evaluation`` is what ``export.evaluate``
            wrote, or ``None``, and ``training.shifted`` what it wrote of another phantom
            configuration, if anything.
        what_it_is: Lines about the system.
        sections: Further ones for the end, as Markdown with a heading of their own.
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
        f"- Data: {training['data']}. {_twice(training)}",
        *_real(training),
        f"- Stage 1: {_progress(training['stage1'])}.",
        f"- Stage 2: {_progress(training['stage2'])}.",
        f"- Last loss of stage 1: {_loss(training['stage1']['loss'])}.",
    ]
    start = training.get("stage1_start")
    while start:
        known = f"bundle {start['bundle']}, " if "bundle" in start else "a run on "
        whose = "Stage 1" if start is training["stage1_start"] else "That"
        lines.append(f"- {whose} had started from {known}{start['data']}: {_progress(start)}.")
        start = start.get("start")
    lines += _log(training.get("log"), started=bool(training.get("stage1_start")))
    lines += [
        "",
        "## Operating points",
        "",
        "What is measured on the very studies that a threshold was chosen on is too good.",
        "",
        "| name | threshold | chosen for | measured on the studies it was chosen on |",
        "|---|---|---|---|",
    ]
    for point in document["operating_points"]:
        measured = ", ".join(
            f"{k} {v:.2f}" if isinstance(v, float) else f"{k}: {v}"
            for k, v in point.get("measured", {}).items()
        )
        lines.append(
            f"| {point['name']} | {point['threshold']:.4f} | {point.get('description') or '-'} | "
            f"{measured or 'not measured'} |"
        )
    lines += _checks(document.get("checks", ()))
    lines += ["", "## Evaluation", ""]
    validated_on = training.get("validated_on", "pairs")
    lines += _evaluation(training.get("evaluation"), validated_on)
    if shifted := training.get("shifted"):
        lines += ["", "## Evaluation on shifted studies", "", *SHIFTED, ""]
        lines += _evaluation(shifted, validated_on)
    for section in sections:
        lines += ["", section.strip()]
    return "\n".join([*lines, ""])


def _twice(training: Mapping[str, Any]) -> str:
    if training.get("collections"):
        return (
            "Every synthetic patient is there twice, with the finding and without; real studies of "
            "collections are there as they are."
        )
    return "Every patient is there twice, with the finding and without."


def _real(training: Mapping[str, Any]) -> list[str]:
    """Real studies that the training used, under which terms."""
    terms: Mapping[str, str] = training.get("terms", {})
    lines = [
        f"- Real studies of {name}: {terms.get(name, 'terms not known')}."
        for name in training.get("collections") or {}
    ]
    backgrounds: Mapping[str, str] = training.get("backgrounds") or {}
    lines += [
        f"- Findings were painted into real studies: {folder} ({source})."
        for folder, source in backgrounds.items()
    ]
    if not training.get("all_backgrounds", True):
        lines.append(
            "- A part of the training was done before its real studies were kept in this record: "
            "findings may have been painted into others."
        )
    return lines


def _log(files: Mapping[str, str] | None, *, started: bool) -> list[str]:
    if files is None:
        return ["- Log: none lay beside the checkpoints, so there is no curve."]
    of = ", without what stage 1 started from" if started else ""
    return [
        f"- Log: [{files['table']}]({files['table']}), a row per validation{of}.",
        "",
        f"![Loss and validation of both stages]({files['curve']})",
    ]


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a study must be like to be judged."""
    if not checks:
        return []
    limits = {
        "refuse_below": "not processed below",
        "flag_below": "flagged below",
        "flag_above": "flagged above",
        "refuse_above": "not processed above",
    }
    lines = [
        "",
        "## Checks of the images",
        "",
        "A study beyond a limit is not processed, or flagged; the value is in every result.",
        "",
        "| check | limits | what it means |",
        "|---|---|---|",
    ]
    for check in checks:
        unit = "mm2" if check["measure"]["kind"] == "area" else "HU"
        given = ", ".join(
            f"{words} {check[key]:g} {unit}"
            for key, words in limits.items()
            if check.get(key) is not None
        )
        lines.append(f"| {check['name']} | {given} | {check['meaning']} |")
    return lines


def _progress(stage: Mapping[str, Any]) -> str:
    at = stage["progression"]
    width = stage.get("width", 1.0)
    narrow = f", {width:g} of the width above" if width != 1.0 else ""
    return f"{at['step']} steps, {at['minutes']:.0f} minutes{narrow}"


def _loss(weights: Mapping[str, float]) -> str:
    names = {"cross_entropy": "cross-entropy", "dice": "Dice", "focal": "focal loss per cell"}
    return " + ".join(f"{weights[key]:g} {name}" for key, name in names.items())


def _evaluation(evaluation: Mapping[str, Any] | None, validated_on: str) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    first, count = evaluation["first_seed"], evaluation["pairs"]
    unseen = "that training never saw" if evaluation["held_out"] else "that training may have seen"
    slabs = evaluation["positive_slabs"]
    real = evaluation.get("semi_synthetic")
    kind = f"semi-synthetic studies made of {real}, by seeds" if real else "synthetic studies"
    made = "configuration" if real else "phantom configuration"
    lines = [
        f"On {count} pairs of {kind} {unseen} (seeds {first} to",
        f"{first + count - 1}, {made} {_digest(evaluation)}), with",
        f"{evaluation['engine']}. {slabs['scored']} slabs are positive;",
        f"{slabs['gated']} more did not pass the gate and are in no measure of slabs.",
    ]
    refused = evaluation.get("not_processed")
    if refused and refused["patients"]:
        lines += [
            f"{refused['patients']} of {count} patients are in no measure, since a study of theirs",
            f"was not processed: {reasons_text(refused)}.",
        ]
    lines += [
        "",
        "| measure | value | 95 % interval |",
        "|---|---|---|",
    ]
    for key, name in HEADLINES.items():
        if key in evaluation:
            value = evaluation[key]
            low, high = value["interval"]
            lines.append(f"| {name} | {value['value']:.3f} | {low:.3f} to {high:.3f} |")
    lines += _broken_down(evaluation)
    if calibration := evaluation.get("calibration"):
        lines += _calibration(calibration, validated_on)
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


def _broken_down(evaluation: Mapping[str, Any]) -> list[str]:
    """By the largest finding of the patient, by what a slab shows of it, and by conditions."""
    lines = []
    for grouping, rows in evaluation.get("by_largest", {}).items():
        lines += _by_group(grouping, f"By {grouping} of the patient's largest lesion", rows)
    if by_size := evaluation.get("by_slab_size"):
        lines += _by_slab_size(by_size)
    for condition, rows in evaluation.get("by_condition", {}).items():
        lines += _by_group(condition, f"By {condition}", rows)
        if condition == ARRIVAL:
            lines += ["", "These are different patients: the order changes no slab of a patient."]
    return lines


def _calibration(calibration: Mapping[str, Any], validated_on: str) -> list[str]:
    scaling, names = calibration["scaling"], {"ece": "expected error", "brier": "Brier score"}
    lines = [
        "",
        "Calibration: probability = sigmoid(scale * logit + offset), fitted on validation studies:",
        f"scale {scaling['scale']:.3f}, offset {scaling['offset']:.3f}. Half of the studies are",
        POSITIVE_SHARES[validated_on],
        "",
        "| calibration | before | after |",
        "|---|---|---|",
    ]
    for key, name in names.items():
        both = " | ".join(interval_text(calibration[w][key], 3) for w in ("before", "after"))
        lines.append(f"| {name} | {both} |")
    return lines


def _digest(evaluation: Mapping[str, Any]) -> str:
    return str(evaluation["phantom_configuration"])[:12]


def _by_group(grouping: str, what: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        f"{what}; intervals are 95 %.",
        "",
        f"| {grouping} | studies | verdicts right | AUC | sensitivity | attention hits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = " | ".join(interval_text(row.get(k)) for k in ("auc", "sensitivity", "peak_hit"))
        lines.append(
            f"| {row['group']} | {row['studies']} | {row['verdicts_right']} | {measured} |"
        )
    return lines


def _by_slab_size(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of positive slabs, each against the same slab of the patient without the finding."""
    lines = [
        "",
        "By size of the finding in the middle plane of a positive slab. The AUC is against the",
        "same slabs of the patients without it, where anatomy cannot help; the slab AUC above is",
        "against all clean slabs. Control is the attention peak at the same places there.",
        "",
        "| pixels | slabs | AUC | attention hits | control |",
        "|---|---|---|---|---|",
    ]
    for i, row in enumerate(rows):
        size = f"{row['from_px']} and more"
        if i + 1 < len(rows):
            size = f"{row['from_px']} to {row['to_px'] - 1}"
        values = (row["auc_against_twins"], row["hit"], row["control"])
        shown = " | ".join("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"| {size} | {row['slabs']} | {shown} |")
    return lines


def interval_text(measured: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Value and interval; a dash where there is none."""
    if measured is None:
        return "-"
    value, low, high = (f"{v:.{digits}f}" for v in (measured["value"], *measured["interval"]))
    return f"{value} ({low} to {high})"
