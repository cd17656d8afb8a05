"""A precision certificate as tables."""

from typing import Final

from rich.console import Console
from rich.text import Text

from pe_infer.certificate import MARGIN, SCORE_BINS, STEPS, Certificate, Deviation
from pe_infer.cli.layout import Cell, print_facts, print_table
from pe_infer.half import CONVERSION_VERSION

_BAR: Final = 40


def headline(certificate: Certificate | None) -> str:
    """What there is, in a line."""
    if certificate is None:
        return "none: what float16 costs was not measured"
    unseen = "" if certificate.held_out else " that training may have seen"
    return (
        f"float16 on {certificate.studies} synthetic studies{unseen}, {certificate.slabs} slabs, "
        f"ONNX Runtime {certificate.onnxruntime_version} on the CPU"
    )


def print_certificate(console: Console, certificate: Certificate) -> None:
    """Print what was measured."""
    print_table(
        console,
        ("node", "writes", "p99", "largest", "own p99", "own max", "in all p99", "in all max"),
        [
            (
                error.node,
                error.sequence,
                f"{error.magnitude_p99:.3g}",
                f"{error.magnitude_max:.3g}",
                *_percent(error.own),
                *_percent(error.accumulated),
            )
            for error in certificate.errors
            if error.sequence is not None
        ],
        title="float16: magnitudes; errors in % of the 99th percentile of the magnitude",
    )
    if certificate.growth:
        print_table(
            console,
            ("node", "tensor", *(f"{steps} steps" for steps in STEPS)),
            _growth(certificate),
            title="growth: p99 (max) of the error after so many steps of a scan, in % as above",
        )
    print_table(
        console,
        ("node", "largest float16 value", "head room", "subnormal", "tensor"),
        [
            (r.node, f"{r.largest:.3g}", _times(r.head_room), f"{r.subnormal_share:.2%}", r.tensor)
            for r in certificate.ranges
        ],
        title=f"range of float16 (65504), inside the graphs, on {certificate.inner_studies} "
        "studies",
    )
    print_facts(console, _facts(certificate), title="logits and verdicts")
    print_table(
        console,
        ("probability", "studies", "", "slabs", ""),
        _histogram(certificate),
        title="float32 scores: how they are spread",
    )


def _percent(error: Deviation) -> tuple[str, str]:
    return f"{100 * error.relative_p99:.2g}", f"{100 * error.relative_max:.2g}"


def _times(head_room: float) -> Cell:
    return Text(f"{head_room:.2g} x", "" if head_room >= 1 else "red")


def _growth(certificate: Certificate) -> list[tuple[str, ...]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for growth in sorted(certificate.growth, key=lambda growth: growth.steps):
        p99, largest = _percent(growth.error)
        rows.setdefault((growth.node, growth.tensor), []).append(f"{p99} ({largest})")
    merged: dict[tuple[str, ...], list[str]] = {}  # an output is often a state, too
    for (node, tensor), cells in rows.items():
        merged.setdefault((node, *cells), []).append(tensor)
    return [(node, ", ".join(tensors), *cells) for (node, *cells), tensors in merged.items()]


def _facts(certificate: Certificate) -> list[tuple[str, str]]:
    shortcomings = certificate.shortcomings()
    last = certificate.first_seed + certificate.pairs - 1
    facts = [
        (logit.output, f"error p99 {logit.p99:.2g}, max {logit.max:.2g} of {logit.count}")
        for logit in certificate.logits
    ]
    facts.append(("score", f"error max {certificate.largest_score_error:.2g}"))
    for flips in certificate.flips:
        verdicts = (
            f"{flips.within + flips.beyond} of {certificate.studies} verdicts at "
            f"{flips.threshold:g}: {flips.within} within {MARGIN:g} of it, {flips.beyond} beyond"
        )
        facts.append((f"flips, {flips.operating_point}", verdicts))
    facts.append(("seeds", f"{certificate.first_seed} to {last}, two studies each"))
    if certificate.conversion_version != CONVERSION_VERSION:
        shortcomings.append(
            f"made with version {certificate.conversion_version} of the conversion to float16, "
            f"this pe_infer has {CONVERSION_VERSION}: measure again"
        )
    facts.append(("shortcomings", "; ".join(shortcomings) or "none"))
    return facts


def _histogram(certificate: Certificate) -> list[tuple[str, ...]]:
    columns = [certificate.study_scores, certificate.slab_scores]
    rows = []
    for at in range(SCORE_BINS):
        cells = [f"{at / SCORE_BINS:.1f} to {(at + 1) / SCORE_BINS:.1f}"]
        for counts in columns:
            bar = round(_BAR * counts[at] / max(1, *counts))
            cells += [str(counts[at]), "#" * bar]
        rows.append(tuple(cells))
    return rows
