"""Class-incremental learning with repetition: classes come, go and come again (Hemati et al. 2023, section 3).

The sampling-based generator of "Class-Incremental Learning with Repetition". The first task of class c is drawn from a
geometric distribution, limited to the last task; the class comes again in each later task with probability p_c. The
examples of a task are distributed evenly among its classes, and drawn from all examples of a class, without replacement
within a task.

Differences from the paper: a column of R is measured on the test examples of its task's classes, so that repeated
classes can be compared with others; the paper tests on the whole test set. A task in which no class would come gets one
that has come before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval

from cl.data.dataset import Array, Dataset, split_validation
from cl.data.task import MOST_TASKS, Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


def occurrences(num_tasks: int, num_classes: int, first: float, again: Sequence[float], seed: int) -> Array:
    """Draw which classes come in which task, bool (T, C); each class comes in a task, and each task has a class.

    Args:
        num_tasks: Number of tasks, T.
        num_classes: Number of classes, C.
        first: Parameter of the geometric distribution of a class's first task, in (0, 1].
        again: Probability of each class to come in a later task, (C,).
        seed: Seed of the draw.

    Example:
        >>> occurrences(3, 2, first=1.0, again=[0.0, 1.0], seed=0).astype(int).tolist()
        [[1, 1], [0, 1], [0, 1]]
    """
    draw = np.random.default_rng(derive(seed, "repetition"))
    start = np.minimum(draw.geometric(first, num_classes) - 1, num_tasks - 1)
    start[draw.integers(num_classes)] = 0  # else the first tasks could be empty
    tasks = np.arange(num_tasks)[:, None]
    present: Array = (tasks == start) | ((tasks > start) & (draw.random((num_tasks, num_classes)) < np.asarray(again)))
    for t in np.flatnonzero(~present.any(1)):
        present[t, draw.choice(np.flatnonzero(start < t))] = True
    return present


def share_out(labels: Array, classes: Array, count: int, seed: int) -> Array:
    """Draw examples evenly from several classes, at least one of each; return their positions, ascending.

    Args:
        labels: The label of each example, (n,).
        classes: The classes to draw from.
        count: Number of examples to draw, fewer if a class has not enough.
        seed: Seed of the draw.

    Example:
        >>> share_out(np.array([0, 0, 1, 1, 2]), np.array([0, 2]), 4, seed=0).tolist()
        [0, 1, 4]
    """
    draw, kept = np.random.default_rng(seed), []
    for c, part in zip(classes, np.array_split(np.arange(count), len(classes)), strict=True):
        kept.append(draw.permutation(np.flatnonzero(labels == c))[: max(1, len(part))])
    chosen: Array = np.sort(np.concatenate(kept))
    return chosen


@checked
def repetition(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 20,
    rows_per_task: Annotated[int, Ge(1)] = 200,
    first: Annotated[float, Interval(gt=0, le=1)] = 0.3,
    again: Annotated[float, Interval(ge=0, le=1)] | Sequence[Annotated[float, Interval(ge=0, le=1)]] = 0.2,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Sample tasks whose classes come at random.

    Args:
        dataset: Any dataset with labels.
        num_tasks: Number of tasks, T (experiences in the paper).
        rows_per_task: Training examples of a task, distributed evenly among its classes; fewer if a class has not
            enough.
        first: Parameter of the geometric distribution of a class's first task, in (0, 1]; with 1 every class comes in
            the first task.
        again: Probability that a class comes in a task after its first one, for all classes or for each.
        scenario: "class" or "task"; None means "class".
        val_fraction: Share of the training set from which validation examples are drawn in the same way.
        order: See `Stream`.
        seed: Seed of all draws.

    Raises:
        InputError: If a probability is outside its range, or the scenario is "domain".

    Example:
        >>> from cl.data.sources import digits
        >>> stream = repetition(digits(), num_tasks=6, rows_per_task=60)
        >>> len(stream), len({c for task in stream for c in task.classes})
        (6, 10)
    """
    chances = [float(p) for p in (again if isinstance(again, Sequence) else [again] * dataset.num_classes)]
    if scenario == "domain":
        raise InputError("Tasks of a repetition stream have different classes: use scenario=class or scenario=task.")
    if len(chances) != dataset.num_classes:
        raise InputError(
            f"again={again} must be one probability, or one for each of the {dataset.num_classes} classes."
        )
    present = occurrences(num_tasks, dataset.num_classes, first, chances, seed)
    train_rows, val_rows = split_validation(dataset.train_y, val_fraction, seed)

    def some(index: torch.Tensor, t: int, count: int) -> TaskData:
        rows = share_out(dataset.train_y[index].numpy(), np.flatnonzero(present[t]), count, derive(seed, "rows", t))
        return TaskData(dataset.train_x, dataset.train_y, t, index[torch.from_numpy(rows)])

    def build(t: int) -> Task:
        own = torch.from_numpy(np.flatnonzero(present[t]))
        test = TaskData(dataset.test_x, dataset.test_y, t, torch.isin(dataset.test_y, own).nonzero().flatten())
        size = round(rows_per_task * len(val_rows) / len(train_rows))
        val = some(val_rows, t, size) if len(val_rows) else None
        names = [dataset.class_names[c] for c in own.tolist()]
        title = "+".join(names[:3]) + " …" * (len(names) > 3)
        return Task(t, some(train_rows, t, rows_per_task), test, val, name=title)

    return dataset.stream(
        build,
        scenario=scenario or "class",
        num_tasks=num_tasks,
        name=f"repeated {dataset.name}",
        repeats=True,
        order=order,
        seed=seed,
    )
