"""Tasks that share classes of a dataset, each with outputs of its own (OL-CIFAR100 of Lin et al. 2022, CUBER)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval

from cl.data.class_names import task_name
from cl.data.dataset import Dataset, rows_of_each, split_validation
from cl.data.rows import Rows
from cl.data.task import Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.ranges import checked


@checked
def overlapping(
    dataset: Dataset,
    classes: Sequence[Sequence[int]],
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Split a dataset into tasks whose classes overlap; a class has an output for each task that it is in.

    Task t learns all examples of its classes, those that earlier tasks have learned included. Its labels are
    o_t, o_t + 1, ..., where o_t is the number of classes in the tasks before it, each counted as often as it comes. So
    nothing of the head is shared, and what a later task changes for the better on an earlier one passes through the
    features: this is where backward transfer can be positive.

    OL-CIFAR100 has seven tasks of ten classes each: 0-9, 5-14, 10-19, 20-29, 25-34, 30-39 and 40-49
    (`experiment=ol_cifar100`).

    Args:
        dataset: Any dataset with labels.
        classes: The classes of each task, as labels of the dataset.
        scenario: "task", or "class", where the outputs of all tasks so far compete; None means "task".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order in which tasks are learned; see `Stream`.
        seed: Seed of the order and of the validation split.

    Raises:
        InputError: If a task has no class, a class twice, or one without an example; or the scenario is "domain".

    Example:
        >>> from cl.data.sources import synthetic
        >>> stream = overlapping(synthetic(num_classes=5), classes=[[0, 1, 2], [2, 3, 4]])
        >>> [(task.name, task.classes) for task in stream]
        [('0+1+2', (0, 1, 2)), ('2+3+4', (3, 4, 5))]
    """
    if dataset.target != "label":
        raise InputError(
            f"The targets of {dataset.name!r} are of kind {dataset.target}: only labels can be split by class."
        )
    if scenario == "domain":
        raise InputError("Overlapping tasks have outputs of their own: use scenario=task or class.")
    tasks = [[int(c) for c in own] for own in classes]
    _check(tasks, dataset)
    train_index, val_index = split_validation(dataset.train_y, val_fraction, seed)
    train_rows = rows_of_each(dataset.train_y, dataset.num_classes, train_index)
    val_rows = rows_of_each(dataset.train_y, dataset.num_classes, val_index)
    test_rows = rows_of_each(dataset.test_y, dataset.num_classes)

    def build(t: int) -> Task:
        label = torch.full((dataset.num_classes,), -1, dtype=torch.int64)
        label[tasks[t]] = sum(map(len, tasks[:t])) + torch.arange(len(tasks[t]))

        def part(x: Rows, y: torch.Tensor, rows: list[torch.Tensor]) -> TaskData:
            return TaskData(x, label[y], t, torch.cat([rows[c] for c in tasks[t]]).sort().values)

        train = part(dataset.train_x, dataset.train_y, train_rows)
        test = part(dataset.test_x, dataset.test_y, test_rows)
        val = part(dataset.train_x, dataset.train_y, val_rows) if len(val_index) else None
        return Task(t, train, test, val, name=task_name([dataset.class_names[c] for c in tasks[t]]))

    return dataset.stream(
        build,
        scenario=scenario or "task",
        num_classes=sum(map(len, tasks)),
        num_tasks=len(tasks),
        class_names=[f"{dataset.class_names[c]} (task {t + 1})" for t, own in enumerate(tasks) for c in own],
        name=f"overlapping {dataset.name}",
        order=order,
        seed=seed,
    )


def _check(tasks: list[list[int]], dataset: Dataset) -> None:
    """Refuse classes that a task cannot have."""
    present = set(torch.unique(dataset.train_y).tolist())
    for t, own in enumerate(tasks):
        strange = [c for c in own if c not in present]
        if not own or strange or len(set(own)) < len(own):
            what = f"class {strange[0]}, which has no row in {dataset.name}" if strange else f"the classes {own}"
            raise InputError(f"Task {t + 1} of classes= has {what}: name one or more classes once each.")
