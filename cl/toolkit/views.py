"""Second views: an augmented copy of each example of a batch, for methods that learn from both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cl.engine.batch import Batch
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream

Augment = Callable[[Tensor, np.random.Generator], Any]


def check_images(stream: Stream, name: str) -> None:
    """Refuse a stream whose inputs are not images.

    Args:
        stream: The stream.
        name: The name of the method in messages.

    Raises:
        InputError: Naming the method and the stream.
    """
    if len(stream.input_shape) != 3:
        raise InputError(
            f"{name} crops images, but the inputs of {stream.name!r} are {stream.input_shape}: choose another strategy."
        )


def check_square(stream: Stream, name: str, setting: str) -> None:
    """Refuse images that are oblong and cannot be turned.

    Args:
        stream: The stream.
        name: The name of the method in messages.
        setting: The setting that turns images, to be set to false.

    Raises:
        InputError: Naming the method, the stream and the setting.
    """
    if stream.input_shape[1] != stream.input_shape[2]:
        raise InputError(f"{name} turns images, but those of {stream.name!r} are oblong: set {setting}=false.")


def another_view(x: Tensor, augment: Augment, rng: np.random.Generator) -> Tensor:
    """Return augmented images of the same type: where `augment` makes floats in [0, 1] of bytes, rounded to bytes.

    Args:
        x: Raw images (B, C, H, W).
        augment: Such as `cl.data.augment.ContrastiveView`.
        rng: The generator of its draws.

    Example:
        >>> x = torch.full((1, 1, 1, 1), 100, dtype=torch.uint8)
        >>> another_view(x, lambda x, rng: x / 255 * 0.5, np.random.default_rng(0)).item()
        50
    """
    view: Tensor = augment(x, rng)
    if x.dtype == torch.uint8 and view.is_floating_point():
        view = (view * 255).round().to(torch.uint8)
    return view


def with_another_view(batch: Batch, augment: Augment, rng: np.random.Generator) -> Batch:
    """Return a batch of 2B examples: its own B, then an augmented copy of each; extras are dropped.

    Example:
        >>> batch = Batch(torch.zeros(3, 1, 2, 2), torch.tensor([4, 5, 6]), torch.zeros(3, dtype=torch.int64))
        >>> with_another_view(batch, lambda x, rng: x, np.random.default_rng(0)).y.tolist()
        [4, 5, 6, 4, 5, 6]
    """
    return batch.append(Batch(another_view(batch.x, augment, rng), batch.y, batch.task))


def turned(x: Tensor) -> Tensor:
    """Return the 16 copies of square images (B, C, H, H), (16 B, C, H, H); the first B are the images themselves.

    Example:
        >>> turned(torch.arange(4.0).view(1, 1, 2, 2))[:4, 0].flatten(1).int().tolist()
        [[0, 1, 2, 3], [2, 1, 0, 3], [0, 3, 2, 1], [2, 3, 0, 1]]
    """
    left, right = x.tensor_split(2, dim=3)
    over_left, over_right = left.rot90(2, (2, 3)), right.rot90(2, (2, 3))
    halves = [(left, right), (over_left, right), (left, over_right), (over_left, over_right)]
    return torch.cat([torch.cat(pair, 3).rot90(k, (2, 3)) for k in range(4) for pair in halves])


def with_turned_copies(batch: Batch, num_classes: int) -> Batch:
    """Return the 16 B turned copies of square images; the k-th copies of class c have the label c + k `num_classes`.

    Example:
        >>> batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.int64))
        >>> with_turned_copies(batch, 3).y[:6].tolist()
        [0, 2, 3, 5, 6, 8]
    """
    x = turned(batch.x)
    copies = len(x) // len(batch)
    label = (batch.y + num_classes * torch.arange(copies, device=x.device)[:, None]).flatten()
    return Batch(x, label, batch.task.repeat(copies))
