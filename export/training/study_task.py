"""What a system gives the training of its second stage, and what such tasks share.

A step sees couples: a positive and a negative study. Those of a phantom are one patient with the
finding and without; real studies are drawn one by one, so that both classes come equally often.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from export.datasets.collections.base import Split
from export.datasets.store import StoredStudy, Studies, StudyPair
from export.training.config import DataSettings, StudySettings
from export.training.sampling import drawn_source
from export.training.sources import open_sources
from pe_infer.errors import ConfigurationError

Encoded = TypeVar("Encoded")
TRAINED_ON: Final[tuple[Split, Split]] = ("train", "validation")


class StudyTask(Protocol):
    """Features of the training and validation studies, and the network that reads them."""

    @property
    def train_count(self) -> int:
        """Couples of studies in an epoch."""

    @property
    def in_channels(self) -> int:
        """Channels of the features."""

    def fresh(self) -> nn.Module:
        """The network as training begins."""

    def loss(
        self, model: nn.Module, pairs: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, list[float], list[bool]]:
        """Loss of some couples of an epoch; score and truth of each of their studies."""

    def train_mode(self, model: nn.Module, step: int) -> None:
        """Put the network into the mode that it trains in at that step."""

    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Score of every validation study, and its label (1 = positive); ``model`` evaluates."""

    def stage1_scores(self) -> dict[str, list[float]]:
        """What stage 1 by itself says of the validation studies, by the name of the measure."""


@dataclass(frozen=True)
class Couple(Generic[Encoded]):
    """A positive and a negative study.

    Attributes:
        positive: With the finding.
        negative: Without it.
        twins: Whether they are one patient, and have the same slabs.
    """

    positive: Encoded
    negative: Encoded
    twins: bool


@dataclass(frozen=True)
class EncodedStudies(Generic[Encoded]):
    """What a source gives the second stage.

    Attributes:
        share: Of what is drawn.
        positives: Studies with the finding.
        negatives: Without it; of pairs, in the order of their twins.
        twins: Whether the studies are pairs.
    """

    share: float
    positives: list[Encoded]
    negatives: list[Encoded]
    twins: bool

    @property
    def studies(self) -> list[Encoded]:
        """All of them; both studies of a pair follow each other."""
        if not self.twins:
            return [*self.positives, *self.negatives]
        pairs = zip(self.positives, self.negatives, strict=True)
        return [study for pair in pairs for study in pair]

    def couple(self, number: int) -> Couple[Encoded]:
        """One of the pairs."""
        return Couple(self.positives[number], self.negatives[number], twins=True)


@dataclass(frozen=True)
class CoupleDraw(Generic[Encoded]):
    """Which studies a step sees, and which are validated on.

    Attributes:
        count: Couples of an epoch.
        train: By source. The couples of a single source of pairs are these pairs, in the order that
            is asked for; anything else is drawn.
        validation: Positive and negative studies, as many of each as there are.
    """

    count: int
    train: list[EncodedStudies[Encoded]]
    validation: list[Encoded]

    def __call__(self, number: int, rng: np.random.Generator) -> Couple[Encoded]:
        """Couple ``number`` of an epoch.

        Args:
            number: Below ``count``.
            rng: Source of what is drawn.
        """
        only = self.train[0]
        if len(self.train) == 1 and only.twins and self.count == len(only.positives):
            return only.couple(number)
        source = drawn_source([each for each in self.train if each.positives], rng)
        number = int(rng.integers(len(source.positives)))
        if source.twins:
            return source.couple(number)
        other = source
        if not source.negatives:
            other = drawn_source([each for each in self.train if each.negatives], rng)
        negative = other.negatives[int(rng.integers(len(other.negatives)))]
        return Couple(source.positives[number], negative, twins=False)


def encode_sources(
    settings: StudySettings,
    data: DataSettings,
    store: Path,
    encode_pair: Callable[[str, StudyPair, str], tuple[Encoded, Encoded]],
    encode_study: Callable[[str, StoredStudy, str], Encoded],
    console: Console,
    *,
    least_slabs: int = 1,
    begin: Callable[[Sequence[StoredStudy]], None] | None = None,
) -> CoupleDraw[Encoded]:
    """Encode every study that a run needs.

    Args:
        settings: Of the run.
        data: Which studies.
        store: Where they lie.
        encode_pair: Called with the split, a pair, and what the names of its studies begin with.
        encode_study: Called with the split, a real study, and its name.
        console: Shows progress, and how many studies are left out.
        least_slabs: Real studies of which fewer passed the gate are left out.
        begin: Called with all studies to train on, before the first is encoded.

    Raises:
        ConfigurationError: A store has fewer pairs than the settings ask for, or does not fit them.
        InputError: A store has none.
    """
    opened = {split: _opened(settings, data, store, split) for split in TRAINED_ON}
    if begin:
        begin([study for source in opened["train"] for study in source.studies])

    def encoded(split: str, source: Studies) -> EncodedStudies[Encoded]:
        # Stores that lie beside each other have studies of the same names.
        folder = source.studies[0].folder.parent
        prefix = f"{folder.name}-" if data.source else ""
        if source.paired:
            shown = [pair for pair in source.pairs if split != "train" or _shows(pair, data)]
            if len(shown) < len(source.pairs):
                console.print(
                    f"{folder}: {len(source.pairs) - len(shown)} of {len(source.pairs)} pairs are "
                    "left out: no slab of the positive study shows enough of the finding"
                )
            pairs = [
                encode_pair(split, pair, prefix) for pair in track(shown, "encode", console=console)
            ]
            positives, negatives = [p for p, _ in pairs], [n for _, n in pairs]
            return EncodedStudies(source.share, positives, negatives, twins=True)
        sides: dict[bool, list[Encoded]] = {True: [], False: []}
        enough = [s for s in source.studies if len(s.record.slab_planes) >= least_slabs]
        if len(enough) < len(source.studies):
            console.print(
                f"{folder}: {len(source.studies) - len(enough)} of {len(source.studies)} studies "
                f"are left out: fewer than {least_slabs} of their slabs passed the gate"
            )
        for study in track(enough, "encode", console=console):
            name = f"{prefix}{study.folder.name}"
            sides[study.record.positive].append(encode_study(split, study, name))
        return EncodedStudies(source.share, sides[True], sides[False], twins=False)

    for split in TRAINED_ON:
        _refuse_one_class(opened[split], store, split)
    train, held = ([encoded(split, source) for source in opened[split]] for split in TRAINED_ON)
    count = settings.train_pairs if data.source else len(train[0].positives)
    return CoupleDraw(count, train, [study for source in held for study in source.studies])


def _shows(pair: StudyPair, data: DataSettings) -> bool:
    """Whether a slab of the positive study is positive."""
    record = pair.positive.record
    return any(record.clot_pixels[middle] >= data.min_pixels for middle in record.slab_planes)


def _refuse_one_class(sources: Sequence[Studies], store: Path, split: str) -> None:
    """Refuse to train or validate on positive or on negative studies only.

    Raises:
        ConfigurationError: There is one class only.
    """
    classes = {study.record.positive for source in sources for study in source.studies}
    if classes != {True, False}:
        raise ConfigurationError(
            f"{store}: the sources have {'positive' if True in classes else 'negative'} studies "
            f"only to {split} on: name a source that has the others"
        )


def _opened(
    settings: StudySettings, data: DataSettings, store: Path, split: Split
) -> list[Studies]:
    """Sources of one split, with all pairs that the settings ask for.

    Raises:
        ConfigurationError: See `encode_sources`.
        InputError: See `encode_sources`.
    """
    training = split == "train"
    limit: int | None = settings.train_pairs if training else settings.validation_pairs
    if data.source if training else data.unpaired:
        limit = None
    only = settings.annotated_only and training
    found = open_sources(data, store, split, pairs=limit, annotated_only=only)
    if not data.source and limit and len(found[0].pairs) < limit:
        raise ConfigurationError(
            f"{store}: {len(found[0].pairs)} pairs from seed {getattr(data, split).first_seed} on, "
            f"the settings ask for {limit}. Make the others, or ask for fewer."
        )
    return found


def window_start(
    slabs: int, length: int, positives: Sequence[int], rng: np.random.Generator
) -> int:
    """First slab of a window of ``length`` slabs that holds one of ``positives``, if there is one.

    Args:
        slabs: Of the study.
        length: At most ``slabs``.
        positives: Indices of positive slabs.
        rng: Source of all randomness.
    """
    last = slabs - length
    if not positives:
        return int(rng.integers(last + 1))
    target = int(rng.choice(positives))
    low, high = max(0, target - length + 1), min(last, target)
    return int(rng.integers(low, high + 1))


def repeated(first: int, length: int, share: float, rng: np.random.Generator) -> list[int]:
    """Slabs ``first`` to ``first + length - 1``; a share of them replaced by the one below."""
    chosen = np.arange(first, first + length)
    dropped = rng.random(length) < share
    chosen[1:][dropped[1:]] = chosen[:-1][dropped[1:]]  # a slab is seen twice, one is not
    return [int(index) for index in chosen]
