"""Streams from a user's own data: a `Dataset` whose examples each name their task becomes a `Stream`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from cl.data.dataset import Dataset, rows_of_each, split_validation
from cl.data.rows import Rows
from cl.data.target import classes_of
from cl.data.task import Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


@dataclass(frozen=True)
class Float32:
    """Inputs of another float type, cast to float32 when they are read.

    Args:
        rows: The inputs as stored, (N, *input).

    Example:
        >>> Float32(torch.zeros(3, 2, dtype=torch.float64))[torch.tensor([1])].dtype
        torch.float32
    """

    rows: Rows
    dtype = torch.float32

    @property
    def shape(self) -> Sequence[int]:
        """(N, *input)."""
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.rows[index].to(torch.float32)


@checked
def by_task(
    dataset: Dataset,
    train_task: Tensor,
    test_task: Tensor,
    names: Sequence[str],
    val: Tensor | None = None,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Return a stream of a dataset in which the task of every example is known.

    Args:
        dataset: The examples; labels stay as they are.
        train_task: The task of each training example, 0..T-1, int64 (N,).
        test_task: The task of each test example.
        names: The names of the T tasks.
        val: Which training examples are for validation, bool (N,); None draws `val_fraction` of each task.
        scenario: "class", "task" or "domain"; None means "class" where no class is in two tasks, else "domain".
        val_fraction: Share of each task's training examples that becomes the validation set, in [0, 1).
        order: See `Stream`.
        seed: Seed of the validation sets and of a shuffled order.

    Raises:
        InputError: If a task has no training or no test example.

    Example:
        >>> from cl.data.sources import synthetic
        >>> data = synthetic(num_classes=4)
        >>> stream = by_task(data, data.train_y // 2, data.test_y // 2, ["a", "b"])
        >>> stream.scenario, [task.classes for task in stream]
        ('class', [(0, 1), (2, 3)])
    """
    train_rows, test_rows = (rows_of_each(task, len(names)) for task in (train_task, test_task))
    tasks: list[Task] = []
    seen: list[int] = []
    for t, name in enumerate(names):
        rows = train_rows[t]
        if val is not None:
            rows, held = rows[~val[rows]], rows[val[rows]]
        else:
            kept, drawn = split_validation(dataset.train_y[rows], val_fraction, derive(seed, "validation", t))
            rows, held = rows[kept], rows[drawn]
        for part, own in (("training", rows), ("test", test_rows[t])):
            if len(own) == 0:
                raise InputError(f"Task {name!r} of {dataset.name!r} has no {part} row: add one or leave the task out.")
        train = TaskData(dataset.train_x, dataset.train_y, t, rows)
        test = TaskData(dataset.test_x, dataset.test_y, t, test_rows[t])
        tasks.append(Task(t, train, test, replace(train, index=held) if len(held) else None, name))
        seen += classes_of(train.labels)
    disjoint = dataset.target != "regression" and len(set(seen)) == len(seen)
    return dataset.stream(
        tasks,
        scenario=scenario or ("class" if disjoint else "domain"),
        order=order,
        seed=seed,
    )
