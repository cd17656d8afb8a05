"""Shi et al. (MIDL 2020): pulmonary embolism."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from export.datasets.labels import attention_target
from export.golden import golden_slabs
from export.models.base import SlabNetwork, SlabOutput
from export.models.stage1 import TOTAL_STRIDE, SlabClassifier, Stage1Output, narrowed, widened
from export.models.stage2 import StudyNet
from export.onnx_export import StudyGraphs
from export.systems.shi_graphs import restored_classifier, study_graphs
from export.training.config import (
    DataSettings,
    GridSettings,
    Stage1Loss,
    Stage2Settings,
    StudySettings,
)
from export.training.features import Encoder
from export.training.losses import Stage1Terms, stage1_terms
from export.training.sampling import Batch
from export.training.shi_studies import ShiStudies, encode_all

CARD = """\
Shi et al., *Automatic Diagnosis of Pulmonary Embolism Using an Attention-guided Framework*
(MIDL 2020, arXiv 2006.00074): a ResNet-18 classifies slabs of five planes and shows where it
looked (class activation map); a stack of convolutional LSTMs, down and up through the study, gives
the study its probability. With `attention_gain` above 0 their training begins as a
logistic regression of the highest attention: what they add to it is seen beside the AUC of the
highest peak by itself. What the paper does not say is marked [ours] in `export/models/`.\
"""


class Shi:
    """See ``export.systems.base.System``."""

    name = "shi"
    resizes = True
    card = tuple(CARD.splitlines())
    study_settings = Stage2Settings

    def slab_network(self, channels: int, width: float) -> SlabClassifier:
        """ResNet-18 with a class activation map."""
        return SlabClassifier(channels, width)

    def resized(self, weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``widened`` and ``narrowed`` in ``export.models.stage1``."""
        grows = weights["stem.weight"].shape[0] < fresh["stem.weight"].shape[0]
        return widened(weights, fresh) if grows else narrowed(weights, fresh)

    def restored(self, encoder: bytes) -> SlabClassifier:
        """See ``export.systems.shi_graphs.restored_classifier``."""
        return restored_classifier(encoder)

    def targets(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cells of the activation map."""
        return attention_target(mask)

    def terms(self, output: SlabOutput, batch: Batch, weights: Stage1Loss) -> Stage1Terms:
        """Cross-entropy, Dice of the attention, dense focal loss."""
        if not isinstance(output, Stage1Output):
            raise TypeError(type(output))
        return stage1_terms(output, batch.labels, batch.target, batch.weight, weights)

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
    ) -> ShiStudies:
        """Convolutional LSTMs over feature maps."""
        model = _classifier(stage1)
        if not isinstance(settings, Stage2Settings):
            raise TypeError(type(settings))
        encoder = Encoder(model, data.grid, threads=threads)
        features = encode_all(
            settings, data, store, folder, encoder, console, stage1_sha256=stage1_sha256
        )
        return ShiStudies(settings, model, features, data.grid.rows // TOTAL_STRIDE)

    def study_network(
        self, settings: Mapping[str, Any], stage1: SlabNetwork, grid: GridSettings
    ) -> StudyNet:
        """Convolutional LSTMs down and up."""
        cells = grid.rows // TOTAL_STRIDE
        return StudyNet(stage1.feature_channels, settings["filters"], cells)

    def graphs(self, stage1: SlabNetwork, stage2: nn.Module, grid: GridSettings) -> StudyGraphs:
        """See ``export.systems.shi_graphs``."""
        if not isinstance(stage2, StudyNet):
            raise TypeError(type(stage2))
        return study_graphs(_classifier(stage1), stage2, grid.rows)

    def golden(self, grid: GridSettings) -> NDArray[np.uint8]:
        """A chest."""
        return golden_slabs(grid.channels, grid.rows, grid.cols)


def _classifier(network: SlabNetwork) -> SlabClassifier:
    if not isinstance(network, SlabClassifier):
        raise TypeError(type(network))
    return network
