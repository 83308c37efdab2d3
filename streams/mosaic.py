"""A multi-label stream from any image dataset: grids of images, whose targets are the classes in them.

In the class- and task-incremental scenarios, as is usual for multi-label streams, an image of a task shows at least one
of the task's classes and any others, but only the task's classes are annotated. The column of another task's class is
0 although the class may be shown, so only the task's own outputs must be trained (train_mask=task, which the
configuration sets).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.data.dataset import Array, Dataset, split_validation
from cl.data.rows import Rows
from cl.data.task import MOST_TASKS, SCENARIOS, Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


def tile(cells: Tensor, grid: int) -> Tensor:
    """Arrange images (N, g^2, C, H, W) in grids (N, C, g H, g W), row by row.

    Example:
        >>> tile(torch.arange(4).view(1, 4, 1, 1, 1), 2).tolist()
        [[[[0, 1], [2, 3]]]]
    """
    rows, _, channels, height, width = cells.shape
    laid = cells.view(rows, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return laid.reshape(rows, channels, grid * height, grid * width)


@checked
def mosaic(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    num_images: int = 1000,
    num_test: int = 500,
    grid: Annotated[int, Ge(1)] = 2,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Draw grids of g by g images; targets are float32 (N, C), 1 if the class is annotated in the grid.

    One cell, at a random position, shows a class of the task, and the others show any class. Images are drawn with
    replacement, those of training grids from the training set and those of test grids from the test set. The entries of
    R are mAP, CF1 or OF1 over the task's classes.

    Args:
        dataset: Images with labels.
        num_tasks: Number of tasks, T; classes are split into tasks as evenly as possible, in their order.
        num_images: Training grids of each task, including validation grids.
        num_test: Test grids of each task.
        grid: Cells in a row of the grid, g.
        scenario: "class" or "task": each task has its own classes. "domain": all classes are annotated in every task,
            so that tasks differ only in the draw, unless a block of `cl.compose` changes their images. None means
            "class".
        val_fraction: Share of the training images, and of the training grids, that becomes the validation set.
        order: See `Stream`.
        seed: Seed of the grids, of the validation split and of a shuffled order.

    Raises:
        InputError: If inputs are not images or targets not labels, or a task would have only one class, which all its
            grids would show.

    Example:
        >>> from cl.data.sources import digits
        >>> stream = mosaic(digits(), num_tasks=5)
        >>> stream.input_shape, stream[1].classes, stream[1].train.labels.shape
        ((1, 16, 16), (2, 3), torch.Size([1000, 10]))
    """
    scenario, width = scenario or "class", dataset.num_classes
    _check(dataset, num_tasks, scenario)
    every = np.arange(width)
    groups = np.array_split(every, num_tasks) if scenario != "domain" else [every] * num_tasks
    train_rows, val_rows = split_validation(dataset.train_y, val_fraction, seed)

    def draw(t: int, part: str, x: Rows, y: Array, rows: Array, count: int) -> TaskData:
        random = np.random.default_rng(derive(seed, "mosaic", part, t))
        cells = random.choice(rows, (count, grid**2))
        own = rows[np.isin(y[rows], groups[t])]
        cells[np.arange(count), random.integers(grid**2, size=count)] = random.choice(own, count)
        target = np.zeros((count, width), dtype=np.float32)
        np.put_along_axis(target, y[cells], 1.0, axis=1)
        images = x[torch.from_numpy(cells.ravel())].unflatten(0, cells.shape)
        return TaskData(tile(images, grid), torch.from_numpy(target * np.isin(every, groups[t])), t)

    def build(t: int) -> Task:
        y, test_y = dataset.train_y.numpy(), dataset.test_y.numpy()
        held_out = round(val_fraction * num_images)
        train = draw(t, "train", dataset.train_x, y, train_rows.numpy(), num_images - held_out)
        val = draw(t, "val", dataset.train_x, y, val_rows.numpy(), held_out) if held_out else None
        test = draw(t, "test", dataset.test_x, test_y, np.arange(len(test_y)), num_test)
        return Task(t, train, test, val, name=" ".join(dataset.class_names[c] for c in groups[t]))

    return dataset.stream(
        build,
        scenario=scenario,
        num_classes=width,
        num_tasks=num_tasks,
        name=f"mosaics of {dataset.name}",
        target="multilabel",
        order=order,
        seed=seed,
    )


def _check(dataset: Dataset, num_tasks: int, scenario: str) -> None:
    if len(dataset.input_shape) != 3 or dataset.target != "label":
        raise InputError(
            f"{dataset.name!r} has inputs of shape {dataset.input_shape} and targets of kind {dataset.target}: mosaics "
            "need images (C, H, W) with one label each."
        )
    if scenario not in SCENARIOS:
        raise InputError(f"scenario={scenario!r} is unknown: use one of {', '.join(SCENARIOS)}.")
    most = dataset.num_classes // 2
    if scenario != "domain" and num_tasks > most:
        raise InputError(
            f"num_tasks={num_tasks} for {dataset.num_classes} classes: give 1 to {most} tasks, so that each has two."
        )
