"""One dataset under a different fixed permutation of its pixels in each task (Goodfellow et al. 2013, section 4)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from cl.augment import Normalize
from cl.data import Dataset, domain_task
from cl.errors import InputError
from cl.random import derive
from cl.task import Scenario, Stream, Task


def permute_pixels(x: Tensor, order: Tensor) -> Tensor:
    """Permute the positions of inputs (N, *shape), channels included.

    Example:
        >>> permute_pixels(torch.tensor([[5, 6, 7]]), torch.tensor([2, 0, 1])).tolist()
        [[7, 5, 6]]
    """
    return x.flatten(1)[:, order].view_as(x)


def permuted(
    dataset: Dataset,
    num_tasks: int = 10,
    identity_first: bool = False,
    scenario: Scenario = "domain",
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Permute the pixels of every image, one permutation a task.

    Args:
        dataset: Any dataset; without augmentation, which would act on permuted pixels.
        num_tasks: T.
        identity_first: Whether the first task keeps its pixels where they are.
        scenario: "domain" shares the labels; "class" and "task" give each task labels of its own.
        val_fraction: Share of the training set that becomes validation.
        seed: Seed of the permutations and of the validation split.

    Raises:
        InputError: If the dataset comes with augmentation or there are no tasks.

    Example:
        >>> from cl.sources import synthetic
        >>> stream = permuted(synthetic(num_classes=3), num_tasks=4)
        >>> len(stream), stream.num_classes
        (4, 3)
    """
    if dataset.augment is not None:
        raise InputError(f"Permuted {dataset.name} would crop or flip permuted pixels: set dataset.augment=null.")
    if num_tasks < 1:
        raise InputError(f"num_tasks={num_tasks}: a stream needs at least one task.")
    size = int(np.prod(dataset.input_shape))

    def build(t: int) -> Task:
        order = np.random.default_rng(derive(seed, "permutation", t)).permutation(size)
        transform = partial(permute_pixels, order=torch.from_numpy(order))
        first = identity_first and t == 0
        return domain_task(
            dataset,
            t,
            None if first else transform,
            offset=0 if scenario == "domain" else t * dataset.num_classes,
            val_fraction=val_fraction,
            seed=seed,
            name="as stored" if first else f"permutation {t + 1}",
        )

    return Stream(
        build,
        scenario=scenario,
        num_classes=dataset.num_classes * (1 if scenario == "domain" else num_tasks),
        num_tasks=num_tasks,
        normalize=Normalize(dataset.mean, dataset.std),
        name=f"permuted {dataset.name}",
    )
