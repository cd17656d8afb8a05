"""Stage 2: recurrent network over the slabs of a study (Shi et al., MIDL 2020).

Where each choice comes from: [slides] = the authors' conference slides, [ours] = not stated there.

- Input: features T x 512 x 24 x 24 of the frozen stage 1, slabs in ascending position (feet to
  head) [slides / ours].
- Twice: ConvLSTM downwards, batch norm, ConvLSTM upwards, batch norm, max pool 2x2. The directions
  follow each other, they are not concatenated [slides]. 96 filters in the second block [slides], 48
  in the first, 3x3 kernels [ours].
- Flatten (6 x 6 x 96 = 3456), mean over T, dropout, dense layer to one logit [slides]; dropout 0.5
  [ours].
- ConvLSTM (Shi X. et al., NeurIPS 2015) without peepholes; the bias of the forget gate starts at 1
  [ours].
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

FILTERS = (48, 96)
FEATURE_SIZE = 24
DROPOUT = 0.5
INPUT, FORGET, CANDIDATE, OUTPUT = range(4)  # order of the gates along the channel axis
OPEN, SHUT, REMEMBER = 3.0, -4.0, 5.0  # biases of gates; a cell loses 1 % per slab at the last


class ConvLstmCell(nn.Module):
    """One step of the recurrence, apart from the input projection.

    Gates lie in the order input, forget, candidate, output along the channel axis.
    """

    def __init__(self, filters: int) -> None:
        """Create the recurrent convolution (no bias: the projection has one)."""
        super().__init__()
        self.filters = filters
        self.recurrent = nn.Conv2d(filters, 4 * filters, 3, 1, 1, bias=False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one slab.

        Args:
            x: (N, 4 * filters, H, W) projected input.
            h: (N, filters, H, W) hidden state.
            c: (N, filters, H, W) cell state.

        Returns:
            The next hidden state, which is also the output, and the next cell state.
        """
        i, f, g, o = torch.chunk(x + self.recurrent(h), 4, dim=1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c_next), c_next


class ConvLstm(nn.Module):
    """Convolutional LSTM over a sequence, as an input projection and a recurrence.

    Args:
        in_channels: Channels of the input sequence.
        filters: Channels of the hidden state.
        downwards: Run from the head to the feet, which is from the last slab to the first.
    """

    def __init__(self, in_channels: int, filters: int, *, downwards: bool) -> None:
        """Create the projection and the cell."""
        super().__init__()
        self.downwards = downwards
        self.filters = filters
        self.project = nn.Conv2d(in_channels, 4 * filters, 3, 1, 1)
        self.cell = ConvLstmCell(filters)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.orthogonal_(self.cell.recurrent.weight)
        bias = torch.zeros(4 * filters)
        bias[FORGET * filters : (FORGET + 1) * filters] = 1.0  # remember by default
        self.project.bias = nn.Parameter(bias)

    def read(self, gate: int, channel: int, weight: Tensor, bias: Tensor) -> None:
        """Let one gate of one channel see a weighted sum of the input at its own place.

        Args:
            gate: ``INPUT``, ``FORGET``, ``CANDIDATE`` or ``OUTPUT``.
            channel: Channel of the hidden state.
            weight: (in_channels,).
            bias: ().
        """
        row = gate * self.filters + channel
        middle = self.project.kernel_size[0] // 2
        self.project.weight[row] = 0.0
        self.project.weight[row, :, middle, middle] = weight
        if self.project.bias is not None:
            self.project.bias[row] = bias

    def hold(self, gate: int, channel: int, bias: float) -> None:
        """Let one gate of one channel see nothing: it is as open as ``bias`` says."""
        self.read(gate, channel, torch.zeros(self.project.in_channels), torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C, H, W) to hidden states (B, T, filters, H, W), both in ascending position.

        Gates and cell state are float32 under autocast too: a cell adds up over a whole study.
        """
        batch, steps = x.shape[:2]
        flat = self.project(x.flatten(0, 1)).float()
        gates = flat.reshape(batch, steps, *flat.shape[1:])
        h = gates.new_zeros(batch, self.filters, *x.shape[3:])
        c = torch.zeros_like(h)
        hidden: list[Tensor] = [h] * steps
        order = range(steps - 1, -1, -1) if self.downwards else range(steps)
        for t in order:
            h, c = self.cell(gates[:, t], h, c)
            hidden[t] = h
        return torch.stack(hidden, dim=1)


class SequenceNorm(nn.BatchNorm2d):
    """Batch norm over studies and slabs: takes (B, T, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is torch's
        """Normalise every channel."""
        if input.ndim == 4:
            return super().forward(input)
        return super().forward(input.flatten(0, 1)).reshape(input.shape)


class StudyNet(nn.Module):
    """Two blocks of ConvLSTM down, norm, ConvLSTM up, norm, max pool; the mean over slabs; a logit.

    Args:
        in_channels: Channels of the stage-1 features.
        filters: Filters of the two blocks.
        feature_size: Rows and columns of the stage-1 features.
        dropout: Share of the mean vector dropped in training.
    """

    def __init__(
        self,
        in_channels: int = 512,
        filters: Sequence[int] = FILTERS,
        feature_size: int = FEATURE_SIZE,
        dropout: float = DROPOUT,
    ) -> None:
        """Create the layers."""
        super().__init__()
        first, second = filters
        self.filters = (first, second)
        self.in_channels = in_channels
        self.feature_size = feature_size
        self.down1 = ConvLstm(in_channels, first, downwards=True)
        self.norm_down1 = SequenceNorm(first)
        self.up1 = ConvLstm(first, first, downwards=False)
        self.norm_up1 = SequenceNorm(first)
        self.down2 = ConvLstm(first, second, downwards=True)
        self.norm_down2 = SequenceNorm(second)
        self.up2 = ConvLstm(second, second, downwards=False)
        self.norm_up2 = SequenceNorm(second)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(second * (feature_size // 4) ** 2, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, T, C, H, W), ascending position, any T, to study logits (B, 1)."""
        logit: Tensor = self.dense(self.dropout(self.described(features)))
        return logit

    def described(self, features: Tensor) -> Tensor:
        """What the dense layer sees: (B, channels of the second block * cells)."""
        x = self.norm_down1(self.down1(features))
        x = pooled(self.norm_up1(self.up1(x)))
        x = self.norm_down2(self.down2(x))
        x = pooled(self.norm_up2(self.up2(x)))
        return x.flatten(2).mean(dim=1)

    def read_attention(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        gain: float,
        levels: Sequence[float],
        counts: Sequence[float] = (),
        offset: float = 0.0,
    ) -> None:
        """Start from what stage 1 already knows instead of from noise [ours].

        The first channels of ``down1`` open their input, candidate and output gates where the class
        activation map is above a level of their own, and forget at once; ``up1`` passes them on.
        ``down2`` and ``up2`` remember: a suspicious place stays in the cell for the rest of the
        study, so that the mean over slabs says that there is one, on however few slabs it was. The
        dense layer weighs these channels: training begins where hours of it would otherwise end.

        They stay as they are while all else learns: cells that add up over every place and slab
        turn the smallest step of their own weights into another logit for everybody.

        Args:
            weight: (C,) weights of the PE class activation map.
            bias: () its bias.
            gain: Factor on the map.
            levels: Of the map, one per channel that starts this way.
            counts: Weight of each of these channels in the dense layer; 0 where there is none.
            offset: Bias of the dense layer.
        """
        with torch.no_grad():
            for channel, level in enumerate(levels):
                for gate in (INPUT, CANDIDATE, OUTPUT):
                    self.down1.read(gate, channel, gain * weight, gain * (bias - level))
                self.down1.hold(FORGET, channel, SHUT)
                for layer in (self.up1, self.down2, self.up2):
                    one_hot = torch.zeros(layer.project.in_channels)
                    one_hot[channel] = 1.0
                    layer.read(CANDIDATE, channel, one_hot, torch.tensor(0.0))
                    layer.hold(INPUT, channel, OPEN)
                    layer.hold(OUTPUT, channel, OPEN)
                    layer.hold(FORGET, channel, SHUT if layer is self.up1 else REMEMBER)
                for layer in (self.down1, self.up1, self.down2, self.up2):
                    layer.cell.recurrent.weight.view(4, layer.filters, -1)[:, channel] = 0.0
            self.dense.weight.mul_(0.1)
            sums = self.dense.weight.view(1, self.filters[1], -1)
            sums[:, : len(counts)] += torch.tensor(counts)[:, None]
            self.dense.bias.fill_(offset)
        self._hold_still(len(levels))

    def _hold_still(self, channels: int) -> None:
        """The first channels of every layer and norm get no gradient; the dense layer does."""
        for layer in (self.down1, self.up1, self.down2, self.up2):
            learns = torch.ones(4, layer.filters)
            learns[:, :channels] = 0.0
            for parameter in (*layer.project.parameters(), *layer.cell.parameters()):
                rows = learns.view(-1, *[1] * (parameter.ndim - 1))
                parameter.register_hook(partial(torch.mul, rows))  # type: ignore[no-untyped-call]
        for norm in (self.norm_down1, self.norm_up1, self.norm_down2, self.norm_up2):
            learns = torch.ones(norm.num_features)
            learns[:channels] = 0.0
            for parameter in norm.parameters():
                parameter.register_hook(partial(torch.mul, learns))  # type: ignore[no-untyped-call]


def pooled(x: Tensor) -> Tensor:
    """Max pool 2x2 of every slab: (B, T, C, H, W) to (B, T, C, H/2, W/2)."""
    flat = functional.max_pool2d(x.flatten(0, 1), 2)
    return flat.reshape(*x.shape[:2], *flat.shape[1:])
