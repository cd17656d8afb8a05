"""Batches of stage 1: which slabs, where they are cropped, and their targets.

Batch number ``s`` of a run depends on the seed, on ``s`` and on the number of pairs in use, on
nothing else: a resumed run sees the same batches.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.datasets.augment import OFF, Strengths, augmented, slab_of
from export.datasets.labels import MIN_CLOT_PIXELS, UNSURE, attention_target, slab_label
from export.datasets.store import StoredStudy, StudyPair
from export.training.config import GridSettings, Phase


@dataclass(frozen=True)
class SlabRef:
    """One slab of a store.

    Attributes:
        pair: The pair of studies it belongs to.
        positive_study: Whether it is cut from the study with emboli.
        middle: Index of its middle plane.
        clot_pixels: Clot pixels of the middle plane.
    """

    pair: StudyPair
    positive_study: bool
    middle: int
    clot_pixels: int

    @property
    def study(self) -> StoredStudy:
        """The study it is cut from."""
        return self.pair.positive if self.positive_study else self.pair.negative

    @property
    def twin(self) -> "SlabRef":
        """The same place in the same patient without emboli."""
        return SlabRef(self.pair, positive_study=False, middle=self.middle, clot_pixels=0)


@dataclass(frozen=True)
class SlabIndex:
    """All usable slabs of some pairs."""

    positives: list[SlabRef]
    negatives: list[SlabRef]


CLASSES = {"positive": 1, "negative": 0, "dropped": UNSURE}

Targets = Callable[[NDArray[np.bool_]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(planes, H, W) mask of a slab to target and weight of every cell (``export.datasets.labels``)."""


@dataclass(frozen=True)
class Sample:
    """One crop of a slab with what should be learnt from it.

    Attributes:
        slab: (channels, H, W) float32 in [0, 1].
        label: 1 = positive, 0 = negative; ``UNSURE`` where the crop shows less clot than a positive
            slab has.
        target: (h, w) float32, mask of the middle plane, at the size of the dense loss.
        weight: (h, w) float32, weight of every cell in the dense loss.
    """

    slab: Tensor
    label: int
    target: NDArray[np.float32]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Tensors of one step.

    Attributes:
        slabs: (N, channels, H, W) float32 in [0, 1].
        labels: (N,) int64, 1 = positive, 0 = negative, or ``UNSURE``.
        target: (N, 1, h, w) float32, mask of the middle plane, at the size of the dense loss.
        weight: (N, 1, h, w) float32, weight of every cell in the dense loss.
    """

    slabs: Tensor
    labels: Tensor
    target: Tensor
    weight: Tensor


def index_slabs(
    pairs: Sequence[StudyPair], planes_per_slab: int, min_pixels: int = MIN_CLOT_PIXELS
) -> SlabIndex:
    """Sort slabs that passed the gate into positives and negatives; doubtful ones are left out."""
    positives: list[SlabRef] = []
    negatives: list[SlabRef] = []
    for pair in pairs:
        for study in (pair.positive, pair.negative):
            record = study.record
            clot = np.asarray(record.clot_pixels, dtype=np.int64)
            for middle in record.slab_planes:
                label = slab_label(clot, middle, planes_per_slab, min_pixels)
                ref = SlabRef(pair, record.positive, middle, int(clot[middle]))
                if label == "positive":
                    positives.append(ref)
                elif label == "negative":
                    negatives.append(ref)
    return SlabIndex(positives, negatives)


def load_slab(
    ref: SlabRef,
    grid: GridSettings,
    *,
    corner: tuple[int, int],
    crop: int,
    strengths: Strengths,
    generator: torch.Generator,
    targets: Targets = attention_target,
    min_pixels: int = MIN_CLOT_PIXELS,
) -> Sample:
    """Cut, augment and window one slab.

    Args:
        ref: Which slab.
        grid: Of the store.
        corner: First row and column of the crop.
        crop: Rows and columns of the crop.
        strengths: Of the augmentation.
        generator: Source of all randomness.
        targets: Makes target and weight.
        min_pixels: What makes a slab positive.
    """
    top, left = corner
    rows, cols = slice(top, top + crop), slice(left, left + crop)
    hu = np.asarray(
        ref.study.slab_hu(ref.middle, grid.planes_per_slab)[:, rows, cols], dtype=np.float32
    )
    mask = np.zeros(hu.shape, dtype=np.bool_)
    if ref.positive_study:
        mask = np.ascontiguousarray(
            ref.study.slab_mask(ref.middle, grid.planes_per_slab)[:, rows, cols]
        )
    clot_pixels = mask.sum(axis=(1, 2), dtype=np.int64)
    label = slab_label(clot_pixels, grid.planes_per_slab // 2, grid.planes_per_slab, min_pixels)
    changed, moved = augmented(
        torch.from_numpy(hu),
        torch.from_numpy(mask),
        strengths,
        generator,
        positive=label != "negative",
    )
    target, weight = targets(moved.numpy())
    return Sample(slab_of(changed, grid.window_bounds), CLASSES[label], target, weight)


class BatchSource:
    """Makes the batch of any step of a phase."""

    def __init__(
        self,
        index: SlabIndex,
        grid: GridSettings,
        phase: Phase,
        *,
        seed: int,
        strengths: Strengths,
        targets: Targets = attention_target,
        min_pixels: int = MIN_CLOT_PIXELS,
    ) -> None:
        """Choose the positives of the phase and how often each is drawn."""
        self._targets = targets
        self._min_pixels = min_pixels
        self._grid = grid
        self._phase = phase
        self._seed = seed
        self._strengths = strengths
        self._negatives = index.negatives
        wanted = [r for r in index.positives if r.clot_pixels >= phase.min_clot_pixels]
        self._positives = wanted or index.positives
        areas = np.array([r.clot_pixels for r in self._positives], dtype=np.float64)
        weights = np.minimum(areas, np.quantile(areas, 0.95)) ** phase.area_power
        self._weights = weights / weights.sum()

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        rng = np.random.default_rng((self._seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        phase = self._phase
        positives = round(phase.batch * phase.shares.positive)
        paired = round(phase.batch * phase.shares.paired_negative)
        chosen: list[tuple[SlabRef, tuple[int, int]]] = []
        for _ in range(positives):
            ref = self._positives[int(rng.choice(len(self._positives), p=self._weights))]
            chosen.append((ref, self._corner_at_clot(ref, rng)))
        chosen += [(ref.twin, corner) for ref, corner in chosen[:paired]]
        while len(chosen) < phase.batch:
            ref = self._negatives[int(rng.integers(len(self._negatives)))]
            chosen.append((ref, self._any_corner(rng)))
        loaded = [
            load_slab(
                ref,
                self._grid,
                corner=corner,
                crop=phase.crop,
                strengths=self._strengths,
                generator=generator,
                targets=self._targets,
                min_pixels=self._min_pixels,
            )
            for ref, corner in chosen
        ]
        return _collated(loaded)

    def _any_corner(self, rng: np.random.Generator) -> tuple[int, int]:
        slack = (self._grid.rows - self._phase.crop, self._grid.cols - self._phase.crop)
        low = [s // 6 for s in slack]  # the rim of a plane is air
        return (
            int(rng.integers(low[0], slack[0] - low[0] + 1)),
            int(rng.integers(low[1], slack[1] - low[1] + 1)),
        )

    def _corner_at_clot(self, ref: SlabRef, rng: np.random.Generator) -> tuple[int, int]:
        """Corner of a crop that holds a random clot pixel of the middle plane, well inside."""
        crop = self._phase.crop
        half = self._grid.planes_per_slab // 2
        mask = ref.study.slab_mask(ref.middle, self._grid.planes_per_slab)[half]
        rows, cols = np.nonzero(mask)
        pixel = int(rng.integers(rows.size))
        jitter = rng.integers(-crop // 3, crop // 3 + 1, size=2)
        top = int(rows[pixel]) - crop // 2 + int(jitter[0])
        left = int(cols[pixel]) - crop // 2 + int(jitter[1])
        return (
            min(max(top, 0), self._grid.rows - crop),
            min(max(left, 0), self._grid.cols - crop),
        )


def _collated(samples: Sequence[Sample]) -> Batch:
    slabs = torch.stack([s.slab for s in samples])
    return Batch(
        slabs=slabs.contiguous(memory_format=torch.channels_last),
        labels=torch.tensor([s.label for s in samples]),
        target=torch.from_numpy(np.stack([s.target for s in samples])[:, None]),
        weight=torch.from_numpy(np.stack([s.weight for s in samples])[:, None]),
    )


def whole_slab(ref: SlabRef, grid: GridSettings) -> Batch:
    """One slab as the product sees it: whole, not augmented."""
    loaded = load_slab(
        ref, grid, corner=(0, 0), crop=grid.rows, strengths=OFF, generator=torch.Generator()
    )
    return _collated([loaded])


def prefetched(source: BatchSource, first: int, stop: int, depth: int = 3) -> Iterator[Batch]:
    """Batches ``first`` to ``stop - 1``, made ahead by one thread."""
    ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=depth)
    cancelled = threading.Event()

    def make() -> None:
        torch.set_num_threads(1)
        for step in range(first, stop):
            item: Batch | Exception
            try:
                item = source.batch(step)
            except Exception as exc:  # noqa: BLE001 - handed to the consumer
                item = exc
            while not cancelled.is_set():
                try:
                    ready.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if cancelled.is_set() or isinstance(item, Exception):
                return

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        for _ in range(first, stop):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        cancelled.set()
        thread.join()
