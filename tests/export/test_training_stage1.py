"""Stage 1: a resumed run is the run that was never stopped; growing changes nothing."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from rich.console import Console

from export.command_line import stopping
from export.models import SlabClassifier, narrowed, widened
from export.training.checkpoint import MovingAverage, load_checkpoint
from export.training.config import DataSettings, Stage1Settings
from export.training.schedule import Stopwatch, learning_rate
from export.training.stage1 import Stage1Run
from export.training.start import measure_norms
from pe_infer.bundle import Bundle
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
    back = narrowed(wide.state_dict(), narrow.state_dict())
    for name, weights in narrow.state_dict().items():
        torch.testing.assert_close(
            back[name], wide.state_dict()[name][tuple(map(slice, weights.shape))]
        )


def test_a_run_can_start_from_the_mean_weights_of_a_narrower_one(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    narrow = train(store, data_settings, tmp_path / "narrow", 3)
    wide = SETTINGS.model_copy(update={"phase": SETTINGS.phase[1:]})
    start = tmp_path / "narrow" / "checkpoint.pt"
    run = Stage1Run(wide, data_settings, store, tmp_path / "wide", resume=False, start=str(start))
    assert run.at.step == 0
    for name, old in narrow.mean.state.items():
        new = run.model.state_dict()[name]
        torch.testing.assert_close(new[tuple(slice(n) for n in old.shape)], old)
        assert torch.equal(run.mean.state[name], new)
    run.train(lambda: True, Console(quiet=True))  # no step, a checkpoint
    content = load_checkpoint(tmp_path / "wide" / "checkpoint.pt", stage=1)
    assert content["start"]["progression"]["step"] == 3
    grown = tmp_path / "wide" / "checkpoint.pt"
    back = Stage1Run(
        SETTINGS, data_settings, store, tmp_path / "no", resume=False, start=str(grown)
    )
    for name, old in narrow.mean.state.items():  # the first channels are what was grown
        torch.testing.assert_close(back.model.state_dict()[name], old)
    back.train(lambda: True, Console(quiet=True))


def test_a_run_can_start_from_a_bundle(
    store: Path, data_settings: DataSettings, bundle: Path, tmp_path: Path
) -> None:
    loaded = Bundle.load(bundle)
    graph = onnxruntime.InferenceSession(loaded.files["encoder.onnx"])
    run = Stage1Run(SETTINGS, data_settings, store, tmp_path, resume=False, start=str(bundle))
    slabs = torch.rand(3, 5, 64, 64)
    features, attention, logit = graph.run(None, {"slab": slabs.numpy()})
    with torch.inference_mode():
        begun = run.model.eval()(slabs)
    torch.testing.assert_close(begun.features, torch.from_numpy(features), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(begun.attention, torch.from_numpy(attention), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(begun.stage1_logit, torch.from_numpy(logit), atol=1e-4, rtol=1e-4)
    assert run.start
    assert run.start["bundle"] == f"pe {loaded.manifest.version}"
    assert run.start["progression"] == loaded.manifest.training["stage1"]["progression"]
    run.train(stop_at(1, [run]), Console(quiet=True))
    checkpoint = tmp_path / "checkpoint.pt"
    assert load_checkpoint(checkpoint, stage=1)["start"] == run.start
    # What starts from that checkpoint knows what the bundle has seen.
    values = data_settings.model_dump()
    values["train"], values["test"] = values["validation"], values["train"]
    values["validation"] = {"first_seed": 500, "pairs": 2}
    later = DataSettings.model_validate(values)
    seen = data_settings.model_copy(update={"train": later.train, "validation": later.validation})
    content = torch.load(checkpoint)
    torch.save({**content, "data": seen.model_dump(mode="json")}, checkpoint)
    with pytest.raises(ConfigurationError, match="for test: these patients would be known"):
        Stage1Run(SETTINGS, later, store, tmp_path / "later", resume=False, start=str(checkpoint))


def test_norms_measured_on_slabs_agree_with_them_in_training() -> None:
    torch.manual_seed(0)
    model = SlabClassifier(5, 0.25)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_mean, -1.0, 1.0)
            torch.nn.init.uniform_(module.running_var, 0.2, 2.0)
    slabs = torch.rand(6, 5, 64, 64)
    with torch.inference_mode():
        before = model.eval()(slabs).attention
        apart = copy.deepcopy(model).train()(slabs).attention
    measure_norms(model.train(), slabs)
    assert model.training
    with torch.inference_mode():
        together = model.train()(slabs).attention
        after = model.eval()(slabs).attention
    torch.testing.assert_close(together, before, atol=0.05, rtol=0.0)  # batches: biased variance
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert float((apart - before).abs().max()) > 0.5


def test_what_is_no_start_is_refused(
    store: Path, data_settings: DataSettings, bundle: Path, tmp_path: Path
) -> None:
    def start(path: str, system: str = "shi") -> None:
        settings = SETTINGS.model_copy(update={"system": system, "phase": SETTINGS.phase[:1]})
        Stage1Run(settings, data_settings, store, tmp_path / "run", resume=False, start=path)

    with pytest.raises(InputError, match="no such checkpoint, and no such bundle"):
        start(str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="RADnet cannot start from a bundle"):
        start(str(bundle), "radnet")
    with pytest.raises(ConfigurationError, match=r"Shi et al.*bundle of the same system"):
        start("ich")
    values = data_settings.model_dump()
    swapped = DataSettings.model_validate(
        {**values, "train": values["validation"], "validation": values["train"]}
    )
    with pytest.raises(ConfigurationError, match="for validation: these patients would be known"):
        Stage1Run(SETTINGS, swapped, store, tmp_path / "run", resume=False, start=str(bundle))
    document = json.loads((bundle / "bundle.json").read_text())
    copy = shutil.copytree(bundle, tmp_path / "copy")
    del document["training"]["seeds"]
    (copy / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match="does not say how its 'encoder' was trained"):
        start(str(copy))


def test_patients_held_back_now_may_not_have_been_trained_on(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    train(store, data_settings, tmp_path / "one", 1)
    checkpoint = tmp_path / "one" / "checkpoint.pt"
    values = data_settings.model_dump()
    swapped = DataSettings.model_validate(
        {**values, "train": values["validation"], "validation": values["train"]}
    )
    with pytest.raises(ConfigurationError, match="holds back 0 to 2 for validation"):
        Stage1Run(SETTINGS, swapped, store, tmp_path / "two", resume=False, start=str(checkpoint))
    with pytest.raises(ConfigurationError, match="holds back 0 to 2 for validation"):
        Stage1Run(SETTINGS, swapped, store, tmp_path / "one", resume=True)
    values["grid"]["spacing_mm"] = 3.0
    finer = DataSettings.model_validate(values)
    with pytest.raises(ConfigurationError, match="grid"):
        Stage1Run(SETTINGS, finer, store, tmp_path / "two", resume=False, start=str(checkpoint))


def test_settings_of_another_run_cannot_resume_it(
    store: Path, data_settings: DataSettings, tmp_path: Path
) -> None:
    train(store, data_settings, tmp_path, 8)
    shorter = SETTINGS.model_copy(update={"phase": SETTINGS.phase[:1]})
    with pytest.raises(ConfigurationError, match="settings of the run"):
        Stage1Run(shorter, data_settings, store, tmp_path, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_an_end_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stopping(None) as stop:
        assert not stop()
        assert signal.getsignal(number) is not before
        os.kill(os.getpid(), number)
        assert stop()
        assert signal.getsignal(number) is before  # a second one is not held up
    with stopping(None) as stop:
        assert not stop()
    assert signal.getsignal(number) is before
    with stopping(0.0) as stop:
        assert stop()


def test_mean_weights_follow_fast_at_first() -> None:
    module = torch.nn.BatchNorm1d(1)
    mean = MovingAverage(module, 0.9)
    module.weight.data.fill_(3.0)
    module.num_batches_tracked.fill_(7)
    mean.update(module)
    decay = 2 / 11  # (1 + updates) / (10 + updates)
    assert float(mean.state["weight"]) == pytest.approx(decay * 1.0 + (1 - decay) * 3.0)
    assert int(mean.state["num_batches_tracked"]) == 7
    for _ in range(500):
        mean.update(module)
    assert float(mean.state["weight"]) == pytest.approx(3.0)


def test_minutes_add_up_over_the_parts_of_a_run() -> None:
    watch = Stopwatch(7.0)
    assert 7.0 <= watch.minutes < 7.1
    assert watch.save_due(0.0)
    assert not watch.save_due(1.0)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [
        learning_rate(step, steps=6, highest=1e-2, lowest=1e-5, warmup_steps=2) for step in range(7)
    ]
    assert rates[0] == pytest.approx(5e-3)
    assert rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)
