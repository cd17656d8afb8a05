"""Stage-1 features of whole studies on disk, for stage 2: 8 bits per value, one scale per channel.

A float16 study is 35 MB and stage 2 reads every study once an epoch. Features are not negative
(they end in a ReLU), so that value = byte * scale; scales come from the largest values of the first
studies.

Slabs of a negative study whose planes equal those of its positive twin are not encoded twice.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.datasets.augment import slab_of
from export.datasets.labels import MIN_CLOT_PIXELS, slab_labels
from export.datasets.store import StoredStudy, StudyPair
from export.models.stage1 import SlabClassifier
from export.systems.shi_graphs import encoder_node
from export.training.config import GridSettings
from export.training.encoder import SlabEncoder
from pe_infer.errors import ConfigurationError

CACHE_FILE = "cache.json"
SCALE_STUDIES = 4
HEADROOM = 1.5


@dataclass(frozen=True)
class StudyFeatures:
    """Features of one study.

    Attributes:
        folder: Where they lie.
        seed: Seed of the study.
        positive: Whether it has emboli.
        clot_slabs: Indices of the positive slabs, as far as it is known which are; for a negative
            study of a pair, of the same places.
    """

    folder: Path
    seed: int
    positive: bool
    clot_slabs: tuple[int, ...]

    @cached_property
    def codes(self) -> NDArray[np.uint8]:
        """(T, C, h, w) bytes, memory-mapped."""
        codes: NDArray[np.uint8] = np.load(self.folder / "features.npy", mmap_mode="r")
        return codes

    @property
    def slabs(self) -> int:
        """T."""
        return int(self.codes.shape[0])


@dataclass(frozen=True)
class FeatureCache:
    """Features of studies.

    Attributes:
        folder: Where they lie; belongs to one stage-1 checkpoint.
        scale: (C,) float32.
    """

    folder: Path
    scale: Tensor

    def decoded(self, codes: NDArray[np.uint8]) -> Tensor:
        """(T, C, h, w) float32 features."""
        values = torch.from_numpy(np.array(codes)).float()
        return values * self.scale[:, None, None]


class Encoder:
    """Stage 1 of Shi et al. over slabs of stored studies."""

    def __init__(
        self, model: SlabClassifier, grid: GridSettings, *, threads: int | None = None
    ) -> None:
        """Export and compile the frozen model.

        Args:
            model: Stage 1.
            grid: Of the store.
            threads: Of the engine; ``None`` is one per core.
        """
        self.grid = grid
        self.feature_channels = model.feature_channels
        self._encoder = SlabEncoder(encoder_node(model, grid.rows), threads=threads)

    def __call__(self, study: StoredStudy, middles: Sequence[int]) -> Tensor:
        """Features (len(middles), C, h, w) float32."""
        parts = []
        for middle in middles:
            hu = study.slab_hu(middle, self.grid.planes_per_slab).astype(np.float32)
            slab = slab_of(torch.from_numpy(hu), self.grid.window_bounds)
            parts.append(self._encoder(slab.numpy()[np.newaxis])["features"])
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)


def cache_facts(
    folder: Path, *, stage1_sha256: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What a folder of features says of itself; ``measure`` is asked if it is new.

    Raises:
        ConfigurationError: The features in the folder come from another stage 1.
    """
    path = folder / CACHE_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"stage1_sha256": stage1_sha256, **measure()}))
    content: dict[str, Any] = json.loads(path.read_text())
    if content["stage1_sha256"] != stage1_sha256:
        raise ConfigurationError(
            f"{path}: these features come from another stage 1 "
            f"({content['stage1_sha256'][:12]}, now {stage1_sha256[:12]}): "
            "name another --run, or remove the folder"
        )
    return content


def open_cache(
    folder: Path, encoder: Encoder, studies: Sequence[StoredStudy], *, stage1_sha256: str
) -> FeatureCache:
    """The cache in a folder, with scales measured on the first positive studies if it is new.

    Raises:
        ConfigurationError: The features in the folder come from another stage 1, or no positive
            study has a slab.
    """

    def scale() -> dict[str, Any]:
        highest = torch.zeros(encoder.feature_channels)
        shown = [s for s in studies if s.record.positive and s.record.slab_planes]
        if not shown:
            raise ConfigurationError(
                f"{folder}: none of the studies with the finding has a slab that passed the gate: "
                "there is nothing to train stage 2 on. Change the gate, or the studies."
            )
        for study in shown[:SCALE_STUDIES]:
            features = encoder(study, study.record.slab_planes[::3])
            highest = torch.maximum(highest, features.amax(dim=(0, 2, 3)))
        return {"scale": (highest * HEADROOM / 255).clamp(min=1e-6).tolist()}

    content = cache_facts(folder, stage1_sha256=stage1_sha256, measure=scale)
    return FeatureCache(folder, torch.tensor(content["scale"]))


def cache_pair(
    cache: FeatureCache,
    encoder: Encoder,
    pair: StudyPair,
    prefix: str = "",
    *,
    min_pixels: int = MIN_CLOT_PIXELS,
) -> tuple[StudyFeatures, StudyFeatures]:
    """Features of the positive and the negative study of a pair, encoded unless they are there.

    Both have the slabs that passed the gate in the positive study, so that they are of one length.
    ``prefix`` is what their names in the cache begin with.
    """
    record = pair.positive.record
    positives = tuple(
        i for i, m in enumerate(record.slab_planes) if record.clot_pixels[m] >= min_pixels
    )
    found = [
        StudyFeatures(cache.folder / f"{prefix}{s.folder.name}", pair.seed, p, positives)
        for s, p in ((pair.positive, True), (pair.negative, False))
    ]
    if not all((f.folder / "features.npy").exists() for f in found):
        middles = record.slab_planes
        quantise = _quantiser(cache.scale)
        codes = quantise(encoder(pair.positive, middles))
        _save(found[0], codes)
        half = encoder.grid.planes_per_slab // 2
        one, other = pair.positive.planes_hu, pair.negative.planes_hu
        differs = np.array([not np.array_equal(a, b) for a, b in zip(one, other, strict=True)])
        changed = [i for i, m in enumerate(middles) if differs[m - half : m + half + 1].any()]
        twin = codes.copy()
        if changed:
            twin[changed] = quantise(encoder(pair.negative, [middles[i] for i in changed]))
        _save(found[1], twin)
    return found[0], found[1]


def cache_study(
    cache: FeatureCache,
    encoder: Encoder,
    study: StoredStudy,
    name: str,
    *,
    min_pixels: int = MIN_CLOT_PIXELS,
) -> StudyFeatures:
    """Features of a study of its own, under a name, encoded unless they are there."""
    record = study.record
    labels = slab_labels(
        record.clot_pixels,
        record.plane_labels,
        record.slab_planes,
        encoder.grid.planes_per_slab,
        min_pixels,
    )
    positives = tuple(i for i, label in enumerate(labels) if label == "positive")
    found = StudyFeatures(cache.folder / name, record.seed, record.positive, positives)
    if not (found.folder / "features.npy").exists():
        _save(found, _quantiser(cache.scale)(encoder(study, record.slab_planes)))
    return found


def _quantiser(scale: Tensor) -> Callable[[Tensor], NDArray[np.uint8]]:
    def quantise(features: Tensor) -> NDArray[np.uint8]:
        codes = (features / scale[:, None, None]).round_().clamp_(0, 255)
        return codes.to(torch.uint8).numpy()

    return quantise


def _save(features: StudyFeatures, codes: NDArray[np.uint8]) -> None:
    features.folder.mkdir(parents=True, exist_ok=True)
    draft = features.folder / "draft.npy"
    np.save(draft, codes)
    draft.rename(features.folder / "features.npy")
