"""Tables of labels: rows with their numbers, and errors that name file, row and remedy."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pe_infer.errors import Code, InputError

_REMEDY = "Unpack the table of the collection again; a changed one is not read."


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        path: The table.
        number: Line in the file; the header is line 1.
        values: Column to text, without spaces around it.
    """

    path: Path
    number: int
    values: Mapping[str, str]

    @property
    def where(self) -> str:
        """File and row, for messages."""
        return f"{self.path.name} row {self.number}"

    def refused(self, why: str) -> InputError:
        """An error that says where and why."""
        return InputError(f"{self.path}, row {self.number}: {why}. {_REMEDY}", code=_CODE)

    def flag(self, column: str) -> bool:
        """A column that holds 0 or 1.

        Raises:
            InputError: It holds something else.
        """
        text = self.values[column]
        if text not in ("0", "1"):
            raise self.refused(f"column {column!r} is {text!r}, expected 0 or 1")
        return text == "1"

    def whole(self, column: str) -> int:
        """A column that holds a whole number.

        Raises:
            InputError: It holds something else.
        """
        text = self.values[column]
        if not text.isdecimal():
            raise self.refused(f"column {column!r} is {text!r}, expected a whole number")
        return int(text)


_CODE = Code.INVALID_ATTRIBUTE


def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a CSV file, with the columns asked for.

    Args:
        path: UTF-8, with or without a byte order mark; the first line names the columns.
        columns: Must be there; others are ignored.

    Raises:
        InputError: The file cannot be read, has no such column, or a row is too short.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise InputError(
                    f"{path}: column {missing[0]!r} is missing among {header[:8]}. {_REMEDY}",
                    code=_CODE,
                )
            places = [(name, header.index(name)) for name in columns]
            last = max(place for _, place in places)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) <= last:
                    raise InputError(
                        f"{path}, row {reader.line_num}: {len(cells)} columns, expected at least "
                        f"{last + 1}. {_REMEDY}",
                        code=_CODE,
                    )
                values = {name: cells[place].strip() for name, place in places}
                yield Row(path, reader.line_num, values)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InputError(
            f"{path}: cannot be read as a table: {exc}. {_REMEDY}", code=Code.UNREADABLE_FILE
        ) from exc
