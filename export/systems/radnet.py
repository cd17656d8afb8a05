"""RADnet (Grewal et al. 2017): intracranial hemorrhage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from export.datasets.labels import plane_target
from export.golden import golden_heads
from export.models.base import SlabNetwork, SlabOutput
from export.models.radnet import LAYERS, SliceClassifier, SliceContext, SliceOutput
from export.onnx_export import StudyGraphs
from export.systems.radnet_graphs import encoder_node, study_graphs
from export.training.config import (
    ContextSettings,
    DataSettings,
    GridSettings,
    Stage1Loss,
    StudySettings,
)
from export.training.encoder import SlabEncoder
from export.training.losses import Stage1Terms, slice_terms
from export.training.radnet_studies import RadnetStudies, encode_all
from export.training.sampling import Batch
from pe_infer.errors import ConfigurationError

CARD = """\
Grewal et al., *RADnet: Radiologist Level Accuracy using Deep Learning for Hemorrhage Detection in
CT Scans* (2017, arXiv 1710.04934): a DenseNet-40 classifies head slices, with an auxiliary
segmentation after each dense block as attention; a bidirectional LSTM gives every slice the context
of its neighbours, and neighbouring positive slices make a study positive. What the paper does not
say, or could not be read, is marked [ours] or [memory] in `export/models/radnet.py`.\
"""


class Radnet:
    """See ``export.systems.base.System``.

    Args:
        layers: Of a dense block; the published network has 12.
    """

    name = "radnet"
    resizes = False
    card = tuple(CARD.splitlines())
    study_settings = ContextSettings

    def __init__(self, layers: int = LAYERS) -> None:
        """Remember the depth."""
        self._layers = layers

    def slab_network(self, channels: int, width: float) -> SliceClassifier:
        """DenseNet-40 with segmentation branches."""
        return SliceClassifier(channels, width, self._layers)

    def resized(self, weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refused: what a layer reads lies between what other layers wrote."""
        del weights, fresh
        raise ConfigurationError(
            "RADnet cannot change its width: give stage 1 that of what it starts from"
        )

    def restored(self, encoder: bytes) -> SliceClassifier:
        """Refused: graphs of RADnet do not say which of its norms were folded."""
        del encoder
        raise ConfigurationError(
            "training of RADnet cannot start from a bundle: pass the checkpoint of its stage 1"
        )

    def targets(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pixels of the slice."""
        return plane_target(mask)

    def terms(self, output: SlabOutput, batch: Batch, weights: Stage1Loss) -> Stage1Terms:
        """Classification and segmentation."""
        if not isinstance(output, SliceOutput):
            raise TypeError(type(output))
        return slice_terms(output, batch.labels, batch.target, batch.weight, weights)

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
    ) -> RadnetStudies:
        """A bidirectional LSTM over pooled features."""
        if not isinstance(settings, ContextSettings):
            raise TypeError(type(settings))
        encoder = SlabEncoder(encoder_node(_classifier(stage1), data.grid.rows), threads=threads)
        studies = encode_all(
            settings, data, store, folder, encoder, console, stage1_sha256=stage1_sha256
        )
        return RadnetStudies(settings, studies)

    def study_network(
        self, settings: Mapping[str, Any], stage1: SlabNetwork, grid: GridSettings
    ) -> SliceContext:
        """A bidirectional LSTM."""
        del grid
        return SliceContext(stage1.feature_channels, settings["hidden"])

    def graphs(self, stage1: SlabNetwork, stage2: nn.Module, grid: GridSettings) -> StudyGraphs:
        """See ``export.systems.radnet_graphs``."""
        if not isinstance(stage2, SliceContext):
            raise TypeError(type(stage2))
        return study_graphs(_classifier(stage1), stage2, grid.rows)

    def golden(self, grid: GridSettings) -> NDArray[np.uint8]:
        """A head."""
        return golden_heads(grid.to_grid())


def _classifier(network: SlabNetwork) -> SliceClassifier:
    if not isinstance(network, SliceClassifier):
        raise TypeError(type(network))
    return network
