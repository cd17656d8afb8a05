"""Training of stage 2.

``python -m export.training.stage2 --config ... --data DIR --stage1 CHECKPOINT --run DIR``

Stage 1 is frozen: its features are computed once per study (``export.training.features``). Every
step sees pairs of studies: a patient with emboli and the same patient without. Steps depend on the
seed and their number only, so that a resumed run is the run that was never stopped.

The paper has binary cross-entropy, Adam at 1e-4, 50 epochs, and keeps the best validation accuracy
[slides]. Here ``best.pt`` has the smallest validation loss of the mean weights; windows of a study,
repeated slabs, the start from the activation map and features of 8 bits are [ours] too.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from export.command_line import (
    ConfigOption,
    MinutesOption,
    ResumeOption,
    RunOption,
    StoreOption,
    ThreadsOption,
    reported,
    stopping,
)
from export.datasets.store import open_pairs
from export.models.stage1 import PE, TOTAL_STRIDE, SlabClassifier, channels_last
from export.models.stage2 import SequenceNorm, StudyNet
from export.training.checkpoint import (
    CsvLog,
    MovingAverage,
    load_checkpoint,
    prepare_run,
    save_checkpoint,
)
from export.training.config import (
    DataSettings,
    SplitSettings,
    Stage2Settings,
    load_data_settings,
    load_settings,
)
from export.training.features import (
    Encoder,
    FeatureCache,
    StudyFeatures,
    cache_pair,
    open_cache,
)
from export.training.schedule import Stopwatch, learning_rate
from pe_infer.errors import ConfigurationError

FEATURES_FOLDER = "features"  # of a run
LOG_COLUMNS = ("step", "epoch", "lr", "loss", "auc", "validation_loss", "validation_auc", "minutes")

Pair = tuple[StudyFeatures, StudyFeatures]


@dataclass
class Progression:
    """Where a run stands: optimiser steps, epochs, minutes, and the best validation loss so far."""

    step: int = 0
    epoch: int = 0
    minutes: float = 0.0
    best: float = math.inf


@dataclass(frozen=True)
class FeatureSets:
    """Features of the training and validation pairs."""

    cache: FeatureCache
    train: list[Pair]
    validation: list[Pair]


def load_stage1(path: Path, data: DataSettings) -> SlabClassifier:
    """Stage 1 with the mean weights of a checkpoint, in evaluation mode.

    Args:
        path: The checkpoint.
        data: What stage 2 is trained and validated on.

    Raises:
        InputError: It is no checkpoint of stage 1.
        ConfigurationError: It was trained on another grid, or on patients that ``data`` holds back.
    """
    content = load_checkpoint(path, stage=1)
    data.refuse_mixing(DataSettings.model_validate(content["data"]), str(path))
    model = SlabClassifier(data.grid.planes_per_slab, content["width"])
    model.load_state_dict(content["mean"])
    return channels_last(model.eval())


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
    wanted: list[tuple[SplitSettings, int]] = [
        (data.train, settings.train_pairs),
        (data.validation, settings.validation_pairs),
    ]
    sets: list[list[Pair]] = []
    cache: FeatureCache | None = None
    for split, limit in wanted:
        pairs = open_pairs(store, first_seed=split.first_seed, pairs=split.pairs, limit=limit)
        if len(pairs) < limit:
            raise ConfigurationError(
                f"{store}: {len(pairs)} pairs from seed {split.first_seed} on, the settings ask "
                f"for {limit}. Make the others, or ask for fewer."
            )
        cache = cache or open_cache(folder, encoder, pairs, stage1_sha256=stage1_sha256)
        sets.append(
            [cache_pair(cache, encoder, pair) for pair in track(pairs, "encode", console=console)]
        )
    if cache is None:
        raise RuntimeError("no split to encode")
    return FeatureSets(cache, sets[0], sets[1])


class Stage2Run:
    """One run: the network, its optimiser and its place in the schedule."""

    def __init__(
        self,
        settings: Stage2Settings,
        data: DataSettings,
        stage1: SlabClassifier,
        features: FeatureSets,
        run: Path,
        *,
        resume: bool,
    ) -> None:
        """Start a run, or take up one where it was left.

        Args:
            settings: Of the run.
            data: Which studies.
            stage1: The frozen encoder; its head may be where the network starts from.
            features: Of these studies, made by ``stage1``.
            run: Folder for checkpoints and logs.
            resume: Go on from the checkpoint in ``run``.

        Raises:
            ConfigurationError: ``run`` holds a checkpoint and is not to be resumed, or the other
                way round, or it was trained on patients that ``data`` holds back.
            InputError: The checkpoint cannot be read.
        """
        self.settings = settings
        self.data = data
        self.features = features
        self.run = run
        self.checkpoint_path = prepare_run(run, resume=resume)
        self.at = Progression()
        torch.manual_seed(settings.seed)
        self.model = StudyNet(
            stage1.feature_channels,
            settings.filters,
            data.grid.rows // TOTAL_STRIDE,
            settings.dropout,
        )
        if settings.attention_gain:
            head = stage1.head
            self.model.read_attention(
                head.weight[PE].detach(), head.bias[PE].detach(), gain=settings.attention_gain
            )
        self.mean = MovingAverage(self.model, settings.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.validation: dict[str, list[float]] = {}  # of the mean weights, after the last epoch
        if resume:
            content = load_checkpoint(self.checkpoint_path, stage=2)
            data.refuse_mixing(
                DataSettings.model_validate(content["data"]), str(self.checkpoint_path)
            )
            self.at = Progression(**content["progression"])
            self.model.load_state_dict(content["model"])
            self.mean.state, self.mean.updates = content["mean"], content["mean_updates"]
            self.optimizer.load_state_dict(content["optimizer"])
            self.validation = content["validation"]
        self.log = CsvLog(
            run / "log.csv", LOG_COLUMNS, resume_step=self.at.step if resume else None
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training pairs."""
        return max(1, len(self.features.train) // self.settings.pairs_per_step)

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done."""
        return self.at.epoch >= self.settings.epochs

    def train(self, stop: Callable[[], bool], console: Console) -> None:
        """Train until ``stop`` says so or the run is finished; saves a checkpoint at the end."""
        watch = Stopwatch(self.at.minutes)
        losses: list[float] = []
        scores: list[tuple[bool, float]] = []
        while not self.finished and not stop():
            loss, logits, labels = self._step()
            losses.append(loss)
            scores += list(zip(labels, logits, strict=True))
            self.at.minutes = watch.minutes
            if self.at.step % self.steps_per_epoch == 0:
                self.at.epoch += 1
                console.print(self._end_epoch(losses, scores))
                losses, scores = [], []
            if watch.save_due(self.settings.checkpoint_minutes):
                self.save(self.checkpoint_path)
        self.save(self.checkpoint_path)
        self.log.close()

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            path,
            {
                "stage": 2,
                "settings": self.settings.model_dump(mode="json"),
                "data": self.data.model_dump(mode="json"),
                "in_channels": self.model.in_channels,
                "progression": asdict(self.at),
                "model": self.model.state_dict(),
                "mean": self.mean.state,
                "mean_updates": self.mean.updates,
                "optimizer": self.optimizer.state_dict(),
                "validation": self.validation,
            },
        )

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        s = self.settings
        return learning_rate(
            self.at.step,
            steps=s.epochs * self.steps_per_epoch,
            highest=s.lr,
            lowest=s.final_lr,
            warmup_steps=s.warmup_steps,
        )

    def _step(self) -> tuple[float, list[float], list[bool]]:
        s = self.settings
        epoch_rng = np.random.default_rng((s.seed, 0, self.at.epoch))
        order = epoch_rng.permutation(len(self.features.train))
        place = (self.at.step % self.steps_per_epoch) * s.pairs_per_step
        rng = np.random.default_rng((s.seed, 1, self.at.step))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout
        pairs = [self.features.train[int(i)] for i in order[place : place + s.pairs_per_step]]
        x, labels = self._batch(pairs, rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.model.train()
        if self.at.step >= s.norm_steps:
            for module in self.model.modules():
                if isinstance(module, SequenceNorm):
                    module.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(x).float().flatten()
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), s.gradient_clip)
        self.optimizer.step()
        self.mean.update(self.model)
        self.at.step += 1
        return float(loss.detach()), logits.detach().tolist(), [v > 0.5 for v in labels.tolist()]

    def _batch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Features (2 * pairs, T, C, h, w) of equal length, and labels."""
        s = self.settings
        shortest = min(p.slabs for p, _ in pairs)
        length = min(s.window_slabs, shortest) if rng.random() < s.window_share else shortest
        studies: list[Tensor] = []
        labels: list[float] = []
        for positive, negative in pairs:
            first = _window(positive, length, rng)
            chosen = np.arange(first, first + length)
            dropped = rng.random(length) < s.drop_slab_share
            chosen[1:][dropped[1:]] = chosen[:-1][dropped[1:]]  # a slab is seen twice, one is not
            flip = rng.random() < s.left_right_share
            for study in (positive, negative):
                x = self.features.cache.decoded(study.codes[chosen])
                studies.append(x.flip(3) if flip else x)
                labels.append(float(study.positive))
        return torch.stack(studies), torch.tensor(labels)

    @torch.inference_mode()
    def _end_epoch(self, losses: list[float], scores: list[tuple[bool, float]]) -> str:
        """Score the mean weights on validation studies; the best so far go to ``best.pt``."""
        model = StudyNet(
            self.model.in_channels,
            self.model.filters,
            self.model.feature_size,
            self.settings.dropout,
        )
        model.load_state_dict(self.mean.state)
        logits, labels = score_studies(model.eval(), self.features.cache, self.features.validation)
        self.validation = {"logits": logits, "labels": labels}
        validation_loss = float(
            functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
        )
        auc = float(roc_auc_score(labels, logits))
        train_auc = float(roc_auc_score([p for p, _ in scores], [v for _, v in scores]))
        loss = float(np.mean(losses))
        self.log.add(
            {
                "step": self.at.step,
                "epoch": self.at.epoch,
                "lr": self.learning_rate(),
                "loss": loss,
                "auc": train_auc,
                "validation_loss": validation_loss,
                "validation_auc": auc,
                "minutes": self.at.minutes,
            }
        )
        if validation_loss < self.at.best:
            self.at.best = validation_loss
            self.save(self.run / "best.pt")
        return (
            f"epoch {self.at.epoch}: loss {loss:.3f}, AUC {train_auc:.3f}; "
            f"validation loss {validation_loss:.3f}, AUC {auc:.3f}"
        )


@torch.inference_mode()
def score_studies(
    model: StudyNet, cache: FeatureCache, pairs: Sequence[Pair]
) -> tuple[list[float], list[float]]:
    """Study logits and labels (1 = PE) of whole studies."""
    logits: list[float] = []
    labels: list[float] = []
    for pair in pairs:
        for study in pair:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits.append(float(model(cache.decoded(study.codes)[None])))
            labels.append(float(study.positive))
    return logits, labels


def _window(study: StudyFeatures, length: int, rng: np.random.Generator) -> int:
    """First slab of a window that holds a positive slab."""
    last = study.slabs - length
    if not study.clot_slabs:
        return int(rng.integers(last + 1))
    target = int(rng.choice(study.clot_slabs))
    low, high = max(0, target - length + 1), min(last, target)
    return int(rng.integers(low, high + 1))


def main(
    *,
    config: ConfigOption,
    data: StoreOption,
    stage1: Annotated[Path, typer.Option(help="Checkpoint of stage 1.")],
    run: RunOption,
    resume: ResumeOption = False,
    minutes: MinutesOption = None,
    threads: ThreadsOption = 2,
) -> None:
    """Train stage 2."""
    console = Console()
    torch.set_num_threads(threads)
    with reported(console):
        settings = load_settings(config, Stage2Settings)
        data_settings = load_data_settings(config, settings.data)
        model = load_stage1(stage1, data_settings)
        features = encode_all(
            settings,
            data_settings,
            data,
            run / FEATURES_FOLDER,
            Encoder(model, data_settings.grid, threads=threads),
            console,
            stage1_sha256=hashlib.sha256(stage1.read_bytes()).hexdigest(),
        )
        run_of_stage2 = Stage2Run(settings, data_settings, model, features, run, resume=resume)
        with stopping(minutes) as stop:
            run_of_stage2.train(stop, console)


if __name__ == "__main__":
    typer.run(main)
