"""One dataset turned by a different angle in each task (Lopez-Paz and Ranzato 2017, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from cl.augment import Normalize
from cl.data import Dataset, domain_task
from cl.errors import InputError
from cl.task import Scenario, Stream, Task


def turn(x: Tensor, angle: float) -> Tensor:
    """Turn images (N, C, H, W) counter-clockwise by degrees, bilinear, the corners filled with 0.

    Example:
        >>> import torch
        >>> turn(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90).squeeze().round().tolist()
        [[2.0, 4.0], [1.0, 3.0]]
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    turned: Tensor = rotate(x, angle, interpolation=InterpolationMode.BILINEAR)
    return turned


def rotated(
    dataset: Dataset,
    num_tasks: int = 10,
    max_angle: float = 180.0,
    angles: Sequence[float] | None = None,
    scenario: Scenario = "domain",
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Turn every image, one angle a task.

    Args:
        dataset: Any dataset of images.
        num_tasks: T.
        max_angle: Angles in degrees are spread evenly over [0, max_angle).
        angles: One angle a task, in place of the even spread.
        scenario: "domain" shares the labels; "class" and "task" give each task labels of its own.
        val_fraction: Share of the training set that becomes validation.
        seed: Seed of the validation split.

    Raises:
        InputError: If the inputs are no images, or the angles are not one a task.

    Example:
        >>> from cl.sources import digits
        >>> [task.name for task in rotated(digits(), num_tasks=3, max_angle=90)]
        ['0°', '30°', '60°']
    """
    if len(dataset.input_shape) != 3:
        raise InputError(f"Inputs of {dataset.name} have shape {dataset.input_shape}: only images can be rotated.")
    degrees = [float(a) for a in (angles if angles is not None else np.arange(num_tasks) * max_angle / num_tasks)]
    if len(degrees) != num_tasks or num_tasks < 1:
        raise InputError(f"{len(degrees)} angles for num_tasks={num_tasks}: give one angle a task.")

    def build(t: int) -> Task:
        return domain_task(
            dataset,
            t,
            partial(turn, angle=degrees[t]) if degrees[t] else None,
            offset=0 if scenario == "domain" else t * dataset.num_classes,
            val_fraction=val_fraction,
            seed=seed,
            name=f"{degrees[t]:g}°",
        )

    return Stream(
        build,
        scenario=scenario,
        num_classes=dataset.num_classes * (1 if scenario == "domain" else num_tasks),
        num_tasks=num_tasks,
        augment=dataset.augment,
        normalize=Normalize(dataset.mean, dataset.std),
        name=f"rotated {dataset.name}",
    )
