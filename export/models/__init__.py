"""The two networks of Shi et al. (MIDL 2020, arXiv 2006.00074) in PyTorch."""

from export.models.stage1 import SlabClassifier, Stage1Output, channels_last, widened
from export.models.stage2 import ConvLstm, StudyNet

__all__ = ["ConvLstm", "SlabClassifier", "Stage1Output", "StudyNet", "channels_last", "widened"]
