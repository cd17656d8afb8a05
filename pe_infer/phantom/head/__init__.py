"""Synthetic head CT studies without contrast, with intracranial hemorrhage and ground truth."""

from pe_infer.phantom.head.config import DEFAULT, HeadConfig
from pe_infer.phantom.head.hemorrhage import TYPES
from pe_infer.phantom.head.study import HeadStudy, generate, generate_pair
from pe_infer.phantom.head.truth import Hemorrhage

__all__ = [
    "DEFAULT",
    "TYPES",
    "HeadConfig",
    "HeadStudy",
    "Hemorrhage",
    "generate",
    "generate_pair",
]
