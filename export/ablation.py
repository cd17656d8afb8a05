"""What the parts of a system contribute, in the shape of its paper's ablation.

``python -m export.ablation run --config export/configs/pe-ablation.toml --data STORE``
``--held-out DIR --out DIR`` trains every row with every seed, scores it, and writes the table. It
can be stopped at any time (``--minutes``, a signal) and goes on when it is given again; ``--only``
names the rows to train. The table has what is finished.

``python -m export.ablation score --config export/configs/ich-ablation.toml --data STORE``
``--held-out DIR --out DIR --row "DenseNet=A.pt" --row "+ recurrence=B.pt,C.pt"`` makes the table of
checkpoints that are there. A row that is named more than once has several trainings.

Thresholds are chosen on the validation pairs of the store, everything is measured on test pairs,
which are made in ``--held-out`` where they are not there yet. Writes ``ablation.json`` and
``ablation.md``, which ``export.bundle --section`` puts into the model card.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from export.ablation_scores import Row, Scorer, score
from export.ablation_table import (
    Training,
    effect_of,
    markdown,
    paper_difference,
    row_summary,
)
from export.ablation_training import (
    SETS,
    Ablation,
    AblationSettings,
    RowSettings,
    Yardstick,
    phantom_of,
)
from export.command_line import (
    ConfigOption,
    MinutesOption,
    StoreOption,
    ThreadsOption,
    reported,
    stopping,
)
from export.training.config import load_data_settings, load_settings
from pe_infer.errors import Code, InputError

HeldOutOption = Annotated[Path, typer.Option(help="Folder of the test pairs; made as needed.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the ablation.")]
PairsOption = Annotated[
    int | None, typer.Option(help="Test pairs, in place of those of the settings.", min=1)
]

app = typer.Typer(no_args_is_help=True, add_completion=False)


def document_of(
    settings: AblationSettings, trained: Mapping[str, Sequence[Training]], yardstick: Yardstick
) -> dict[str, Any]:
    """Table, effects and scores, for JSON.

    Args:
        settings: Say what is compared, and what the paper has.
        trained: Row to its trainings.
        yardstick: What they were scored on.

    Raises:
        InputError: There is no training.
    """
    there = {name: trainings for name, trainings in trained.items() if trainings}
    if not there:
        raise InputError(
            "no row is trained and scored yet: there is no table", code=Code.INVALID_ARGUMENT
        )
    paper = {row.name: row.paper for row in settings.row}
    effects = [
        effect_of(
            effect.name,
            effect.level,
            (effect.row, there[effect.row]),
            (effect.over, there[effect.over]),
            paper_difference(paper[effect.row], paper[effect.over], effect.level),
        )
        for effect in settings.effect
        if {effect.row, effect.over} <= there.keys()
    ]
    test = yardstick.pairs["test"]
    return {
        "source": settings.source,
        "note": settings.note,
        "pairs": len(test),
        "first_seed": test[0].seed,
        "rows": [row_summary(name, found, paper.get(name, {})) for name, found in there.items()],
        "effects": [{**asdict(e), "words": e.words} for e in effects if e is not None],
        "scores": {
            name: {
                str(training.label): {one: asdict(getattr(training, one)) for one in SETS}
                for training in found
            }
            for name, found in there.items()
        },
    }


def write_table(document: Mapping[str, Any], out: Path, console: Console) -> None:
    """``ablation.json`` and ``ablation.md``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    text = markdown(document)
    (out / "ablation.md").write_text(text)
    console.print(text, markup=False)


def chosen_rows(settings: AblationSettings, names: Sequence[str]) -> list[RowSettings]:
    """Rows by their names; all of them without any.

    Raises:
        InputError: There is no row of a name.
    """
    known = {row.name: row for row in settings.row}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"{unknown}: no such rows, there are {list(known)}", code=Code.INVALID_ARGUMENT
        )
    return [known[name] for name in names] or list(settings.row)


@app.command()
def run(
    *,
    config: ConfigOption,
    data: StoreOption,
    held_out: HeldOutOption,
    out: OutOption,
    only: Annotated[list[str] | None, typer.Option(help="Row to train; may be repeated.")] = None,
    pairs: PairsOption = None,
    minutes: MinutesOption = None,
    threads: ThreadsOption = 2,
) -> None:
    """Train every row with every seed, score it, and write the table."""
    console = Console()
    with reported(console), stopping(minutes) as stop:
        torch.set_num_threads(threads)
        ablation = Ablation(config, data, out, threads=threads, console=console)
        settings = ablation.settings
        rows = chosen_rows(settings, only or [])
        ablation.check_store(rows)
        yardstick = Yardstick.prepare(
            ablation.data,
            ablation.phantom,
            pairs or settings.pairs,
            data,
            held_out,
            workers=threads,
            console=console,
        )
        done = ablation.run(rows, yardstick, stop)
        trained = {row.name: ablation.trainings(row, yardstick) for row in settings.row}
        if any(trained.values()):
            write_table(document_of(settings, trained, yardstick), out, console)
        if not done:
            console.print("stopped: give the command again to go on")


@app.command(name="score")
def score_checkpoints(
    *,
    row: Annotated[list[str], typer.Option(help="NAME=STAGE1 or NAME=STAGE1,STAGE2.")],
    config: ConfigOption,
    data: StoreOption,
    held_out: HeldOutOption,
    out: OutOption,
    pairs: PairsOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Write the table of checkpoints."""
    console = Console()
    with reported(console):
        torch.set_num_threads(threads)
        settings = load_settings(config, AblationSettings)
        data_settings = load_data_settings(config, settings.data)
        rows = [Row.parse(text) for text in row]
        named = chosen_rows(settings, [each.name for each in rows])
        rows = [replace(each, peak=of.peak) for each, of in zip(rows, named, strict=True)]
        scorer = Scorer(rows, data_settings, threads)
        yardstick = Yardstick.prepare(
            data_settings,
            phantom_of(config, settings, data_settings),
            pairs or settings.pairs,
            data,
            held_out,
            workers=threads,
            console=console,
        )
        trained: dict[str, list[Training]] = {}
        for entry, sets in zip(rows, score(scorer, yardstick.pairs, console) or [], strict=True):
            known = trained.setdefault(entry.name, [])
            known.append(Training(len(known), sets["validation"], sets["test"]))
        write_table(document_of(settings, trained, yardstick), out, console)


if __name__ == "__main__":
    app()
