"""Batches of stage 1: which slabs, where they are cropped, and their targets.

Batch number ``s`` of a run depends on the seed, on ``s`` and on the studies in use, on nothing
else: a resumed run sees the same batches.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.datasets.augment import OFF, Strengths, augmented, slab_of
from export.datasets.labels import (
    MIN_CLOT_PIXELS,
    UNSURE,
    Label,
    attention_target,
    slab_label,
    slab_labels,
)
from export.datasets.store import UNKNOWN_PIXELS, StoredStudy, Studies, StudyPair, of_pairs
from export.training.config import GridSettings, Phase
from pe_infer.errors import ConfigurationError


@dataclass(frozen=True)
class SlabRef:
    """One slab of a store.

    Attributes:
        study: It is cut from.
        middle: Index of its middle plane.
        clot_pixels: Clot pixels of the middle plane; ``UNKNOWN_PIXELS`` where a label of the plane
            says that there are some and no mask says where.
        other: The same patient without emboli, if ``study`` is a phantom that has them.
    """

    study: StoredStudy
    middle: int
    clot_pixels: int
    other: StoredStudy | None = None

    @property
    def masked(self) -> bool:
        """Whether it is known which pixels show the finding."""
        return self.clot_pixels != UNKNOWN_PIXELS

    @property
    def twin(self) -> "SlabRef | None":
        """The same place in the same patient without emboli, if there is one."""
        return SlabRef(self.other, self.middle, 0) if self.other else None


@dataclass(frozen=True)
class SlabIndex:
    """All usable slabs of one source.

    Attributes:
        positives: With the finding.
        negatives: Without it.
        share: Of the source, of what is drawn.
    """

    positives: list[SlabRef]
    negatives: list[SlabRef]
    share: float = 1.0


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
    source: Studies | Sequence[StudyPair], planes_per_slab: int, min_pixels: int = MIN_CLOT_PIXELS
) -> SlabIndex:
    """Sort slabs that passed the gate into positives and negatives; doubtful ones are left out."""
    studies = source if isinstance(source, Studies) else of_pairs(source)
    positives: list[SlabRef] = []
    negatives: list[SlabRef] = []
    for place, study in enumerate(studies.studies):
        record = study.record
        twin = studies.studies[place + 1] if studies.paired and record.positive else None
        labels = slab_labels(
            record.clot_pixels,
            record.plane_labels,
            record.slab_planes,
            planes_per_slab,
            min_pixels,
        )
        for middle, label in zip(record.slab_planes, labels, strict=True):
            if label == "positive":
                positives.append(SlabRef(study, middle, record.clot_pixels[middle], twin))
            elif label == "negative":
                negatives.append(SlabRef(study, middle, 0))
    return SlabIndex(positives, negatives, studies.share)


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

    Where no mask says which pixels show the finding, the sample is positive by its label, and no
    cell has a weight: a crop of it may not show the finding, only the whole plane may be asked for.

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
    if not ref.masked and crop != grid.rows:
        raise ValueError(f"a crop of {crop} pixels of a slab without a mask has no label")
    mask = np.zeros(hu.shape, dtype=np.bool_)
    if ref.clot_pixels > 0:
        mask = np.ascontiguousarray(
            ref.study.slab_mask(ref.middle, grid.planes_per_slab)[:, rows, cols]
        )
    clot_pixels = mask.sum(axis=(1, 2), dtype=np.int64)
    label: Label = "positive"
    if ref.masked:
        half = grid.planes_per_slab // 2
        label = slab_label(clot_pixels, half, grid.planes_per_slab, min_pixels)
    changed, moved = augmented(
        torch.from_numpy(hu),
        torch.from_numpy(mask),
        strengths,
        generator,
        positive=label != "negative",
    )
    target, weight = targets(moved.numpy())
    if not ref.masked:
        weight = np.zeros_like(weight)
    return Sample(slab_of(changed, grid.window_bounds), CLASSES[label], target, weight)


class SlabDraw:
    """Draws slabs of one source for one phase.

    Attributes:
        positives: That the phase takes.
        negatives: All.
        share: Of the source.
    """

    def __init__(self, index: SlabIndex, grid: GridSettings, phase: Phase) -> None:
        """Choose the positives of the phase and how often each is drawn."""
        self.negatives = index.negatives
        whole = phase.crop == grid.rows
        usable = [r for r in index.positives if r.masked or whole]
        wanted = [r for r in usable if r.clot_pixels >= phase.min_clot_pixels or not r.masked]
        self.positives = wanted or usable
        self.share = index.share
        if not self.positives:
            return
        known = [r.clot_pixels for r in self.positives if r.masked]
        typical = float(np.median(known)) if known else 1.0
        areas = np.array(
            [r.clot_pixels if r.masked else typical for r in self.positives], dtype=np.float64
        )
        weights = np.minimum(areas, np.quantile(areas, 0.95)) ** phase.area_power
        self._weights = weights / weights.sum()

    def positive(self, rng: np.random.Generator) -> SlabRef:
        """A slab with the finding."""
        return self.positives[int(rng.choice(len(self.positives), p=self._weights))]

    def negative(self, rng: np.random.Generator) -> SlabRef:
        """A slab without it."""
        return self.negatives[int(rng.integers(len(self.negatives)))]


class BatchSource:
    """Makes the batch of any step of a phase.

    Positives and negatives are drawn from the sources by the same shares, so that the source of a
    slab says nothing of its label. It may where a source has one of both only: then the other
    sources' shares of those grow.
    """

    def __init__(
        self,
        index: SlabIndex | Sequence[SlabIndex],
        grid: GridSettings,
        phase: Phase,
        *,
        seed: int,
        strengths: Strengths,
        targets: Targets = attention_target,
        min_pixels: int = MIN_CLOT_PIXELS,
    ) -> None:
        """Choose the positives of the phase and how often each is drawn.

        Raises:
            ConfigurationError: A source has no slab that the phase can take.
        """
        indices = [index] if isinstance(index, SlabIndex) else index
        draws = [SlabDraw(each, grid, phase) for each in indices]
        self._positive = [draw for draw in draws if draw.positives]
        self._negative = [draw for draw in draws if draw.negatives]
        if not self._positive or not self._negative:
            positives, negatives = (
                sum(len(slabs) for slabs in side)
                for side in ([i.positives for i in indices], [i.negatives for i in indices])
            )
            raise ConfigurationError(
                f"phase {phase.name!r} needs positive and negative slabs, and there are "
                f"{positives} and {negatives}. Those that have a label and no mask need crop = "
                f"{grid.rows}, the whole plane; it is {phase.crop}."
            )
        self._targets = targets
        self._min_pixels = min_pixels
        self._grid = grid
        self._phase = phase
        self._seed = seed
        self._strengths = strengths

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        rng = np.random.default_rng((self._seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        phase = self._phase
        positives = round(phase.batch * phase.shares.positive)
        paired = round(phase.batch * phase.shares.paired_negative)
        chosen: list[tuple[SlabRef, tuple[int, int]]] = []
        drawn: list[SlabDraw] = []
        for _ in range(positives):
            drawn.append(drawn_source(self._positive, rng))
            ref = drawn[-1].positive(rng)
            corner = self._corner_at_clot(ref, rng) if ref.masked else (0, 0)
            chosen.append((ref, corner))
        for (ref, corner), draw in zip(chosen[:paired], drawn, strict=False):
            if ref.twin:
                chosen.append((ref.twin, corner))
            else:
                other = draw if draw.negatives else drawn_source(self._negative, rng)
                chosen.append((other.negative(rng), self._any_corner(rng)))
        while len(chosen) < phase.batch:
            ref = drawn_source(self._negative, rng).negative(rng)
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


class Shared(Protocol):
    """Something with a share of what is drawn."""

    @property
    def share(self) -> float:
        """Above 0."""


Source = TypeVar("Source", bound=Shared)


def drawn_source(sources: Sequence[Source], rng: np.random.Generator) -> Source:
    """One of the sources by its share; nothing is drawn where there is only one."""
    if len(sources) == 1:
        return sources[0]
    shares = np.array([source.share for source in sources])
    return sources[int(rng.choice(len(sources), p=shares / shares.sum()))]


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
