"""The studies of a run: pairs of a phantom that differ by the finding, and real ones, one by one.

Real studies come from stores of ``export.datasets.preprocess``. Their patients were split when the
collection was indexed; here it is checked that a store's studies are where the settings put them,
so that a patient who is validated or tested on is never trained on. Pairs have to be what the
settings say too: of phantoms, or painted into the real studies that they name, so that the model
card can name them.
"""

from collections.abc import Sequence
from pathlib import Path

from export.datasets.collections.base import Fractions, Split, split_of
from export.datasets.store import (
    StoredStudy,
    Studies,
    StudyPair,
    grid_digest,
    of_pairs,
    open_pairs,
)
from export.training.config import (
    BackgroundSettings,
    DataSettings,
    SourceSettings,
    SplitSettings,
)
from pe_infer.errors import Code, ConfigurationError, InputError


def open_sources(
    data: DataSettings,
    folder: Path,
    split: Split,
    *,
    pairs: int | None = None,
    annotated_only: bool = False,
) -> list[Studies]:
    """The studies of one split, by source.

    Args:
        data: Which.
        folder: The store, or the one that the stores of the sources lie in.
        split: ``"train"`` or ``"validation"``.
        pairs: Return no more pairs; of real studies, no more positive and no more negative ones.
        annotated_only: Leave out positive real studies without a mask.

    Raises:
        ConfigurationError: A store has not all pairs that the settings name, is of another
            collection, grid or background, or its patients were split otherwise.
        InputError: A store has no study of the split.
    """
    seeds: SplitSettings = getattr(data, split)
    if not data.source:
        found = open_pairs(
            folder,
            first_seed=seeds.first_seed,
            pairs=seeds.pairs,
            limit=pairs,
            painted=bool(data.backgrounds),
        )
        _refuse_others(found, data, data.backgrounds)
        return [of_pairs(found)]
    wanted = [
        source
        for source in data.source
        if split == "train" or source.collection or not (data.unpaired or source.train)
    ]
    if not wanted:
        raise ConfigurationError(
            f"{data.name!r}: every source is trained on only, none is left to validate on"
        )
    return [
        _real(source, data, folder / source.store, split, pairs, annotated_only=annotated_only)
        if source.collection
        else of_pairs(
            _all_pairs(folder / source.store, data, source, source.train or seeds, pairs),
            source.share,
        )
        for source in wanted
    ]


def _all_pairs(
    store: Path, data: DataSettings, source: SourceSettings, seeds: SplitSettings, limit: int | None
) -> list[StudyPair]:
    """Pairs of a store that has to be complete: what is drawn depends on how many there are."""
    count = seeds.pairs if limit is None else min(limit, seeds.pairs)
    found = open_pairs(
        store,
        first_seed=seeds.first_seed,
        pairs=seeds.pairs,
        limit=count,
        painted=bool(source.backgrounds),
    )
    if len(found) < count:
        raise ConfigurationError(
            f"{store}: {len(found)} pairs from seed {seeds.first_seed} on, the settings name "
            f"{count}. A store that is one of several has to be complete: make the others."
        )
    _refuse_others(found, data, source.backgrounds)
    return found


def _refuse_others(
    pairs: Sequence[StudyPair], data: DataSettings, backgrounds: Sequence[BackgroundSettings]
) -> None:
    """Refuse pairs that are not made of what the settings say.

    Raises:
        ConfigurationError: They were painted into other real studies than the backgrounds, or they
            are phantoms and there are backgrounds; or they are of another grid, as far as the store
            says: older ones do not.
    """
    expected: set[str | None] = {each.source for each in backgrounds} or {None}
    grid = grid_digest(data.grid.to_grid())
    for study in (study for pair in pairs for study in (pair.positive, pair.negative)):
        if (made_on := study.record.phantom.get("grid", grid)) != grid:
            raise ConfigurationError(
                f"{study.folder}: grid {made_on!r}, expected {grid!r} of {data.name!r}: make the "
                "store again with these settings"
            )
        found = study.record.phantom.get("semi-synthetic")
        if found not in expected:
            made = f"was painted into a study of {found!r}" if found else "is a phantom"
            named = ", ".join(repr(each.source) for each in backgrounds) or "none"
            raise ConfigurationError(
                f"{study.folder}: {made}, the backgrounds that {data.name!r} names for it are "
                f"{named}. Give folder and source of those that the store was made of as "
                "'backgrounds' of its [[source]], or of the settings where there is no source: "
                "the model card names them."
            )


def _real(
    source: SourceSettings,
    data: DataSettings,
    store: Path,
    split: Split,
    limit: int | None,
    *,
    annotated_only: bool,
) -> Studies:
    """Real studies of one split, those of a limit spread over the store."""
    grid = grid_digest(data.grid.to_grid())
    positives: list[StoredStudy] = []
    negatives: list[StoredStudy] = []
    for folder in sorted(path.parent for path in store.glob("[0-9]*/study.json")):
        study = StoredStudy(folder)
        if _split(study, source, grid) != split:
            continue
        if not study.record.positive:
            negatives.append(study)
        elif not annotated_only or study.packed_mask is not None:
            positives.append(study)
    if not positives and not negatives:
        raise InputError(
            f"{store}: no study of {source.collection} to {split} on. Make it with 'python -m "
            "export.datasets.preprocess --split all'.",
            code=Code.INVALID_ARGUMENT,
        )
    chosen = (*_spread(positives, limit), *_spread(negatives, limit))
    return Studies(chosen, source.share, paired=False)


def _split(study: StoredStudy, source: SourceSettings, grid: str) -> Split:
    """Where the patient of a real study belongs.

    Raises:
        ConfigurationError: The study is of another collection, grid or division.
    """
    facts = study.record.phantom
    expected = {"collection": source.collection, "grid": grid}
    for name, value in expected.items():
        if facts.get(name) != value:
            raise ConfigurationError(
                f"{study.folder}: {name} {facts.get(name)!r}, expected {value!r} of the settings"
            )
    fractions = Fractions(validation=source.validation, test=source.test)
    own = split_of(str(source.collection), str(facts["patient"]), fractions)
    if facts.get("split") != own:
        raise ConfigurationError(
            f"{study.folder}: was indexed for {facts.get('split')!r}, with validation = "
            f"{source.validation} and test = {source.test} it is for {own!r}. Give the source the "
            "fractions of the index."
        )
    return own


def _spread(studies: Sequence[StoredStudy], limit: int | None) -> list[StoredStudy]:
    if limit is None or len(studies) <= limit:
        return list(studies)
    return [studies[len(studies) * number // limit] for number in range(limit)]
