"""What a system gives the training of its second stage, and what such tasks share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from export.datasets.store import StudyPair, open_pairs
from export.training.config import DataSettings, StudySettings
from pe_infer.errors import ConfigurationError

Encoded = TypeVar("Encoded")


class StudyTask(Protocol):
    """Features of the training and validation studies, and the network that reads them."""

    @property
    def train_count(self) -> int:
        """Pairs of studies that are trained on."""

    @property
    def in_channels(self) -> int:
        """Channels of the features."""

    def fresh(self) -> nn.Module:
        """The network as training begins."""

    def loss(
        self, model: nn.Module, pairs: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, list[float], list[bool]]:
        """Loss of some training pairs; score and truth of each of their studies."""

    def train_mode(self, model: nn.Module, step: int) -> None:
        """Put the network into the mode that it trains in at that step."""

    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Score of every validation study, and its label (1 = positive); ``model`` evaluates."""


def encode_splits(
    settings: StudySettings,
    data: DataSettings,
    store: Path,
    encode: Callable[[str, Sequence[StudyPair], StudyPair], Encoded],
    console: Console,
) -> dict[str, list[Encoded]]:
    """Call ``encode(split, pairs of the split, pair)`` for every pair that a run needs.

    Returns:
        ``train`` and ``validation``.

    Raises:
        ConfigurationError: The store has fewer pairs than the settings ask for.
        InputError: The store has none.
    """
    found: dict[str, list[StudyPair]] = {}
    for name, split, limit in (
        ("train", data.train, settings.train_pairs),
        ("validation", data.validation, settings.validation_pairs),
    ):
        pairs = open_pairs(store, first_seed=split.first_seed, pairs=split.pairs, limit=limit)
        if len(pairs) < limit:
            raise ConfigurationError(
                f"{store}: {len(pairs)} pairs from seed {split.first_seed} on, the settings ask "
                f"for {limit}. Make the others, or ask for fewer."
            )
        found[name] = pairs
    return {
        name: [encode(name, pairs, pair) for pair in track(pairs, "encode", console=console)]
        for name, pairs in found.items()
    }


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
