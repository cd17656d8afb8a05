"""Synthetic contrast chest CT studies with pulmonary emboli and ground truth."""

from pe_infer.phantom.chest.config import DEFAULT, PhantomConfig
from pe_infer.phantom.chest.study import Embolus, PhantomStudy, generate, generate_pair

__all__ = ["DEFAULT", "Embolus", "PhantomConfig", "PhantomStudy", "generate", "generate_pair"]
