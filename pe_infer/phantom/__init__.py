"""Synthetic CT studies with ground truth (NumPy, SciPy).

One package per anatomy, with functions of the same names: ``chest`` (pulmonary emboli) and ``head``
(intracranial hemorrhage). They share shapes on voxels (``raster``), sampling and noise
(``acquisition``), random streams (``sampling``) and frozen configurations (``configuration``).
What is at the top is the chest's.
"""

from pe_infer.phantom.chest import (
    DEFAULT,
    Embolus,
    PhantomConfig,
    PhantomStudy,
    generate,
    generate_pair,
)

__all__ = ["DEFAULT", "Embolus", "PhantomConfig", "PhantomStudy", "generate", "generate_pair"]
