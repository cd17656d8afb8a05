"""What float16 costs a bundle: the models behind ``certificate.json``, format version 1.

`export/certify.py` measures and writes it, `pe_infer.bundle` stores and checks it, and ``pe-infer
bundles show`` prints it. Float16 here is what `pe_infer.half` makes of the graphs, with every value
rounded as on a GPU, executed on the CPU; nothing in a certificate was measured on a GPU.
"""

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from pe_infer.manifest import (
    ONLINE_LOGIT,
    SLAB_LOGIT,
    FileName,
    Identifier,
    Manifest,
    Probability,
    ReduceNode,
    TensorName,
)

CERTIFICATE_FORMAT_VERSION: Final = 1
CERTIFICATE_FILE: Final = "certificate.json"
FLOAT16_LARGEST: Final = 65504.0
FLOAT16_SMALLEST_NORMAL: Final = 2.0**-14
STEPS: Final = (10, 50, 200, 1000)
MARGIN: Final = 0.01  # of probability: a verdict that flips nearer to its threshold is expected to
SLAB_LOGIT_P99: Final = 0.05  # what the error of slab logits should stay within
SCORE_BINS: Final = 10
_NOT_FINITE: Final = 3.4e38  # and more is what stands for values that are not (see `Deviation`)

Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Counts: TypeAlias = Annotated[
    tuple[NonNegativeInt, ...], Field(min_length=SCORE_BINS, max_length=SCORE_BINS)
]


class _Value(BaseModel):
    """Frozen, strict, no unknown keys. Attribute docstrings go into the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Deviation(_Value):
    """How far values are from float32, over single elements. Not finite: the largest float32."""

    p99: Size
    """99 % of the elements are at most this far off; up to 7 % too large."""
    max: Size
    relative_p99: Size
    """``p99`` divided by the 99th percentile of the tensor's magnitude in float32 (by its largest
    magnitude where that is zero)."""
    relative_max: Size
    """``max`` divided by the same."""


class TensorError(_Value):
    """One output of one node, over all studies."""

    node: Identifier
    tensor: TensorName
    sequence: Identifier | None
    """What it writes; ``null`` for a recurrent state."""
    magnitude_p99: Size
    """Of the float32 values; up to 7 % too large."""
    magnitude_max: Size
    """The largest of both variants, where it is finite."""
    own: Deviation
    """The node alone: what it reads, its states among it, is float32's."""
    accumulated: Deviation
    """All nodes before it computed in float16 too, and every earlier step of its own."""


class Growth(_Value):
    """One output of one scan after many steps, fed with float32's input from real studies.

    A study is run forth and back until there are enough steps, both variants each with its own
    states. The error is that of the last ten steps.
    """

    node: Identifier
    tensor: TensorName
    steps: PositiveInt
    error: Deviation


class HalfRange(_Value):
    """What is rounded to float16 inside one node's graph, before it is."""

    node: Identifier
    tensor: str
    """The tensor with the largest value; its name in the graph."""
    largest: Size
    """Largest finite magnitude."""
    head_room: Size
    """65504, the largest float16, divided by ``largest``: below 1 it overflows."""
    subnormal_share: Probability
    """Of all values but zeros, those below 2**-14, which float16 keeps with less precision or as
    zero."""


class LogitError(_Value):
    """One logit that the program puts out; absolute, exact percentiles."""

    output: Identifier
    count: PositiveInt
    p99: Size
    max: Size


class Flips(_Value):
    """Verdicts that differ at one operating point."""

    operating_point: Identifier
    threshold: Probability
    within: NonNegativeInt
    """Flips of studies whose float32 score is within 0.01 of the threshold."""
    beyond: NonNegativeInt
    """All other flips, and studies that get a verdict in one variant only."""


class Certificate(_Value):
    """``certificate.json``: float16 against float32 over synthetic studies."""

    format_version: Literal[1]
    bundle: str
    """Name and version of the bundle, for readers. What decides is ``graphs`` and ``program``."""
    graphs: Annotated[dict[FileName, Sha256], Field(min_length=1)]
    """Every graph of the bundle that was measured."""
    program: Sha256
    """Of all else in the manifest that the numbers depend on; see `program_digest`."""
    conversion_version: PositiveInt
    """Of the rules by which float16 graphs are made (`pe_infer.half`)."""
    pe_infer_version: str
    onnxruntime_version: str
    phantom_configuration: Sha256
    first_seed: NonNegativeInt
    """Of the phantom."""
    pairs: PositiveInt
    """Two studies each, with and without emboli; the seeds follow each other."""
    held_out: bool
    """Whether the bundle says which seeds it was trained on, and these are others."""
    studies: PositiveInt
    slabs: PositiveInt
    inner_studies: PositiveInt
    """Studies on which ``ranges`` and ``growth`` were measured."""
    errors: Annotated[tuple[TensorError, ...], Field(min_length=1)]
    growth: tuple[Growth, ...]
    ranges: tuple[HalfRange, ...]
    """Nodes that hold float16 values."""
    logits: Annotated[tuple[LogitError, ...], Field(min_length=1)]
    largest_score_error: Probability
    """Of the study's probability; 1 if one variant has none."""
    flips: Annotated[tuple[Flips, ...], Field(min_length=1)]
    study_scores: Counts
    """Studies by their float32 probability: [0, 0.1), [0.1, 0.2), ... [0.9, 1]."""
    slab_scores: Counts
    """Slabs by theirs; all zero where the program gives none."""

    @model_validator(mode="after")
    def _studies_counted(self) -> Self:
        if self.studies != 2 * self.pairs or self.inner_studies > self.studies:
            raise ValueError(
                f"{self.studies} studies, {self.inner_studies} of them in detail, do not fit "
                f"{self.pairs} pairs"
            )
        return self

    def misfit(self, manifest: Manifest) -> str:
        """Why the certificate is not one of this bundle, or an empty text."""
        for graph, sha256 in graph_hashes(manifest).items():
            if self.graphs.get(graph) != sha256:
                made_from = self.graphs.get(graph, "none of that name")
                return f"it was made from another graph {graph!r}: sha256 {made_from}, not {sha256}"
        if self.program != program_digest(manifest):
            return (
                "it was made for another program: nodes, grid, outputs, calibration, rule or "
                "thresholds differ"
            )
        return ""

    def shortcomings(self) -> list[str]:
        """Where float16 is not what it should be; nothing if all is well."""
        per_slab = {SLAB_LOGIT: "slab", ONLINE_LOGIT: "online"}
        found = [
            f"99 % of {per_slab[logit.output]} logits are within {logit.p99:.2g}, wanted "
            f"{SLAB_LOGIT_P99:g}"
            for logit in self.logits
            if logit.output in per_slab and logit.p99 > SLAB_LOGIT_P99
        ]
        found += [
            f"{flips.beyond} verdicts flip further than {MARGIN:g} from the threshold "
            f"{flips.threshold:g} ({flips.operating_point})"
            for flips in self.flips
            if flips.beyond
        ]
        found += [
            f"node {inside.node!r} overflows: {inside.tensor} reaches {inside.largest:.3g}"
            for inside in self.ranges
            if inside.head_room < 1
        ]
        found += [
            f"node {error.node!r}: some values of {error.tensor} are not finite numbers"
            for error in self.errors
            if error.accumulated.max >= _NOT_FINITE
        ]
        return found

    def to_bytes(self) -> bytes:
        """The contents of ``certificate.json``."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def graph_hashes(manifest: Manifest) -> dict[str, str]:
    """File to sha256 of every graph of a bundle."""
    names = {node.graph for node in manifest.nodes if not isinstance(node, ReduceNode)}
    return {name: manifest.files[name].sha256 for name in sorted(names)}


def program_digest(manifest: Manifest) -> str:
    """Hash of what a certificate depends on besides graphs: how slabs are made, run and judged."""
    parts = manifest.model_dump(
        mode="json",
        include={
            *("preprocessing_version", "grid", "slab_channels", "min_slabs"),
            *("nodes", "outputs", "calibration", "rule"),
        },
        exclude_defaults=True,
    )
    parts["operating_points"] = {point.name: point.threshold for point in manifest.operating_points}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def certificate_schema() -> dict[str, Any]:
    """The JSON schema, as published in ``docs/certificate.schema.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Certificate.model_json_schema(),
        "title": f"pe_infer precision certificate, format version {CERTIFICATE_FORMAT_VERSION}",
    }
