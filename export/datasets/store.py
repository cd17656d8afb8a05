"""Studies on disk, already on the patient grid; slabs are cut from them without copying.

A store is a folder with one folder per study::

    STORE/0000042-positive/
        planes.npy   (planes, rows, cols) int16, HU
        mask.npy     (planes, rows, ceil(cols / 8)) uint8, clot mask, bits packed
        study.json   seed, positions, slabs, what the phantom says of itself
    STORE/0000042-negative/
        the same patient without the emboli; no mask

Studies are written to a temporary name and renamed, so that a folder is complete or absent.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pe_infer import preprocess
from pe_infer.errors import Code, InputError
from pe_infer.geometry import PatientGrid

POSITIVE, NEGATIVE = "positive", "negative"
UNLABELLED: Final = -100  # label of a plane that is neither positive nor negative
UNKNOWN_PIXELS: Final = -1  # pixels of a plane of which no mask says how much of the finding it has


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What ``study.json`` holds.

    Attributes:
        seed: Seed of the phantom; a positive study and its negative twin share it.
        positive: Whether the study has emboli.
        positions_um: (planes,) position of every plane, ascending.
        slab_planes: Index of the middle plane of every slab that passed the gate, ascending.
        clot_pixels: (planes,) clot pixels of every plane; ``UNKNOWN_PIXELS`` where a real study has
            the finding, or may have it, and no mask says where.
        preprocessing_version: Version of the kernel that made the planes.
        phantom: Free description.
        plane_labels: (planes,) 1, 0 or ``UNLABELLED``, where somebody labelled slices and not
            pixels; ``None`` elsewhere.
    """

    seed: int
    positive: bool
    positions_um: list[int]
    slab_planes: list[int]
    clot_pixels: list[int]
    preprocessing_version: int
    phantom: dict[str, Any]
    plane_labels: list[int] | None = None


def grid_digest(grid: PatientGrid) -> str:
    """Names the grid of a store."""
    return hashlib.sha256(repr(grid).encode()).hexdigest()[:12]


def study_name(seed: int, *, positive: bool) -> str:
    """Folder name of a study."""
    return f"{seed:07d}-{POSITIVE if positive else NEGATIVE}"


@dataclass(frozen=True)
class StoredStudy:
    """One study of a store; arrays are mapped, not read."""

    folder: Path

    @cached_property
    def record(self) -> StudyRecord:
        """The description of the study.

        Raises:
            InputError: Another version of the kernel made its planes.
        """
        path = self.folder / "study.json"
        record = StudyRecord(**json.loads(path.read_text()))
        if record.preprocessing_version != preprocess.VERSION:
            raise InputError(
                f"{path}: planes of preprocessing version {record.preprocessing_version}, expected "
                f"{preprocess.VERSION}. Make the store again.",
                code=Code.INVALID_ARGUMENT,
            )
        return record

    @cached_property
    def planes_hu(self) -> NDArray[np.int16]:
        """(planes, rows, cols) int16 HU, memory-mapped."""
        planes: NDArray[np.int16] = np.load(self.folder / "planes.npy", mmap_mode="r")
        return planes

    @cached_property
    def packed_mask(self) -> NDArray[np.uint8] | None:
        """Packed clot mask, memory-mapped; ``None`` for a negative study."""
        path = self.folder / "mask.npy"
        return np.load(path, mmap_mode="r") if path.exists() else None

    def slab_hu(self, middle: int, planes_per_slab: int) -> NDArray[np.int16]:
        """(planes_per_slab, rows, cols) HU around a middle plane."""
        half = planes_per_slab // 2
        return self.planes_hu[middle - half : middle + half + 1]

    def slab_mask(self, middle: int, planes_per_slab: int) -> NDArray[np.bool_]:
        """(planes_per_slab, rows, cols) clot mask around a middle plane."""
        half = planes_per_slab // 2
        packed = self.packed_mask
        if packed is None:
            return np.zeros((planes_per_slab, *self.planes_hu.shape[1:]), dtype=np.bool_)
        cols = self.planes_hu.shape[2]
        rows = packed[middle - half : middle + half + 1]
        return np.unpackbits(rows, axis=-1, count=cols).astype(np.bool_)


@dataclass(frozen=True)
class StudyPair:
    """A positive study and the same patient without emboli."""

    positive: StoredStudy
    negative: StoredStudy

    @property
    def seed(self) -> int:
        """Seed that both share."""
        return self.positive.record.seed


@dataclass(frozen=True)
class Studies:
    """What one source of training data holds.

    Attributes:
        studies: In an order that only grows at its end; both studies of a pair follow each other,
            the positive one first.
        share: Of what is drawn; the shares of all sources add up to 1.
        paired: Whether they are pairs of one patient.
    """

    studies: tuple[StoredStudy, ...]
    share: float = 1.0
    paired: bool = True

    @property
    def pairs(self) -> list[StudyPair]:
        """The pairs, if that is what they are."""
        return [
            StudyPair(positive, negative)
            for positive, negative in zip(self.studies[::2], self.studies[1::2], strict=True)
        ]


def of_pairs(pairs: Sequence[StudyPair], share: float = 1.0) -> Studies:
    """Pairs as a source."""
    both = tuple(study for pair in pairs for study in (pair.positive, pair.negative))
    return Studies(both, share)


def write_study(
    store: Path, record: StudyRecord, planes_hu: NDArray[np.int16], mask: NDArray[np.bool_] | None
) -> Path:
    """Write one study; the folder appears complete or not at all.

    Args:
        store: Folder of the store, created if absent.
        record: Description.
        planes_hu: (planes, rows, cols) int16.
        mask: (planes, rows, cols) clot mask, or ``None``.

    Returns:
        Folder of the study.
    """
    folder = store / study_name(record.seed, positive=record.positive)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    np.save(draft / "planes.npy", planes_hu)
    if mask is not None:
        np.save(draft / "mask.npy", np.packbits(mask, axis=-1))
    (draft / "study.json").write_text(json.dumps(asdict(record)))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def open_pairs(
    store: Path, *, first_seed: int, pairs: int, limit: int | None = None, painted: bool = False
) -> list[StudyPair]:
    """Pairs of a store whose seeds lie in a range, in the order of their seeds.

    Only the unbroken run of complete pairs from ``first_seed`` on is returned, so that the list
    only ever grows at its end while the store is being written.

    Args:
        store: Folder of the store.
        first_seed: First seed of the range.
        pairs: Length of the range.
        limit: Return no more than this many.
        painted: Whether they are painted into real studies, for the error.

    Raises:
        InputError: The store has no complete pair in the range.
    """
    found: list[StudyPair] = []
    for seed in range(first_seed, first_seed + pairs):
        folders = [store / study_name(seed, positive=p) for p in (True, False)]
        if not all((f / "study.json").exists() for f in folders) or len(found) == limit:
            break
        found.append(StudyPair(StoredStudy(folders[0]), StoredStudy(folders[1])))
    if not found:
        command = "generate_semisynthetic" if painted else "generate"
        raise InputError(
            f"{store}: no pair of studies from seed {first_seed} on. Make them with "
            f"'python -m export.datasets.{command} --config DATA.toml --out {store}'.",
            code=Code.INVALID_ARGUMENT,
        )
    return found
