"""One dataset with a different fixed permutation of its pixels in each task (Goodfellow et al. 2013, section 4)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from cl.compose import copies, permute, reorder
from cl.data.dataset import Dataset
from cl.data.task import MOST_TASKS, Order, Scenario, Stream
from cl.ranges import checked


@checked
def permuted(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 10,
    identity_first: bool = False,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
    shared_labels: bool | None = None,
) -> Stream:
    """Permute the pixels of every image, with one permutation for each task.

    Args:
        dataset: Any dataset; without augmentation, which would act on permuted pixels.
        num_tasks: Number of tasks, T.
        identity_first: Whether the pixels of the first task are not permuted.
        scenario: "class", "task" or "domain"; None means "domain".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order of the permutations, see `Stream`.
        seed: Seed of the permutations, of the validation split and of a shuffled order.
        shared_labels: Whether all tasks have the same labels, also if the scenario is "task"; None means only if the
            scenario is "domain".

    Raises:
        InputError: If the dataset comes with augmentation, or `shared_labels` is False with scenario "domain".

    Example:
        >>> from cl.data.sources import synthetic
        >>> stream = permuted(synthetic(num_classes=3), num_tasks=4)
        >>> len(stream), stream.num_classes
        (4, 3)
    """
    whole = copies(dataset, num_tasks, scenario, val_fraction, seed=seed, shared_labels=shared_labels)
    return reorder(permute(whole, identity_first, seed), order, seed)
