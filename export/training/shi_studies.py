"""Stage 2 of Shi et al. on features of studies: what a step sees, and the loss.

Windows of a study, repeated slabs, the start from the activation map and features of 8 bits are
[ours].
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.store import StoredStudy, StudyPair
from export.models.base import mixed_precision
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

LEVELS = 8
LEVEL_RANGE = (0.2, 0.98)  # quantiles of the highest peaks of studies [ours]
STUDIES_OF_A_SOURCE = 100  # to start from, of either kind


@dataclass(frozen=True)
class AttentionStart:
    """Where the network starts from: see `StudyNet.read_attention`."""

    gain: float
    levels: list[float]
    counts: list[float]
    offset: float


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
                head.weight[PE].detach(), head.bias[PE].detach(), **asdict(self.attention_start)
            )
        return model

    @cached_property
    def attention_start(self) -> AttentionStart:
        """Fitted to training studies.

        Levels are spread over the highest peaks of the activation map; the weights of the channels
        that see them are those of a logistic regression. These channels see each other only, so
        that a network of nothing else says what they say of a study.
        """
        s = self.settings
        some: list[StudyFeatures] = []
        weights: list[float] = []
        for source in self.features.studies.train:
            for studies in filter(None, (source.positives, source.negatives)):
                few = studies[:: -(-len(studies) // STUDIES_OF_A_SOURCE)]
                some += few
                weights += [source.share / len(few)] * len(few)
        maps = [self._maps(study) for study in some]
        highest = torch.stack([each.max() for each in maps])
        shares = torch.linspace(*LEVEL_RANGE, min(LEVELS, *s.filters))
        levels = torch.quantile(highest, shares).tolist()
        reader = StudyNet(1, (len(levels), len(levels)), self._cells)
        reader.read_attention(
            torch.ones(1), torch.tensor(0.0), gain=s.attention_gain, levels=levels
        )
        with torch.inference_mode():
            described = torch.cat([reader.eval().described(each[None, :, None]) for each in maps])
        sums = described.view(len(maps), len(levels), -1).sum(dim=2).numpy()
        drawn = np.array(weights) * len(some) / sum(weights)  # as training draws them
        fitted = LogisticRegression().fit(sums, [study.positive for study in some], drawn)
        return AttentionStart(
            gain=s.attention_gain,
            levels=levels,
            counts=fitted.coef_[0].tolist(),
            offset=float(fitted.intercept_[0]),
        )

    def stage1_scores(self) -> dict[str, list[float]]:
        """Of the validation studies: the highest peak of the map, and the mean of three slabs'."""
        peaks = [self._maps(s).amax(dim=(1, 2)) for s in self.features.studies.validation]
        return {
            "highest peak": [float(each.max()) for each in peaks],
            "three peaks": [float(each.topk(min(3, each.numel())).values.mean()) for each in peaks],
        }

    @torch.inference_mode()
    def _maps(self, study: StudyFeatures) -> Tensor:
        """(T, h, w) activation map of every slab."""
        return self._stage1.activation_maps(self.features.cache.decoded(study.codes))[:, PE]

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
        with mixed_precision():
            logits = model(x).float().flatten()
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        return loss, logits.detach().tolist(), [v > 0.5 for v in labels.tolist()]

    @torch.inference_mode()
    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Study logits and labels (1 = PE) of the validation studies."""
        logits: list[float] = []
        labels: list[float] = []
        for study in self.features.studies.validation:
            with mixed_precision():
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
