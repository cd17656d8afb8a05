"""The PE system (Shi et al.) as a study program.

Batch norms of the encoder are folded into its convolutions; those of the recurrent net stay,
because zero padding comes after them.
"""

import copy
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.models.stage1 import (
    NO_PE,
    PE,
    STAGE_CHANNELS,
    TOTAL_STRIDE,
    BasicBlock,
    SlabClassifier,
)
from export.models.stage2 import SequenceNorm, StudyNet
from export.onnx_export import SLAB, Array, GraphNode, ScanGraph, StudyGraphs
from pe_infer.errors import ConfigurationError


class EncoderGraph(nn.Module):
    """Stage 1 with its batch norms folded into the convolutions."""

    def __init__(self, model: SlabClassifier) -> None:
        """Copy and fold; the argument is not changed."""
        super().__init__()
        folded = copy.deepcopy(model).eval().float()
        folded.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        folded.stem = fuse_conv_bn_eval(folded.stem, folded.stem_norm)
        folded.stem_norm = nn.Identity()  # type: ignore[assignment]
        for block in folded.blocks:
            if not isinstance(block, BasicBlock):
                raise TypeError(type(block))
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
            block.norm1 = block.norm2 = nn.Identity()  # type: ignore[assignment]
            if isinstance(block.shortcut, nn.Sequential):
                conv, norm = block.shortcut
                block.shortcut = fuse_conv_bn_eval(conv, norm)  # type: ignore[arg-type, type-var]
        self.model = folded

    def forward(self, slab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, planes, H, W) to features, raw attention of the PE class and stage-1 logit."""
        features = self.model.encode(slab)
        head = self.model.head
        maps = functional.conv2d(features, head.weight[:, :, None, None], head.bias)
        means = maps.mean(dim=(2, 3))
        logit = means[:, PE : PE + 1] - means[:, NO_PE : NO_PE + 1]
        return features, maps[:, PE : PE + 1], logit


def restored_classifier(encoder: bytes) -> SlabClassifier:
    """Stage 1 of a bundle, with batch norms again: the inverse of `EncoderGraph`.

    In evaluation mode it computes what the graph does. Where a folded convolution came from is
    forgotten: every filter gets the length that it has in a fresh network, since the optimiser's
    steps are relative to it, and its norm undoes that. The running means and variances belong to
    no data before ``export.training.start.measure_norms``.

    Args:
        encoder: The ONNX graph.

    Raises:
        ConfigurationError: It is not a graph of stage 1.
    """
    try:
        graph = onnx.load_from_string(encoder).graph
        weights = {
            entry.name.removesuffix("_half").removeprefix("model."): torch.from_numpy(
                onnx.numpy_helper.to_array(entry).astype(np.float32)
            )
            for entry in graph.initializer
        }
        channels, planes = weights["stem.weight"].shape[:2]
        model = SlabClassifier(planes, channels / STAGE_CHANNELS[0])
        state = model.state_dict()
        (head,) = (w for w in weights.values() if w.shape == (2, model.feature_channels, 1, 1))
        state["head.weight"] = head[:, :, 0, 0]  # the exporter folded the reshaping
        state["head.bias"] = weights["head.bias"]
        for folded, conv, norm in _convolutions(model):
            filters = weights[f"{folded}.weight"]
            length = filters.flatten(1).norm(dim=1).clamp(min=1e-6)
            usual = state[f"{conv}.weight"].flatten(1).norm(dim=1).mean()
            state[f"{conv}.weight"] = filters * (usual / length)[:, None, None, None]
            state[f"{norm}.running_var"].fill_(1.0 - nn.BatchNorm2d(1).eps)
            state[f"{norm}.weight"] = length / usual
            state[f"{norm}.bias"] = weights[f"{folded}.bias"]
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as exc:
        raise ConfigurationError(
            "the encoder of the bundle is not a stage 1 of Shi et al.: its weights have other "
            "names or shapes. Start from a bundle of the same system, or from a checkpoint."
        ) from exc
    return model


def _convolutions(model: SlabClassifier) -> Iterator[tuple[str, str, str]]:
    """Name of every convolution once folded, its own name, and that of the norm behind it."""
    yield "stem", "stem", "stem_norm"
    for index, block in enumerate(model.blocks):
        place = f"blocks.{index}"
        yield f"{place}.conv1", f"{place}.conv1", f"{place}.norm1"
        yield f"{place}.conv2", f"{place}.conv2", f"{place}.norm2"
        if isinstance(block.get_submodule("shortcut"), nn.Sequential):
            yield f"{place}.shortcut", f"{place}.shortcut.0", f"{place}.shortcut.1"


class ProjectionGraph(nn.Module):
    """Norm and pool that end the layer before, and the input projection of a ConvLSTM."""

    def __init__(self, project: nn.Conv2d, norm: SequenceNorm | None, *, pool: bool) -> None:
        """Keep the modules."""
        super().__init__()
        self.norm = norm or nn.Identity()
        self.pool = pool
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 4 * filters, H or H/2, W or W/2)."""
        x = self.norm(x)
        if self.pool:
            x = functional.max_pool2d(x, 2)
        y: Tensor = self.project(x)
        return y


class ScoreGraph(nn.Module):
    """Last norm, pool and dense layer, slab by slab: the mean over slabs commutes with it."""

    def __init__(self, norm: SequenceNorm, dense: nn.Linear) -> None:
        """Keep the modules."""
        super().__init__()
        self.norm = norm
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        """(N, filters, H, W) to (N, 1)."""
        y: Tensor = self.dense(functional.max_pool2d(self.norm(x), 2).flatten(1))
        return y


def encoder_node(stage1: SlabClassifier, size: int) -> GraphNode:
    """The map that turns slabs of ``size`` rows and columns into features; ``stage1`` is copied."""
    return GraphNode(
        name="encoder",
        kind="map",
        module=EncoderGraph(stage1),
        inputs={"slab": SLAB},
        outputs={"features": "features", "attention": "attention", "stage1_logit": "stage1_logit"},
        shapes={"slab": (stage1.in_channels, size, size)},
    )


def study_graphs(stage1: SlabClassifier, stage2: StudyNet, size: int) -> StudyGraphs:
    """The PE system as a study program.

    Args:
        stage1: Encoder, in evaluation mode; copied.
        stage2: Recurrent net over its features, in evaluation mode; copied.
        size: Rows and columns of a slab.
    """
    net = copy.deepcopy(stage2).eval().float()
    first, second = net.filters
    cells = size // TOTAL_STRIDE
    half = cells // 2
    nodes = [encoder_node(stage1, size)]

    def recurrent(
        layer: str, source: str, norm: SequenceNorm | None, channels: int, side: int, *, pool: bool
    ) -> None:
        lstm = getattr(net, layer)
        filters, out = lstm.filters, side // 2 if pool else side
        nodes.append(
            GraphNode(
                name=f"project_{layer}",
                kind="map",
                module=ProjectionGraph(lstm.project, norm, pool=pool).eval(),
                inputs={"x": source},
                outputs={"y": f"gates_{layer}"},
                shapes={"x": (channels, side, side)},
            )
        )
        state = (filters, out, out)
        nodes.append(
            GraphNode(
                name=layer,
                kind="scan",
                module=ScanGraph(lstm.cell).eval(),
                inputs={"x": f"gates_{layer}"},
                outputs={"y": f"hidden_{layer}"},
                shapes={"x": (4 * filters, out, out), "h": state, "c": state},
                direction="down" if lstm.downwards else "up",
                states={"h": "h_next", "c": "c_next"},
                precision="mixed",
            )
        )

    recurrent("down1", "features", None, stage1.feature_channels, cells, pool=False)
    recurrent("up1", "hidden_down1", net.norm_down1, first, cells, pool=False)
    recurrent("down2", "hidden_up1", net.norm_up1, first, cells, pool=True)
    recurrent("up2", "hidden_down2", net.norm_down2, second, half, pool=False)
    nodes.append(
        GraphNode(
            name="score",
            kind="map",
            module=ScoreGraph(net.norm_up2, net.dense).eval(),
            inputs={"x": "hidden_up2"},
            outputs={"y": "score"},
            shapes={"x": (second, half, half)},
        )
    )

    @torch.inference_mode()
    def reference(slabs: Array) -> Array:
        features = torch.cat([stage1.encode(torch.from_numpy(s[None])) for s in slabs])
        answer: Array = stage2(features[None]).numpy()
        return answer

    return StudyGraphs(
        nodes=nodes,
        means={"study_logit": "score"},
        outputs={
            "study_logit": "study_logit",
            "slab_logit": "stage1_logit",
            "attention": "attention",
        },
        answer="study_logit",
        reference=reference,
    )
