"""A precision certificate with made-up numbers, for a given bundle."""

from typing import Any

from pe_infer.bundle import Bundle
from pe_infer.certificate import STEPS, Certificate, graph_hashes, program_digest
from pe_infer.half import CONVERSION_VERSION

DEVIATION = {"p99": 0.002, "max": 0.01, "relative_p99": 0.001, "relative_max": 0.005}


def certificate_of(bundle: Bundle, **changes: Any) -> Certificate:
    document = {
        "format_version": 1,
        "bundle": "toy 0.1.0",
        "graphs": graph_hashes(bundle.manifest),
        "program": program_digest(bundle.manifest),
        "conversion_version": CONVERSION_VERSION,
        "pe_infer_version": "0.1.0",
        "onnxruntime_version": "1.27.0",
        "phantom_configuration": "a" * 64,
        "first_seed": 2_900_000,
        "pairs": 3,
        "held_out": True,
        "studies": 6,
        "slabs": 300,
        "inner_studies": 2,
        "errors": (
            tensor_error() | {"sequence": "features"},
            tensor_error(node="down") | {"tensor": "c_next"},
        ),
        "growth": tuple(
            {"node": "down", "tensor": "y", "steps": steps, "error": DEVIATION} for steps in STEPS
        ),
        "ranges": (half_range(largest=12.5),),
        "logits": ({"output": "slab_logit", "count": 300, "p99": 0.004, "max": 0.02},),
        "largest_score_error": 0.003,
        "flips": (flips(),),
        "study_scores": (2, 1, 0, 0, 0, 0, 0, 0, 1, 2),
        "slab_scores": (150, 50, 20, 10, 10, 10, 10, 10, 10, 20),
    }
    return Certificate.model_validate({**document, **changes})


def tensor_error(node: str = "encoder", largest: float = 0.01) -> dict[str, Any]:
    return {
        "node": node,
        "tensor": "y",
        "sequence": None,
        "magnitude_p99": 2.0,
        "magnitude_max": 3.0,
        "own": DEVIATION,
        "accumulated": {**DEVIATION, "max": largest},
    }


def half_range(largest: float) -> dict[str, Any]:
    return {
        "node": "encoder",
        "tensor": "conv_1",
        "largest": largest,
        "head_room": 65504 / largest,
        "subnormal_share": 0.01,
    }


def flips(within: int = 0, beyond: int = 0) -> dict[str, Any]:
    return {
        "operating_point": "balanced",
        "threshold": 0.5,
        "within": within,
        "beyond": beyond,
    }
