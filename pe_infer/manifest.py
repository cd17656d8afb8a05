"""What a bundle says of itself: the models behind ``bundle.json``, format version 1.

A manifest is data from outside: unknown keys, wrong types and numbers that are not finite are
refused, nothing is converted. The dataflow between the nodes is checked in `pe_infer.program`, the
files in `pe_infer.bundle`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    PositiveInt,
    model_validator,
)

from pe_infer.geometry import PatientGrid
from pe_infer.result import Finding

FORMAT_VERSION: Final = 1
PREPROCESSING_VERSION: Final = 1  # of the kernel in this package, see `pe_infer.preprocess`
SLAB: Final = "slab"  # the sequence that every program reads
STUDY_LOGIT: Final = "study_logit"
SLAB_LOGIT: Final = "slab_logit"
ONLINE_LOGIT: Final = "online_logit"  # of a slab before its neighbours are known

Direction: TypeAlias = Literal["down", "up"]
Precision: TypeAlias = Literal["reduced", "mixed", "float32"]
"""What an engine may compute in: ``reduced`` is its fastest floating-point type for a whole graph;
``mixed`` is that type for convolutions and matrix products, float32 for what they are added to."""
Identifier: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
TensorName: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Keyword: TypeAlias = Annotated[str, Field(min_length=1, max_length=64)]
FileName: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Shape: TypeAlias = tuple[PositiveInt, ...]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Value(BaseModel):
    """Frozen, strict, no unknown keys. Attribute docstrings go into the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Scope(_Value):
    """Which series the bundle was made for. An empty list says nothing of that attribute."""

    modality: tuple[str, ...] = ("CT",)
    body_part: tuple[str, ...] = ()
    """Accepted values of BodyPartExamined."""
    contrast: Literal["required", "any", "forbidden"] = "any"
    keywords: tuple[Keyword, ...] = ()
    """Words and phrases of ProtocolName, SeriesDescription and StudyDescription that, like those of
    ``body_part``, tell that a series is for this bundle where BodyPartExamined does not."""


class SequenceSpec(_Value):
    """One named sequence: what is kept for each slab, or once for the study."""

    shape: Shape
    """Without the leading axis (slabs, or 1 for the study)."""
    axes: tuple[Identifier, ...]
    """A name for each entry of ``shape``."""
    dtype: Literal["float32"] = "float32"
    per: Literal["slab", "study"] = "slab"

    @model_validator(mode="after")
    def _one_name_per_axis(self) -> Self:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{len(self.axes)} axis names for the shape {self.shape}")
        return self


class Batch(_Value):
    """How many slabs a map graph takes at once."""

    min: Literal[1] = 1
    max: PositiveInt = 1


class State(_Value):
    """A recurrent state: fed to ``input``, taken from ``output``, both (1, *shape) float32."""

    input: TensorName
    output: TensorName
    shape: Shape
    initial: FiniteFloat = 0.0
    """Every element of the state before the first slab."""


class _GraphNode(_Value):
    name: Identifier
    graph: FileName
    inputs: Annotated[dict[TensorName, Identifier], Field(min_length=1)]
    """Graph tensor to the sequence it reads."""
    outputs: Annotated[dict[TensorName, Identifier], Field(min_length=1)]
    """Graph tensor to the sequence it writes."""


class MapNode(_GraphNode):
    """A stateless graph: once per slab, or once per study if it reads reduced values."""

    kind: Literal["map"]
    precision: Precision = "reduced"
    """``reduced``: an engine's fastest floating-point type for the whole graph. ``mixed``: that for
    convolutions and matrix products, float32 for what they are added to."""
    max_batch: PositiveInt | None = None
    """The manifest's ``batch.max`` when absent."""


class ScanNode(_GraphNode):
    """A recurrent graph: one slab at a time, every tensor with a first axis of 1."""

    kind: Literal["scan"]
    direction: Direction
    """``down``: by decreasing position, head to feet."""
    states: Annotated[tuple[State, ...], Field(min_length=1)]
    precision: Literal["mixed", "float32"] = "float32"
    """States are computed and carried in float32 either way."""

    @model_validator(mode="after")
    def _tensors_differ(self) -> Self:
        for role, names in (
            ("input", [*self.inputs, *(state.input for state in self.states)]),
            ("output", [*self.outputs, *(state.output for state in self.states)]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"node {self.name!r}: an {role} tensor is named twice in {names}")
        return self


class ReduceNode(_Value):
    """A built-in reduction of a whole sequence to one value per study."""

    kind: Literal["reduce"]
    name: Identifier
    reducer: Literal["mean", "max"]
    inputs: Annotated[dict[TensorName, Identifier], Field(min_length=1, max_length=1)]
    outputs: Annotated[dict[TensorName, Identifier], Field(min_length=1, max_length=1)]


GraphNode: TypeAlias = MapNode | ScanNode
Node: TypeAlias = Annotated[MapNode | ScanNode | ReduceNode, Field(discriminator="kind")]


class Calibration(_Value):
    """From a logit to a probability: sigmoid(scale * logit + offset)."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    offset: FiniteFloat = 0.0

    def probability(self, logit: float) -> float:
        """The calibrated probability in [0, 1]."""
        value = self.scale * logit + self.offset
        if value >= 0:
            return 1.0 / (1.0 + math.exp(-value))
        power = math.exp(value)
        return power / (1.0 + power)


class OperatingPoint(_Value):
    """A named threshold on the calibrated probability: positive from ``threshold`` on."""

    name: Identifier
    threshold: Probability
    description: str = ""
    measured: dict[str, JsonValue] = {}
    """How it did: sensitivity, specificity, data set."""


class ThresholdRule(_Value):
    """A study is positive when its probability (output ``study_logit``) reaches the threshold."""

    kind: Literal["threshold"]


class ConsecutiveRule(_Value):
    """A study is positive when ``count`` neighbouring slabs are (output ``slab_logit``)."""

    kind: Literal["consecutive"]
    count: PositiveInt
    gated: Literal["skip", "break"] = "skip"
    """``skip``: the slabs on both sides of gated ones are neighbours. ``break``: they are not."""
    fewer: Literal["refuse", "shrink"] = "refuse"
    """No run is as long as ``count``. ``refuse``: no score. ``shrink``: the longest run counts."""

    def score(self, probabilities: Sequence[float | None]) -> float | None:
        """The largest, over runs of ``count`` neighbours, of the run's smallest probability.

        Args:
            probabilities: Per slab in ascending position; ``None`` for a gated slab.

        Returns:
            The score, to be compared with the threshold, or ``None`` where the rule refuses to
            answer.
        """
        runs: list[list[float]] = [[]]
        for probability in probabilities:
            if probability is not None:
                runs[-1].append(probability)
            elif self.gated == "break":
                runs.append([])
        longest = max(len(run) for run in runs)
        if longest == 0 or (longest < self.count and self.fewer == "refuse"):
            return None
        count = min(self.count, longest)
        return max(min(run[i : i + count]) for run in runs for i in range(len(run) - count + 1))


Rule: TypeAlias = Annotated[ThresholdRule | ConsecutiveRule, Field(discriminator="kind")]


class ProvisionalAlert(_Value):
    """When to alert before the end: ``consecutive`` slabs at ``slab_probability`` or more."""

    slab_probability: Probability
    consecutive: PositiveInt


class Region(_Value):
    """A part of a plane, by where the grid's gate finds its organ.

    Quantiles of the cells whose mean lies within the gate's range and that have tissue to the left
    and right, in front and behind. Between the middles of two lungs lies the mediastinum: 0.25 and
    0.75 of their columns; 0.5 of their rows is in front of the spine.
    """

    right: Probability = 0.0
    """Of the columns, which run from the patient's right to left."""
    left: Probability = 1.0
    front: Probability = 0.0
    """Of the rows, which run from front to back."""
    back: Probability = 1.0

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.right >= self.left or self.front >= self.back:
            raise ValueError("a region needs right < left and front < back")
        return self


class _CellMeasure(_Value):
    """Of the square cells into which a plane is cut, from its first pixel on.

    Those with a mean within [low_hu, high_hu] count; with fewer than 8 the plane has no value.
    """

    low_hu: FiniteFloat
    high_hu: FiniteFloat
    quantile: Probability
    """Of the cells that count, the lower one where it lies between two."""
    cell_px: PositiveInt = 8
    """Width of a cell in pixels of the grid."""
    region: Region | None = None
    """Cells outside do not count; ``null``: the whole plane."""


class Level(_CellMeasure):
    """How bright tissue is, whatever the noise: a quantile of the means of cells, in HU."""

    kind: Literal["level"]


class Noise(_CellMeasure):
    """A quantile of the standard deviations within cells, each over its pixels, in HU.

    A low quantile takes cells without edges. The grid has smoothed the pixels: this is the noise
    that networks see.
    """

    kind: Literal["noise"]


class Area(_Value):
    """Of all pixels of a plane of at least ``low_hu``, in mm2. The grid holds up to 4095 HU."""

    kind: Literal["area"]
    low_hu: FiniteFloat


Measure: TypeAlias = Annotated[Level | Noise | Area, Field(discriminator="kind")]


class Check(_Value):
    """What a study's images must be like for an answer to mean anything.

    Measured in the middle plane of every slab that passes the gate, see `pe_infer.checks`. A study
    that is refused is *not processed*; one that is flagged has the value and the limit in
    ``quality``. Where no plane has a value, the worst that the check can say is said.
    """

    name: Identifier
    measure: Measure
    over: Probability
    """The study's value is this quantile of those of its planes (the lower one of two): 0.5 is
    their median, 1 the largest."""
    refuse_below: FiniteFloat | None = None
    flag_below: FiniteFloat | None = None
    flag_above: FiniteFloat | None = None
    refuse_above: FiniteFloat | None = None
    meaning: Annotated[str, Field(min_length=1, max_length=200)]
    """What a value beyond a limit says of the images, in words of those who took them."""
    remedy: Annotated[str, Field(max_length=200)] = ""
    """What they can do."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        limits = (self.refuse_below, self.flag_below, self.flag_above, self.refuse_above)
        given = [limit for limit in limits if limit is not None]
        if not given or given != sorted(given):
            raise ValueError(
                f"check {self.name!r}: refuse_below, flag_below, flag_above and refuse_above are "
                f"{limits}: give at least one, and no later one smaller than an earlier one"
            )
        return self

    @property
    def unit(self) -> Literal["HU", "mm2"]:
        """Of its values and limits."""
        return "mm2" if isinstance(self.measure, Area) else "HU"


class Tolerance(_Value):
    """Largest deviation from the golden outputs, relative to max(1, largest golden value)."""

    float32: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """When every node runs in float32."""
    reduced: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-2
    """When some node runs in a narrower type."""


class Golden(_Value):
    """The self-test: slabs and the outputs they must give (see `pe_infer.bundle.GoldenData`)."""

    file: FileName
    tolerance: Tolerance = Tolerance()


class CertificateEntry(_Value):
    """What float16 costs, as measured (see `pe_infer.certificate`)."""

    file: FileName


class FileEntry(_Value):
    """One file of the bundle."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Value):
    """``bundle.json``: a study program and all that is needed to use it."""

    format_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    version: Annotated[
        str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,2}([-+.][0-9A-Za-z.-]+)?$", max_length=64)
    ]
    finding: Finding
    scope: Scope
    intended_use: str
    preprocessing_version: PositiveInt
    grid: PatientGrid
    slab_channels: Literal["planes_ascending_windows_fastest"] = "planes_ascending_windows_fastest"
    """Channel c of a slab is plane c // windows (ascending position) in window c % windows."""
    min_slabs: PositiveInt = 1
    """A study with fewer slabs is refused."""
    batch: Batch = Batch()
    sequences: dict[Identifier, SequenceSpec]
    nodes: Annotated[tuple[Node, ...], Field(min_length=1)]
    outputs: Annotated[dict[Identifier, Identifier], Field(min_length=1)]
    """Output to sequence. ``study_logit`` or ``slab_logit`` drives the rule. ``online_logit`` is
    what is said of a slab while slices arrive, where ``slab_logit`` waits for the last one."""
    calibration: Calibration = Calibration()
    operating_points: Annotated[tuple[OperatingPoint, ...], Field(min_length=1)]
    default_operating_point: Identifier
    rule: Rule
    provisional_alert: ProvisionalAlert | None = None
    checks: tuple[Check, ...] = ()
    """What the images must be like; in the order in which a reason for refusal is looked for."""
    golden: Golden | None = None
    certificate: CertificateEntry | None = None
    files: dict[FileName, FileEntry]
    training: dict[str, JsonValue] = {}
    """Where the weights come from: data, code version, date, metrics."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_twice("node", [node.name for node in self.nodes])
        _refuse_twice("operating point", [point.name for point in self.operating_points])
        _refuse_twice("check", [check.name for check in self.checks])
        for check in self.checks:
            if self.grid.gate is None and getattr(check.measure, "region", None):
                raise ValueError(
                    f"check {check.name!r} has a region, which lies where the grid's gate finds "
                    "its organ: the grid has no gate"
                )
        if self.default_operating_point not in {point.name for point in self.operating_points}:
            raise ValueError(
                f"default_operating_point {self.default_operating_point!r} is none of "
                f"{[point.name for point in self.operating_points]}"
            )
        used = {node.graph for node in self.nodes if not isinstance(node, ReduceNode)}
        used |= {entry.file for entry in (self.golden, self.certificate) if entry}
        if unlisted := sorted(used - self.files.keys()):
            raise ValueError(f"no sha256 in 'files' for {unlisted}")
        needed = STUDY_LOGIT if isinstance(self.rule, ThresholdRule) else SLAB_LOGIT
        if needed not in self.outputs:
            raise ValueError(
                f"rule {self.rule.kind!r} needs the output {needed!r}; outputs: "
                f"{sorted(self.outputs)}"
            )
        if self.provisional_alert and self.update_output not in self.outputs:
            raise ValueError(
                f"provisional_alert needs the output {ONLINE_LOGIT!r} or {SLAB_LOGIT!r}; outputs: "
                f"{sorted(self.outputs)}"
            )
        return self

    @property
    def update_output(self) -> str:
        """The output that updates and the provisional alert speak of."""
        return ONLINE_LOGIT if ONLINE_LOGIT in self.outputs else SLAB_LOGIT

    def operating_point(self, name: str | None = None) -> OperatingPoint | None:
        """The operating point of that name or the default one; ``None`` if there is none."""
        wanted = self.default_operating_point if name is None else name
        return next((point for point in self.operating_points if point.name == wanted), None)


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of ``bundle.json``, as published in ``docs/bundle.schema.json``."""
    schema = Manifest.model_json_schema()
    for name in ("PatientGrid", "Gate", "Window"):  # their docstrings speak of Python
        schema["$defs"][name].pop("description", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"pe_infer bundle manifest, format version {FORMAT_VERSION}",
    }


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    ordered = sorted(names)
    if twice := [a for a, b in pairwise(ordered) if a == b]:
        raise ValueError(f"{what} {twice[0]!r} is defined twice")
