"""Stage 1: slab classifier with a class activation map (Shi et al., MIDL 2020).

Where each choice comes from: [slides] = the authors' conference slides, [ours] = not stated there.

- Input: one slab of 5 planes of 384 x 384 as channels, in [0, 1] [slides; resampled to 0.75 mm:
  ours].
- Backbone: ResNet-18 with a 3x3 stem of 64 channels and blocks of 64, 128, 256, 512, stride 2 in
  the last three [slides]; the stem has stride 2 and there is no max pool, so that the last feature
  map is 24 x 24 [ours].
- Head: average pool, dense layer to 2 classes (no PE, PE) [slides].
- Attention: class activation map of the PE class on the last feature map [slides: "from the last
  conv output"]; the bias of the class is included, so that the mean of the map is the logit of the
  class [ours].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.models.base import SlabNetwork

STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)
BLOCKS_PER_STAGE = 2
TOTAL_STRIDE = 16
NO_PE, PE = 0, 1
INPUT_MEAN = 0.35  # slabs in [0, 1] are centred in the graph: x -> (x - mean) / deviation [ours]
INPUT_DEVIATION = 0.3


class Stage1Output(NamedTuple):
    """What stage 1 says of N slabs.

    Attributes:
        features: (N, C, H/16, W/16) last feature map, not negative; C = 512 at width 1.
        attention: (N, 1, H/16, W/16) float32 raw class activation map of the PE class.
        logits: (N, 2) float32, mean of the class activation maps of (no PE, PE).
    """

    features: Tensor
    attention: Tensor
    logits: Tensor

    @property
    def stage1_logit(self) -> Tensor:
        """(N, 1) logit of PE minus logit of no PE: its sigmoid is the softmax probability of PE."""
        return self.logits[:, PE : PE + 1] - self.logits[:, NO_PE : NO_PE + 1]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, the block of ResNet-18)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Create the layers; the shortcut is a 1x1 convolution where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class SlabClassifier(SlabNetwork):
    """ResNet-18 at total stride 16 with a class activation map.

    Args:
        in_channels: Planes of a slab times windows.
        width: Factor on every channel count; 1 is the published network, less is for tests and for
            growing.
    """

    def __init__(self, in_channels: int = 5, width: float = 1.0) -> None:
        """Create the layers with He initialisation; the second norm of a block starts small."""
        super().__init__()
        channels = [max(1, round(c * width)) for c in STAGE_CHANNELS]
        self.in_channels = in_channels
        self.width = width
        self.feature_channels = channels[-1]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels[0])
        blocks: list[nn.Module] = []
        previous = channels[0]
        for count, stride in zip(channels, STAGE_STRIDES, strict=True):
            for index in range(BLOCKS_PER_STAGE):
                blocks.append(BasicBlock(previous, count, stride if index == 0 else 1))
                previous = count
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(previous, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock):
                nn.init.constant_(module.norm2.weight, 0.2)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def encode(self, slabs: Tensor) -> Tensor:
        """Map slabs (N, planes, H, W) in [0, 1] to features (N, C, H/16, W/16)."""
        x = (slabs - INPUT_MEAN) / INPUT_DEVIATION
        x = functional.relu(self.stem_norm(self.stem(x)))
        features: Tensor = self.blocks(x)
        return features

    def activation_maps(self, features: Tensor) -> Tensor:
        """Class activation maps (N, 2, h, w) float32 of (no PE, PE), bias included.

        Computed in float32 whatever the autocast state: sums over 512 channels lose too much in
        bfloat16.
        """
        with torch.autocast(features.device.type, enabled=False):
            weight = self.head.weight.float()[:, :, None, None]
            return functional.conv2d(features.float(), weight, self.head.bias.float())

    def forward(self, slabs: Tensor) -> Stage1Output:
        """Classify slabs (N, planes, H, W) in [0, 1]; H and W are multiples of 16."""
        features = self.encode(slabs)
        maps = self.activation_maps(features)
        return Stage1Output(features, maps[:, PE : PE + 1], maps.mean(dim=(2, 3)))


def widened(narrow: dict[str, Tensor], wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a wide ``SlabClassifier`` that computes exactly what the narrow one does.

    The narrow network becomes the first channels of the wide one. New channels keep their fresh
    weights and read everything, but the weights with which old channels (and the head) read new
    channels start at zero, so that the output is unchanged and the new channels are free to learn.
    A way to spend few hours of CPU well [ours].

    Args:
        narrow: State of the narrow network.
        wide: Fresh state of the wide network.

    Returns:
        New state for the wide network; the arguments are not changed.
    """
    grown: dict[str, Tensor] = {}
    for name, fresh in wide.items():
        old = narrow[name]
        new = fresh.detach().clone()
        if new.ndim == 0:
            new = old.detach().clone()
        else:
            rows = old.shape[0]
            if new.ndim > 1:
                new[:rows] = 0
                new[:rows, : old.shape[1]] = old
            else:
                new[:rows] = old
        grown[name] = new
    return grown


def narrowed(wide: dict[str, Tensor], narrow: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a narrow ``SlabClassifier`` that is the first channels of a wide one.

    The inverse of `widened`. Of a network that was grown and has been trained since, the first
    channels know what it knew before, and the means of their norms are no longer right: how much it
    loses by this has to be measured [ours].

    Args:
        wide: State of the wide network.
        narrow: State of a narrow one, for its shapes.

    Returns:
        New state for the narrow network; the arguments are not changed.
    """
    return {
        name: wide[name][tuple(slice(count) for count in fresh.shape)].detach().clone()
        for name, fresh in narrow.items()
    }
