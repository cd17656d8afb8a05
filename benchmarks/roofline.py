"""The tables of docs/gpu.md: what studies cost, and how long that takes at published peak rates.

    python -m benchmarks.roofline          # print them
    python -m benchmarks.roofline --write  # put them into docs/gpu.md

Computed from the graphs of the shipped bundles; nothing runs.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pe_infer.bundle import Bundle, shipped
from pe_infer.roofline.gpus import GPUS
from pe_infer.roofline.study import (
    STUDIES,
    Step,
    StudyCost,
    StudyShape,
    Time,
    steps_time,
    times_by_kind,
    totals,
)
from pe_infer.synthetic import phantom_for

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "gpu.md"
BLOCK: Final = re.compile(r"(<!-- computed: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The document with its tables computed anew."""
    tables = {"gpus": gpu_table, "studies": study_sections}
    return BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", text)


def gpu_table() -> str:
    """Peak rates and where they are published."""
    rows = [
        (
            gpu.name,
            gpu.capability,
            _number(gpu.tensor_flops / 1e12, 4),
            _number(gpu.float_flops / 1e12),
            _number(gpu.memory_bandwidth / 1e9, 4),
            "shared memory" if gpu.link_bandwidth is None else _number(gpu.link_bandwidth / 1e9),
            _number(gpu.launch_s * 1e6),
            _number(gpu.tensor_flops / gpu.memory_bandwidth),
        )
        for gpu in GPUS
    ]
    head = (
        "GPU",
        "Compute capability",
        "FP16 tensor, TFLOP/s",
        "FP32, TFLOP/s",
        "Memory, GB/s",
        "Host to device, GB/s",
        "Assumed per launch, µs",
        "FLOP/byte where tensor cores and memory balance",
    )
    sources = "\n".join(f"- {gpu.name}: {gpu.source}." for gpu in GPUS)
    return f"{_table(head, rows)}\n\n{sources}"


def study_sections() -> str:
    """All tables of the shipped bundles."""
    return "\n\n".join(section(Bundle.load(name)) for name in shipped())


def section(bundle: Bundle) -> str:
    """All tables of one bundle, for the usual study of the anatomy that it accepts."""
    shape = STUDIES[phantom_for(bundle.manifest).anatomy]
    cost = StudyCost(bundle, shape)
    study = (
        f"{shape.slices} slices of {shape.rows} x {shape.rows} pixels, "
        f"{shape.spacing_um / 1000:g} mm apart: {cost.slabs} slabs"
    )
    times = "Expected times, **computed, not measured**; in brackets what most of them is due to:"
    return "\n\n".join(
        (
            f"### Bundle `{bundle.manifest.name}`",
            f"A study is {study}. What one run costs, with a batch of 1:",
            _cost_table(cost),
            times,
            _time_table(cost),
            "The whole study stage by stage, in ms, **computed, not measured**:",
            _stage_table(cost),
            _memory_line(cost, shape),
        )
    )


def _cost_table(cost: StudyCost) -> str:
    steps = cost.slab_steps("down")
    online = {step.name for step in steps}
    steps += [
        Step(kind=cost.kind(node), name=node.name, kernels=cost.node(node).kernels, runs=1)
        for node in cost.program.graph_nodes
        if node.name not in online
    ]
    rows = []
    for step in steps:
        if step.kind == "copies":
            continue
        one = totals(step.kernels)
        rows.append(
            (
                step.kind,
                step.name,
                _number(one.flops / 1e6),
                _number(100 * one.tensor_flops / max(1, one.flops)),
                _number(one.weight_bytes / 1e6),
                _number(one.read_bytes / 1e6),
                _number(one.written_bytes / 1e6),
                _number(one.flops / one.memory_bytes),
                str(len(step.kernels)),
            )
        )
    head = (
        "Stage",
        "Node or kernel",
        "MFLOP",
        "on tensor cores, %",
        "Weights, MB",
        "Read, MB",
        "Written, MB",
        "FLOP/byte",
        "Launches",
    )
    return _table(head, rows)


def _time_table(cost: StudyCost) -> str:
    rows = [
        (
            gpu.name,
            *(
                _time(steps_time(steps, gpu))
                for steps in (
                    cost.slab_steps("down"),
                    cost.study_steps(),
                    cost.last_slice_steps("down"),
                    cost.last_slice_steps("up"),
                )
            ),
        )
        for gpu in GPUS
    ]
    head = (
        "GPU",
        "One slab while slices arrive, ms",
        "Whole study at once, ms",
        "Last slice to result, head first, ms",
        "Last slice to result, feet first, ms",
    )
    return _table(head, rows)


def _stage_table(cost: StudyCost) -> str:
    steps = cost.study_steps()
    kinds = list(times_by_kind(steps, GPUS[0]))
    rows = [
        (gpu.name, *(_time(time) for time in times_by_kind(steps, gpu).values())) for gpu in GPUS
    ]
    return _table(("GPU", *kinds), rows)


def _memory_line(cost: StudyCost, shape: StudyShape) -> str:
    memory = cost.memory()
    return (
        f"Device memory of one stream, computed: weights {_number(memory.weights / 1e6)}, "
        f"{shape.slices} resampled slices {_number(memory.slices / 1e6)}, sequences and states "
        f"{_number(memory.sequences / 1e6)}, buffers of one batch {_number(memory.buffers / 1e6)}, "
        f"intermediate tensors of all engines {_number(memory.contexts / 1e6)}; together "
        f"{_number(memory.total / 1e6)} MB. A further stream shares the weights. The CUDA context "
        "and the code of TensorRT come on top: their size depends on GPU and driver, and is not "
        "known here."
    )


def _time(time: Time) -> str:
    return f"{_number(time.seconds * 1e3)} ({time.bound})"


def _number(value: float, digits: int = 3) -> str:
    """A few significant digits, without an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.7f}".rstrip("0").rstrip(".")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables, or write them."""
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    elif len(sys.argv) == 1:
        print(f"{gpu_table()}\n\n{study_sections()}")
    else:
        raise SystemExit("usage: python -m benchmarks.roofline [--write]")


if __name__ == "__main__":
    main()
