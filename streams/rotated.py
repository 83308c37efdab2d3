"""One dataset rotated by a different angle in each task (Lopez-Paz and Ranzato 2017, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Interval

from cl.compose import copies, reorder, rotate
from cl.data.dataset import Dataset
from cl.data.task import MOST_TASKS, Order, Scenario, Stream
from cl.ranges import checked


@checked
def rotated(
    dataset: Dataset,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 10,
    max_angle: float = 180.0,
    angles: Sequence[float] | None = None,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
    shared_labels: bool | None = None,
) -> Stream:
    """Rotate every image, with one angle for each task.

    Args:
        dataset: Any dataset of images.
        num_tasks: Number of tasks, T.
        max_angle: Angles, in degrees, are spread evenly over [0, max_angle).
        angles: The angle of each task in degrees, instead of the even spread.
        scenario: "class", "task" or "domain"; None means "domain".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order of the angles, see `Stream`.
        seed: Seed of the validation split and of a shuffled order.
        shared_labels: Whether all tasks have the same labels, also if the scenario is "task"; None means only if the
            scenario is "domain".

    Raises:
        InputError: If the inputs are not images, there are more or fewer angles than tasks, or `shared_labels` is False
            with scenario "domain".

    Example:
        >>> from cl.data.sources import digits
        >>> [task.name for task in rotated(digits(), num_tasks=3, max_angle=90)]
        ['0°', '30°', '60°']
    """
    whole = copies(dataset, num_tasks, scenario, val_fraction, seed=seed, shared_labels=shared_labels)
    spread = [t * max_angle / num_tasks for t in range(num_tasks)]
    return reorder(rotate(whole, spread if angles is None else angles), order, seed)
