"""Whether engines fit a machine, told from their manifest."""

import json
from pathlib import Path
from typing import Any

import engine_files as made_up
import jsonschema
import pytest
from pydantic import ValidationError

from pe_infer.bundle import Bundle
from pe_infer.engine_manifest import engine_schema
from pe_infer.machine import Machine

TENSORRT = {"target": "tensorrt", "version": "10.3.0.26", "compute_capabilities": ("8.7",)}
DEFAULT = {"compute_capabilities": ("8.0", "8.6", "8.9", "12.0"), "later_capabilities": True}


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        ({}, "sm=86,tensorrt-rtx=1.7"),
        ({}, "sm=8.9,tensorrt-rtx=1.7.1.116"),
        ({}, "sm=89"),
        ({}, "tensorrt-rtx=1.7,tensorrt=10.3"),
        ({}, "sm=86,tensorrt-rtx=1.7,platform=win32-AMD64"),
        (DEFAULT, "sm=80"),
        (DEFAULT, "sm=12.1"),
        (TENSORRT, "sm=87,tensorrt=10.3"),
        ({**TENSORRT, "version": "10.3.0"}, "sm=87,tensorrt=10.3.0.26"),
        (TENSORRT, "sm=87,tensorrt=10.3.0.26,platform=linux-x86_64"),
    ],
)
def test_fits(bundle: Bundle, changes: dict[str, Any], machine: str) -> None:
    assert made_up.engine_manifest(bundle, **changes).misfits(Machine.parse(machine)) == []


@pytest.mark.parametrize(
    ("changes", "machine", "reasons"),
    [
        ({}, "sm=87,tensorrt=10.3", ["the machine has tensorrt", "8.6, 8.9, the GPU has 8.7"]),
        ({}, "sm=12.0", ["8.6, 8.9, the GPU has 12.0"]),
        ({}, "sm=86,tensorrt-rtx=1.4", ["built with tensorrt-rtx 1.7.1.116"]),
        ({}, "tensorrt-rtx=1.7.1.11", ["1.7.1.116"]),
        ({}, "platform=linux-aarch64", ["the machine is linux-aarch64"]),
        (DEFAULT, "sm=75", ["12.0 and later, the GPU has 7.5"]),
        (DEFAULT, "sm=90", ["the GPU has 9.0"]),
        (DEFAULT, "sm=87", ["the GPU has 8.7"]),
        (TENSORRT, "sm=87,tensorrt=10.30", ["10.3.0.26, the machine has 10.30"]),
        (TENSORRT, "sm=86,tensorrt=11", ["the machine has 11", "the GPU has 8.6"]),
        (TENSORRT, "platform=linux-aarch64", ["the machine is linux-aarch64"]),
    ],
)
def test_says_why_not(
    bundle: Bundle, changes: dict[str, Any], machine: str, reasons: list[str]
) -> None:
    found = made_up.engine_manifest(bundle, **changes).misfits(Machine.parse(machine))
    assert len(found) == len(reasons)
    for text, reason in zip(found, reasons, strict=True):
        assert reason in text


def test_here_what_is_not_found_is_not_there(bundle: Bundle) -> None:
    found = made_up.engine_manifest(bundle).misfits(Machine(here=True))
    assert found == ["tensorrt-rtx is not installed here", "no NVIDIA GPU was found here"]


def test_a_manifest_is_valid_under_the_published_schema(bundle: Bundle, tmp_path: Path) -> None:
    made_up.write_made_up(tmp_path / "engines", bundle)
    document = json.loads((tmp_path / "engines" / "engines.json").read_text())
    jsonschema.validate(document, engine_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"target": "cuda"},
        {"version": "latest"},
        {"compute_capabilities": ()},
        {"compute_capabilities": ("86",)},
        {"engines": {}},
        {"precision": "int8"},
        {"surprise": 1},
    ],
)
def test_what_makes_no_sense_is_refused(bundle: Bundle, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made_up.engine_manifest(bundle, **change)
