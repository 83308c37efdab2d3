"""Disjoint and blurry classes at once: i-Blurry-N-M (Koh et al. 2022, section 3).

"Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime Inference", ICLR. N percent of
the classes are disjoint: all their examples come in one task. Each of the other classes has its own task, too, but M
percent of its examples are spread evenly over the other tasks.

Differences from the paper: a class is tested in the column of R of its own task; the paper tests all classes seen.
Differences from the released code: shares are exact for each class; examples keep the label of their class's task.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval

from cl.data.dataset import Array, Dataset, split_validation
from cl.data.task import MOST_TASKS, Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


def blend(
    labels: Array, num_classes: int, num_tasks: int, disjoint: float, blur: float, seed: int
) -> tuple[Array, Array]:
    """Draw the task of each class (C,), and the task in which each example comes (n,).

    Args:
        labels: The label of each example, (n,).
        num_classes: Number of classes, C.
        num_tasks: Number of tasks.
        disjoint: Share of the classes that are disjoint.
        blur: Share of a blurry class's examples that come in other tasks.
        seed: Seed of the draw.

    Example:
        >>> owner, task = blend(np.array([0] * 10 + [1] * 10), 2, 2, disjoint=0.0, blur=0.3, seed=0)
        >>> sorted(owner.tolist()), int((task != owner[[0] * 10 + [1] * 10]).sum())
        ([0, 1], 6)
    """
    draw = np.random.default_rng(derive(seed, "i-blurry"))
    classes = draw.permutation(num_classes)
    # Both kinds of classes are distributed evenly; the blurry ones begin where the disjoint ones ended.
    owner = np.empty(num_classes, dtype=np.int64)
    owner[classes] = np.arange(num_classes) % num_tasks
    task: Array = owner[labels]
    for c in classes[round(disjoint * num_classes) :] if num_tasks > 1 else ():
        own = draw.permutation(np.flatnonzero(labels == c))
        leaving = own[: round(blur * len(own))]
        task[leaving] = (owner[c] + 1 + np.arange(len(leaving)) % (num_tasks - 1)) % num_tasks
    return owner, task


@checked
def i_blurry(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    disjoint: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    blur: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Split a dataset by class, with some examples of some classes in other tasks.

    Args:
        dataset: Any dataset with labels.
        num_tasks: Number of tasks, T.
        disjoint: Share of the classes that are disjoint, N/100, in [0, 1].
        blur: Share of a blurry class's examples that come in other tasks, M/100, in [0, 1].
        scenario: "class" or "task"; None means "class".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: See `Stream`.
        seed: Seed of all draws.

    Raises:
        InputError: If shares are outside [0, 1], the scenario is "domain", or there are fewer classes than tasks.

    Example:
        >>> from cl.data.sources import digits
        >>> stream = i_blurry(digits(), num_tasks=2, disjoint=0.5, blur=0.2)
        >>> [len(task.classes) for task in stream], len(stream[0].train.labels.unique())
        ([5, 5], 8)
    """
    if scenario == "domain":
        raise InputError("The tasks of i_blurry have different classes: use scenario=class or scenario=task.")
    if num_tasks > dataset.num_classes:
        raise InputError(f"num_tasks={num_tasks} for {dataset.num_classes} classes: give each task at least one.")
    train_rows, val_rows = split_validation(dataset.train_y, val_fraction, seed)
    labels = dataset.train_y[train_rows].numpy()
    owner, task = blend(labels, dataset.num_classes, num_tasks, disjoint, blur, seed)
    table = torch.from_numpy(owner)
    train_task, test_task = table[dataset.train_y], table[dataset.test_y]

    def build(t: int) -> Task:
        train = TaskData(dataset.train_x, dataset.train_y, train_task, train_rows[torch.from_numpy(task == t)])
        test = TaskData(dataset.test_x, dataset.test_y, t, (test_task == t).nonzero().flatten())
        val = TaskData(dataset.train_x, dataset.train_y, t, val_rows[train_task[val_rows] == t])
        names = [dataset.class_names[c] for c in np.flatnonzero(owner == t)]
        return Task(t, train, test, val if len(val) else None, name="+".join(names[:3]) + " …" * (len(names) > 3))

    return dataset.stream(
        build,
        scenario=scenario or "class",
        num_tasks=num_tasks,
        name=f"i-blurry {dataset.name}",
        repeats=True,
        order=order,
        seed=seed,
    )
