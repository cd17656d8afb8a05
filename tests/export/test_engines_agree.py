"""What the product computes, engine by engine, against the PyTorch networks of the paper.

The networks are rebuilt from the weights that the bundle's graphs hold. How the graphs are wired
together is not: that is `StudyNet.forward` here, and the manifest there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.bundle import DEFAULT_CONFIG, BundleSettings, load_trained, make_bundle
from export.golden import golden_slabs
from export.models import SlabClassifier, StudyNet
from export.models.stage1 import STAGE_CHANNELS, TOTAL_STRIDE
from export.systems.shi_graphs import EncoderGraph
from export.training.config import load_settings
from pe_infer.bundle import Bundle
from pe_infer.compiled import CompiledProgram
from pe_infer.engines.base import RUNTIMES, EngineOptions, installed, select
from pe_infer.executor import StudyOutputs

LENGTHS = (1, 5, 13)
LOGIT_TOLERANCE = 1e-3  # float32
PROBABILITY_TOLERANCE = 0.01  # an engine's own precision
LAYERS = ("down1", "up1", "down2", "up2")
READERS = ("project_up1", "project_down2", "project_up2", "score")  # of the norm behind a layer

Slabs = NDArray[np.float32]
Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Rebuilt:
    """The two networks with the weights of a bundle."""

    encoder: EncoderGraph
    study: StudyNet

    @torch.inference_mode()
    def __call__(self, slabs: Slabs, lengths: tuple[int, ...]) -> "Expected":
        """Float32 outputs of slabs (T, planes, rows, cols) and of studies of their first ones."""
        outputs = [self.encoder(torch.from_numpy(s[None])) for s in slabs]
        features, attention, slab_logits = (
            torch.cat(parts) for parts in zip(*outputs, strict=True)
        )
        return Expected(
            attention=attention.numpy(),
            slab_logits=slab_logits.numpy(),
            logits={n: float(self.study(features[None, :n])) for n in lengths},
        )


@dataclass(frozen=True)
class Expected:
    """What PyTorch says: (T, 1, h, w) raw maps, (T, 1) slab logits, length to study logit."""

    attention: Slabs
    slab_logits: Slabs
    logits: dict[int, float]


def weights_of(path: Path) -> dict[str, Tensor]:
    """Initialisers of a graph by the names they have in PyTorch, as float32."""
    return {
        entry.name.removesuffix("_half"): torch.from_numpy(
            onnx.numpy_helper.to_array(entry).astype(np.float32)
        )
        for entry in onnx.load(path).graph.initializer
    }


def rebuilt(bundle: Bundle) -> Rebuilt:
    """PyTorch networks with the weights that a bundle's graphs hold."""
    grid = bundle.manifest.grid
    weights = weights_of(bundle.folder / "encoder.onnx")
    width = weights["model.stem.weight"].shape[0] / STAGE_CHANNELS[0]
    encoder = EncoderGraph(SlabClassifier(grid.planes_per_slab, width))
    (head,) = (w for w in weights.values() if w.shape == (2, encoder.model.feature_channels, 1, 1))
    weights["model.head.weight"] = head[:, :, 0, 0]  # the exporter folded the reshaping
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    state: dict[str, Tensor] = {}
    for layer, reader in zip(LAYERS, READERS, strict=True):
        project = weights_of(bundle.folder / f"project_{layer}.onnx")
        state |= {f"{layer}.{n}": v for n, v in project.items() if n.startswith("project.")}
        scan = weights_of(bundle.folder / f"{layer}.onnx")
        state[f"{layer}.cell.recurrent.weight"] = scan["cell.recurrent.weight"]
        norm = weights_of(bundle.folder / f"{reader}.onnx")
        state |= {f"norm_{layer}.{n[5:]}": v for n, v in norm.items() if n.startswith("norm.")}
    score = weights_of(bundle.folder / "score.onnx")
    state |= {name: score[name] for name in ("dense.weight", "dense.bias")}
    first, second = (state[f"{layer}.cell.recurrent.weight"].shape[1] for layer in LAYERS[1::2])
    study = StudyNet(encoder.model.feature_channels, (first, second), grid.rows // TOTAL_STRIDE)
    missing, unknown = study.load_state_dict(state, strict=False)
    assert not unknown
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return Rebuilt(encoder.eval(), study.eval())


def study_of(bundle: Bundle, length: int) -> Slabs:
    """(length, planes, rows, cols) in [0, 1]: golden slabs, no two of them equal."""
    grid = bundle.manifest.grid
    golden = golden_slabs(grid.planes_per_slab, grid.rows, grid.cols).astype(np.float32) / 255
    shifts = np.random.default_rng(0).integers(-grid.rows // 8, grid.rows // 8, (length, 2))
    slabs = [np.roll(golden[i % len(golden)], s, (1, 2)) for i, s in enumerate(shifts.tolist())]
    return np.ascontiguousarray(np.stack(slabs))


def executed(compiled: CompiledProgram, slabs: Slabs, arrival: Direction) -> StudyOutputs:
    """Outputs of slabs that arrive one by one."""
    executor = compiled.executor(arrival)
    for index in range(len(slabs)) if arrival == "up" else reversed(range(len(slabs))):
        executor.push([(5000 * index, slabs[index])])
    return executor.finish()


Compile = Callable[[Bundle, str], CompiledProgram]


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def compiled_on(request: pytest.FixtureRequest) -> Compile:
    """Compiles a bundle on one engine, in ``"float32"`` or ``"default"`` precision."""
    if request.param not in installed():
        pytest.skip(f"{request.param} is not installed")

    def compile_bundle(bundle: Bundle, precision: Literal["default", "float32"]) -> CompiledProgram:
        options = EngineOptions(precision=precision, threads=2)
        return CompiledProgram.compile(bundle, select(request.param, options))

    return compile_bundle


@pytest.fixture(scope="module")
def small(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small bundle whose recurrent weights are loud enough for every wrong turn to be heard."""
    trained = load_trained(checkpoints)
    torch.manual_seed(0)
    net = trained.stage2
    for layer in (net.down1, net.up1, net.down2, net.up2):
        torch.nn.init.normal_(layer.project.weight, std=0.3)
        torch.nn.init.normal_(layer.cell.recurrent.weight, std=0.3)
    torch.nn.init.normal_(net.dense.weight, std=0.5)
    settings = load_settings(DEFAULT_CONFIG, BundleSettings)
    return make_bundle(settings, trained, tmp_path_factory.mktemp("small"))[0]


def test_order_and_length_matter_to_the_small_bundle(small: Bundle) -> None:
    slabs, networks = study_of(small, 13), rebuilt(small)
    forwards, backwards = (networks(s, LENGTHS).logits for s in (slabs, slabs[::-1].copy()))
    assert abs(forwards[13] - backwards[13]) > 20 * LOGIT_TOLERANCE, (forwards, backwards)
    assert np.ptp(list(forwards.values())) > 20 * LOGIT_TOLERANCE


@pytest.mark.parametrize("arrival", ["down", "up"])
def test_a_small_bundle_computes_the_networks(
    small: Bundle, compiled_on: Compile, arrival: Direction
) -> None:
    check(small, compiled_on, arrival, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("arrival", ["down", "up"])
def test_the_shipped_bundle_computes_the_networks(compiled_on: Compile, arrival: Direction) -> None:
    check(Bundle.load("pe"), compiled_on, arrival, (5,))


def check(
    bundle: Bundle, compiled_on: Compile, arrival: Direction, lengths: tuple[int, ...]
) -> None:
    """Both precisions against PyTorch in float32, at several lengths."""
    slabs = study_of(bundle, max(lengths))
    expected = rebuilt(bundle)(slabs, lengths)
    exact, own = compiled_on(bundle, "float32"), compiled_on(bundle, "default")
    assert set(exact.info.precision.values()) == {"float32"}
    calibrated = bundle.manifest.calibration.probability
    for length, logit in expected.logits.items():
        part = slabs[:length]
        outputs = executed(exact, part, arrival)
        assert outputs.study["study_logit"] == pytest.approx(logit, abs=LOGIT_TOLERANCE)
        for name, values in (
            ("attention", expected.attention),
            ("slab_logit", expected.slab_logits),
        ):
            np.testing.assert_allclose(
                outputs.slabs[name], values[:length], rtol=1e-3, atol=LOGIT_TOLERANCE
            )
        found = float(executed(own, part, arrival).study["study_logit"][0])
        assert calibrated(found) == pytest.approx(calibrated(logit), abs=PROBABILITY_TOLERANCE)
