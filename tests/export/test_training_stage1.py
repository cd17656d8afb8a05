"""Stage 1: a resumed run is the run that was never stopped; growing changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from export.models import SlabClassifier, widened
from export.training.checkpoint import load_checkpoint
from export.training.config import DataSettings, Stage1Settings
from export.training.stage1 import Stage1Run, learning_rate
from pe_infer.errors import ConfigurationError, InputError

SETTINGS = Stage1Settings.model_validate(
    {
        "seed": 5,
        "data": "unused.toml",
        "refresh_steps": 4,
        "validation_pairs": 2,
        "phase": [
            {"name": "a", "width": 0.0625, "crop": 32, "batch": 4, "steps": 6, "lr": 1e-3},
            {"name": "b", "width": 0.125, "crop": 64, "batch": 4, "steps": 4, "lr": 1e-3},
        ],
    }
)


def stop_at(step: int, run: list[Stage1Run]) -> Callable[[], bool]:
    return lambda: bool(run) and run[0].at.step >= step


def train(store: Path, data: DataSettings, folder: Path, *stops: int) -> Stage1Run:
    """Train to the last stop, interrupted at the others."""
    console = Console(quiet=True)
    for index, stop in enumerate(stops):
        run = Stage1Run(SETTINGS, data, store, folder, resume=index > 0)
        run.train(stop_at(stop, [run]), console)
    return run


def test_resumed_run_equals_an_uninterrupted_one(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    straight = train(store, data_settings, tmp_path / "straight", 99)
    stopped = train(store, data_settings, tmp_path / "stopped", 3, 6, 8, 99)
    assert straight.finished
    assert straight.at.step == stopped.at.step == 10
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name
    for name, value in straight.mean.state.items():
        assert torch.equal(value, stopped.mean.state[name]), name
    logs = [
        (tmp_path / f / "validation.csv").read_text().splitlines() for f in ("straight", "stopped")
    ]
    assert [row.rsplit(",", 1)[0] for row in logs[0]] == [row.rsplit(",", 1)[0] for row in logs[1]]


def test_checkpoint_needs_an_explicit_resume(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    train(store, data_settings, tmp_path, 1)
    with pytest.raises(ConfigurationError, match="--resume"):
        Stage1Run(SETTINGS, data_settings, store, tmp_path, resume=False)
    with pytest.raises(ConfigurationError, match="nothing to resume"):
        Stage1Run(SETTINGS, data_settings, store, tmp_path / "new", resume=True)
    with pytest.raises(InputError, match="expected format 1, stage 2"):
        load_checkpoint(tmp_path / "checkpoint.pt", stage=2)


def test_widened_network_computes_the_same() -> None:
    torch.manual_seed(0)
    narrow, wide = SlabClassifier(5, 0.125), SlabClassifier(5, 0.25)
    slabs = torch.rand(3, 5, 64, 64)
    narrow(slabs)  # moves the running means of the norms away from their start
    wide.load_state_dict(widened(narrow.state_dict(), wide.state_dict()))
    for mode in (True, False):
        one, other = narrow.train(mode)(slabs), wide.train(mode)(slabs)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)


def test_learning_rate_warms_up_and_falls() -> None:
    phase = SETTINGS.phase[0].model_copy(update={"warmup_steps": 2, "final_lr": 1e-5, "lr": 1e-2})
    rates = [learning_rate(phase, step) for step in range(phase.steps + 1)]
    assert rates[0] == pytest.approx(5e-3)
    assert rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)
