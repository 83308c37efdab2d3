"""Several datasets one after another, with shared or separate labels (5-Datasets, Ebrahimi et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Interval

from cl.compose import concat, copies
from cl.compose.tasks import Match
from cl.data.dataset import Dataset
from cl.data.task import Order, Scenario, Stream
from cl.ranges import checked


@checked
def domains(
    datasets: Mapping[str, Dataset],
    scenario: Scenario | None = None,
    input_shape: Sequence[int] | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    order: Order = None,
    seed: int = 0,
    match: Match = "name",
) -> Stream:
    """Return a stream in which each task is one dataset.

    Args:
        datasets: The datasets by name, in order.
        scenario: "domain": datasets share labels; "class" and "task": each has labels of its own. None means "domain"
            if the datasets have equally many classes, and either unnamed ones or some names in common; else "class".
        input_shape: The shape (C, H, W) to resize all images to; None requires that all have one shape.
        val_fraction: Share of each training set that becomes the validation set, in [0, 1).
        order: The order of the datasets, see `Stream`.
        seed: Seed of the validation splits and of a shuffled order.
        match: Which classes are the same if labels are shared: those of one "name", or of one "position", see
            `cl.compose.concat`.

    Raises:
        InputError: If shapes differ; or if labels are shared, but the datasets have no name in common or, by position,
            different numbers of classes.

    Example:
        >>> from cl.data.sources import digits, synthetic
        >>> other = synthetic(num_classes=10, input_shape=(1, 8, 8), image=True)
        >>> domains({"digits": digits(), "blobs": other}, scenario="task").num_classes
        20
    """
    parts = {name: copies(dataset, val_fraction=val_fraction, seed=seed) for name, dataset in datasets.items()}
    return concat(parts, scenario, input_shape, order, seed, match)
