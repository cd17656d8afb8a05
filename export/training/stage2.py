"""Training of stage 2, of any system.

``python -m export.training.stage2 --config ... --data DIR --stage1 CHECKPOINT --run DIR``

Stage 1 is frozen: its features are computed once per study. Every step sees pairs of studies: a
patient with the finding and the same patient without. Steps depend on the seed and their number
only, so that a resumed run is the run that was never stopped.

Shi et al. have binary cross-entropy, Adam at 1e-4, 50 epochs, and keep the best validation accuracy
[slides]. Here ``best.pt`` has the smallest validation loss of the mean weights, each time after a
calibration of its own, as the bundle has one; the network as it begins competes as epoch 0 [ours].
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from export.calibration import fit_calibration
from export.command_line import (
    ConfigOption,
    MinutesOption,
    ResumeOption,
    RunOption,
    StoreOption,
    ThreadsOption,
    WithoutOption,
    reported,
    stopping,
)
from export.models.base import SlabNetwork, channels_last
from export.systems.base import System
from export.systems.registry import load_study_settings, refuse_other_system, system_of
from export.training.checkpoint import (
    CsvLog,
    MovingAverage,
    load_checkpoint,
    prepare_run,
    save_checkpoint,
    unfinished,
)
from export.training.config import DataSettings, StudySettings, load_data_settings
from export.training.schedule import Stopwatch, learning_rate
from export.training.start import seen_in_all
from export.training.study_task import StudyTask
from pe_infer.errors import ConfigurationError

FEATURES_FOLDER = "features"  # of a run
LOG_COLUMNS = ("step", "epoch", "lr", "loss", "auc", "validation_loss", "validation_auc", "minutes")


@dataclass
class Progression:
    """Where a run stands: optimiser steps, epochs, minutes, and the best validation loss so far."""

    step: int = 0
    epoch: int = 0
    minutes: float = 0.0
    best: float = math.inf


def load_stage1(path: Path, data: DataSettings, system: System | None = None) -> SlabNetwork:
    """Stage 1 with the mean weights of a checkpoint, in evaluation mode.

    Args:
        path: The checkpoint.
        data: What stage 2 is trained and validated on.
        system: The one that is expected; ``None`` takes any.

    Raises:
        InputError: It is no checkpoint of stage 1.
        ConfigurationError: It is of another system, was trained on another grid, or on patients
            that ``data`` holds back.
    """
    content = load_checkpoint(path, stage=1)
    if system:
        refuse_other_system(content, system, path)
    data.refuse_mixing(seen_in_all(content), str(path))
    model = system_of(content["settings"]).slab_network(data.grid.channels, content["width"])
    model.load_state_dict(content["mean"])
    return channels_last(model.eval())


class Stage2Run:
    """One run: the network, its optimiser and its place in the schedule."""

    def __init__(
        self,
        settings: StudySettings,
        data: DataSettings,
        task: StudyTask,
        run: Path,
        *,
        resume: bool,
    ) -> None:
        """Start a run, or take up one where it was left.

        Args:
            settings: Of the run.
            data: Which studies.
            task: Their features, and the network.
            run: Folder for checkpoints and logs.
            resume: Go on from the checkpoint in ``run``.

        Raises:
            ConfigurationError: ``run`` holds a checkpoint and is not to be resumed, or the other
                way round, or it has another seed, or was trained on patients that ``data`` holds
                back.
            InputError: The checkpoint cannot be read.
        """
        self.settings = settings
        self.data = data
        self.task = task
        self.run = run
        self.checkpoint_path = prepare_run(run, resume=resume)
        self.at = Progression()
        torch.manual_seed(settings.seed)
        self.model = task.fresh()
        self.mean = MovingAverage(self.model, settings.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.validation: dict[str, list[float]] = {}  # of the mean weights, after the last epoch
        if resume:
            content = load_checkpoint(self.checkpoint_path, stage=2)
            refuse_other_system(content, system_of(settings), self.checkpoint_path)
            earlier = DataSettings.model_validate(content["data"])
            if earlier != data:
                raise ConfigurationError(
                    f"{self.checkpoint_path}: trained on {earlier.name!r}, now {data.name!r}, or "
                    "the settings of the same data were changed: resume with those of the run "
                    "(and its --without)"
                )
            if (seed := content["settings"]["seed"]) != settings.seed:
                raise ConfigurationError(
                    f"{self.checkpoint_path}: a run of seed {seed}, now {settings.seed}: "
                    f"pass --seed {seed}"
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
        return max(1, self.task.train_count // self.settings.pairs_per_step)

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done."""
        return self.at.epoch >= self.settings.epochs

    def train(self, stop: Callable[[], bool], console: Console) -> None:
        """Train until ``stop`` says so or the run is finished; saves a checkpoint at the end."""
        if self.at.step == 0:
            console.print(self._as_begun())
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
                "backgrounds": self.data.painted,  # the stores were found to be made of these
                "in_channels": self.task.in_channels,
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
        order = epoch_rng.permutation(self.task.train_count)
        place = (self.at.step % self.steps_per_epoch) * s.pairs_per_step
        rng = np.random.default_rng((s.seed, 1, self.at.step))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout
        pairs = [int(i) for i in order[place : place + s.pairs_per_step]]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.task.train_mode(self.model, self.at.step)
        loss, scores, truth = self.task.loss(self.model, pairs, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), s.gradient_clip)
        self.optimizer.step()
        self.mean.update(self.model)
        self.at.step += 1
        return float(loss.detach()), scores, truth

    def _as_begun(self) -> str:
        """Score the network before its first step, and stage 1 by itself."""
        said = self._validate({})
        labels = self.validation["labels"]
        for name, scores in self.task.stage1_scores().items():
            said += f"; of stage 1 alone, {name}: AUC {roc_auc_score(labels, scores):.3f}"
        return said

    def _end_epoch(self, losses: list[float], scores: list[tuple[bool, float]]) -> str:
        auc = float(roc_auc_score([p for p, _ in scores], [v for _, v in scores]))
        loss = float(np.mean(losses))
        said = self._validate({"loss": loss, "auc": auc})
        return f"{said}; in training loss {loss:.3f}, AUC {auc:.3f}"

    @torch.inference_mode()
    def _validate(self, of_training: Mapping[str, float]) -> str:
        """Score the mean weights on validation studies; the best so far go to ``best.pt``."""
        model = self.task.fresh()
        model.load_state_dict(self.mean.state)
        logits, labels = self.task.score(model.eval())
        self.validation = {"logits": logits, "labels": labels}
        probabilities = fit_calibration(logits, labels)(np.array(logits, dtype=np.float64))
        validation_loss = float(log_loss(labels, probabilities))
        auc = float(roc_auc_score(labels, logits))
        self.log.add(
            {
                "step": self.at.step,
                "epoch": self.at.epoch,
                "lr": self.learning_rate(),
                "validation_loss": validation_loss,
                "validation_auc": auc,
                "minutes": self.at.minutes,
                **of_training,
            }
        )
        if validation_loss < self.at.best:
            self.at.best = validation_loss
            self.save(self.run / "best.pt")
        return f"epoch {self.at.epoch}: validation loss {validation_loss:.3f}, AUC {auc:.3f}"


def main(
    *,
    config: ConfigOption,
    data: StoreOption,
    stage1: Annotated[Path, typer.Option(help="Checkpoint of stage 1.")],
    run: RunOption,
    resume: ResumeOption = False,
    seed: Annotated[int | None, typer.Option(help="In place of that of the settings.")] = None,
    without: WithoutOption = None,
    minutes: MinutesOption = None,
    threads: ThreadsOption = 2,
) -> None:
    """Train stage 2."""
    console = Console()
    torch.set_num_threads(threads)
    with reported(console):
        settings = load_study_settings(config)
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        data_settings = load_data_settings(config, settings.data, without)
        system = system_of(settings)
        if line := unfinished(stage1, load_checkpoint(stage1, stage=1)):
            console.print(line, markup=False, soft_wrap=True)
        task = system.study_task(
            settings,
            data_settings,
            data,
            run / FEATURES_FOLDER,
            load_stage1(stage1, data_settings, system),
            console,
            stage1_sha256=hashlib.sha256(stage1.read_bytes()).hexdigest(),
            threads=threads,
        )
        run_of_stage2 = Stage2Run(settings, data_settings, task, run, resume=resume)
        with stopping(minutes) as stop:
            run_of_stage2.train(stop, console)


if __name__ == "__main__":
    typer.run(main)
