"""Stage 2 of Shi et al. on features of pairs of studies: what a step sees, and the loss.

Windows of a study, repeated slabs, the start from the activation map and features of 8 bits are
[ours].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.store import StudyPair
from export.models.stage1 import PE, SlabClassifier
from export.models.stage2 import SequenceNorm, StudyNet
from export.training.config import DataSettings, Stage2Settings
from export.training.features import Encoder, FeatureCache, StudyFeatures, cache_pair, open_cache
from export.training.study_task import encode_splits, repeated, window_start

Pair = tuple[StudyFeatures, StudyFeatures]


@dataclass(frozen=True)
class FeatureSets:
    """Features of the training and validation pairs."""

    cache: FeatureCache
    train: list[Pair]
    validation: list[Pair]


def encode_all(
    settings: Stage2Settings,
    data: DataSettings,
    store: Path,
    folder: Path,
    encoder: Encoder,
    console: Console,
    *,
    stage1_sha256: str,
) -> FeatureSets:
    """Encode every pair that a run needs; what is in the folder already is kept.

    Raises:
        ConfigurationError: The store has fewer pairs than the settings ask for, or the features in
            the folder come from another stage 1.
        InputError: The store has none.
    """
    cache: FeatureCache | None = None

    def encode(split: str, pairs: Sequence[StudyPair], pair: StudyPair) -> Pair:
        del split
        nonlocal cache
        cache = cache or open_cache(folder, encoder, pairs, stage1_sha256=stage1_sha256)
        return cache_pair(cache, encoder, pair, min_pixels=data.min_pixels)

    sets = encode_splits(settings, data, store, encode, console)
    if cache is None:
        raise RuntimeError("no split to encode")
    return FeatureSets(cache, sets["train"], sets["validation"])


class ShiStudies:
    """The task: see ``export.training.study_task.StudyTask``."""

    def __init__(
        self, settings: Stage2Settings, stage1: SlabClassifier, features: FeatureSets, cells: int
    ) -> None:
        """Take what a run needs.

        Args:
            settings: Of the run.
            stage1: The frozen encoder; its head may be where the network starts from.
            features: Made by ``stage1``.
            cells: Rows and columns of the features.
        """
        self.settings = settings
        self.features = features
        self._stage1 = stage1
        self._cells = cells

    @property
    def train_count(self) -> int:
        """Pairs that are trained on."""
        return len(self.features.train)

    @property
    def in_channels(self) -> int:
        """Channels of the features."""
        return self._stage1.feature_channels

    def fresh(self) -> StudyNet:
        """The network, which may start from what stage 1 knows."""
        s, head = self.settings, self._stage1.head
        model = StudyNet(self.in_channels, s.filters, self._cells, s.dropout)
        if s.attention_gain:
            model.read_attention(
                head.weight[PE].detach(), head.bias[PE].detach(), gain=s.attention_gain
            )
        return model

    def train_mode(self, model: nn.Module, step: int) -> None:
        """Norms keep their running means after some steps."""
        model.train()
        if step >= self.settings.norm_steps:
            for module in model.modules():
                if isinstance(module, SequenceNorm):
                    module.eval()

    def loss(
        self, model: nn.Module, pairs: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, list[float], list[bool]]:
        """Cross-entropy of the studies of some pairs."""
        x, labels = self._batch([self.features.train[i] for i in pairs], rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x).float().flatten()
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        return loss, logits.detach().tolist(), [v > 0.5 for v in labels.tolist()]

    @torch.inference_mode()
    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Study logits and labels (1 = PE) of the validation studies."""
        logits: list[float] = []
        labels: list[float] = []
        for pair in self.features.validation:
            for study in pair:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits.append(float(model(self.features.cache.decoded(study.codes)[None])))
                labels.append(float(study.positive))
        return logits, labels

    def _batch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Features (2 * pairs, T, C, h, w) of equal length, and labels."""
        s = self.settings
        shortest = min(p.slabs for p, _ in pairs)
        length = min(s.window_slabs, shortest) if rng.random() < s.window_share else shortest
        studies: list[Tensor] = []
        labels: list[float] = []
        for positive, negative in pairs:
            first = window_start(positive.slabs, length, positive.clot_slabs, rng)
            chosen = repeated(first, length, s.drop_slab_share, rng)
            flip = rng.random() < s.left_right_share
            for study in (positive, negative):
                x = self.features.cache.decoded(study.codes[chosen])
                studies.append(x.flip(3) if flip else x)
                labels.append(float(study.positive))
        return torch.stack(studies), torch.tensor(labels)
