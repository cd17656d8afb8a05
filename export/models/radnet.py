"""RADnet (Grewal et al. 2017, arXiv 1710.04934): a slice classifier with attention, then an LSTM.

Where each choice comes from: [abstract] = read in the abstract, [memory] = remembered from the
paper and not read again, [ours] = not stated there, or our choice.

- Input: one slice of 256 x 256 pixels of 1 mm in three windows, in [0, 1] [ours; the paper has 250
  x 250 pixels of about 1 mm: memory].
- Backbone: DenseNet-40 with growth 12, which is three dense blocks of 12 layers (norm, ReLU, 3x3
  convolution), without bottlenecks or compression (Huang et al. 2017) [memory]. The stem has 16
  channels and stride 2 [ours]: a stem of stride 1, as for the images of 32 x 32 pixels that
  DenseNet-40 was made for, costs four times as much at 256 x 256.
- Attention: after each dense block an auxiliary branch, one convolution and one deconvolution up to
  the size of the image, that says for every pixel whether it is hemorrhage [memory]; 16 channels
  between the two, kernels of the deconvolution twice its stride, a norm between them [ours].
- Pooled features: the mean of the last block over the slice [memory], and the strongest place of
  each branch [ours]: the mean over a slice hardly changes for a bleed of a few millimetres.
- Recurrence: a bidirectional LSTM over the pooled features of a study's slices, a probability per
  slice [abstract / memory]. What it says is added to the logit that the slice has by itself [ours],
  so that it starts from what the first stage knows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.models.base import SlabNetwork

BLOCKS, LAYERS, GROWTH, STEM = 3, 12, 12, 16
STEM_STRIDE = 2
TOTAL_STRIDE = STEM_STRIDE * 2 ** (BLOCKS - 1)
BRANCH_CHANNELS = 16
EVIDENCE_STRIDE = 4  # pixels per cell of the attention map: 4 mm
HIDDEN = 64
DROPOUT = 0.3
PRIOR_LOGIT = -4.0  # of a pixel before training: few pixels are blood
INPUT, FORGET, CANDIDATE, OUTPUT = range(4)  # order of the gates along the channel axis


class SliceOutput(NamedTuple):
    """What the slice classifier says of N slices.

    Attributes:
        features: (N, F) float32 pooled features; F = 451 at width 1.
        masks: (N, 3, H, W) float32 logits of the branches, shallow to deep.
        attention: (N, 1, H/4, W/4) float32, mean logit of the branches over cells of 4 x 4 pixels.
        logits: (N, 1) float32 logit of hemorrhage in the slice.
    """

    features: Tensor
    masks: Tensor
    attention: Tensor
    logits: Tensor

    @property
    def stage1_logit(self) -> Tensor:
        """(N, 1) the logit, by the name that every first stage gives it."""
        return self.logits


class DenseLayer(nn.Module):
    """Norm, ReLU and a 3x3 convolution; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        """Create the layers."""
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], dim=1)


class Transition(nn.Module):
    """Norm, ReLU, a 1x1 convolution and a mean over 2 x 2 pixels, between two dense blocks."""

    def __init__(self, channels: int) -> None:
        """Create the layers."""
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H/2, W/2).

        The mean comes before the convolution, which is the same and a quarter of the work.
        """
        y: Tensor = self.conv(functional.avg_pool2d(functional.relu(self.norm(x)), 2))
        return y


class Branch(nn.Module):
    """Auxiliary segmentation: one convolution, one deconvolution up to the size of the image.

    Args:
        in_channels: Of the dense block.
        stride: Pixels of the image per pixel of the block.
    """

    def __init__(self, in_channels: int, stride: int) -> None:
        """Create the layers; the deconvolution starts as an interpolation."""
        super().__init__()
        self.norm_in = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, BRANCH_CHANNELS, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(BRANCH_CHANNELS)
        self.up = nn.ConvTranspose2d(BRANCH_CHANNELS, 1, 2 * stride, stride, stride // 2)
        with torch.no_grad():
            self.up.weight.copy_(
                torch.randn(BRANCH_CHANNELS, 1, 1, 1) * 0.1 * _interpolation(stride)
            )
            nn.init.constant_(_bias_of(self.up), PRIOR_LOGIT)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H/stride, W/stride) to logits (N, 1, H, W)."""
        x = self.conv(functional.relu(self.norm_in(x)))
        logits: Tensor = self.up(functional.relu(self.norm(x)))
        return logits


class SliceClassifier(SlabNetwork):
    """DenseNet-40 with a segmentation branch after each block.

    Args:
        in_channels: Planes of a slab times windows.
        width: Factor on growth and stem; 1 is the published network.
        layers: Of a block; fewer than published are for tests.
    """

    def __init__(self, in_channels: int = 3, width: float = 1.0, layers: int = LAYERS) -> None:
        """Create the layers with He initialisation."""
        super().__init__()
        growth, channels = max(1, round(GROWTH * width)), max(1, round(STEM * width))
        self.in_channels = in_channels
        self.width = width
        self.stem = nn.Conv2d(in_channels, channels, 3, STEM_STRIDE, 1, bias=False)
        blocks: list[nn.Module] = []
        branches: list[nn.Module] = []
        transitions: list[nn.Module] = []
        for block in range(BLOCKS):
            if block:
                transitions.append(Transition(channels))
            dense = [DenseLayer(channels + growth * i, growth) for i in range(layers)]
            blocks.append(nn.Sequential(*dense))
            channels += growth * layers
            branches.append(Branch(channels, STEM_STRIDE * 2**block))
        self.blocks = nn.ModuleList(blocks)
        self.transitions = nn.ModuleList(transitions)
        self.branches = nn.ModuleList(branches)
        self.norm = nn.BatchNorm2d(channels)
        self.feature_channels = channels + BLOCKS
        self.head = nn.Linear(self.feature_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def trunk(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C) of the last block and logits (N, 3, H, W) of the branches."""
        x = self.stem(slabs - 0.5)
        masks: list[Tensor] = []
        for index, (block, branch) in enumerate(zip(self.blocks, self.branches, strict=True)):
            if index:
                x = self.transitions[index - 1](x)
            x = block(x)
            masks.append(branch(x))
        pooled = functional.relu(self.norm(x)).mean(dim=(2, 3))
        return pooled, torch.cat(masks, dim=1)

    def conclude(self, pooled: Tensor, masks: Tensor) -> SliceOutput:
        """What `trunk` gives, as float32, to what is said of the slices."""
        cells = functional.avg_pool2d(masks, EVIDENCE_STRIDE)
        features = torch.cat([pooled, cells.amax(dim=(2, 3))], dim=1)
        return SliceOutput(features, masks, cells.mean(dim=1, keepdim=True), self.head(features))

    def forward(self, slabs: Tensor) -> SliceOutput:
        """Classify slices (N, channels, H, W) in [0, 1]; H and W are multiples of 8.

        What comes out is float32 under autocast too.
        """
        pooled, masks = self.trunk(slabs)
        with torch.autocast(slabs.device.type, enabled=False):
            return self.conclude(pooled.float(), masks.float())


class LstmCell(nn.Module):
    """One step of an LSTM, apart from the input projection.

    Gates lie in the order input, forget, candidate, output along the channel axis.
    """

    def __init__(self, hidden: int) -> None:
        """Create the recurrent product (no bias: the projection has one)."""
        super().__init__()
        self.hidden = hidden
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one slice.

        Args:
            x: (N, 4 * hidden) projected input.
            h: (N, hidden) hidden state.
            c: (N, hidden) cell state.

        Returns:
            The next hidden state, which is also the output, and the next cell state.
        """
        i, f, g, o = torch.chunk(x + self.recurrent(h), 4, dim=1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c_next), c_next


class Lstm(nn.Module):
    """LSTM over a sequence, as an input projection and a recurrence.

    Args:
        in_features: Length of a feature vector.
        hidden: Length of the hidden state.
        downwards: Run from the head to the feet, which is from the last slice to the first.
    """

    def __init__(self, in_features: int, hidden: int, *, downwards: bool) -> None:
        """Create the projection and the cell; the forget gate starts open."""
        super().__init__()
        self.downwards = downwards
        self.hidden = hidden
        self.project = nn.Linear(in_features, 4 * hidden)
        self.cell = LstmCell(hidden)
        nn.init.xavier_uniform_(self.project.weight)
        with torch.no_grad():
            self.project.bias.zero_()
            self.project.bias[FORGET * hidden : (FORGET + 1) * hidden] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, F) to hidden states (B, T, hidden), both in ascending position."""
        gates = self.project(x)
        steps = x.shape[1]
        h = gates.new_zeros(len(x), self.hidden)
        c = torch.zeros_like(h)
        hidden: list[Tensor] = [h] * steps
        for t in range(steps - 1, -1, -1) if self.downwards else range(steps):
            h, c = self.cell(gates[:, t], h, c)
            hidden[t] = h
        return torch.stack(hidden, dim=1)


class SliceContext(nn.Module):
    """Bidirectional LSTM over a study's slices: every slice's logit, corrected by its neighbours.

    Args:
        in_features: Length of a feature vector, 451 for the published slice classifier.
        hidden: Length of the hidden state of each direction.
        dropout: Share of features and hidden states dropped in training.
    """

    def __init__(
        self, in_features: int = 451, hidden: int = HIDDEN, dropout: float = DROPOUT
    ) -> None:
        """Create the layers; untrained, it leaves the slices' own logits as they are."""
        super().__init__()
        self.in_features = in_features
        self.hidden = hidden
        self.register_buffer("offset", torch.zeros(in_features))
        self.register_buffer("gain", torch.ones(in_features))
        self.dropout = nn.Dropout(dropout)
        self.down = Lstm(in_features, hidden, downwards=True)
        self.up = Lstm(in_features, hidden, downwards=False)
        self.head = nn.Linear(2 * hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def scale_to(self, mean: Tensor, deviation: Tensor) -> None:
        """Bring features of that mean and standard deviation, both (F,), to 0 and 1."""
        with torch.no_grad():
            self.get_buffer("offset").copy_(mean)
            self.get_buffer("gain").copy_(1.0 / deviation.clamp(min=1e-3))

    def scaled(self, features: Tensor) -> Tensor:
        """Features (..., F) as the LSTM reads them."""
        return (features - self.get_buffer("offset")) * self.get_buffer("gain")

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Logits of all slices.

        Args:
            features: (B, T, F) pooled features, ascending position, any T.
            logits: (B, T) the slices' own logits.

        Returns:
            (B, T) logits.
        """
        x = self.dropout(self.scaled(features))
        hidden = torch.cat([self.down(x), self.up(x)], dim=2)
        context: Tensor = self.head(self.dropout(hidden))
        return logits + context[..., 0]


def consecutive_score(logits: Tensor, count: int) -> Tensor:
    """Score of a study: the largest, over ``count`` neighbouring slices, of their smallest logit.

    What `pe_infer.manifest.ConsecutiveRule` does to probabilities; a rising curve between logit
    and probability changes nothing about it.

    Args:
        logits: (B, T), T >= count.
        count: Of neighbours.
    """
    return logits.unfold(1, count, 1).amin(dim=2).amax(dim=1)


def _interpolation(stride: int) -> Tensor:
    """(2 * stride, 2 * stride) bilinear kernel of a deconvolution of that stride."""
    ramp = 1.0 - (torch.arange(2 * stride) - (stride - 0.5)).abs() / stride
    return ramp[:, None] * ramp[None, :]


def _bias_of(module: nn.ConvTranspose2d) -> Tensor:
    if module.bias is None:
        raise TypeError(module)
    return module.bias
