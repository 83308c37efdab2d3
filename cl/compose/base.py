"""Datasets as streams, and helpers that the building blocks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from cl.data.dataset import Dataset, split_validation
from cl.data.task import MOST_TASKS, Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked

Source = Stream | Dataset


@checked
def copies(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 1,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
    shared_labels: bool | None = None,
) -> Stream:
    """Return a stream in which every task is the whole dataset, for blocks that change each task differently.

    Args:
        dataset: Any dataset.
        num_tasks: Number of tasks, T.
        scenario: "class", "task" or "domain"; None means "domain".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: See `Stream`.
        seed: Seed of the validation split and of a shuffled order.
        shared_labels: Whether all tasks have the same labels, or each has its own; None means the same if the scenario
            is "domain". With scenario "task" and shared labels, the task is given at test, and all tasks share one
            output for each class.

    Raises:
        InputError: If there are no tasks, or the scenario is "domain" and `shared_labels` is False.

    Example:
        >>> from cl.data.sources import synthetic
        >>> [task.classes for task in copies(synthetic(num_classes=2), 2, "task")]
        [(0, 1), (2, 3)]
    """
    scenario = scenario or "domain"
    own = scenario != "domain" if shared_labels is None else not shared_labels
    if own and scenario == "domain":
        raise InputError("shared_labels=false with scenario=domain, whose tasks have the same labels: leave it out.")
    train_rows, val_rows = split_validation(dataset.train_y, val_fraction, seed)
    width = dataset.num_classes * (num_tasks if own else 1)

    def build(t: int) -> Task:
        train_y, test_y = (shift(y, t * dataset.num_classes * own, width) for y in (dataset.train_y, dataset.test_y))
        train = TaskData(dataset.train_x, train_y, t, train_rows if len(val_rows) else None)
        val = TaskData(dataset.train_x, train_y, t, val_rows) if len(val_rows) else None
        return Task(t, train, TaskData(dataset.test_x, test_y, t), val, name=f"{dataset.name} {t + 1}")

    return dataset.stream(
        build,
        scenario=scenario,
        num_classes=width,
        num_tasks=num_tasks,
        class_names=() if own else dataset.class_names,
        repeats=not own and scenario != "domain",
        order=order,
        seed=seed,
    )


def shift(y: Tensor, offset: int, width: int) -> Tensor:
    """Add an offset to labels (N,), or move the columns of targets (N, C) by it to targets (N, `width`)."""
    return y + offset if y.ndim == 1 else F.pad(y, (offset, width - offset - y.shape[1]))


def as_stream(source: Source) -> Stream:
    """Return a dataset as a stream of one task; a stream is returned as it is."""
    return copies(source) if isinstance(source, Dataset) else source


def labels_only(stream: Stream, what: str) -> None:
    """Refuse a stream whose targets are not labels; `what` names the block in the error."""
    if stream.target.name != "label":
        raise InputError(f"{what} counts labels, but the targets of {stream.name!r} are {stream.target.name}.")


def generator(seed: int, what: str, task: int) -> np.random.Generator:
    """Return the random generator of one task; `what` names the block, so that each has its own draws."""
    return np.random.default_rng(derive(seed, what, task))


def choose(y: Tensor, count: Callable[[int, int], int], seed: int, what: str, task: int) -> Tensor:
    """Draw examples of each class without replacement, and return their positions, ascending.

    Args:
        y: Labels, int64 (N,).
        count: Returns the number to draw from a class and the number of its examples.
        seed: Seed of the draw.
        what: Name of the block, so that each has its own draws.
        task: Position of the task.
    """
    labels, kept = y.numpy(), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        draw = np.random.default_rng(derive(seed, what, task, int(label)))
        kept.append(draw.permutation(rows)[: count(int(label), len(rows))])
    return torch.from_numpy(np.sort(np.concatenate(kept)))
