"""Synthetic contrast chest CT studies with pulmonary emboli and ground truth (NumPy, SciPy)."""

from pe_infer.phantom.config import DEFAULT, PhantomConfig
from pe_infer.phantom.study import Embolus, PhantomStudy, generate, generate_pair

__all__ = ["DEFAULT", "Embolus", "PhantomConfig", "PhantomStudy", "generate", "generate_pair"]
