"""Stage 2 of Shi et al. on features of studies: what a step sees, and the loss.

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

from export.datasets.store import StoredStudy, StudyPair
from export.models.stage1 import PE, SlabClassifier
from export.models.stage2 import SequenceNorm, StudyNet
from export.training.config import DataSettings, Stage2Settings
from export.training.features import (
    Encoder,
    FeatureCache,
    StudyFeatures,
    cache_pair,
    cache_study,
    open_cache,
)
from export.training.study_task import (
    Couple,
    CoupleDraw,
    encode_sources,
    repeated,
    window_start,
)


@dataclass(frozen=True)
class FeatureSets:
    """Features of the studies to train and validate on."""

    cache: FeatureCache
    studies: CoupleDraw[StudyFeatures]


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
    """Encode every study that a run needs; what is in the folder already is kept.

    Raises:
        ConfigurationError: The store has fewer pairs than the settings ask for, or the features in
            the folder come from another stage 1.
        InputError: The store has none.
    """
    caches: list[FeatureCache] = []

    def begin(studies: Sequence[StoredStudy]) -> None:
        caches.append(open_cache(folder, encoder, studies, stage1_sha256=stage1_sha256))

    def encode_pair(
        split: str, pair: StudyPair, prefix: str
    ) -> tuple[StudyFeatures, StudyFeatures]:
        del split
        return cache_pair(caches[0], encoder, pair, prefix, min_pixels=data.min_pixels)

    def encode_study(split: str, study: StoredStudy, name: str) -> StudyFeatures:
        del split
        return cache_study(caches[0], encoder, study, name, min_pixels=data.min_pixels)

    draw = encode_sources(settings, data, store, encode_pair, encode_study, console, begin=begin)
    return FeatureSets(caches[0], draw)


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
        """Couples of studies in an epoch."""
        return self.features.studies.count

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
        """Cross-entropy of the studies of some couples."""
        x, labels = self._batch([self.features.studies(i, rng) for i in pairs], rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x).float().flatten()
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        return loss, logits.detach().tolist(), [v > 0.5 for v in labels.tolist()]

    @torch.inference_mode()
    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Study logits and labels (1 = PE) of the validation studies."""
        logits: list[float] = []
        labels: list[float] = []
        for study in self.features.studies.validation:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits.append(float(model(self.features.cache.decoded(study.codes)[None])))
            labels.append(float(study.positive))
        return logits, labels

    def _batch(
        self, couples: Sequence[Couple[StudyFeatures]], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Features (2 * couples, T, C, h, w) of equal length, and labels.

        Pairs of one patient are cut to the shortest. Real studies are not: the finding may be
        anywhere, so that the slabs of shorter ones are repeated evenly, as the paper brings every
        study to one length. Windows are cut only where it is known which slabs they must hold.
        """
        s = self.settings
        shortest = min(c.positive.slabs for c in couples)
        whole = shortest
        windowed = bool(rng.random() < s.window_share)
        if not all(c.twins for c in couples):
            whole = max(study.slabs for c in couples for study in (c.positive, c.negative))
            windowed &= all(c.twins or c.positive.clot_slabs for c in couples)
        length = min(s.window_slabs, shortest) if windowed else whole
        studies: list[Tensor] = []
        labels: list[float] = []
        for couple in couples:
            chosen = self._slabs(couple.positive, couple.positive.clot_slabs, length, rng)
            flip = rng.random() < s.left_right_share
            for study in (couple.positive, couple.negative):
                if study is couple.negative and not couple.twins:
                    chosen = self._slabs(study, (), length, rng)
                x = self.features.cache.decoded(study.codes[chosen])
                studies.append(x.flip(3) if flip else x)
                labels.append(float(study.positive))
        return torch.stack(studies), torch.tensor(labels)

    def _slabs(
        self,
        study: StudyFeatures,
        clot_slabs: Sequence[int],
        length: int,
        rng: np.random.Generator,
    ) -> list[int]:
        """Indices of ``length`` slabs: neighbours, or all of a study that has fewer."""
        own = min(length, study.slabs)
        first = window_start(study.slabs, own, clot_slabs, rng)
        chosen = repeated(first, own, self.settings.drop_slab_share, rng)
        return [chosen[number * own // length] for number in range(length)]
