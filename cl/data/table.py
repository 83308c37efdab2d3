"""Read a CSV or Parquet file as a table of text that knows the number of each row in the file, for errors."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl.errors import InputError
from cl.files import expand_path

_log = logging.getLogger(__name__)
_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", " ": "a blank"}


@dataclass(frozen=True)
class Table:
    """Columns of text.

    Args:
        path: The file.
        columns: The cells of each column, as text without blanks around it; an empty cell is "".
        rows: The number of each row in the file, from 1. In CSV the header is row 1; Parquet's header has no number.
    """

    path: Path
    columns: dict[str, list[str]]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """Return the number of the i-th row and the file, to begin an error.

        Example:
            >>> Table(Path("a.csv"), {}, [2, 3]).where(1)
            'Row 3 of a.csv'
        """
        return f"Row {self.rows[i]} of {self.path}"

    def column(self, name: str) -> list[str]:
        """Return the cells of a column.

        Raises:
            InputError: If there is no such column.
        """
        if name not in self.columns:
            raise InputError(
                f"{self.path} has no column {name!r} among {', '.join(self.columns)}: add it, or say in columns which "
                "one to use."
            )
        return self.columns[name]

    def take(self, order: Sequence[int]) -> Table:
        """Return the table with the rows at these positions, in this order."""
        cells = {name: [column[i] for i in order] for name, column in self.columns.items()}
        return Table(self.path, cells, [self.rows[i] for i in order])


def read_table(path: str | Path) -> Table:
    r"""Read a CSV file with a header (UTF-8), or a Parquet file, whose name ends in .parquet.

    The separator of a CSV file is the first of comma, tab, semicolon and blank that its header contains; several blanks
    count as one. Another separator than the comma is logged. In Parquet, a list becomes its items joined by ";", and a
    time with a time zone becomes UTC.

    Raises:
        InputError: If the file cannot be read, has no rows, has two columns of one name, or a row has another number of
            cells than the header.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text("path,label\na.png, cat\n")
        >>> read_table(path).columns
        {'path': ['a.png'], 'label': ['cat']}
    """
    path = expand_path(path)
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): give a CSV file in UTF-8, or a .parquet file.") from error
    if not len(table):
        raise InputError(f"{path} has no rows: give one for each image.")
    return table


def _read_csv(path: Path) -> Table:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        text = stream.read()
    separator = _separator(text.partition("\n")[0])
    if separator != ",":
        _log.info("%s is read with %s between its cells.", path, _SEPARATORS[separator])
    runs = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator == " ")
    lines = [[cell.strip() for cell in line] for line in runs]
    if separator == " ":
        lines = [line[:-1] if line and not line[-1] else line for line in lines]  # a blank at the end of a line
    if not lines:
        raise InputError(f"{path} is empty: give it a header, such as path,label,task,split.")
    header, rows = lines[0], [number for number, line in enumerate(lines, 1) if number > 1 and any(line)]
    odd = next((number for number in rows if len(lines[number - 1]) != len(header)), None)
    if odd is not None:
        raise InputError(
            f"Row {odd} of {path} has {len(lines[odd - 1])} cells where the header has {len(header)}: "
            f"give one for each column, in quotes where a cell holds {_SEPARATORS[separator]}."
        )
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path} has two columns called {twice!r}: rename one.")
    return Table(path, {name: [lines[number - 1][k] for number in rows] for k, name in enumerate(header)}, rows)


def _separator(header: str) -> str:
    """Return the first of comma, tab, semicolon and blank that a header contains, or a comma."""
    return next((separator for separator in _SEPARATORS if separator in header.strip()), ",")


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file: run `pip install 'clsim[parquet]'`, or give a CSV file."
        ) from error
    try:
        read = pq.read_table(path)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): write it as Parquet again, or as CSV.") from error
    columns = {}
    for name, column in zip(read.column_names, read.columns, strict=True):
        # Python's datetime has a resolution of microseconds. Without its zone, a time is an instant in UTC.
        cells = column.cast(pa.timestamp("us"), safe=False) if pa.types.is_timestamp(column.type) else column
        columns[name] = [_text(cell) for cell in cells.to_pylist()]
    return Table(path, columns, list(range(1, read.num_rows + 1)))


def _text(cell: Any) -> str:
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, list | tuple):
        return ";".join(_text(item) for item in cell)
    return str(cell).strip()


def rename(table: Table, names: Mapping[str, str | Sequence[str]]) -> Table:
    """Return the table with additional columns: copies under new names, or several columns joined by ";".

    Args:
        table: The table.
        names: For each new name, the column to copy, or the columns to join.

    Example:
        >>> table = Table(Path("a.csv"), {"file": ["a.png"], "x": ["1"], "y": ["2"]}, [2])
        >>> rename(table, {"path": "file", "label": ["x", "y"]}).columns["label"]
        ['1;2']
    """
    columns = dict(table.columns)
    for name, given in names.items():
        sources = [given] if isinstance(given, str) else list(given)
        columns[name] = [";".join(cells) for cells in zip(*map(table.column, sources), strict=True)]
    return Table(table.path, columns, table.rows)
