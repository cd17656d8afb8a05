"""The networks of Shi et al. (MIDL 2020) and of RADnet (arXiv 1710.04934) in PyTorch."""

from export.models.base import SlabNetwork, SlabOutput, channels_last
from export.models.radnet import SliceClassifier, SliceContext
from export.models.stage1 import SlabClassifier, Stage1Output, narrowed, widened
from export.models.stage2 import ConvLstm, StudyNet

__all__ = [
    "ConvLstm",
    "SlabClassifier",
    "SlabNetwork",
    "SlabOutput",
    "SliceClassifier",
    "SliceContext",
    "Stage1Output",
    "StudyNet",
    "channels_last",
    "narrowed",
    "widened",
]
