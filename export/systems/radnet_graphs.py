"""RADnet (Grewal et al.) as a study program.

Norms stay as they are: between a norm and the next convolution there is a ReLU. What brings
features to a common scale is folded into the projections.
"""

import copy

import torch
from torch import Tensor, nn

from export.models.radnet import Lstm, SliceClassifier, SliceContext
from export.onnx_export import SLAB, Array, GraphNode, ScanGraph, StudyGraphs


class EncoderGraph(nn.Module):
    """The slice classifier."""

    def __init__(self, model: SliceClassifier) -> None:
        """Copy; the argument is not changed."""
        super().__init__()
        self.model = copy.deepcopy(model).eval().float()
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, slab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, channels, H, W) to pooled features, attention and the slice's own logit."""
        output = self.model.conclude(*self.model.trunk(slab))
        return output.features, output.attention, output.logits


class ScoreGraph(nn.Module):
    """Hidden states of both directions and the slice's own logit to its logit."""

    def __init__(self, head: nn.Linear) -> None:
        """Keep the module."""
        super().__init__()
        self.head = head

    def forward(self, down: Tensor, up: Tensor, own: Tensor) -> Tensor:
        """(N, hidden) twice and (N, 1) to (N, 1)."""
        context: Tensor = self.head(torch.cat([down, up], dim=1))
        return own + context


def encoder_node(stage1: SliceClassifier, size: int) -> GraphNode:
    """The map that turns slices of ``size`` rows and columns into features; copies ``stage1``."""
    return GraphNode(
        name="encoder",
        kind="map",
        module=EncoderGraph(stage1).eval(),
        inputs={"slab": SLAB},
        outputs={"features": "features", "attention": "attention", "logit": "stage1_logit"},
        shapes={"slab": (stage1.in_channels, size, size)},
    )


def study_graphs(stage1: SliceClassifier, stage2: SliceContext, size: int) -> StudyGraphs:
    """RADnet as a study program.

    Args:
        stage1: Slice classifier, in evaluation mode; copied.
        stage2: Recurrent net over its features, in evaluation mode; copied.
        size: Rows and columns of a slice.
    """
    net = copy.deepcopy(stage2).eval().float()
    nodes = [encoder_node(stage1, size)]
    state = (net.hidden,)
    for direction, layer in (("down", net.down), ("up", net.up)):
        nodes += [
            GraphNode(
                name=f"project_{direction}",
                kind="map",
                module=_scaled_projection(net, layer),
                inputs={"x": "features"},
                outputs={"y": f"gates_{direction}"},
                shapes={"x": (net.in_features,)},
            ),
            GraphNode(
                name=direction,
                kind="scan",
                module=ScanGraph(layer.cell).eval(),
                inputs={"x": f"gates_{direction}"},
                outputs={"y": f"hidden_{direction}"},
                shapes={"x": (4 * net.hidden,), "h": state, "c": state},
                direction="down" if layer.downwards else "up",
                states={"h": "h_next", "c": "c_next"},
                precision="mixed",
            ),
        ]
    nodes.append(
        GraphNode(
            name="score",
            kind="map",
            module=ScoreGraph(net.head).eval(),
            inputs={"down": "hidden_down", "up": "hidden_up", "own": "stage1_logit"},
            outputs={"y": "slab_logit"},
            shapes={"down": state, "up": state, "own": (1,)},
        )
    )

    @torch.inference_mode()
    def reference(slabs: Array) -> Array:
        outputs = [stage1(torch.from_numpy(s[None])) for s in slabs]
        features, own = (
            torch.cat([getattr(o, n) for o in outputs]) for n in ("features", "logits")
        )
        answer: Array = stage2(features[None], own[None, :, 0])[0, :, None].numpy()
        return answer

    return StudyGraphs(
        nodes=nodes,
        outputs={
            "slab_logit": "slab_logit",
            "online_logit": "stage1_logit",
            "attention": "attention",
        },
        answer="slab_logit",
        reference=reference,
    )


@torch.no_grad()
def _scaled_projection(net: SliceContext, layer: Lstm) -> nn.Linear:
    """The projection of a layer, which reads features as they come from the encoder."""
    folded = copy.deepcopy(layer.project)
    folded.weight.mul_(net.get_buffer("gain"))
    folded.bias.sub_(folded.weight @ net.get_buffer("offset"))
    return folded.eval()
