"""A labelled dataset as arrays: `Dataset`, the mean and std of its channels, and the draw of a validation set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cl.data.augment import Normalize
from cl.data.class_names import with_rows
from cl.data.rows import Rows, as_rows, first_not_finite, kind_of, parts
from cl.data.target import TARGETS
from cl.data.task import Stream, Task
from cl.errors import InputError
from cl.random import derive

Array = npt.NDArray[Any]
Numbers = Sequence[float] | None


@dataclass(frozen=True)
class Dataset:
    """Labelled training and test examples as stored, and how they are augmented and normalised for a network.

    Args:
        name: Its name in reports and errors.
        train_x: Inputs, uint8 images (N, C, H, W) or float32 arrays (N, *shape); possibly memory-mapped.
        train_y: Labels 0..C-1, int64 (N,).
        test_x: Test inputs, of the same type and shape.
        test_y: Test labels.
        class_names: The name of each class.
        mean: Mean of each channel (axis 1), or one number for all; for images in units of [0, 1].
        std: Standard deviation of each channel, or one number for all; above 0.
        augment: Train-time augmentation `(x, numpy generator) -> x` of raw batches on the device, or None.
        target: The kind of target, see `cl.data.target`. For all kinds but "label", `train_y` and `test_y` are float32
            (N, C), and `class_names` has a name for each column.

    Raises:
        InputError: If a part is empty, types or shapes disagree, a label is out of range, or a value is not finite.

    Example:
        >>> x, y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
        >>> Dataset("toy", x, y, x, y, ("cat", "dog")).num_classes
        2
        >>> Dataset("toy", x, y + 1, x, y, ("cat", "dog"))
        Traceback (most recent call last):
        cl.errors.InputError: The train set of 'toy' has label 2, outside 0..1: fix it or num_classes.
    """

    name: str
    train_x: Rows
    train_y: Tensor
    test_x: Rows
    test_y: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: nn.Module | None = None
    target: str = "label"

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            self._check_part(f"The {part} set of {self.name!r}", x, y)
        train, test = (f"{tuple(x.shape[1:])} {x.dtype}".replace("torch.", "") for x in (self.train_x, self.test_x))
        if train != test:
            raise InputError(
                f"Inputs of {self.name!r} are {train} in the train set but {test} in the test set: bring them to one."
            )
        for label, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.input_shape[0]) or not np.isfinite(values).all():
                raise InputError(
                    f"{label}={list(values)} of {self.name!r} does not fit inputs of shape {self.input_shape}: "
                    f"give 1 or {self.input_shape[0]} finite numbers."
                )
        if min(self.std) <= 0:
            raise InputError(f"std={list(self.std)} of {self.name!r} is not above 0: give positive numbers.")

    def __repr__(self) -> str:
        rows = f"{len(self.train_y)} train, {len(self.test_y)} test rows of {kind_of(self.train_x)}"
        return f"Dataset({self.name!r}: {rows}, {self.num_classes} classes)"

    def _check_part(self, what: str, x: Rows, y: Tensor) -> None:
        if len(x) == 0:
            raise InputError(f"{what} is empty: it needs at least one example.")
        if len(x) != len(y):
            raise InputError(f"{what} has {len(x)} inputs but {len(y)} labels: give one label an input.")
        if (
            x.dtype not in (torch.uint8, torch.float32)
            or (x.dtype == torch.uint8 and len(x.shape) != 4)
            or len(x.shape) < 2
        ):
            raise InputError(
                f"{what} holds {x.dtype} inputs of shape {tuple(x.shape)}: "
                "give uint8 images (N, C, H, W) or float32 arrays (N, *shape)."
            )
        TARGETS[self.target].check(what, y, self.num_classes)
        row = first_not_finite(x)
        if row is not None:
            raise InputError(f"{what} has a NaN or infinite value in row {row}: clean the data.")

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_x.shape[1:])

    def stream(self, tasks: Sequence[Task] | Callable[[int], Task], **options: Any) -> Stream:
        """Return a stream of tasks, with the classes, augmentation, normalisation, name and target of this dataset.

        Args:
            tasks: Tasks whose examples come from the dataset, see `Stream`.
            options: Arguments of `Stream`; they replace those of the dataset.

        Example:
            >>> from cl.data.sources import synthetic
            >>> from cl.data.task import TaskData
            >>> data = synthetic(num_classes=3)
            >>> part = TaskData(data.train_x, data.train_y)
            >>> data.stream([Task(0, part, part)], name="mine").num_classes
            3
        """
        shared = {name: getattr(self, name) for name in ("num_classes", "augment", "class_names", "name", "target")}
        return Stream(tasks, **{**shared, "normalize": Normalize(self.mean, self.std), **options})


def rows_of_each(y: Tensor, num_groups: int, index: Tensor | None = None) -> list[Tensor]:
    """Return the positions of the examples of each class (or task), ascending.

    Args:
        y: Labels 0..`num_groups` - 1, int64 (N,).
        num_groups: Number of classes, or tasks.
        index: The examples to group, int64 (n,); None means all of them.

    Example:
        >>> [rows.tolist() for rows in rows_of_each(torch.tensor([1, 0, 1]), 2)]
        [[1], [0, 2]]
    """
    index = torch.arange(len(y)) if index is None else index
    labels, order = y[index].sort(stable=True)
    return list(index[order].split(torch.bincount(labels, minlength=num_groups).tolist()))


def split_validation(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a validation set from the training set, with the same share of every class.

    The size of the validation set is `fraction` * N, rounded. Each class gives its share rounded down, and the classes
    with the largest remainders give one example more, until that size is reached. Targets that are not labels are
    drawn from as one class.

    Args:
        y: Training labels, int64 (N,), or targets (N, C).
        fraction: Share of the examples, in [0, 1).
        seed: Seed of the draw; the split depends on it and on `y` alone.

    Returns:
        The positions of the examples that stay for training and of those for validation, both ascending; fraction 0
        gives none for validation.

    Raises:
        InputError: If a class would have no training example left, or the validation set would be empty.

    Example:
        >>> train, val = split_validation(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
        >>> len(train), len(val)
        (6, 2)
    """
    if not 0 <= fraction < 1:
        raise InputError(f"A validation share of {fraction} is not in [0, 1): give, say, 0.1.")
    labels = y.cpu().numpy() if y.ndim == 1 else np.zeros(len(y), dtype=np.int64)
    chosen = np.zeros(len(labels), dtype=bool)
    names, sizes = np.unique(labels, return_counts=True)
    counts = np.floor(fraction * sizes).astype(int)
    missing = round(fraction * len(labels)) - counts.sum()
    counts[np.argsort(counts - fraction * sizes, kind="stable")[:missing]] += 1
    for label, count in zip(names, counts, strict=True):
        rows = np.flatnonzero(labels == label)
        if count >= len(rows):
            raise InputError(
                f"Class {label} has {len(rows)} training examples, of which a share of {fraction} would leave none: "
                "give a smaller share or more examples."
            )
        draw = np.random.default_rng(derive(seed, "validation", int(label)))
        chosen[draw.permutation(rows)[:count]] = True
    if fraction > 0 and not chosen.any():
        raise InputError(f"A share of {fraction} rounds to no example of any class: give a larger one, or 0.")
    return torch.from_numpy(np.flatnonzero(~chosen)), torch.from_numpy(np.flatnonzero(chosen))


def make_dataset(
    name: str,
    arrays: Mapping[str, Any],
    class_names: Sequence[str],
    normalize: bool,
    mean: Numbers,
    std: Numbers,
    augment: nn.Module | None,
    target: str = "label",
) -> Dataset:
    """Return a dataset of arrays, normalised by the mean and std that are given or by those of its training images.

    Float inputs are not normalised unless `mean` or `std` is given. Classes without a training example are left out,
    see `cl.data.class_names.with_rows`.

    Args:
        name: Its name in reports and errors.
        arrays: `train_x`, `train_y`, `test_x`, `test_y`; and `mean` and `std` of the images where they are known.
        class_names: The name of each class, or of each column of targets.
        normalize: Whether to subtract `mean` and divide by `std`; else pixels are only divided by 255.
        mean: Mean of each channel, in [0, 1]; None computes it from the training images.
        std: Standard deviation of each channel, as `mean`.
        augment: Train-time augmentation.
        target: See `cl.data.target`.
    """
    x = [as_rows(arrays[part]) for part in ("train_x", "test_x")]
    y = [torch.as_tensor(arrays[part]) for part in ("train_y", "test_y")]
    if target == "label":
        y[0], y[1], class_names = with_rows(name, y[0], y[1], class_names)
    if not normalize:
        mean, std = (0.0,), (1.0,)
    elif x[0].dtype == torch.uint8 and len(x[0].shape) == 4 and len(x[0]) and (mean is None or std is None):
        own = (arrays["mean"], arrays["std"]) if "mean" in arrays else channel_moments(x[0])
        mean = own[0].tolist() if mean is None else mean
        std = [float(s) or 1.0 for s in own[1]] if std is None else std  # a constant channel is left as it is
    means, stds = (tuple(map(float, given)) for given in (mean or (0.0,), std or (1.0,)))
    return Dataset(name, x[0], y[0], x[1], y[1], tuple(class_names), means, stds, augment, target)


def channel_moments(x: Any) -> tuple[Array, Array]:
    """Return mean and standard deviation of each channel of uint8 images (N, C, H, W), in units of [0, 1], exactly.

    Args:
        x: An array, a tensor, or a mapped file, which is read part by part.

    Example:
        >>> mean, std = channel_moments(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
        >>> mean.tolist(), std.tolist()
        ([0.5], [0.5])
    """
    total, square = np.zeros(x.shape[1], dtype=np.int64), np.zeros(x.shape[1], dtype=np.int64)
    for part in parts(x):
        values = part.astype(np.uint32)
        total += values.sum((0, 2, 3), dtype=np.int64)
        square += (values * values).sum((0, 2, 3), dtype=np.int64)
    count = math.prod(x.shape) // x.shape[1]
    mean = total / count
    return mean / 255, np.sqrt(np.maximum(square / count - mean**2, 0)) / 255
