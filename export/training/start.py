"""Where a first stage starts from: a checkpoint, or a bundle whose checkpoints are not at hand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.models.base import SlabNetwork
from export.systems.base import System
from export.systems.registry import refuse_other_system
from export.training.checkpoint import load_checkpoint
from export.training.config import DataSettings, Seen
from pe_infer.bundle import Bundle
from pe_infer.errors import BundleError, Code, ConfigurationError, InputError

ENCODER = "encoder"  # the node of a bundle that is its first stage


@dataclass(frozen=True)
class Start:
    """Weights to start from, and where they come from.

    Attributes:
        weights: State of the network.
        width: Of the network.
        seen: What it was trained on.
        origin: For the next checkpoint, and at last the model card.
        measured: Whether the norms know the means and variances of some data.
    """

    weights: dict[str, Tensor]
    width: float
    seen: Seen
    origin: dict[str, Any]
    measured: bool


def read_start(path: str, system: System) -> Start:
    """Read a checkpoint of stage 1, or a bundle.

    Args:
        path: Checkpoint, or folder or name of a bundle.
        system: That the weights have to be of.

    Raises:
        BundleError: The bundle is damaged.
        ConfigurationError: It is of another system, or of one whose bundles cannot be trained on.
        InputError: It is neither.
    """
    if Path(path).is_file():
        return _of_checkpoint(Path(path), system)
    try:
        bundle = Bundle.load(path)
    except BundleError as exc:
        if exc.code is not Code.BUNDLE_NOT_FOUND:
            raise
        raise InputError(
            f"{path}: no such checkpoint, and no such bundle", code=Code.INVALID_ARGUMENT
        ) from exc
    return _of_bundle(bundle, system)


def seen_in_all(content: Mapping[str, Any]) -> Seen:
    """What the training of a checkpoint has seen, and what it started from had.

    Args:
        content: Of the checkpoint, of either stage. Those of older versions do not say all that
            they, or what they started from, have seen.
    """
    own = DataSettings.model_validate(content["data"]).seen
    start: Mapping[str, Any] | None = content.get("start")
    earlier: Mapping[str, Any] = (start or {}).get("seen", {})
    collections = earlier.get("collections", {})
    return replace(
        own,
        seeds=[*own.seeds, *_ranges(earlier.get("seeds", ()))],
        collections={name: (a, b) for name, (a, b) in collections.items()} | {**own.collections},
        validated=[*own.validated, *_ranges(earlier.get("validated", ()))],
        backgrounds={**earlier.get("backgrounds", {}), **own.backgrounds},
        all_backgrounds="backgrounds" in content
        and (start is None or earlier.get("all_backgrounds", False)),
    )


def _ranges(bounds: Iterable[tuple[int, int]]) -> list[range]:
    return [range(first, stop) for first, stop in bounds]


def _told(seen: Seen) -> dict[str, Any]:
    return {
        "seeds": [[seeds.start, seeds.stop] for seeds in seen.seeds],
        "collections": {name: list(split) for name, split in seen.collections.items()},
        "validated": [[seeds.start, seeds.stop] for seeds in seen.validated],
        "backgrounds": dict(seen.backgrounds),
        "all_backgrounds": seen.all_backgrounds,
    }


def _of_checkpoint(path: Path, system: System) -> Start:
    content = load_checkpoint(path, stage=1)
    refuse_other_system(content, system, path)
    start = content.get("start")
    seen = seen_in_all(content)
    return Start(
        weights=content["mean"],
        width=content["width"],
        seen=seen,
        origin={
            "data": content["data"]["name"],
            "progression": content["progression"],
            "width": content["width"],
            "seen": _told(seen),
            "start": start,
        },
        measured=True,
    )


def _of_bundle(bundle: Bundle, system: System) -> Start:
    manifest = bundle.manifest
    graphs = [n.graph for n in manifest.nodes if n.name == ENCODER and n.kind == "map"]
    if not graphs or not {"data", "seeds", "stage1"} <= manifest.training.keys():
        raise ConfigurationError(
            f"{bundle.folder}: bundle {manifest.name!r} does not say how its {ENCODER!r} was "
            "trained: start from a checkpoint"
        )
    model = system.restored(bundle.files[graphs[0]])
    training: Mapping[str, Any] = manifest.training

    def seeds(purpose: str) -> list[range]:
        return [
            range(first, first + pairs)
            for name, (first, pairs) in training["seeds"].items()
            if name.startswith(purpose)
        ]

    seen = Seen(
        name=training["data"],
        grid=manifest.grid,
        seeds=seeds("training"),
        collections={
            name: (split["validation"], split["test"])
            for name, split in training.get("collections", {}).items()
        },
        validated=seeds("validation"),
        backgrounds=training["backgrounds"] if "all_backgrounds" in training else {},
        all_backgrounds=training.get("all_backgrounds", False),
    )
    return Start(
        weights=model.state_dict(),
        width=model.width,
        seen=seen,
        origin={
            "bundle": f"{manifest.name} {manifest.version}",
            "data": training["data"],
            "progression": training["stage1"]["progression"],
            "width": model.width,
            "seen": _told(seen),
            "start": training.get("stage1_start"),
        },
        measured=False,
    )


@torch.no_grad()
def measure_norms(model: SlabNetwork, slabs: Tensor) -> None:
    """Give batch norms the running means and variances of some slabs.

    In evaluation mode the network computes what it did before; in training mode, where norms take
    the means and variances of their batch, it now comes close to that.

    Args:
        model: Changed in place.
        slabs: (N, channels, H, W) in [0, 1].
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        if not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(type(norm))
        if norm.running_mean is None or norm.running_var is None:
            raise TypeError("a norm without running means")
        variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        before = (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(norm.weight * (mean - norm.running_mean) / before)
        norm.weight.mul_((variance + norm.eps).sqrt() / before)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    hooks = [
        module.register_forward_pre_hook(measure)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    training = model.training
    model.eval()(slabs)
    model.train(training)
    for hook in hooks:
        hook.remove()
