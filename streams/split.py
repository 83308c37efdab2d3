"""The classes of a dataset, split into tasks (Split-MNIST, Split-CIFAR and similar)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval

from cl.data.class_names import task_name
from cl.data.dataset import Dataset, rows_of_each, split_validation
from cl.data.rows import Rows
from cl.data.task import Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


@checked
def split(
    dataset: Dataset,
    num_tasks: Annotated[int, Ge(1)] | None = None,
    classes_per_task: Annotated[int, Ge(1)] | Sequence[Annotated[int, Ge(1)]] | None = None,
    first_task: Annotated[int, Ge(0)] | None = None,
    class_order: str | Sequence[int] = "natural",
    classes: Sequence[int] | None = None,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Split a dataset by class.

    Stream-wide labels follow the order of learning: the first task has the classes 0, 1, ... In the
    domain-incremental scenario a label is the position within its task (van de Ven et al. 2022, section 2).

    Args:
        dataset: Any dataset.
        num_tasks: Number of tasks of equal size; give this or `classes_per_task`.
        classes_per_task: Number of classes in every task, or a list with that of each task.
        first_task: Number of classes in a larger first task; the other tasks share the rest evenly.
        class_order: "natural"; "shuffled" (by `seed`); "icarl", the shuffled order of the released code of iCaRL, which
            later papers keep (numpy's generator with the seed 1993); "curriculum" (designed by `cl.compose.curriculum`
            from the raw inputs of at most 200 training examples of each class); or a list of the classes in order.
        classes: The classes to use; None means all that have examples.
        scenario: "class", "task" or "domain"; None means "class".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order in which tasks are learned; the classes of a task do not depend on it. See `Stream`.
        seed: Seed of the orders and of the validation split.

    Raises:
        InputError: If the classes cannot be split in this way.

    Example:
        >>> from cl.data.sources import synthetic
        >>> stream = split(synthetic(num_classes=5), num_tasks=2, first_task=3)
        >>> [task.classes for task in stream]
        [(0, 1, 2), (3, 4)]
    """
    if dataset.target != "label":
        raise InputError(
            f"The targets of {dataset.name!r} are of kind {dataset.target}: only labels can be split by class."
        )
    classes_in_order = _class_order(dataset, class_order, classes, seed)
    sizes = _sizes(len(classes_in_order), num_tasks, classes_per_task, first_task)
    label = np.full(dataset.num_classes, -1, dtype=np.int64)
    starts = np.cumsum([0, *sizes])
    for start, size in zip(starts, sizes, strict=False):
        for position, name in enumerate(classes_in_order[start : start + size]):
            label[name] = position if scenario == "domain" else start + position
    train_index, val_index = split_validation(dataset.train_y, val_fraction, seed)
    table = torch.from_numpy(label)
    train_y, test_y = table[dataset.train_y], table[dataset.test_y]
    train_rows = rows_of_each(dataset.train_y, dataset.num_classes, train_index)
    val_rows = rows_of_each(dataset.train_y, dataset.num_classes, val_index)
    test_rows = rows_of_each(dataset.test_y, dataset.num_classes)

    def build(t: int) -> Task:
        own = classes_in_order[starts[t] : starts[t + 1]]

        def part(x: Rows, y: torch.Tensor, rows: list[torch.Tensor]) -> TaskData:
            return TaskData(x, y, t, torch.cat([rows[c] for c in own]).sort().values)

        train, test = part(dataset.train_x, train_y, train_rows), part(dataset.test_x, test_y, test_rows)
        val = part(dataset.train_x, train_y, val_rows) if len(val_index) else None
        return Task(t, train, test, val, name=task_name([dataset.class_names[c] for c in own]))

    names = [dataset.class_names[c] for c in classes_in_order] if scenario != "domain" else []
    return dataset.stream(
        build,
        scenario=scenario or "class",
        num_classes=max(sizes) if scenario == "domain" else len(classes_in_order),
        num_tasks=len(sizes),
        class_names=names,
        name=f"split {dataset.name}",
        order=order,
        seed=seed,
    )


def _class_order(
    dataset: Dataset, class_order: str | Sequence[int], classes: Sequence[int] | None, seed: int
) -> list[int]:
    present = torch.cat([dataset.train_y, dataset.test_y]).unique().tolist()
    known = present if classes is None else [int(c) for c in classes]
    if class_order == "natural":
        order = known
    elif class_order == "shuffled":
        draw = np.random.default_rng(derive(seed, "class order"))
        order = [known[i] for i in draw.permutation(len(known))]
    elif class_order == "icarl":
        order = [known[i] for i in np.random.RandomState(1993).permutation(len(known))]
    elif class_order == "curriculum":
        order = _curriculum(dataset, known)
    elif isinstance(class_order, str):
        raise InputError(
            f"class_order={class_order!r} is unknown: use natural, shuffled, icarl, curriculum, or a list."
        )
    else:
        order = [int(c) for c in class_order]
        if classes is not None and set(order) != set(known):
            raise InputError(f"class_order={order} and classes={known} name different classes: drop one of the two.")
    outside = [c for c in order if not 0 <= c < dataset.num_classes]
    if outside:
        raise InputError(f"Class {outside[0]} is not in {dataset.name} (0..{dataset.num_classes - 1}): leave it out.")
    empty = sorted(set(order) - set(present))
    if empty:
        raise InputError(f"Class {empty[0]} of {dataset.name} has no row: leave it out.")
    if len(set(order)) < len(order):
        twice = next(c for c in order if order.count(c) > 1)
        raise InputError(f"Class {twice} is twice in the class order: name each class once.")
    return order


def _curriculum(dataset: Dataset, classes: list[int]) -> list[int]:
    """Return the classes in the first order that the Curriculum Designer proposes, before any training."""
    from cl.compose.curriculum import class_distances, design_orders

    if len(classes) < 2:
        return classes
    rows = rows_of_each(dataset.train_y, dataset.num_classes)
    some = [rows[c][:200] for c in classes]
    features = dataset.train_x[torch.cat(some)].flatten(1).double()
    labels = torch.repeat_interleave(torch.arange(len(some)), torch.tensor([len(part) for part in some]))
    return [classes[i] for i in design_orders(class_distances(features, labels))[0]]


def _sizes(
    num_classes: int, num_tasks: int | None, per_task: int | Sequence[int] | None, first_task: int | None
) -> list[int]:
    if (num_tasks is None) == (per_task is None):
        raise InputError("A split stream needs either num_tasks or classes_per_task: give one of the two.")
    if per_task is not None and not isinstance(per_task, int):
        sizes = [int(size) for size in per_task]
    else:
        rest = num_classes - (first_task or 0)
        others = (num_tasks - (first_task is not None)) if num_tasks is not None else rest // (per_task or 1)
        if num_tasks is not None and num_tasks > num_classes:
            raise InputError(f"num_tasks={num_tasks} is more than the {num_classes} classes: ask for fewer tasks.")
        if rest < 0 or (others == 0) != (rest == 0) or (others and rest % others) or (per_task and rest % per_task):
            raise InputError(
                f"{rest} classes do not split evenly (num_tasks={num_tasks}, classes_per_task={per_task}, "
                f"first_task={first_task}): give classes_per_task as a list, or other counts."
            )
        sizes = ([first_task] if first_task else []) + [rest // others] * others
    if min(sizes, default=0) < 1 or sum(sizes) != num_classes:
        raise InputError(
            f"classes_per_task={sizes} adds up to {sum(sizes)} where there are {num_classes} classes: "
            "give each task at least one class and use every class."
        )
    return sizes
