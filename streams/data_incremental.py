"""One dataset in parts: every task has all classes and new instances of them ("new instances" in CORe50)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from cl.compose import copies, partition, reorder
from cl.data.dataset import Dataset
from cl.data.task import MOST_TASKS, Order, Stream
from cl.ranges import checked


@checked
def data_incremental(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Cut a dataset into parts of equal size, with the same share of each class; domain-incremental.

    Args:
        dataset: Any dataset with labels.
        num_tasks: Number of tasks, T.
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order of the parts, see `Stream`.
        seed: Seed of the parts, of the validation split and of a shuffled order.

    Raises:
        InputError: If a class has fewer examples than there are tasks.

    Example:
        >>> from cl.data.sources import digits
        >>> [len(task.test) for task in data_incremental(digits(), num_tasks=2)]
        [181, 178]
    """
    return reorder(partition(copies(dataset, val_fraction=val_fraction, seed=seed), num_tasks, seed), order, seed)
