"""What training and export ask of a system; every system is one module beside this one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from export.models.base import SlabNetwork, SlabOutput
from export.onnx_export import StudyGraphs
from export.training.config import DataSettings, GridSettings, Stage1Loss, StudySettings
from export.training.losses import Stage1Terms
from export.training.sampling import Batch
from export.training.study_task import StudyTask


class System(Protocol):
    """A system: two networks, how they are trained, and the study program that they become."""

    @property
    def name(self) -> str:
        """As in the ``system`` of settings."""

    @property
    def card(self) -> tuple[str, ...]:
        """Lines of the model card that say what it is."""

    @property
    def study_settings(self) -> type[StudySettings]:
        """Settings of its second stage."""

    @property
    def resizes(self) -> bool:
        """Whether its first stage can become wider or narrower."""

    def slab_network(self, channels: int, width: float) -> SlabNetwork:
        """A fresh first stage."""

    def resized(self, weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of a first stage of another width.

        Args:
            weights: A state. A wider network computes what this one does; a narrower one is its
                first channels, and does not.
            fresh: State of a fresh network of the new width.

        Raises:
            ConfigurationError: The system's networks have one width.
        """

    def restored(self, encoder: bytes) -> SlabNetwork:
        """The first stage of a bundle, to train on; it computes what the bundle's graph does.

        Args:
            encoder: The ONNX graph of the node ``encoder``.

        Raises:
            ConfigurationError: The graph is not of this system, or its graphs do not keep what
                training needs.
        """

    def targets(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Target and weight of the dense loss: see ``export.training.sampling.Targets``."""

    def terms(self, output: SlabOutput, batch: Batch, weights: Stage1Loss) -> Stage1Terms:
        """Loss of a batch of the first stage."""

    def study_task(
        self,
        settings: StudySettings,
        data: DataSettings,
        store: Path,
        folder: Path,
        stage1: SlabNetwork,
        console: Console,
        *,
        stage1_sha256: str,
        threads: int | None,
    ) -> StudyTask:
        """Everything that training of the second stage needs, with features made in ``folder``.

        Raises:
            ConfigurationError: The store has fewer pairs than the settings ask for, or the features
                in the folder come from another first stage.
            InputError: The store has none.
        """

    def study_network(
        self, settings: Mapping[str, Any], stage1: SlabNetwork, grid: GridSettings
    ) -> nn.Module:
        """A fresh second stage, by the settings in its checkpoint."""

    def graphs(self, stage1: SlabNetwork, stage2: nn.Module, grid: GridSettings) -> StudyGraphs:
        """Both networks, in evaluation mode, as a study program."""

    def golden(self, grid: GridSettings) -> NDArray[np.uint8]:
        """(slabs, channels, rows, cols) slabs for a bundle's self-test."""
