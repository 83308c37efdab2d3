"""Blocks that change inputs: permute pixels, rotate and corrupt images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cl.compose.base import Source, as_stream, generator
from cl.data.task import Stream, Task
from cl.errors import InputError


def transform(
    source: Source,
    change: Callable[[int], Callable[[Tensor], Tensor] | None],
    name: str,
    task_names: Sequence[str] | None = None,
) -> Stream:
    """Transform the inputs of every task, in training, validation and test sets.

    Args:
        source: Stream or dataset.
        change: Maps the position of a task to a deterministic map of its raw inputs (n, *input), which acts on each
            input independently; None does not change them.
        name: Name of the new stream in reports.
        task_names: Names of the tasks; None keeps those of the source.

    Example:
        >>> from cl.data.sources import synthetic
        >>> halved = transform(synthetic(), lambda t: lambda x: x / 2, "halved")
        >>> bool((halved[0].train.tensors()[0] * 2 == synthetic().train_x).all())
        True
    """
    stream = as_stream(source)

    def build(t: int) -> Task:
        task, change_t = stream[t], change(t)
        task = task if change_t is None else task.each(lambda part: part.then(change_t))
        return task if task_names is None else replace(task, name=task_names[t])

    return stream.derive(build, name=name)


def permute_pixels(x: Tensor, order: Tensor) -> Tensor:
    """Permute the positions of inputs (N, *shape), channels included.

    Example:
        >>> permute_pixels(torch.tensor([[5, 6, 7]]), torch.tensor([2, 0, 1])).tolist()
        [[7, 5, 6]]
    """
    return x.flatten(1)[:, order].view_as(x)


def permute(source: Source, identity_first: bool = False, seed: int = 0) -> Stream:
    """Permute the pixels of every input, with one permutation for each task (Goodfellow et al. 2013, section 4).

    Args:
        source: Stream or dataset; without augmentation, which would act on permuted pixels.
        identity_first: Whether the pixels of the first task are not permuted.
        seed: Seed of the permutations.

    Raises:
        InputError: If the stream comes with augmentation.

    Example:
        >>> from cl.data.sources import synthetic
        >>> permute(synthetic())[0].name
        'permutation 1'
    """
    stream = as_stream(source)
    if stream.augment is not None:
        raise InputError(f"Permuting {stream.name} would crop or flip permuted pixels: set dataset.augment=null.")
    size = int(np.prod(stream.input_shape))

    def change(t: int) -> Callable[[Tensor], Tensor] | None:
        order = torch.from_numpy(generator(seed, "permutation", t).permutation(size))
        return None if identity_first and t == 0 else partial(permute_pixels, order=order)

    names = ["as stored" if identity_first and t == 0 else f"permutation {t + 1}" for t in range(len(stream))]
    return transform(stream, change, f"permuted {stream.name}", names)


def turn(x: Tensor, angle: float) -> Tensor:
    """Rotate images (N, C, H, W) counter-clockwise by degrees, with bilinear interpolation and corners of 0.

    Example:
        >>> turn(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90).squeeze().round().tolist()
        [[2.0, 4.0], [1.0, 3.0]]
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    turned: Tensor = rotate(x, angle, interpolation=InterpolationMode.BILINEAR)
    return turned


def rotate(source: Source, angles: Sequence[float]) -> Stream:
    """Rotate every image, with one angle for each task (Lopez-Paz and Ranzato 2017, section 5).

    Args:
        source: Stream or dataset of images.
        angles: The angle of each task in degrees, counter-clockwise.

    Raises:
        InputError: If the inputs are not images, or there are more or fewer angles than tasks.

    Example:
        >>> from cl.data.sources import digits
        >>> rotate(digits(), [30])[0].name
        '30°'
    """
    stream = as_stream(source)
    _images_only(stream, "can be rotated")
    degrees = [float(angle) for angle in angles]
    if len(degrees) != len(stream):
        raise InputError(f"{len(degrees)} angles for num_tasks={len(stream)}: give one angle a task.")

    def change(t: int) -> Callable[[Tensor], Tensor] | None:
        return partial(turn, angle=degrees[t]) if degrees[t] else None

    return transform(stream, change, f"rotated {stream.name}", [f"{angle:g}°" for angle in degrees])


def corrupt(source: Source, kinds: Sequence[str], severity: int = 3, seed: int = 0) -> Stream:
    """Corrupt every image, with one kind of corruption for each task (Hendrycks and Dietterich 2019, section 3).

    Args:
        source: Stream or dataset of uint8 images.
        kinds: The kind of each task, one of `cl.compose.corruptions.CORRUPTIONS` or "clean".
        severity: 1 to 5.
        seed: Seed of the noise.

    Raises:
        InputError: If the inputs are not images, there are more or fewer kinds than tasks, or a kind or the severity
            does not exist.

    Example:
        >>> from cl.compose import copies
        >>> from cl.data.sources import digits
        >>> [task.name for task in corrupt(copies(digits(), 2), ["clean", "fog"])]
        ['clean', 'fog']
    """
    from cl.compose.corruptions import check_corruption
    from cl.compose.corruptions import corrupt as corrupted

    stream = as_stream(source)
    _images_only(stream, "can be corrupted")
    if len(kinds) != len(stream):
        raise InputError(f"{len(kinds)} corruptions for {len(stream)} tasks: give one a task.")
    for kind in set(kinds) - {"clean"}:
        check_corruption(kind, severity)

    def change(t: int) -> Callable[[Tensor], Tensor] | None:
        return None if kinds[t] == "clean" else partial(corrupted, kind=kinds[t], severity=severity, seed=seed)

    return transform(stream, change, f"corrupted {stream.name}", kinds)


def _images_only(stream: Stream, what: str) -> None:
    if len(stream.input_shape) != 3:
        raise InputError(f"Inputs of {stream.name} have shape {stream.input_shape}: only images {what}.")
