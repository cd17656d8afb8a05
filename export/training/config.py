"""Settings of data generation and training, read from TOML; an unknown key is an error."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.datasets.augment import Strengths
from export.datasets.labels import MIN_CLOT_PIXELS
from export.models.stage1 import TOTAL_STRIDE
from pe_infer.errors import ConfigurationError
from pe_infer.geometry import TISSUE_HU, Gate, PatientGrid, Window


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WindowSettings(Settings):
    """``pe_infer.geometry.Window``."""

    low_hu: float
    high_hu: float


class GateSettings(Settings):
    """``pe_infer.geometry.Gate``."""

    low_hu: float
    high_hu: float
    min_fraction: float
    enclosed_by_hu: float = TISSUE_HU


class GridSettings(Settings):
    """``pe_infer.geometry.PatientGrid``."""

    rows: int
    cols: int
    spacing_mm: float
    pitch_um: int
    planes_per_slab: int
    slab_step: int
    windows: tuple[WindowSettings, ...]
    gate: GateSettings
    through_plane: Literal["resample", "source"] = "resample"

    @model_validator(mode="before")
    @classmethod
    def _one_window(cls, values: Any) -> Any:
        """Checkpoints of bundle pe up to 0.2.0 have one ``window``."""
        if isinstance(values, dict) and "window" in values:
            return {
                **{k: v for k, v in values.items() if k != "window"},
                "windows": [values["window"]],
            }
        return values

    @property
    def window_bounds(self) -> list[tuple[float, float]]:
        """Low and high HU of every window."""
        return [(window.low_hu, window.high_hu) for window in self.windows]

    @property
    def channels(self) -> int:
        """Channels of a slab."""
        return self.planes_per_slab * len(self.windows)

    def to_grid(self) -> PatientGrid:
        """The value that preprocessing takes."""
        fields = self.model_dump(exclude={"windows", "gate"})
        return PatientGrid(
            **fields,
            windows=tuple(Window(**window.model_dump()) for window in self.windows),
            gate=Gate(**self.gate.model_dump()),
        )


class SplitSettings(Settings):
    """A range of phantom seeds: ``first_seed`` up to, not including, ``first_seed + pairs``."""

    first_seed: int = Field(ge=0)
    pairs: int = Field(ge=0)

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.pairs)


class BackgroundSettings(Settings):
    """A real study without the finding, into which findings are painted.

    Attributes:
        folder: Of its DICOM series, or of NIfTI volumes, within the folder that the command is
            given.
        source: Its collection and licence, for the record.
        volume: The scan, where it is a NIfTI volume.
        arteries: NIfTI mask of its pulmonary arteries, if there is one.
    """

    folder: str
    source: str
    volume: str | None = None
    arteries: str | None = None


class SourceSettings(Settings):
    """One of the stores that a run draws from.

    Attributes:
        store: Its folder, within the one that the command is given.
        share: Of what is drawn for training.
        collection: The real studies of which collection it holds; ``None``: pairs, by the seeds of
            the splits.
        train: Seeds of its pairs, where they are not those of the splits: findings painted into
            real studies beside phantoms, say. Such a source is trained on only.
        backgrounds: Real studies that its pairs were painted into; none are phantoms. A store that
            says otherwise is refused.
        validation: Share of the patients, as the index of the collection was made.
        test: The same.
    """

    store: str
    share: float = Field(gt=0, le=1)
    collection: str | None = None
    train: SplitSettings | None = None
    backgrounds: tuple[BackgroundSettings, ...] = ()
    validation: float = Field(default=0.1, ge=0, le=1)
    test: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _seeds_of_pairs(self) -> "SourceSettings":
        if self.collection and self.train:
            message = f"{self.store}: a collection of real studies has no seeds to train on"
            raise ValueError(message)
        if self.collection and self.backgrounds:
            message = f"{self.store}: nothing is painted into the studies of a collection"
            raise ValueError(message)
        return self


NO_SEEDS = SplitSettings(first_seed=0, pairs=0)
SHARE_ERROR = 1e-6


class DataSettings(Settings):
    """Which studies are made or drawn, and the grid they are brought to.

    Attributes:
        name: For the record.
        phantom: What synthetic ones are made with: a key of ``pe_infer.phantom.ANATOMIES``.
        grid: Their planes.
        min_pixels: A slab is positive if its middle plane shows at least as much of the finding.
        train: Synthetic studies that are trained on; none by default.
        validation: Chosen on.
        test: Held back.
        source: Stores that are drawn from. Without any, the store that the command is given holds
            the pairs of the splits. Where one holds real studies, only real ones are chosen on.
        backgrounds: Real studies that pairs are made of, in turn; of a store of pairs that is
            trained on without any source, those that were.
    """

    name: str
    phantom: str = "chest"
    grid: GridSettings
    min_pixels: int = Field(default=MIN_CLOT_PIXELS, ge=1)
    train: SplitSettings = NO_SEEDS
    validation: SplitSettings = NO_SEEDS
    test: SplitSettings = NO_SEEDS
    source: tuple[SourceSettings, ...] = ()
    backgrounds: tuple[BackgroundSettings, ...] = ()

    @property
    def unpaired(self) -> bool:
        """Whether some of the studies are real ones."""
        return any(source.collection is not None for source in self.source)

    @property
    def painted(self) -> dict[str, str]:
        """Folder to source of every real study that pairs are made of."""
        own = (each for source in self.source for each in source.backgrounds)
        return {each.folder: each.source for each in (*self.backgrounds, *own)}

    @model_validator(mode="after")
    def _shares(self) -> "DataSettings":
        total = sum(source.share for source in self.source)
        if self.source and abs(total - 1.0) > SHARE_ERROR:
            message = f"the shares of the sources add up to {total:g}, expected 1"
            raise ValueError(message)
        names = [Path(source.store).name for source in self.source]
        if len(set(names)) < len(names):
            message = f"the stores of the sources are called {names}: give them different names"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _disjoint(self) -> "DataSettings":
        held = [s.seeds for s in (self.validation, self.test) if s.pairs]
        for own in (self.train, *(s.train for s in self.source if s.train)):
            ranges = sorted([*held, own.seeds] if own.pairs else held, key=lambda r: r.start)
            for lower, upper in pairwise(ranges):
                if upper.start < lower.stop:
                    message = (
                        f"seeds {lower} and {upper} overlap: a patient would be trained and tested "
                        "on"
                    )
                    raise ValueError(message)
        return self

    def without(self, stores: Sequence[str]) -> "DataSettings":
        """The same without some sources; the shares of the others grow alike.

        Args:
            stores: Of sources.

        Raises:
            ConfigurationError: There is no such source, or none is left, or only such as are
                trained on but not validated on.
        """
        known = [source.store for source in self.source]
        left = [source for source in self.source if source.store not in stores]
        if (unknown := [store for store in stores if store not in known]) or not left:
            raise ConfigurationError(
                f"{self.name!r} cannot do without {', '.join(unknown or stores)}: its sources are "
                f"{', '.join(known) or 'none'}"
            )
        if all(source.train for source in left):
            raise ConfigurationError(
                f"{self.name!r} cannot do without {', '.join(stores)}: the sources that are left, "
                f"{', '.join(source.store for source in left)}, are trained on only, and nothing "
                "is validated on"
            )
        total = sum(source.share for source in left)
        shared = [source.model_copy(update={"share": source.share / total}) for source in left]
        name = ", without ".join([self.name, *stores])
        return self.model_copy(update={"name": name, "source": tuple(shared)})

    @property
    def seen(self) -> "Seen":
        """What a run with these settings learns from."""
        own = [s.train for s in self.source if s.train]
        return Seen(
            name=self.name,
            grid=self.grid.to_grid(),
            seeds=[s.seeds for s in (self.train, *own) if s.pairs],
            collections={s.collection: (s.validation, s.test) for s in self.source if s.collection},
            validated=[self.validation.seeds] if self.validation.pairs else [],
            backgrounds=self.painted,
        )

    def refuse_mixing(self, earlier: "Seen", source: str) -> None:
        """Refuse to go on from what was trained on other planes, or on patients held back here.

        Args:
            earlier: What the earlier training has seen.
            source: Where it comes from, for messages.

        Raises:
            ConfigurationError: Its grid is another one, it was trained on seeds that validate or
                test here, or chosen on seeds that test here, or patients of a collection were split
                otherwise.
        """
        own = self.seen
        if earlier.grid != own.grid:
            raise ConfigurationError(
                f"{source} was trained on the grid of {earlier.name!r} ({earlier.grid}), expected "
                f"that of {self.name!r} ({own.grid})"
            )
        splits = {"validation": self.validation.seeds, "test": self.test.seeds}
        for (name, held), seen in product(splits.items(), earlier.seeds):
            if max(seen.start, held.start) < min(seen.stop, held.stop):
                raise ConfigurationError(
                    f"{source} was trained on seeds {seen.start} to {seen.stop - 1} of "
                    f"{earlier.name!r}; {self.name!r} holds back {held.start} to {held.stop - 1} "
                    f"for {name}: these patients would be known"
                )
        for chosen in earlier.validated:
            if max(chosen.start, self.test.seeds.start) < min(chosen.stop, self.test.seeds.stop):
                raise ConfigurationError(
                    f"{source} was chosen on seeds {chosen.start} to {chosen.stop - 1} of "
                    f"{earlier.name!r}; {self.name!r} tests on {self.test.seeds.start} to "
                    f"{self.test.seeds.stop - 1}: what is measured there would be too good"
                )
        for collection, fractions in earlier.collections.items():
            if own.collections.get(collection, fractions) != fractions:
                raise ConfigurationError(
                    f"{source} was trained on {collection} split with validation, test = "
                    f"{fractions}; {self.name!r} has {own.collections[collection]}: patients that "
                    "are held back would be known. Use one index for both stages."
                )


@dataclass(frozen=True)
class Seen:
    """What a training has seen.

    Attributes:
        name: Of its data settings.
        grid: Of its planes.
        seeds: Of the pairs that it learnt from.
        collections: Collection to the shares of the patients that validate and test.
        validated: Seeds of the pairs that it was chosen on.
        backgrounds: Folder to source of the real studies that pairs were painted into.
        all_backgrounds: Whether those are all; what was trained by older versions does not say.
    """

    name: str
    grid: PatientGrid
    seeds: Sequence[range]
    collections: Mapping[str, tuple[float, float]]
    validated: Sequence[range] = ()
    backgrounds: Mapping[str, str] = field(default_factory=dict)
    all_backgrounds: bool = False


class Stage1Loss(Settings):
    """Weights of the stage-1 loss; that of Shi et al. is 1, 1, 0."""

    cross_entropy: float = 1.0
    dice: float = 1.0
    focal: float = 1.0
    focal_gamma: float = 2.0


class Shares(Settings):
    """What a batch is made of; the rest are negative slabs from anywhere.

    Attributes:
        positive: Crops that hold clot.
        paired_negative: The same places of the same patients without emboli, for as many of the
            positives. Real studies have none: negative slabs of their source take their places.
    """

    positive: float = Field(default=0.4, ge=0, le=1)
    paired_negative: float = Field(default=0.4, ge=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> "Shares":
        if self.paired_negative > self.positive or self.positive + self.paired_negative > 1:
            message = (
                f"positive={self.positive} and paired_negative={self.paired_negative}: a batch "
                "has no more paired negatives than positives, and no more than 1 of both"
            )
            raise ValueError(message)
        return self


class Phase(Settings):
    """One phase of stage 1.

    Attributes:
        name: For the log.
        width: Width of the network; it may only grow from phase to phase.
        crop: Rows and columns of the crops, a multiple of 16; the grid's size means whole planes.
        batch: Slabs per step.
        steps: Optimiser steps.
        lr: Highest learning rate, reached after ``warmup_steps``, falling by half a cosine to
            ``final_lr``.
        min_clot_pixels: Positives with less clot in the middle plane are left out: large clots
            first.
        area_power: Positives are drawn in proportion to their clot pixels to this power.
        loss: Weights of the loss.
        validate_steps: Steps between validations.
        augment: Strengths of the augmentation, in place of the run's.
    """

    name: str
    width: float = Field(gt=0)
    crop: int = Field(gt=0, multiple_of=TOTAL_STRIDE)
    batch: int = Field(ge=1)
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_lr: float = 0.0
    min_clot_pixels: int = 12
    area_power: float = 0.0
    loss: Stage1Loss = Stage1Loss()
    shares: Shares = Shares()
    validate_steps: int = Field(default=500, ge=1)
    augment: Strengths | None = None


class Stage1Settings(Settings):
    """Everything that decides a stage-1 run apart from the data.

    Attributes:
        system: What is trained: a key of ``export.systems.registry.SYSTEMS``.
        seed: Of the weights and of the batches.
        data: File with the data settings, relative to the settings' own folder.
        phase: Phases in order; their widths never shrink.
        weight_decay: Of convolutions and the head, not of norms and biases.
        gradient_clip: Largest norm of the gradient.
        ema_decay: Of the mean weights, per step.
        refresh_steps: Steps between looks at the store, which may still be growing.
        checkpoint_minutes: Minutes between checkpoints.
        validation_pairs: Pairs that are validated on, from the first seed of the split on; of real
            studies, as many positive ones and as many negative ones.
        annotated_only: Leave out positive real studies without a mask.
        compile: Whether to use ``torch.compile``.
        augment: Strengths of the augmentation.
    """

    system: str = "shi"
    seed: int
    data: str
    phase: tuple[Phase, ...]
    weight_decay: float = 0.02
    gradient_clip: float = 5.0
    ema_decay: float = 0.999
    refresh_steps: int = 250
    checkpoint_minutes: float = 5.0
    validation_pairs: int = 12
    annotated_only: bool = False
    compile: bool = False
    augment: Strengths = Strengths()

    @model_validator(mode="after")
    def _growing(self) -> "Stage1Settings":
        widths = [p.width for p in self.phase]
        if not widths or sorted(widths) != widths:
            message = f"phases need widths that never shrink, got {widths}"
            raise ValueError(message)
        return self


class StudySettings(Settings):
    """What decides a stage-2 run of any system, apart from the data and the first stage.

    Attributes:
        system: What is trained: a key of ``export.systems.registry.SYSTEMS``.
        seed: Of the weights, the order of the pairs and every random choice of a step.
        data: File with the data settings, relative to the settings' own folder.
        train_pairs: Pairs that are trained on. With sources in the data settings, pairs that an
            epoch draws: a source by its share, of it a pair, or a positive and a negative study.
        validation_pairs: Pairs that are validated on; real studies are all validated on.
        annotated_only: Leave out positive real studies without a mask.
        epochs: Passes over the training pairs.
        pairs_per_step: Pairs of studies per optimiser step.
        lr: Highest learning rate.
        final_lr: Learning rate at the end.
        warmup_steps: Steps up to the highest learning rate.
        weight_decay: Of all weights.
        gradient_clip: Largest norm of the gradient.
        window_slabs: Training uses this many neighbouring slabs of a study, around the finding for
            positives and the same place for their twins, in ``window_share`` of the steps.
        window_share: See ``window_slabs``.
        drop_slab_share: Slabs that are replaced by the one below them.
        ema_decay: Of the mean weights, per step.
        checkpoint_minutes: Minutes between checkpoints.
    """

    system: str
    seed: int
    data: str
    train_pairs: int
    validation_pairs: int
    annotated_only: bool = False
    epochs: int
    pairs_per_step: int = 2
    lr: float = 1e-4
    final_lr: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    window_slabs: int = 24
    window_share: float = 0.5
    drop_slab_share: float = 0.1
    ema_decay: float = 0.99
    checkpoint_minutes: float = 3.0


class Stage2Settings(StudySettings):
    """Stage 2 of Shi et al.

    Attributes:
        dropout: Share of the mean vector dropped in training.
        filters: Of the two blocks.
        left_right_share: Pairs that are mirrored.
        norm_steps: After this many steps the batch norms keep their running means: a batch of a few
            studies says too little about the next one. 0 keeps them out of the way of
            ``attention_gain``: they would scale its few active channels up until nothing is left of
            the start.
        attention_gain: Start ``down1`` from the class activation map with this gain; 0 starts from
            noise.
    """

    system: Literal["shi"] = "shi"
    dropout: float = 0.5
    filters: tuple[int, int] = (48, 96)
    left_right_share: float = 0.0
    norm_steps: int = 10**9
    attention_gain: float = 0.0


class ContextSettings(StudySettings):
    """Stage 2 of RADnet.

    Attributes:
        hidden: Length of the LSTM's hidden state in each direction.
        dropout: Share of features and hidden states dropped in training.
        variants: How often every training study is encoded: once as it is, then augmented.
        augment: Strengths of that augmentation; all slices of a pair are changed alike.
        consecutive: Positive neighbours that make a study positive, as the bundle's rule has it.
        study_weight: Weight of the loss of the study's score, beside that of its slices.
    """

    system: Literal["radnet"] = "radnet"
    hidden: int = Field(default=64, ge=1)
    dropout: float = 0.3
    variants: int = Field(default=3, ge=1)
    augment: Strengths = Strengths()
    consecutive: int = Field(default=3, ge=1)
    study_weight: float = 0.5


Kind = TypeVar("Kind", bound=Settings)


def load_settings(path: Path, kind: type[Kind]) -> Kind:
    """Read settings from a TOML file.

    Args:
        path: The file.
        kind: Which settings it holds.

    Raises:
        ConfigurationError: The file is absent, is not TOML, or holds unknown, missing or impossible
            values.
    """
    try:
        return kind.model_validate(load_toml(path))
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ConfigurationError(f"{path}: {problems}") from exc


def load_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        ConfigurationError: The file is absent, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigurationError(f"{path}: no such file") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{path}: not valid TOML: {exc}") from exc


def load_data_settings(
    training_config: Path, data: str, without: Sequence[str] | None = None
) -> DataSettings:
    """Data settings that a training file names, relative to its own folder.

    Args:
        training_config: The training file.
        data: What it names.
        without: Sources to leave out.

    Raises:
        ConfigurationError: The file cannot be used, or has no such source.
    """
    settings = load_settings(training_config.parent / data, DataSettings)
    return settings.without(without) if without else settings
