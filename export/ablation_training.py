"""The trainings of an ablation: every row with every seed, one after another.

What is finished is not done again, what was stopped is taken up. In the folder of the ablation::

    seed1/A/            run of stage 1, by the settings A.toml
    seed1/A+B/          run of stage 2, by B.toml, on the features of the former
    seed1/features-A/   those features, until everything that reads them is done
    seed1/A.json        what stage 1 by itself says of validation and test pairs
    seed1/A+B.json      what both stages say of them
    seed1/A@peak.json   what the highest attention of stage 1 says of them
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import track

from export.ablation_scores import Row, Scorer, score
from export.ablation_table import Level, Scores, Training
from export.datasets.generate import store_pair
from export.datasets.store import StudyPair, open_pairs, study_name
from export.systems.registry import load_study_settings, system_of
from export.training.checkpoint import load_checkpoint
from export.training.config import (
    DataSettings,
    Settings,
    Stage1Settings,
    StudySettings,
    load_data_settings,
    load_settings,
)
from export.training.features import CACHE_FILE
from export.training.stage1 import Stage1Run
from export.training.stage2 import FEATURES_FOLDER, Stage2Run, load_stage1
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import Phantom, open_phantom

Stop = Callable[[], bool]
SETS = ("validation", "test")


class RowSettings(Settings):
    """A line of the table.

    Attributes:
        name: Of the line.
        stage1: File with its settings, in the folder of the ablation's own.
        stage2: The same; ``None``: stage 1 by itself.
        peak: Stage 1 by itself is read by its highest attention, not by its probability.
        paper: The paper's own numbers: level to measure to value.
    """

    name: str
    stage1: str
    stage2: str | None = None
    peak: bool = False
    paper: dict[Level, dict[str, float]] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names its files."""
        parts = [self.stage1] if self.stage2 is None else [self.stage1, self.stage2]
        return "+".join(Path(part).stem for part in parts) + "@peak" * self.peak

    @model_validator(mode="after")
    def _by_itself(self) -> "RowSettings":
        if self.peak and self.stage2 is not None:
            message = f"row {self.name!r}: peak is of stage 1 by itself, and it has a stage2"
            raise ValueError(message)
        return self


class EffectSettings(Settings):
    """What the paper finds: one row above another.

    Attributes:
        name: What makes the difference.
        level: At which the AUC are compared.
        row: The better one.
        over: The other one.
    """

    name: str
    level: Level
    row: str
    over: str


class AblationSettings(Settings):
    """An ablation.

    Attributes:
        data: File with the data settings of validation and test.
        phantom: File with the configuration of the phantom; ``None`` is the default one.
        source: Of the paper's numbers.
        note: What a reader of the table has to know: sizes, and what does not mirror the paper.
        pairs: Of the test, from its first seed on.
        seeds: Of the trainings.
        row: Lines of the table.
        effect: What is compared.
    """

    data: str
    phantom: str | None = None
    source: str
    note: str = ""
    pairs: int = Field(default=100, ge=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    row: tuple[RowSettings, ...] = Field(min_length=1)
    effect: tuple[EffectSettings, ...] = ()

    @model_validator(mode="after")
    def _named(self) -> "AblationSettings":
        names = [row.name for row in self.row]
        for kind, values in (
            ("names of rows", names),
            ("stages of rows", [row.key for row in self.row]),
            ("seeds", [str(seed) for seed in self.seeds]),
        ):
            if len(set(values)) < len(values):
                message = f"{kind}: {values}: every one may be there once"
                raise ValueError(message)
        for effect in self.effect:
            for name in {effect.row, effect.over} - set(names):
                message = f"effect {effect.name!r} is of a row {name!r}; there are {names}"
                raise ValueError(message)
        return self


@dataclass(frozen=True)
class Yardstick:
    """What all trainings of an ablation are scored on.

    Attributes:
        data: Grid, validation and test seeds.
        pairs: Set to its pairs.
        phantom: Digest of the configuration that made the test pairs.
    """

    data: DataSettings
    pairs: Mapping[str, Sequence[StudyPair]]
    phantom: str

    @classmethod
    def prepare(
        cls,
        data: DataSettings,
        phantom: Phantom,
        count: int,
        store: Path,
        held_out: Path,
        *,
        workers: int,
        console: Console,
    ) -> "Yardstick":
        """Make the test pairs that are not there yet, and open both sets.

        Raises:
            ConfigurationError: The folder's pairs are of another phantom, or the data settings hold
                back fewer.
            InputError: The store has no pair to validate on.
        """
        seeds = list(data.test.seeds)[:count]
        if len(seeds) < count:
            raise ConfigurationError(
                f"{count} test pairs are asked for, {data.name!r} holds back {len(seeds)}"
            )
        grid = data.grid.to_grid()
        missing = []
        for seed in seeds:
            folders = [held_out / study_name(seed, positive=positive) for positive in (True, False)]
            if all((folder / "study.json").exists() for folder in folders):
                store_pair(held_out, seed, grid, phantom)  # only looks what made it
            else:
                missing.append(seed)
        if missing:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(store_pair, held_out, seed, grid, phantom) for seed in missing]
                try:
                    for job in track(jobs, "test pairs are made", console=console):
                        job.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        sets = {}
        for name, folder, number in (
            ("validation", store, data.validation.pairs),
            ("test", held_out, count),
        ):
            first = getattr(data, name).first_seed
            sets[name] = open_pairs(folder, first_seed=first, pairs=number)
        return cls(data, sets, phantom.digest())

    def facts(self) -> dict[str, Any]:
        """What scores depend on beside the networks."""
        seeds = {name: [pairs[0].seed, len(pairs)] for name, pairs in self.pairs.items()}
        return {"phantom": self.phantom, **seeds}


class Ablation:
    """All trainings of an ablation, in a folder."""

    def __init__(
        self, config: Path, store: Path, out: Path, *, threads: int, console: Console
    ) -> None:
        """Read the settings; nothing is trained yet.

        Args:
            config: File of `AblationSettings`; the files that it names lie beside it.
            store: What is trained and validated on.
            out: Folder of the ablation.
            threads: Of the engine.
            console: Shows progress.

        Raises:
            ConfigurationError: Settings are not valid.
        """
        self.settings = load_settings(config, AblationSettings)
        self.data = load_data_settings(config, self.settings.data)
        self.phantom = phantom_of(config, self.settings, self.data)
        self._beside = config.parent
        self._store, self._out = store, out
        self._threads, self._console = threads, console

    def check_store(self, rows: Sequence[RowSettings]) -> None:
        """Refuse a store that rows cannot be trained on: all trainings have to see the same pairs.

        Raises:
            ConfigurationError: Pairs are missing, or were made by another phantom than test pairs.
            InputError: There are none.
        """
        wanted: dict[tuple[int, int], str] = {}
        for row in rows:
            one = self._stage1_settings(row, seed=0)
            data = load_data_settings(self._beside / row.stage1, one.data)
            wanted[data.train.first_seed, data.train.pairs] = row.stage1
            wanted[data.validation.first_seed, one.validation_pairs] = row.stage1
            if row.stage2:
                two = self._stage2_settings(row.stage2, seed=0)
                data = load_data_settings(self._beside / row.stage2, two.data)
                wanted[data.train.first_seed, two.train_pairs] = row.stage2
                wanted[data.validation.first_seed, two.validation_pairs] = row.stage2
        for (first, count), name in wanted.items():
            found = open_pairs(self._store, first_seed=first, pairs=count)
            if len(found) < count:
                raise ConfigurationError(
                    f"{self._store}: {len(found)} pairs from seed {first} on, {name} asks for "
                    f"{count}, and all trainings have to see the same. Make the others with "
                    "'python -m export.datasets.generate'."
                )
            made = str(found[0].positive.record.phantom.get("configuration"))
            if made != self.phantom.digest():
                raise ConfigurationError(
                    f"{found[0].positive.folder} was made with phantom configuration {made[:12]}, "
                    f"the ablation is tested on {self.phantom.digest()[:12]}"
                )

    def run(self, rows: Sequence[RowSettings], yardstick: Yardstick, stop: Stop) -> bool:
        """Train and score what is not done yet; returns whether everything is.

        Raises:
            ConfigurationError: A run in the folder has other settings than now.
        """
        for seed in self.settings.seeds:
            for name in dict.fromkeys(row.stage1 for row in rows):
                group = [row for row in rows if row.stage1 == name]
                if not self._group(group, seed, yardstick, stop):
                    return False
        return True

    def trainings(self, row: RowSettings, yardstick: Yardstick) -> list[Training]:
        """What is known of a row on these pairs, by seed."""
        found = []
        for seed in self.settings.seeds:
            path = self._folder(seed) / f"{row.key}.json"
            content = json.loads(path.read_text()) if path.exists() else {}
            if content.get("measured_on") == yardstick.facts():
                sets = [Scores.from_json(content[name]) for name in SETS]
                found.append(Training(seed, *sets))
        return found

    def _folder(self, seed: int) -> Path:
        return self._out / f"seed{seed}"

    def _group(
        self, rows: Sequence[RowSettings], seed: int, yardstick: Yardstick, stop: Stop
    ) -> bool:
        """Rows of one first stage."""
        stage1 = self._stage1(rows[0], seed, stop)
        if stage1 is None:
            return False
        checkpoints: list[Row] = []
        for row in rows:
            stage2 = self._stage2(row, row.stage2, seed, stage1, stop) if row.stage2 else None
            if row.stage2 and stage2 is None:
                return False
            checkpoints.append(Row(row.name, stage1, stage2, row.peak))
        if not self._score(rows, checkpoints, seed, yardstick, stop):
            return False
        shutil.rmtree(self._features(rows[0], seed), ignore_errors=True)
        return True

    def _features(self, row: RowSettings, seed: int) -> Path:
        return self._folder(seed) / f"features-{Path(row.stage1).stem}"

    def _stage1_settings(self, row: RowSettings, seed: int) -> Stage1Settings:
        settings = load_settings(self._beside / row.stage1, Stage1Settings)
        return settings.model_copy(update={"seed": seed})

    def _stage2_settings(self, name: str, seed: int) -> StudySettings:
        return load_study_settings(self._beside / name).model_copy(update={"seed": seed})

    def _stage1(self, row: RowSettings, seed: int, stop: Stop) -> Path | None:
        """The best weights of a run of stage 1; ``None`` if it was stopped."""
        settings = self._stage1_settings(row, seed)
        data = load_data_settings(self._beside / row.stage1, settings.data)
        run = self._folder(seed) / Path(row.stage1).stem
        at = _progression(run, settings, data)
        last = settings.phase[-1].steps, len(settings.phase) - 1
        if at is None or (at["phase_step"], at["phase"]) != last:
            self._console.print(f"{row.stage1}, seed {seed}", markup=False)
            training = Stage1Run(settings, data, self._store, run, resume=at is not None)
            training.train(stop, self._console)
            if not training.finished:
                return None
        return run / "best.pt"

    def _stage2(
        self, row: RowSettings, name: str, seed: int, stage1: Path, stop: Stop
    ) -> Path | None:
        """The best weights of a run of stage 2; ``None`` if it was stopped."""
        settings = self._stage2_settings(name, seed)
        data = load_data_settings(self._beside / name, settings.data)
        run = self._folder(seed) / row.key
        at = _progression(run, settings, data)
        if at is None or at["epoch"] < settings.epochs:
            self._console.print(f"{row.key}, seed {seed}", markup=False)
            system, features = system_of(settings), self._features(row, seed)
            task = system.study_task(
                settings,
                data,
                self._store,
                features,
                load_stage1(stage1, data, system),
                self._console,
                stage1_sha256=_sha256(stage1),
                threads=self._threads,
            )
            known = run / FEATURES_FOLDER / CACHE_FILE  # says which stage 1 the run belongs to
            if not known.exists():
                known.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(features / CACHE_FILE, known)
            training = Stage2Run(settings, data, task, run, resume=at is not None)
            training.train(stop, self._console)
            if not training.finished:
                return None
        return run / "best.pt"

    def _score(
        self,
        rows: Sequence[RowSettings],
        checkpoints: Sequence[Row],
        seed: int,
        yardstick: Yardstick,
        stop: Stop,
    ) -> bool:
        paths = [self._folder(seed) / f"{row.key}.json" for row in rows]
        facts = [
            {
                "measured_on": yardstick.facts(),
                "sha256": [_sha256(p) for p in (row.stage1, row.stage2) if p is not None],
            }
            for row in checkpoints
        ]
        if all(_known(path, fact) for path, fact in zip(paths, facts, strict=True)):
            return True
        scorer = Scorer(checkpoints, yardstick.data, self._threads)
        found = score(scorer, yardstick.pairs, self._console, stop)
        if found is None:
            return False
        for path, fact, sets in zip(paths, facts, found, strict=True):
            draft = path.with_suffix(".draft")
            scores = {name: asdict(one) for name, one in sets.items()}
            draft.write_text(json.dumps({**fact, **scores}, allow_nan=False))
            draft.replace(path)
        return True


def phantom_of(config: Path, settings: AblationSettings, data: DataSettings) -> Phantom:
    """What makes the pairs of an ablation.

    Raises:
        ConfigurationError: Its configuration is not valid.
    """
    named = config.parent / settings.phantom if settings.phantom else None
    return open_phantom(data.phantom, named)


def _progression(run: Path, settings: Settings, data: DataSettings) -> dict[str, Any] | None:
    """Where a run stands; ``None`` if it has not begun.

    Raises:
        ConfigurationError: It has other settings.
    """
    path = run / "checkpoint.pt"
    if not path.exists():
        return None
    content = load_checkpoint(path)
    for name, now in (("settings", settings), ("data", data)):
        if content[name] != now.model_dump(mode="json"):
            raise ConfigurationError(
                f"{path} was trained with other {name} than those that are given now: name "
                "another --out, or restore the files"
            )
    progression: dict[str, Any] = content["progression"]
    return progression


def _known(path: Path, facts: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    content = json.loads(path.read_text())
    return all(content.get(name) == value for name, value in facts.items())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
