"""What every first stage is: slabs to features, a map of where it looked, and a logit."""

from abc import abstractmethod
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pe_infer.engines.processor import processor


class SlabOutput(Protocol):
    """What a first stage says of N slabs."""

    @property
    def features(self) -> Tensor:
        """(N, ...) what the second stage reads."""

    @property
    def attention(self) -> Tensor:
        """(N, 1, h, w) float32 raw activation over the plane."""

    @property
    def stage1_logit(self) -> Tensor:
        """(N, 1) float32 logit of the finding in the slab."""


class SlabNetwork(nn.Module):
    """A first stage.

    Attributes:
        in_channels: Planes of a slab times windows.
        width: Factor on channel counts.
        feature_channels: Channels of the features.
    """

    in_channels: int
    width: float
    feature_channels: int

    @abstractmethod
    def forward(self, slabs: Tensor) -> SlabOutput:
        """Classify slabs (N, channels, H, W) in [0, 1]."""


def mixed_precision() -> torch.autocast:
    """Context of training: bfloat16 where the CPU has units for it, else float32 [ours].

    Elsewhere it gains little: on two cores of an Intel processor without AMX a step of the full
    first stage of Shi et al. took 11 s in it and 13 s in float32, or 12 and 9 to 10 s with memory
    that stays with the process (see ``docs/training.md``).
    """
    here = processor()
    units = {"amx_bf16", "avx512_bf16", "bf16"} & set(here.features)
    fast = bool(units) and not here.bfloat16_is_slow
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast)


Network = TypeVar("Network", bound=nn.Module)


def channels_last(model: Network) -> Network:
    """The same model with its weights in the memory format that convolutions on a CPU like best."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
