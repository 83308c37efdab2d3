"""Class names and labels: drop classes without examples, match the classes of several datasets, sort names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.errors import InputError

_log = logging.getLogger(__name__)


def with_rows(name: str, train_y: Tensor, test_y: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Leave out classes without a training example, and number the others from 0 in their order.

    A dataset of 1,000 names that was filtered to 100 of them then has 100 classes. Labels out of range are left as
    they are, for `Dataset` to refuse.

    Args:
        name: What an error calls the dataset.
        train_y: Training labels, int64 (N,).
        test_y: Test labels.
        names: The name of each class.

    Returns:
        The new training labels, the new test labels and the names of the classes that are left.

    Raises:
        InputError: If a test example has a class that no training example has.

    Example:
        >>> with_rows("pets", torch.tensor([2, 0]), torch.tensor([2]), ["ant", "bee", "cat"])
        (tensor([1, 0]), tensor([1]), ['ant', 'cat'])
    """
    both = [y for y in (train_y, test_y) if len(y)]
    known = len(train_y) and all(y.ndim == 1 and not y.is_floating_point() for y in both)
    if not known or any(int(y.min()) < 0 or int(y.max()) >= len(names) for y in both):
        return train_y, test_y, list(names)
    present = torch.unique(train_y)
    if len(present) == len(names):
        return train_y, test_y, list(names)
    table = torch.full((len(names),), -1, dtype=torch.int64)
    table[present] = torch.arange(len(present))
    train, test = table[train_y], table[test_y]
    untrained = (test < 0).nonzero().flatten()
    if len(untrained):
        row = int(untrained[0])
        raise InputError(
            f"Row {row} of the test set of {name!r} has the class {names[int(test_y[row])]!r}, which no training row "
            "has: leave the row out or give training rows."
        )
    missing = len(names) - len(present)
    _log.info("%d of the %d classes of %s have no example and are left out.", missing, len(names), name)
    return train, test, [names[c] for c in present.tolist()]


def join(names: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[str]]:
    """Merge several lists of names into one of distinct names, in the order in which they first appear.

    Returns:
        For each list the positions of its names in the merged list; and the merged list.

    Example:
        >>> join([["ant", "bee"], ["bee", "cow"]])
        ([[0, 1], [1, 2]], ['ant', 'bee', 'cow'])
    """
    together = list(dict.fromkeys(name for own in names for name in own))
    position = {name: c for c, name in enumerate(together)}
    return [[position[name] for name in own] for own in names], together


def move(y: Tensor, places: Sequence[int], width: int) -> Tensor:
    """Renumber classes, or move columns of targets; a withheld label (-1) stays, and new columns are 0.

    Args:
        y: Labels (N,), or targets (N, C).
        places: The new position of each of the C classes.
        width: The new number of classes or columns.

    Example:
        >>> move(torch.tensor([0, 1, -1]), [2, 0], 3).tolist(), move(torch.tensor([[5.0, 7.0]]), [2, 0], 3).tolist()
        ([2, 0, -1], [[7.0, 0.0, 5.0]])
    """
    if list(places) == list(range(len(places))):
        return y if y.ndim == 1 else F.pad(y, (0, width - y.shape[1]))
    table = torch.tensor(places, device=y.device)
    if y.ndim == 1:
        return torch.where(y < 0, y, table[y.clamp_min(0)])
    return torch.zeros(len(y), width, dtype=y.dtype, device=y.device).index_copy_(1, table, y)


def number_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in ascending order, compared as numbers if all are numbers, else as text.

    Example:
        >>> number_classes(["10", "9", "10"]), number_classes(["b", "10", "a"])
        (['9', '10'], ['10', 'a', 'b'])
    """
    names = sorted(set(labels))
    return sorted(names, key=float) if all(map(is_number, names)) else names


def in_natural_order(what: str, names: Iterable[str]) -> list[str]:
    """Return distinct names in natural order: digits within a name compare as a number, so s2 comes before s10.

    If all names are numbers, they are sorted as numbers. Where the order differs from that of plain text, it is logged.

    Args:
        what: What the names are of, for the log.
        names: Any names.

    Example:
        >>> in_natural_order("Tasks", ["s10", "s2", "s1"]), in_natural_order("Tasks", ["1.5", "-2", "1.25"])
        (['s1', 's2', 's10'], ['-2', '1.25', '1.5'])
    """
    text = number_classes(names)
    found = text if all(map(is_number, text)) else sorted(text, key=_natural)
    if found != sorted(text):
        shown = found if len(found) <= 12 else [*found[:6], "…", *found[-3:]]
        _log.info("%s in natural order: %s.", what, ", ".join(shown))
    return found


def is_number(text: str) -> bool:
    """Return whether text is a finite number, without underscores.

    Example:
        >>> [is_number(text) for text in ("1e3", "nan", "a", "1_0")]
        [True, False, False, False]
    """
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key in which digits compare as numbers and come before letters."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not p[0].isdecimal(), int(p) if p[0].isdecimal() else 0, p) for p in pieces]


def task_name(classes: Sequence[str]) -> str:
    """Return the name of a task with these classes, short if they are many.

    Example:
        >>> task_name(["ant", "bee"]), task_name(["0", "1", "2", "3"])
        ('ant+bee', '0 … 3')
    """
    return "+".join(classes) if len(classes) <= 3 else f"{classes[0]} … {classes[-1]}"
