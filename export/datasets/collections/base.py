"""The form that collections of real studies come in, and how patients are split.

A reader makes `IndexedStudy` values of a folder; what comes after it (splits, counts, planes,
evaluation) knows no collection by name. Another collection is one more module with a class that has
the attributes of `Collection`, and a line in `export.datasets.collections.registry`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

from pydicom.dataset import Dataset

from pe_infer.errors import Code, ConfigurationError

Form: TypeAlias = Literal["dicom", "nifti", "nrrd"]
Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class IndexedStudy:
    """One study of a collection, by its labels and its files; no pixel has been read.

    Attributes:
        study: Identifier, unique in the collection.
        patient: Whose study it is: what is split, and drawn in a bootstrap.
        form: ``"dicom"``: files or folders of one study, of which the product's own rule chooses
            the series; ``"nifti"``, ``"nrrd"``: one volume in HU.
        files: Where it lies, relative to the collection's folder.
        positive: Whether the collection says that the finding is there.
        types: Kind of finding to whether it is there; empty if the collection does not say.
        slices: Label of every labelled slice: the kinds of finding it shows, none of them in a
            clean slice. By SOPInstanceUID; in a volume by number, from 1 on along its third axis.
            ``None`` if the collection labels studies only.
        mask: Volume with the voxels of the finding, on the lattice of the study; of DICOM files, a
            MATLAB file with a plane for each of ``files``; ``None`` without one.
    """

    study: str
    patient: str
    form: Form
    files: tuple[str, ...]
    positive: bool
    types: dict[str, bool] = field(default_factory=dict)
    slices: dict[str, tuple[str, ...]] | None = None
    mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Something of a collection that is not used.

    Attributes:
        what: File, folder or row, with its place.
        reason: Short and the same for all of a kind, for counting.
        message: What was found, what was expected, what can be done.
    """

    what: str
    reason: str
    message: str


@dataclass(kw_only=True)
class Found:
    """What a reader made of a folder.

    Attributes:
        studies: In an order that depends on the collection alone.
        left_out: Everything that is not used, and why.
    """

    studies: list[IndexedStudy] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, what: str, reason: str, message: str) -> None:
        """Note something that is not used."""
        self.left_out.append(LeftOut(what=what, reason=reason, message=message))


class Follow(Protocol):
    """Passes items through, e.g. to show progress."""

    def __call__(self, items: Iterable[Item], total: int) -> Iterable[Item]:
        """The same items in the same order; ``total`` of them."""


def unfollowed(items: Iterable[Item], total: int) -> Iterator[Item]:
    """A `Follow` that shows nothing."""
    del total
    yield from items


class Collection(Protocol):
    """A reader of one collection."""

    @property
    def name(self) -> str:
        """Key in the registry."""

    @property
    def terms(self) -> str:
        """Under which terms it is given, for the model card."""

    @property
    def repair(self) -> Callable[[Dataset], None] | None:
        """Changes a DICOM data set, in place, into one that the product's reader takes.

        For what the files of the collection are known to lack or to state wrongly; ``None`` if they
        are read as they are.
        """

    def index(self, root: Path, *, workers: int, follow: Follow) -> Found:
        """Read labels and headers.

        Args:
            root: Folder of the collection.
            workers: Processes that read headers.
            follow: Shows progress.

        Raises:
            ConfigurationError: The folder is not one of this collection.
            InputError: A table is not what the collection documents.
        """


@dataclass(frozen=True, kw_only=True)
class Fractions:
    """Shares of the patients that are held back; the rest is trained on.

    Raises:
        ConfigurationError: They are not shares, or leave nobody to train on.
    """

    validation: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not (min(self.validation, self.test) >= 0.0 and self.validation + self.test <= 1.0):
            raise ConfigurationError(
                f"validation={self.validation}, test={self.test}: shares of the patients, from 0 "
                "on and at most 1 together, are expected"
            )


def split_of(collection: str, patient: str, fractions: Fractions) -> Split:
    """Where a patient belongs: always the same place, whatever else the collection holds.

    The sha256 of the collection's name and the patient's identifier decides. All studies of a
    patient come to the same place.
    """
    digest = hashlib.sha256(f"{collection}\0{patient}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < fractions.test:
        return "test"
    return "validation" if draw < fractions.test + fractions.validation else "train"


def required(root: Path, names: Sequence[str], *, collection: str) -> Path:
    """The first of some files or folders that exists below ``root``.

    Raises:
        ConfigurationError: None of them does.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise ConfigurationError(
        f"{root}: holds no {' and no '.join(names)}, so it is not the folder of {collection}. Give "
        "--root the folder that the collection was unpacked into.",
        code=Code.INVALID_ARGUMENT,
    )
