"""Conversion of the metrics' inputs to float64 on the CPU, and checks of their shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cl.errors import InputError

Values = Tensor | Sequence[float]
Table = Tensor | Sequence[Sequence[float]] | Sequence[Tensor]


def to_float64(name: str, values: Values | Table | float) -> Tensor:
    """Return the values as float64 on the CPU (not every accelerator has float64), detached from the graph.

    Args:
        name: The name of the argument, for the message.
        values: A tensor, a number, or sequences of numbers or of tensors.

    Raises:
        InputError: if the values are no numbers, or rows of unequal lengths.

    Example:
        >>> to_float64("curves", [[1, 2], [3, 4]]).dtype
        torch.float64
    """
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    try:
        if isinstance(values, Sequence) and values and all(isinstance(row, Tensor) for row in values):
            return torch.stack([row.detach().cpu().double() for row in values if isinstance(row, Tensor)])
        return torch.as_tensor(values, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} must hold numbers in rows of one length: {error}.") from error


def vector(name: str, values: Values, length: int | None = None, low: float = -math.inf) -> Tensor:
    """Return the values as a vector, float64 (n,).

    Raises:
        InputError: if it is empty, has another length than `length`, or an entry is below `low`.

    Example:
        >>> vector("seconds", [1, 2], length=2, low=0)
        tensor([1., 2.], dtype=torch.float64)
    """
    found = to_float64(name, values)
    if found.ndim != 1 or len(found) == 0 or (length is not None and len(found) != length):
        expected = "at least one entry" if length is None else f"{length} entries"
        raise InputError(f"{name} must be a vector with {expected}, got shape {tuple(found.shape)}.")
    if (found < low).any():
        raise InputError(f"{name} must not hold an entry below {low:g}, got {found[found < low].min().item():g}.")
    return found


def table(name: str, values: Table, rows: str, columns: str, shape: tuple[int | None, int | None]) -> Tensor:
    """Return the values as a matrix, float64 (rows, columns).

    Args:
        name: The name of the argument, for the message.
        values: Rows of numbers.
        rows: The word for the rows.
        columns: The word for the columns.
        shape: The required numbers of rows and columns; None allows any number from 1 on.

    Raises:
        InputError: if the shape is another.

    Example:
        >>> table("curves", [[0.1, 0.9]], "tasks", "points", (None, 2)).shape
        torch.Size([1, 2])
    """
    found = to_float64(name, values)
    wanted = tuple(str(size or word) for size, word in zip(shape, (rows, columns), strict=True))
    sizes = zip(found.shape, shape, strict=False)
    if found.ndim != 2 or 0 in found.shape or any(size not in (None, real) for real, size in sizes):
        raise InputError(f"{name} must have shape ({rows}, {columns}) = ({', '.join(wanted)}), got {_shape(found)}.")
    return found


def transfer_matrix(R: Table, name: str = "A transfer matrix over T tasks") -> Tensor:
    """Return a transfer matrix R, float64 (T + 1, T).

    Raises:
        InputError: if it has another shape.

    Example:
        >>> transfer_matrix([[0.1], [0.9]]).shape
        torch.Size([2, 1])
    """
    found = to_float64(name, R)
    if found.ndim != 2 or found.shape[1] < 1 or found.shape[0] != found.shape[1] + 1:
        raise InputError(
            f"{name} has shape (T + 1, T), got {_shape(found)}: "
            "row 0 is the untrained learner, a row of NaN where it was not measured."
        )
    return found


def learned(R: Table) -> tuple[Tensor, Tensor]:
    """Return rows 1..T of R as a (T, T) matrix, and its diagonal R[j,j].

    Example:
        >>> learned([[0.1], [0.9]])[1]
        tensor([0.9000], dtype=torch.float64)
    """
    rows = transfer_matrix(R)[1:]
    return rows, rows.diagonal()


def keep(values: Tensor, mask: Tensor, fill: float = math.nan) -> Tensor:
    """Return the entries where the mask is true, and `fill` elsewhere.

    Example:
        >>> keep(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        tensor([1., nan])
    """
    return values.where(mask, torch.tensor(fill, dtype=values.dtype))


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below; NaN, and never infinite, where the denominator is 0.

    Example:
        >>> ratio(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor([0.5000,    nan])
    """
    return keep(above / below, below != 0)


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
