"""Read map-style datasets of (input, label) items into inputs, labels and class names; errors name the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from cl.data.class_names import join, move, with_rows
from cl.data.rows import Items, Rows, to_tensor
from cl.errors import InputError


def read_items(dataset: Any, lazy: bool = False, what: str = "the dataset") -> tuple[Rows, Tensor]:
    """Return the inputs (N, *input) and the labels (N,), or targets (N, C), of a dataset.

    Args:
        dataset: A map-style dataset of (input, label, ...) items.
        lazy: Whether inputs are read anew whenever they are needed; labels are read once in any case.
        what: The name of the dataset in errors.

    Raises:
        InputError: If the dataset is empty or cannot be indexed, an item is not a pair, its input or label is not
            numbers, or differs from the first in shape or type; names the item.

    Example:
        >>> read_items([(torch.zeros(2), 0), (torch.ones(2), 1)])[1].tolist()
        [0, 1]
        >>> read_items([(torch.zeros(2), "cat")])
        Traceback (most recent call last):
        cl.errors.InputError: Item 0 of the dataset has the label 'cat': number the classes from 0.
    """
    count = _length(dataset, what)
    if lazy:
        known = getattr(dataset, "targets", None)
        labels = [_pair(dataset, i, what)[1] for i in range(count)] if known is None else known
        return Items(dataset), _targets(labels, what)
    inputs: list[Tensor] = []
    labels = []
    for i in range(count):
        given, label = _pair(dataset, i, what)
        x = to_tensor(given, f"The input of item {i} of {what}")
        first = inputs[0] if inputs else x
        if x.shape != first.shape or x.dtype != first.dtype:
            kinds = [
                f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}"
                if x.dtype != first.dtype
                else f"shape {tuple(tensor.shape)}"
                for tensor in (x, first)
            ]
            raise InputError(
                f"Item {i} of {what} has {kinds[0]} where item 0 has {kinds[1]}: bring all to one shape and type."
            )
        inputs.append(x)
        labels.append(label)
    return torch.stack(inputs), _targets(labels, what)


def _length(dataset: Any, what: str) -> int:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"{kind} cannot be indexed: give a map-style dataset, with len() and [i], such as the list of its items."
        )
    if len(dataset) == 0:
        raise InputError(f"{what[0].upper()}{what[1:]} is empty: every task needs at least one example.")
    return len(dataset)


def _pair(dataset: Any, i: int, what: str) -> tuple[Any, Any]:
    item = dataset[i]
    if isinstance(item, Mapping):
        raise InputError(
            f"Item {i} of {what} is a dict with the keys {', '.join(map(str, item))}: give pairs (input, label); "
            "what the Hugging Face library saved is read by dataset=huggingface."
        )
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise InputError(f"Item {i} of {what} is of type {type(item).__name__}: give a pair (input, label).")
    return item[0], item[1]


def _targets(values: Any, what: str) -> Tensor:
    """Return labels as int64 (N,), or targets as float32."""
    if isinstance(values, Tensor):
        y = values.detach().cpu()
    else:
        rows = [value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in values]
        for i, value in enumerate(rows):
            if isinstance(value, str):
                raise InputError(f"Item {i} of {what} has the label {value!r}: number the classes from 0.")
            if np.asarray(value, dtype=object).dtype.kind == "O" and np.asarray(value).dtype.kind not in "biuf":
                raise InputError(
                    f"Item {i} of {what} has a label of type {type(value).__name__}: give an integer, or a vector "
                    "of numbers for other targets."
                )
            if np.shape(value) != np.shape(rows[0]):
                raise InputError(
                    f"Item {i} of {what} has a label of shape {np.shape(value)} where item 0 has "
                    f"{np.shape(rows[0])}: bring all to one shape."
                )
        y = torch.from_numpy(np.asarray(rows))
    return y.to(torch.float32) if y.ndim > 1 or y.is_floating_point() else y.to(torch.int64)


def read_sides(
    train: Sequence[Any], test: Sequence[Any], class_names: Sequence[str] | None = None, all_classes: bool = False
) -> tuple[list[Rows], list[Tensor], tuple[str, ...]]:
    """Read several training sets and as many test sets, and find the names of their classes.

    Where all datasets name their classes (`class_to_idx`), classes of one name are one class. Classes without a
    training example are left out.

    Args:
        train: The training set of each task.
        test: The test set of each task.
        class_names: A name for each class that has examples, or for each label from 0 on. None takes the names from the
            datasets; if they have none and classes are left out, the old labels are the names.
        all_classes: Whether classes without examples count, too.

    Returns:
        The inputs of the training sets and then of the test sets, their labels in the same order, and the class names,
        or an empty tuple where there are none.

    Raises:
        InputError: If there are no datasets, their targets differ in shape or type, or `class_names` has another number
            of names; or from `read_items`.

    Example:
        >>> pets = [(torch.zeros(2), 1), (torch.ones(2), 3)]
        >>> read_sides([pets], [pets])[1:]
        ([tensor([0, 1]), tensor([0, 1])], ('1', '3'))
    """
    if not train:
        raise InputError("There are no datasets: give one or more, one a task.")
    several = len(train) > 1
    sides = [(f"the {part} set", own) for part, own in (("training", train), ("test", test))]
    called = [f"{what} of task {t}" if several else what for what, own in sides for t in range(len(own))]
    read = [read_items(data, what=what) for data, what in zip((*train, *test), called, strict=True)]
    labels, names = by_name([*train, *test], [y for _, y in read])
    if len({(y.dtype, y.shape[1:]) for y in labels}) > 1:
        raise InputError("The datasets have targets of several shapes or types: bring them to one.")
    inputs, known = [x for x, _ in read], tuple(class_names or names or ())
    if all_classes or labels[0].ndim > 1 or labels[0].is_floating_point():
        return inputs, labels, known
    own, other = (torch.cat(labels[: len(train)]), torch.cat(labels[len(train) :]))
    count = len(own.unique())
    highest = int(torch.cat([own, other]).max()) + 1
    chosen = known if len(known) >= highest else [str(c) for c in range(highest)]
    own, other, kept = with_rows("the datasets" if several else "the dataset", own, other, chosen)
    moved = list(torch.cat([own, other]).split([len(y) for y in labels]))
    if len(known) not in (0, count) and len(known) < highest:
        raise InputError(
            f"class_names has {len(known)} names where the training rows have {count} classes: give one each."
        )
    if len(known) == count:  # one name for each class that has examples
        return inputs, moved, known
    return inputs, moved, tuple(kept) if known or len(kept) < highest else ()


def names_of(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's labels 0..C-1 from its `class_to_idx`, as torchvision's have it, or None.

    Example:
        >>> class Pets(list):
        ...     class_to_idx = {"cat": 0, "dog": 1}
        >>> names_of(Pets()), names_of([])
        (['cat', 'dog'], None)
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    number = getattr(dataset, "class_to_idx", None)
    if not isinstance(number, Mapping) or getattr(dataset, "target_transform", None) is not None:
        return None
    if not number or not all(isinstance(name, str) for name in number):
        return None
    names = sorted(number, key=number.__getitem__)
    return names if [number[name] for name in names] == list(range(len(names))) else None


def by_name(datasets: Sequence[Any], labels: Sequence[Tensor]) -> tuple[list[Tensor], list[str] | None]:
    """Return labels of several datasets in which classes of one name have one number, and the names in that order.

    This is for folders of images: two folders with different classes each number theirs from 0. If a dataset does not
    name its classes, labels stay as they are and the names are None.

    Args:
        datasets: The datasets.
        labels: The labels of each dataset, (N,).

    Example:
        >>> class Pets(list):
        ...     def __init__(self, *names):
        ...         self.class_to_idx = {name: c for c, name in enumerate(names)}
        >>> y = torch.tensor([0, 1])
        >>> by_name([Pets("ant", "bee"), Pets("bee", "cow")], [y, y])
        ([tensor([0, 1]), tensor([1, 2])], ['ant', 'bee', 'cow'])
    """
    known = [names_of(dataset) for dataset in datasets]
    names = [own for own in known if own is not None]
    fits = len(names) == len(known) and all(
        y.ndim == 1 and not y.is_floating_point() and len(y) and int(y.min()) >= 0 and int(y.max()) < len(own)
        for own, y in zip(names, labels, strict=False)
    )
    if not fits:
        return list(labels), None
    places, together = join(names)
    return [move(y, place, len(together)) for y, place in zip(labels, places, strict=True)], together
