"""How facts and tables are laid out: folded to a terminal's width, elsewhere whole lines.

What is piped into a file or another program can be searched: no identifier is split over two lines.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WHOLE_LINE: Final = 10_000  # wider than anything that is printed

Cell = str | Text


def open_console(*, stderr: bool = False) -> Console:
    """A console on standard output, or standard error, that folds lines for a terminal only."""
    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console.width = _WHOLE_LINE
    return console


def printable(text: str) -> str:
    """Text that any terminal takes: names of files may hold control characters and bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_facts(console: Console, facts: Iterable[tuple[str, str]], title: str = "") -> None:
    """Print names and values: two columns on a terminal, a line per fact elsewhere."""
    known = list(facts)
    _print_title(console, title)
    if not console.is_terminal:
        width = max((len(name) for name, _ in known), default=0)
        for name, value in known:
            console.print(Text(f"{name:<{width}}  {value}"))
        return
    table = Table(show_header=False, box=box.SIMPLE, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in known:
        table.add_row(Text(name), Text(value))
    console.print(table)


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = ""
) -> None:
    """Print rows under headings, if there are any. Strings are taken as they are: no markup."""
    _print_title(console, title)
    table = Table(box=box.SIMPLE, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(table)


def _print_title(console: Console, title: str) -> None:
    if title:
        console.print(Text(title, style="italic"))
