"""Several datasets in a row, each with labels of its own or shared ones (5-Datasets, Ebrahimi et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.augment import Normalize
from cl.data import Dataset, domain_task
from cl.errors import InputError
from cl.task import Scenario, Stream, Task


def to_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring images (N, C, H, W) to another shape: grey repeated as colour, size by bilinear interpolation.

    Example:
        >>> to_shape(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), (3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    if x.shape[2:] != tuple(shape[1:]):
        resized = F.interpolate(x.float(), size=tuple(shape[1:]), mode="bilinear", antialias=True)
        x = resized.round().clamp(0, 255).to(torch.uint8) if x.dtype == torch.uint8 else resized
    return x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else x


def domains(
    datasets: Mapping[str, Dataset],
    scenario: Scenario = "domain",
    input_shape: Sequence[int] | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Learn one dataset after the other.

    Args:
        datasets: By name, in order.
        scenario: "domain" shares the labels, so that all need the same number of classes; "class" and "task"
            give each dataset labels of its own.
        input_shape: (C, H, W) that all images are brought to; None means they agree already.
        val_fraction: Share of each training set that becomes validation.
        seed: Seed of the validation splits.

    Raises:
        InputError: If shapes or, with shared labels, numbers of classes differ.

    Example:
        >>> from cl.sources import digits, synthetic
        >>> other = synthetic(num_classes=10, input_shape=(1, 8, 8), image=True)
        >>> domains({"digits": digits(), "blobs": other}, scenario="task").num_classes
        20
    """
    names, parts = list(datasets), list(datasets.values())
    if not parts:
        raise InputError("A domains stream has no datasets: name at least one.")
    shape = tuple(input_shape or parts[0].input_shape)
    for name, part in datasets.items():
        fits = part.input_shape == shape or (input_shape and len(shape) == 3 and part.input_shape[0] in (1, shape[0]))
        if not fits:
            raise InputError(f"Inputs of {name!r} have shape {part.input_shape}, not {shape}: set stream.input_shape.")
    shared = scenario == "domain"
    counts = [part.num_classes for part in parts]
    if shared and len(set(counts)) > 1:
        raise InputError(
            f"The datasets have {counts} classes, which scenario=domain would share: use scenario=task or class."
        )
    offsets = [0 if shared else sum(counts[:t]) for t in range(len(parts))]

    def build(t: int) -> Task:
        transform = partial(to_shape, shape=shape) if parts[t].input_shape != shape else None
        return domain_task(parts[t], t, transform, offsets[t], val_fraction, seed, name=names[t])

    return Stream(
        build,
        scenario=scenario,
        num_classes=counts[0] if shared else sum(counts),
        num_tasks=len(parts),
        augment=parts[0].augment,
        normalize=Normalize(parts[0].mean, parts[0].std),
        name=" → ".join(names),
    )
