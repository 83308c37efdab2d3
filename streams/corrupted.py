"""One dataset with a different corruption in each task (Hendrycks and Dietterich 2019), such as CIFAR-C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Interval

from cl.compose import copies, corrupt, reorder
from cl.data.dataset import Dataset
from cl.data.task import Order, Scenario, Stream
from cl.ranges import checked


@checked
def corrupted(
    dataset: Dataset,
    kinds: Sequence[str] | None = None,
    severity: int = 3,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
    shared_labels: bool | None = None,
) -> Stream:
    """Corrupt every image, with one kind of corruption for each task, in training and test sets.

    Args:
        dataset: A dataset of uint8 images.
        kinds: The kind of each task, one of `cl.compose.corruptions.CORRUPTIONS` or "clean"; None means clean images
            first and then all fifteen corruptions.
        severity: 1 to 5.
        scenario: "class", "task" or "domain"; None means "domain".
        val_fraction: Share of the training set that becomes the validation set, in [0, 1).
        order: The order of the kinds, see `Stream`.
        seed: Seed of the noise, of the validation split and of a shuffled order.
        shared_labels: Whether all tasks have the same labels, also if the scenario is "task"; None means only if the
            scenario is "domain".

    Raises:
        InputError: If the inputs are not images, a kind or the severity does not exist, or `shared_labels` is False
            with scenario "domain".

    Example:
        >>> from cl.data.sources import digits
        >>> [task.name for task in corrupted(digits(), ["clean", "fog", "pixelate"])]
        ['clean', 'fog', 'pixelate']
    """
    from cl.compose.corruptions import CORRUPTIONS

    chosen = ["clean", *CORRUPTIONS] if kinds is None else list(kinds)
    whole = copies(dataset, len(chosen), scenario, val_fraction, seed=seed, shared_labels=shared_labels)
    return reorder(corrupt(whole, chosen, severity, seed), order, seed)
