"""One dataset that comes in parts: every task has all classes and new instances of them (New Instances in CORe50)."""

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
    """Cut a dataset into parts of equal size, the same share of each class; domain-incremental.

    Args:
        dataset: Any dataset of labels.
        num_tasks: T.
        val_fraction: Share of the training set that becomes validation.
        order: The order of the parts, see `Stream`.
        seed: Seed of the parts, of the validation split and of a shuffled order.

    Raises:
        InputError: If a class has fewer rows than there are tasks.

    Example:
        >>> from cl.data.sources import digits
        >>> [len(task.test) for task in data_incremental(digits(), num_tasks=2)]
        [181, 178]
    """
    return reorder(partition(copies(dataset, val_fraction=val_fraction, seed=seed), num_tasks, seed), order, seed)
