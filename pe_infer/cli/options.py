"""Options that several commands have."""

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from pe_infer.engines.base import AUTO, RUNTIMES


class Precision(StrEnum):
    """Arithmetic inside the networks."""

    default = "default"
    float32 = "float32"


BundleOption: TypeAlias = Annotated[
    str, typer.Option("--bundle", help="A shipped bundle's name, or a bundle's folder.")
]
ChosenBundleOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--bundle",
        help="A shipped bundle's name, or a bundle's folder. Without it, the shipped bundle that "
        "modality, body part and protocol of the study ask for.",
    ),
]
EngineOption: TypeAlias = Annotated[
    str,
    typer.Option("--engine", help=f"One of {', '.join((AUTO, *RUNTIMES))}: that one or an error."),
]
PrecisionOption: TypeAlias = Annotated[
    Precision,
    typer.Option(
        "--precision", help="default: what the bundle allows and the processor does best."
    ),
]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", help="Threads of one inference.", min=1)
]
