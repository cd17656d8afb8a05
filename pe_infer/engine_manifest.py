"""What a folder of built engines says of itself: the models behind ``engines.json``.

Like a bundle's manifest it is data from outside: unknown keys and wrong types are refused. Whether
the folder may be trusted is decided in `pe_infer.engine_folder`; whether an engine fits a machine
is decided here, from the text alone.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from pe_infer.machine import Machine
from pe_infer.manifest import FileName, Identifier, Precision, TensorName

ENGINE_FORMAT_VERSION: Final = 1

Target: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
Compute: TypeAlias = Literal["fp16", "fp32"]
Capability: TypeAlias = Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
EngineFileName: TypeAlias = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}-[0-9a-f]{12}\.(engine|cache)$")
]
Shape: TypeAlias = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class _Value(BaseModel):
    """Frozen, strict, no unknown keys. Attribute docstrings go into the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class StoredFile(_Value):
    """One file beside the manifest."""

    file: EngineFileName
    """Name and the beginning of its sha256: a new engine never takes an old one's place."""
    sha256: Sha256
    bytes: NonNegativeInt


class ShapeRange(_Value):
    """What an input may be: the optimisation profile, or one shape three times."""

    min: Shape
    best: Shape
    """The shape that the engine is optimised for."""
    max: Shape


class EngineEntry(StoredFile):
    """One engine."""

    graph: FileName
    """Of the bundle."""
    graph_sha256: Sha256
    precision: Precision
    """What the bundle says of the node; see ``precision`` of the folder."""
    max_batch: PositiveInt
    inputs: dict[TensorName, ShapeRange]
    """All float32."""
    outputs: dict[TensorName, Shape]
    """All float32, at the largest batch."""


class BuiltFrom(_Value):
    """The bundle that engines were built from."""

    name: str
    version: str
    sha256: Sha256


class EngineManifest(_Value):
    """``engines.json``: engines of one bundle, built together for one kind of machine."""

    format_version: Literal[1]
    bundle: BuiltFrom
    target: Target
    version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,3}[0-9A-Za-z.+-]*$", max_length=64)]
    """Of the library that built them. Only the same version runs them."""
    platform: str
    """Operating system and processor on which they were built."""
    compute_capabilities: Annotated[tuple[Capability, ...], Field(min_length=1)]
    """Ascending."""
    later_capabilities: bool = False
    """Whether they run on GPUs that came after the last of these, too."""
    precision: Compute
    """``fp16``: as the bundle's nodes allow. ``fp32``: everything in float32."""
    conversion_version: PositiveInt
    """Of the rules by which float16 graphs are made (`pe_infer.half`)."""
    options: dict[str, bool | int | str] = {}
    """Settings of the builder, for the record."""
    pe_infer_version: str
    engines: Annotated[dict[Identifier, EngineEntry], Field(min_length=1)]
    """By node of the bundle's program. Nodes may share an engine."""
    timing_cache: StoredFile | None = None
    """What the builder measured, to be used by the next build."""
    runtime_cache: StoredFile | None = None
    """Kernels that were compiled when the engines were first run here."""

    def misfits(self, machine: Machine) -> list[str]:
        """Why these engines do not run on a machine; nothing if they do, as far as is known.

        What is not known of a machine that was described is taken to fit; on this machine nothing
        is unknown, so there a GPU or a library that is not found is one that is not there.
        """
        return [
            reason
            for reason in (
                self._library_misfit(machine),
                self._gpu_misfit(machine),
                self._platform_misfit(machine),
            )
            if reason
        ]

    def _library_misfit(self, machine: Machine) -> str:
        found = machine.versions.get(self.target)
        if found is None:
            if machine.here:
                return f"{self.target} is not installed here"
            if machine.versions:
                others = ", ".join(sorted(machine.versions))
                return f"built for {self.target}, the machine has {others}"
            return ""
        pairs = zip(self.version.split("."), found.split("."), strict=False)  # as far as both say
        if all(ours == theirs for ours, theirs in pairs):
            return ""
        return (
            f"built with {self.target} {self.version}, the machine has {found}: engines run on "
            "the version that built them only"
        )

    def _gpu_misfit(self, machine: Machine) -> str:
        found = machine.compute_capability
        if found is None:
            return "no NVIDIA GPU was found here" if machine.here else ""
        if found in self.compute_capabilities:
            return ""
        if self.later_capabilities and _number(found) > _number(self.compute_capabilities[-1]):
            return ""
        later = " and later" if self.later_capabilities else ""
        return (
            f"built for compute capability {', '.join(self.compute_capabilities)}{later}, the GPU "
            f"has {found}"
        )

    def _platform_misfit(self, machine: Machine) -> str:
        ours, theirs = self.platform, machine.platform
        if theirs is None:
            return ""
        if self.target == "tensorrt-rtx":  # portable between Linux and Windows (its documentation)
            ours, theirs = _processor(ours), _processor(theirs)
        if ours == theirs:
            return ""
        return f"built on {self.platform}, the machine is {machine.platform}"


def engine_schema() -> dict[str, Any]:
    """The JSON schema of ``engines.json``, as published in ``docs/engines.schema.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **EngineManifest.model_json_schema(),
        "title": f"pe_infer engine manifest, format version {ENGINE_FORMAT_VERSION}",
    }


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def _processor(platform: str) -> str:
    """Of a platform, under its name on Linux."""
    processor = platform.rpartition("-")[2].lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)
