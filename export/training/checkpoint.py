"""Checkpoints that are replaced atomically, an exponential mean of the weights, a CSV log."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pe_infer.errors import Code, ConfigurationError, InputError

FORMAT = 1


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; a reader sees the old file or the new one, never half of one."""
    draft = path.with_suffix(".draft")
    torch.save({"format": FORMAT, **content}, draft)
    draft.replace(path)


def load_checkpoint(path: Path, *, stage: int | None = None) -> dict[str, Any]:
    """Read a checkpoint; its ``stage`` says of which of the two programs.

    Tensors and plain values only: nothing in the file is executed.

    Args:
        path: The file.
        stage: The stage that is expected; ``None`` takes either.

    Raises:
        InputError: The file is absent, is no checkpoint of this program, or belongs to the other
            stage.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint", code=Code.INVALID_ARGUMENT)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:
        raise InputError(
            f"{path}: not a checkpoint of this program: {exc}", code=Code.INVALID_ARGUMENT
        ) from exc
    wanted = (1, 2) if stage is None else (stage,)
    if content.get("format") != FORMAT or content.get("stage") not in wanted:
        raise InputError(
            f"{path}: format {content.get('format')}, stage {content.get('stage')}, "
            f"expected format {FORMAT}, stage {' or '.join(map(str, wanted))}",
            code=Code.INVALID_ARGUMENT,
        )
    return content


def unfinished(path: Path, content: Mapping[str, Any]) -> str | None:
    """A line about a checkpoint from before the end of its run; ``None`` of one from its end.

    Args:
        path: The file.
        content: Of the checkpoint.
    """
    at, settings = content["progression"], content["settings"]
    if content["stage"] == 1:
        done, planned = at["step"], sum(phase["steps"] for phase in settings["phase"])
        unit = "steps"
    else:
        done, planned, unit = at["epoch"], settings["epochs"], "epochs"
    if done >= planned:
        return None
    return (
        f"warning: {path} is of step {at['step']}, {done} of {planned} {unit} of its run: finish "
        "it with --resume, unless it is the best of a run that is finished"
    )


class MovingAverage:
    """Exponential mean of a module's weights and buffers; young means follow faster.

    Attributes:
        state: Name to mean tensor; integer buffers are copied.
        updates: How many times the mean was updated.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start at the weights of the module; ``decay`` is what remains of the mean per update."""
        self.decay = decay
        self.updates = 0
        self.state: dict[str, Tensor] = {
            k: v.detach().clone() for k, v in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights of the module."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            mean = self.state[name]
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1.0 - decay)
            else:
                mean.copy_(value)


class CsvLog:
    """Appends rows to a CSV file; rows after the step a run resumes from are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], *, resume_step: int | None) -> None:
        """Open the file, new or cut back to ``resume_step``; the first column is the step."""
        rows: list[list[str]] = []
        if resume_step is not None and path.exists():
            with path.open(newline="") as file:
                rows = [
                    r for r in csv.reader(file) if r and r[0].isdigit() and int(r[0]) <= resume_step
                ]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(columns)
        self._writer.writerows(rows)
        self._columns = columns
        self._file.flush()

    def add(self, values: Mapping[str, float | int | str]) -> None:
        """Append one row; floats with five digits."""
        row = [values.get(name, "") for name in self._columns]
        self._writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in row])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def prepare_run(run: Path, *, resume: bool) -> Path:
    """Create the folder of a run, and say where its checkpoint lies.

    Raises:
        ConfigurationError: The run has a checkpoint and ``resume`` was not asked for, or the other
            way round.
    """
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise ConfigurationError(
            f"{checkpoint} exists: pass --resume to go on, or name another --run"
        )
    if resume and not checkpoint.exists():
        raise ConfigurationError(f"{checkpoint} does not exist: there is nothing to resume")
    return checkpoint
