"""Stage 2 of RADnet on pooled features of studies: what a step sees, and the loss.

Every slice that passed the gate has a label: hemorrhage from ``DataSettings.min_pixels`` on, none
where it is clean, no part in the loss in between. Nor has a clean slice beside one with hemorrhage:
blood that fills less than half of its thickness is seen in it, and no mask says so. Where slices
were labelled by readers and not by masks, their word counts; where they labelled studies only, the
score of the study is all there is to learn from. The loss is the
mean cross-entropy of the slices [memory], and that of the study's score, which is what the bundle's
rule decides by [ours]. Features are frozen and few, so that every training study is encoded several
times, augmented, all slices of a pair alike [ours].
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.augment import OFF, Strengths, augmented, slab_of
from export.datasets.labels import UNSURE, slab_labels
from export.datasets.store import StoredStudy, StudyPair
from export.models.radnet import SliceContext, consecutive_score
from export.training.config import ContextSettings, DataSettings
from export.training.encoder import SlabEncoder
from export.training.features import cache_facts
from export.training.sampling import CLASSES
from export.training.study_task import (
    Couple,
    CoupleDraw,
    encode_sources,
    repeated,
    window_start,
)
from pe_infer.errors import ConfigurationError


@dataclass(frozen=True)
class SliceFeatures:
    """One study as the LSTM sees it.

    Attributes:
        features: (variants, T, F) float32; the first variant is the study as it is.
        logits: (variants, T) float32, of the slices by themselves.
        labels: (T,) 1, 0 or ``UNSURE``.
        positive: Whether the study shows hemorrhage.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    positive: bool


def slice_labels(study: StoredStudy, middles: Sequence[int], data: DataSettings) -> list[int]:
    """Label of every slice: 1, 0 or ``UNSURE``."""
    record, planes = study.record, data.grid.planes_per_slab
    found = slab_labels(record.clot_pixels, record.plane_labels, middles, planes, data.min_pixels)
    return [CLASSES[label] for label in found]


def encode_all(
    settings: ContextSettings,
    data: DataSettings,
    store: Path,
    folder: Path,
    encoder: SlabEncoder,
    console: Console,
    *,
    stage1_sha256: str,
) -> CoupleDraw[SliceFeatures]:
    """Encode every study that a run needs; what is in the folder already is kept.

    Raises:
        ConfigurationError: The store has fewer pairs than the settings ask for, or the features in
            the folder come from another stage 1 or other settings.
        InputError: The store has none.
    """
    made_with = {"variants": settings.variants, "augment": settings.augment.model_dump()}
    facts = cache_facts(folder, stage1_sha256=stage1_sha256, measure=lambda: made_with)
    if {key: facts[key] for key in made_with} != json.loads(json.dumps(made_with)):
        raise ConfigurationError(
            f"{folder}: these features were made with other variants or another augmentation: "
            "name another --run, or remove the folder"
        )

    strengths = [OFF, *[settings.augment] * (settings.variants - 1)]

    def encoded(split: str, study: StoredStudy, middles: Sequence[int], name: str) -> SliceFeatures:
        path = folder / f"{name}.npz"
        if not path.exists():
            variants = strengths if split == "train" else [OFF]
            _save(path, _encoded(encoder, study, middles, variants, data))
        with np.load(path) as arrays:
            features, logits = (torch.from_numpy(arrays[n]) for n in ("features", "logits"))
        labels = torch.tensor(slice_labels(study, middles, data))
        return SliceFeatures(features, logits, labels, study.record.positive)

    def encode_pair(
        split: str, pair: StudyPair, prefix: str
    ) -> tuple[SliceFeatures, SliceFeatures]:
        middles = pair.positive.record.slab_planes  # of both, so that they are of one length
        positive, negative = (
            encoded(split, study, middles, f"{prefix}{study.folder.name}")
            for study in (pair.positive, pair.negative)
        )
        return positive, negative

    def encode_study(split: str, study: StoredStudy, name: str) -> SliceFeatures:
        return encoded(split, study, study.record.slab_planes, name)

    return encode_sources(
        settings,
        data,
        store,
        encode_pair,
        encode_study,
        console,
        least_slabs=settings.consecutive,
    )


class RadnetStudies:
    """The task: see ``export.training.study_task.StudyTask``."""

    def __init__(self, settings: ContextSettings, studies: CoupleDraw[SliceFeatures]) -> None:
        """Take what a run needs; measure the scale of the features.

        Raises:
            ConfigurationError: A study has fewer slices than the rule counts.
        """
        self.settings = settings
        self.studies = studies
        trained = [study for source in studies.train for study in source.studies]
        shortest = min(study.labels.numel() for study in (*trained, *studies.validation))
        if shortest < settings.consecutive:
            raise ConfigurationError(
                f"a study has {shortest} slices that passed the gate, the rule counts "
                f"{settings.consecutive} neighbours: leave the study out, or change the gate"
            )
        plain = torch.cat([study.features[0] for study in trained])
        self._mean, self._deviation = plain.mean(dim=0), plain.std(dim=0)

    @property
    def train_count(self) -> int:
        """Couples of studies in an epoch."""
        return self.studies.count

    @property
    def in_channels(self) -> int:
        """Length of a feature vector."""
        return self._mean.numel()

    def fresh(self) -> SliceContext:
        """The network, which leaves the slices' logits as they are."""
        model = SliceContext(self.in_channels, self.settings.hidden, self.settings.dropout)
        model.scale_to(self._mean, self._deviation)
        return model

    def train_mode(self, model: nn.Module, step: int) -> None:
        """It has no norms: the step makes no difference."""
        del step
        model.train()

    def loss(
        self, model: nn.Module, pairs: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, list[float], list[bool]]:
        """Mean loss of some couples, one after the other: they differ in length."""
        losses: list[Tensor] = []
        scores: list[float] = []
        truth: list[bool] = []
        for index in pairs:
            couple = self.studies(index, rng)
            features, logits, labels = self._batch(couple, rng)
            said = (
                model(torch.stack(features), torch.stack(logits))
                if couple.twins
                else [model(f[None], own[None])[0] for f, own in zip(features, logits, strict=True)]
            )
            score = torch.cat([consecutive_score(s[None], self.settings.consecutive) for s in said])
            loss = self.settings.study_weight * functional.binary_cross_entropy_with_logits(
                score, torch.tensor([1.0, 0.0])
            )
            flat, labelled = torch.cat(list(said)), torch.cat(labels)
            known = labelled != UNSURE
            if known.any():
                loss = loss + functional.binary_cross_entropy_with_logits(
                    flat[known], labelled[known].float()
                )
            losses.append(loss)
            scores += score.detach().tolist()
            truth += [True, False]
        return torch.stack(losses).mean(), scores, truth

    @torch.inference_mode()
    def score(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Study scores and labels (1 = hemorrhage) of the validation studies."""
        scores: list[float] = []
        labels: list[float] = []
        for study in self.studies.validation:
            said = model(study.features[:1], study.logits[:1])
            scores.append(float(consecutive_score(said, self.settings.consecutive)))
            labels.append(float(study.positive))
        return scores, labels

    def stage1_scores(self) -> dict[str, list[float]]:
        """None: the network starts as the rule over stage 1's own logits."""
        return {}

    def _batch(
        self, couple: Couple[SliceFeatures], rng: np.random.Generator
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features (T, F), logits and labels (T,) of both studies; of twins, the same slices."""
        chosen = self._slices(couple.positive, rng, anywhere=couple.twins)
        variant = int(rng.integers(len(couple.positive.features)))
        picks = [(couple.positive, chosen, variant)]
        if couple.twins:
            picks.append((couple.negative, chosen, variant))
        else:
            chosen = self._slices(couple.negative, rng, anywhere=True)
            variant = int(rng.integers(len(couple.negative.features)))
            picks.append((couple.negative, chosen, variant))
        return (
            [study.features[number][slices] for study, slices, number in picks],
            [study.logits[number][slices] for study, slices, number in picks],
            [study.labels[slices] for study, slices, _ in picks],
        )

    def _slices(
        self, study: SliceFeatures, rng: np.random.Generator, *, anywhere: bool
    ) -> list[int]:
        """A window of a study, or all of it.

        Where it is not known which slices show the finding, a window may lie ``anywhere``, or there
        is none.
        """
        s, slices = self.settings, study.labels.numel()
        places = torch.nonzero(study.labels == 1).flatten().tolist()
        least = max(s.window_slabs, s.consecutive)
        windowed = rng.random() < s.window_share and bool(places or anywhere)
        length = min(least, slices) if windowed else slices
        first = window_start(slices, length, places, rng)
        return repeated(first, length, s.drop_slab_share, rng)


def _encoded(
    encoder: SlabEncoder,
    study: StoredStudy,
    middles: Sequence[int],
    variants: Sequence[Strengths],
    data: DataSettings,
) -> dict[str, NDArray[np.float32]]:
    """Features (variants, T, F) and logits (variants, T)."""
    grid = data.grid
    features: list[list[NDArray[np.float32]]] = []
    logits: list[list[float]] = []
    for number, strengths in enumerate(variants):
        outputs = []
        for middle in middles:
            # One seed for all slices of both studies of the pair: they are changed alike.
            generator = torch.Generator().manual_seed(1000 * study.record.seed + number)
            hu = torch.from_numpy(study.slab_hu(middle, grid.planes_per_slab).astype(np.float32))
            mask = torch.zeros(hu.shape, dtype=torch.bool)
            changed, _ = augmented(hu, mask, strengths, generator, positive=True)
            outputs.append(encoder(slab_of(changed, grid.window_bounds).numpy()[np.newaxis]))
        features.append([output["features"][0] for output in outputs])
        logits.append([float(output["logit"][0, 0]) for output in outputs])
    return {
        "features": np.array(features, dtype=np.float32),
        "logits": np.array(logits, dtype=np.float32),
    }


def _save(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    draft = path.with_suffix(".draft.npz")
    np.savez(draft, features=arrays["features"], logits=arrays["logits"])
    draft.rename(path)
