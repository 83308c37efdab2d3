"""Read the cells of a table as labels, numbers, columns of 0 and 1, or times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

import numpy as np
import torch
from torch import Tensor

from cl.data.class_names import is_number, number_classes
from cl.data.table import Table, rename
from cl.errors import InputError

_LARGEST = torch.finfo(torch.float32).max
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}  # in lower case


def read_targets(table: Table, target: str, columns: str | Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Return labels (N,) or targets (N, C) from a table, and the names of the classes or of the columns.

    Args:
        table: A table that has the column, or columns.
        target: The kind of target, see `cl.data.target`.
        columns: The column, or columns, of the labels; None means the column "label". Where columns hold only 0 and 1
            (or true and false), each stands for the class of its name, and 1 means that a row has it.

    Raises:
        InputError: If a cell cannot be read as a label of this kind; names its row.

    Example:
        >>> from pathlib import Path
        >>> table = Table(Path("a.csv"), {"cat": ["1", "0", "1"], "dog": ["0", "1", "1"]}, [2, 3, 4])
        >>> read_targets(table, "multilabel", ["cat", "dog"])
        (tensor([[1., 0.],
                [0., 1.],
                [1., 1.]]), ['cat', 'dog'])
    """
    given = [columns] if isinstance(columns, str) else list(columns or ())
    flags = None if target == "regression" else _flags(table, given)
    cells = rename(table, {"label": given} if given else {}).column("label")
    if target == "regression":
        return _numbers(table, cells)
    if flags is not None and target == "multilabel":
        return torch.tensor(flags, dtype=torch.float32).T.contiguous(), given
    if flags is not None and len(given) > 1:
        return _one_hot(table, flags, given)
    return _one_label(table, cells) if target == "label" else _several_labels(table, cells)


def _flags(table: Table, columns: Sequence[str]) -> list[list[int]] | None:
    """Return the columns as 0 and 1, (C, N), or None if none of them holds only 0 and 1.

    Raises:
        InputError: If some of the columns hold only 0 and 1, and others do not.
    """
    read = {name: [_FLAGS.get(cell.lower()) for cell in table.column(name)] for name in columns}
    if not any(None not in cells for cells in read.values()):
        return None
    for name, cells in read.items():
        if None in cells:
            i = cells.index(None)
            raise InputError(
                f"{table.where(i)} has {table.columns[name][i]!r} in the column {name!r}, where other columns of the "
                "labels say 0 or 1: give 0 or 1, or leave the column or the row out."
            )
    return [[cell for cell in cells if cell is not None] for cells in read.values()]


def _one_hot(table: Table, flags: Sequence[Sequence[int]], columns: Sequence[str]) -> tuple[Tensor, list[str]]:
    table_of_flags = np.array(flags)
    odd = np.flatnonzero(table_of_flags.sum(0) != 1)
    if len(odd):
        own = [name for name, flag in zip(columns, table_of_flags[:, odd[0]], strict=True) if flag]
        raise InputError(
            f"{table.where(int(odd[0]))} has the labels {', '.join(own) or 'of no column'}, where target=label needs "
            "one: leave the row out, or use target=multilabel."
        )
    return torch.from_numpy(table_of_flags.argmax(0)), list(columns)


def _one_label(table: Table, cells: Sequence[str]) -> tuple[Tensor, list[str]]:
    empty = next((i for i, cell in enumerate(cells) if not cell), None)
    if empty is not None:
        raise InputError(f"{table.where(empty)} has no label: give one or remove the row.")
    names = number_classes(cells)
    number = {label: c for c, label in enumerate(names)}
    return torch.tensor([number[cell] for cell in cells]), names


def _several_labels(table: Table, cells: Sequence[str]) -> tuple[Tensor, list[str]]:
    sets = [[label.strip() for label in cell.split(";") if label.strip()] for cell in cells]
    names = number_classes(label for own in sets for label in own)
    if not names:
        raise InputError(f"{table.path} has no label in any row: give some, with ';' between those of one row.")
    if {name.lower() for name in names} <= set(_FLAGS):
        raise InputError(
            f"The labels of {table.path} are {' and '.join(names)} alone, which may say that something is absent or "
            "present: give each class a column of 0 and 1, and list the columns in columns.label."
        )
    number = {label: c for c, label in enumerate(names)}
    y = torch.zeros(len(sets), len(names))
    for i, own in enumerate(sets):
        if len(set(own)) < len(own):
            raise InputError(f"{table.where(i)} has a label twice in {cells[i]!r}: name each once.")
        y[i, [number[label] for label in own]] = 1
    return y, names


def _numbers(table: Table, cells: Sequence[str]) -> tuple[Tensor, list[str]]:
    rows: list[list[float]] = []
    for i, cell in enumerate(cells):
        try:
            row = [float(number) for number in cell.split(";")]
        except ValueError:
            row = [np.nan]
        if not all(abs(number) <= _LARGEST for number in row) or len(row) != len((rows or [row])[0]):
            count = len(rows[0]) if rows else "finite"
            raise InputError(f"{table.where(i)} has the label {cell!r}: give {count} numbers, with ';' between.")
        rows.append(row)
    return torch.tensor(rows), [str(k) for k in range(len(rows[0]))]


def read_times(table: Table, column: str = "timestamp") -> list[float]:
    """Return the numbers of a column; dates and times become seconds since 1970, in UTC where they name no zone.

    Raises:
        InputError: If a cell is neither a number nor a date, or the column mixes both; names the row.

    Example:
        >>> from pathlib import Path
        >>> read_times(Table(Path("a.csv"), {"timestamp": ["1970-01-02", "1970-01-01T00:00:01"]}, [2, 3]))
        [86400.0, 1.0]
    """
    cells = table.column(column)
    first: Mapping[bool, int] = {is_number(cell): i for i, cell in reversed(list(enumerate(cells)))}
    times = []
    for i, cell in enumerate(cells):
        try:
            times.append(float(cell) if is_number(cell) else _seconds(cell))
        except ValueError as error:
            raise InputError(
                f"{table.where(i)} has the {column} {cell!r}: give a number, or a time such as 2024-05-01T12:30."
            ) from error
    if len(first) == 2:
        number, date = first[True], first[False]
        i, j = max(number, date), min(number, date)
        raise InputError(
            f"{table.where(i)} has the {column} {cells[i]!r}, row {table.rows[j]} {cells[j]!r}: give all rows a date, "
            "or all a number."
        )
    return times


def _seconds(cell: str) -> float:
    time = datetime.fromisoformat(cell.replace("Z", "+00:00"))  # the letter is new in Python 3.11
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()
