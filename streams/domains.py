"""Several datasets in a row, each with labels of its own or shared ones (5-Datasets, Ebrahimi et al. 2020)."""

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
    """Learn one dataset after the other.

    Args:
        datasets: By name, in order.
        scenario: "domain" shares the labels; "class" and "task" give each dataset labels of its own; None means
            "domain" where the numbers of classes agree and they have some in common, else "class".
        input_shape: (C, H, W) that all images are brought to; None means they agree already.
        val_fraction: Share of each training set that becomes validation.
        order: The order of the datasets, see `Stream`.
        seed: Seed of the validation splits and of a shuffled order.
        match: Which classes are the same where labels are shared: those of one "name", or of one "position", see
            `cl.compose.concat`.

    Raises:
        InputError: If shapes differ; or with shared labels no name is in common or, by position, numbers of classes
            differ.

    Example:
        >>> from cl.data.sources import digits, synthetic
        >>> other = synthetic(num_classes=10, input_shape=(1, 8, 8), image=True)
        >>> domains({"digits": digits(), "blobs": other}, scenario="task").num_classes
        20
    """
    parts = {name: copies(dataset, val_fraction=val_fraction, seed=seed) for name, dataset in datasets.items()}
    return concat(parts, scenario, input_shape, order, seed, match)
