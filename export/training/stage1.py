"""Training of stage 1, of any system.

``python -m export.training.stage1 --config export/configs/pe-stage1.toml --data DIR --run DIR``

A run is a sequence of phases (see ``export.training.config.Phase``). It can be stopped at any time,
by ``--minutes`` or by a signal, and goes on with ``--resume`` as if it had never stopped.

Shi et al. train 100 epochs and keeps the best validation accuracy [slides]. Here a run has a fixed
number of steps, the weights that are used are an exponential mean, and ``best.pt`` has the largest
sum of AUC, AUC of the attention peak and hits on the validation slabs of its phase [ours].
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

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
from export.datasets.store import Studies
from export.models.base import SlabNetwork, channels_last, mixed_precision
from export.systems.registry import refuse_other_system, system_of
from export.training.checkpoint import (
    CsvLog,
    MovingAverage,
    load_checkpoint,
    prepare_run,
    save_checkpoint,
)
from export.training.config import (
    DataSettings,
    Phase,
    Stage1Settings,
    load_data_settings,
    load_settings,
)
from export.training.losses import Stage1Terms
from export.training.sampling import BatchSource, SlabIndex, SlabRef, index_slabs, prefetched
from export.training.schedule import Stopwatch, learning_rate
from export.training.sources import open_sources
from export.training.start import measure_norms, read_start, seen_in_all
from export.training.validation import SlabScores, choose_slabs, score_slabs
from pe_infer.errors import ConfigurationError

LOG_COLUMNS = ("step", "phase", "lr", "pairs", "total", "cross_entropy", "dice", "focal", "seconds")
VALIDATION_COLUMNS = ("step", "phase", "slabs", "auc", "peak_auc", "hit", "control", "minutes")
LOG_STEPS = 25


@dataclass
class Progression:
    """Where a run stands.

    Attributes:
        phase: Index of the phase.
        phase_step: Optimiser steps done in it.
        step: Optimiser steps done in all.
        pairs: Pairs of studies in use; with sources in the data settings, studies in use.
        minutes: Wall clock spent so far.
        best: Best validation score so far, within the last phase that was validated.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    pairs: int = 0
    minutes: float = 0.0
    best: float = -1.0


class Stage1Run:
    """One run: the model, its optimiser and its place in the schedule."""

    def __init__(
        self,
        settings: Stage1Settings,
        data: DataSettings,
        store: Path,
        run: Path,
        *,
        resume: bool,
        start: str | None = None,
    ) -> None:
        """Start a run, or take up one where it was left.

        Args:
            settings: Of the run.
            data: Which studies.
            store: Where they lie.
            run: Folder for checkpoints and logs.
            resume: Go on from the checkpoint in ``run``.
            start: Start from the mean weights of this checkpoint, or from this bundle, rather than
                from noise; of a wider one the first channels. A run that is resumed has started
                already: it takes no notice.

        Raises:
            BundleError: The bundle to start from is damaged.
            ConfigurationError: The widths differ and the system cannot change its own; ``run``
                holds a checkpoint and is not to be resumed, or the other way round; the checkpoint
                does not fit the settings, has another seed, or was trained on patients that
                ``data`` holds back; bundles of the system cannot be trained on.
            InputError: A checkpoint cannot be read, or is not there.
        """
        self.settings = settings
        self.system = system_of(settings)
        if not self.system.resizes and len({phase.width for phase in settings.phase}) > 1:
            raise ConfigurationError(
                f"system {self.system.name!r} cannot grow: give all phases of stage 1 one width"
            )
        self.data = data
        self.store = store
        self.run = run
        self.checkpoint_path = prepare_run(run, resume=resume)
        self.at = Progression()
        self.model = self._new_model(settings.phase[0].width, settings.seed)
        self.mean = MovingAverage(self.model, settings.ema_decay)
        self.start: dict[str, Any] | None = None
        self._sources: list[Studies] | None = None  # of stores that do not grow
        self.optimizer = self._new_optimizer()
        if resume:
            self._restore()
        elif start:
            self._start_from(start)
        resume_step = self.at.step if resume else None
        self.log = CsvLog(run / "log.csv", LOG_COLUMNS, resume_step=resume_step)
        self.validation_log = CsvLog(
            run / "validation.csv", VALIDATION_COLUMNS, resume_step=resume_step
        )
        self._validation_slabs: list[tuple[SlabRef, SlabRef]] | None = None

    @property
    def phase(self) -> Phase:
        """The phase the run is in."""
        return self.settings.phase[self.at.phase]

    @property
    def finished(self) -> bool:
        """Whether the last step of the last phase is done."""
        return (
            self.at.phase == len(self.settings.phase) - 1 and self.at.phase_step >= self.phase.steps
        )

    def train(self, stop: Callable[[], bool], console: Console) -> None:
        """Train until ``stop`` says so or the run is finished; saves a checkpoint at the end."""
        watch = Stopwatch(self.at.minutes)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        with bar:
            task = bar.add_task("stage 1")
            while not self.finished and not stop():
                if self.at.phase_step >= self.phase.steps:
                    self._enter_phase(self.at.phase + 1)
                if self.at.phase_step % self.settings.refresh_steps == 0:
                    self._refresh_pairs()
                bar.reset(task, total=self.phase.steps, completed=self.at.phase_step)
                for terms in self._steps_until_refresh(stop):
                    self.at.minutes = watch.minutes
                    bar.update(
                        task,
                        completed=self.at.phase_step,
                        description=f"{self.phase.name} loss {float(terms.total.detach()):.3f}",
                    )
                    if self.at.phase_step % self.phase.validate_steps == 0 or (
                        self.at.phase_step == self.phase.steps
                    ):
                        console.print(self._validate())
                    if watch.save_due(self.settings.checkpoint_minutes):
                        self.save()
        self.save()
        self.log.close()
        self.validation_log.close()

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.checkpoint_path, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "stage": 1,
            "settings": self.settings.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "width": self.model.width,
            "progression": asdict(self.at),
            "model": self.model.state_dict(),
            "mean": self.mean.state,
            "mean_updates": self.mean.updates,
            "optimizer": self.optimizer.state_dict(),
            "start": self.start,
            "backgrounds": self.data.painted,  # the stores were found to be made of these
        }

    def _start_from(self, path: str) -> None:
        start = read_start(path, self.system)
        self.data.refuse_mixing(start.seen, path)
        model = self._new_model(start.width, self.settings.seed)
        model.load_state_dict(start.weights)
        if not start.measured:
            measure_norms(model, self._batches(self._indexed(self._opened(None))).batch(0).slabs)
        weights = model.state_dict()
        if start.width != self.model.width:
            weights = self.system.resized(weights, self.model.state_dict())
        self.model.load_state_dict(weights)
        self.mean = MovingAverage(self.model, self.settings.ema_decay)
        self.start = start.origin

    def _restore(self) -> None:
        content = load_checkpoint(self.checkpoint_path, stage=1)
        refuse_other_system(content, self.system, self.checkpoint_path)
        self.data.refuse_mixing(seen_in_all(content), str(self.checkpoint_path))
        self.at = Progression(**content["progression"])
        widths = [phase.width for phase in self.settings.phase]
        if content["width"] not in widths[self.at.phase : self.at.phase + 1]:
            raise ConfigurationError(
                f"{self.checkpoint_path}: phase {self.at.phase} of width {content['width']}, the "
                f"settings have phases of widths {widths}. Resume with the settings of the run."
            )
        if (seed := content["settings"]["seed"]) != self.settings.seed:
            raise ConfigurationError(
                f"{self.checkpoint_path}: a run of seed {seed}, now {self.settings.seed}: "
                f"pass --seed {seed}"
            )
        self.start = content.get("start")
        self.model = self._new_model(content["width"], self.settings.seed)
        self.model.load_state_dict(content["model"])
        self.mean = MovingAverage(self.model, self.settings.ema_decay)
        self.mean.state = content["mean"]
        self.mean.updates = content["mean_updates"]
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(content["optimizer"])

    def _new_model(self, width: float, seed: int) -> SlabNetwork:
        torch.manual_seed(seed)
        return channels_last(self.system.slab_network(self.data.grid.channels, width))

    def _new_optimizer(self) -> torch.optim.AdamW:
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.phase.lr, foreach=True)

    def _enter_phase(self, index: int) -> None:
        width = self.settings.phase[index].width
        self.at.phase, self.at.phase_step, self.at.best = index, 0, -1.0
        if width != self.model.width:
            wide = self._new_model(width, self.settings.seed + index)
            fresh = wide.state_dict()
            mean = self.system.resized(self.mean.state, fresh)
            wide.load_state_dict(self.system.resized(self.model.state_dict(), fresh))
            self.model = wide
            self.mean.state = mean
            self.mean.updates = 0
            self.optimizer = self._new_optimizer()

    def _refresh_pairs(self) -> None:
        """Look how many pairs there are now; stores of several sources do not change.

        Raises:
            ConfigurationError: They did since the run was started.
        """
        count = sum(len(source.studies) for source in self._opened(None))
        if not self.data.source:
            self.at.pairs = count // 2
        elif self.at.pairs not in (0, count):
            raise ConfigurationError(
                f"{self.store}: the sources have {count} studies, {self.at.pairs} when the run "
                "was started: it cannot be resumed on others"
            )
        else:
            self.at.pairs = count

    def _opened(self, pairs: int | None) -> list[Studies]:
        """What is trained on; ``pairs`` cuts the list of a store that may still be growing."""
        only = self.settings.annotated_only
        if not self.data.source:
            return open_sources(self.data, self.store, "train", pairs=pairs)
        if self._sources is None:
            self._sources = open_sources(self.data, self.store, "train", annotated_only=only)
        return self._sources

    def _indexed(self, sources: Sequence[Studies]) -> list[SlabIndex]:
        planes, pixels = self.data.grid.planes_per_slab, self.data.min_pixels
        return [index_slabs(source, planes, pixels) for source in sources]

    def _batches(self, index: Sequence[SlabIndex]) -> BatchSource:
        """Those of the phase."""
        return BatchSource(
            index,
            self.data.grid,
            self.phase,
            seed=self.settings.seed + 1000 * self.at.phase,
            strengths=self.phase.augment or self.settings.augment,
            targets=self.system.targets,
            min_pixels=self.data.min_pixels,
        )

    def _steps_until_refresh(self, stop: Callable[[], bool]) -> Iterator[Stage1Terms]:
        """Do the steps up to the next look at the store, or the end of the phase."""
        phase = self.phase
        source = self._batches(self._indexed(self._opened(self.at.pairs)))
        every = self.settings.refresh_steps
        first = self.at.phase_step
        last = min((first // every + 1) * every, phase.steps)
        self.model.train()
        forward: nn.Module = (
            torch.compile(self.model) if self.settings.compile else self.model  # type: ignore[assignment]
        )
        for batch in prefetched(source, first, last):
            began = time.monotonic()
            lr = learning_rate(
                self.at.phase_step,
                steps=phase.steps,
                highest=phase.lr,
                lowest=phase.final_lr,
                warmup_steps=phase.warmup_steps,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.model.train()
            with mixed_precision():
                output = forward(batch.slabs)
            terms = self.system.terms(output, batch, phase.loss)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
            self.optimizer.step()
            self.mean.update(self.model)
            self.at.phase_step += 1
            self.at.step += 1
            if self.at.phase_step % LOG_STEPS == 0:
                parts = {k: float(v.detach()) for k, v in vars(terms).items()}
                place: dict[str, float | int | str] = {
                    "step": self.at.step,
                    "phase": phase.name,
                    "pairs": self.at.pairs,
                    "lr": lr,
                }
                self.log.add({**place, **parts, "seconds": time.monotonic() - began})
            yield terms
            if stop():
                return

    def _validate(self) -> str:
        """Score the mean weights on validation slabs; the best so far go to ``best.pt``."""
        grid = self.data.grid
        if self._validation_slabs is None:
            indices = self._indexed(
                open_sources(
                    self.data, self.store, "validation", pairs=self.settings.validation_pairs
                )
            )
            everywhere = [slab for i in indices for slab in i.negatives]
            self._validation_slabs = [
                slabs
                for i in indices
                for slabs in choose_slabs(i.positives, i.negatives or everywhere, 5)
            ]
            if not self._validation_slabs:
                raise ConfigurationError(f"{self.store}: no positive slab to validate on")
        model = self._new_model(self.model.width, self.settings.seed)
        model.load_state_dict(self.mean.state)
        scores: SlabScores = score_slabs(model, self._validation_slabs, grid)
        row: dict[str, float | int | str] = {
            "step": self.at.step,
            "phase": self.phase.name,
            "minutes": self.at.minutes,
            **asdict(scores),
        }
        self.validation_log.add(row)
        if scores.total > self.at.best:
            self.at.best = scores.total
            save_checkpoint(self.run / "best.pt", self._content())
        return (
            f"step {self.at.step}: AUC {scores.auc:.3f}, of the peak {scores.peak_auc:.3f}, "
            f"hit {scores.hit:.2f}, control {scores.control:.2f} ({scores.slabs} slabs)"
        )


def main(
    *,
    config: ConfigOption,
    data: StoreOption,
    run: RunOption,
    resume: ResumeOption = False,
    start: Annotated[
        str | None, typer.Option(help="Checkpoint to start from, or folder or name of a bundle.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="In place of that of the settings.")] = None,
    without: WithoutOption = None,
    minutes: MinutesOption = None,
    threads: ThreadsOption = 2,
) -> None:
    """Train stage 1."""
    console = Console()
    torch.set_num_threads(threads)
    with reported(console):
        settings = load_settings(config, Stage1Settings)
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        data_settings = load_data_settings(config, settings.data, without)
        run_of_stage1 = Stage1Run(settings, data_settings, data, run, resume=resume, start=start)
        with stopping(minutes) as stop:
            run_of_stage1.train(stop, console)


if __name__ == "__main__":
    typer.run(main)
