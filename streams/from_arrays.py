"""Your own arrays, with the task of each row, or with classes that are split into tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from cl.data.by_row import Float32, by_task
from cl.data.dataset import Array, Dataset, Numbers, make_dataset
from cl.data.rows import Rows, check_plain, open_array
from cl.data.target import TARGETS
from cl.data.task import Order, Scenario, Stream
from cl.errors import InputError, unknown
from cl.ranges import checked

Given = Any  # a numpy array, a tensor, or the path of a .npy file


@checked
def from_arrays(
    train_x: Given,
    train_y: Given,
    test_x: Given,
    test_y: Given,
    train_task: Given | None = None,
    test_task: Given | None = None,
    num_tasks: int | None = None,
    class_names: Sequence[str] | None = None,
    target: str = "label",
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
    name: str = "arrays",
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Return a stream of arrays: numpy arrays, tensors, or the paths of `.npy` files, of which large ones stay on disk.

    Labels are stream-wide. If they are not 0..C-1, they are numbered in ascending order, and the old labels become the
    names of the classes. Tasks are the values of the task arrays in ascending order. Without task arrays, classes are
    split in ascending order, as evenly as possible and with larger tasks first; with scenario="domain", a label is then
    the position of a class in its task.

    Args:
        train_x: Inputs: uint8 images (N, C, H, W), or floats (N, *shape), which become float32.
        train_y: Targets: integers (N,); for "multilabel" 0 and 1, (N, C); for "regression" numbers, (N, K) or (N,).
        test_x: Test inputs, of the same type and shape.
        test_y: Test targets.
        train_task: The task of each training row, integers (N,), or None.
        test_task: The task of each test row, or None.
        num_tasks: Number of tasks if there are no task arrays; None means 5, or the number of classes if it is smaller.
        class_names: The name of each class, in ascending order of the labels; or of each column of other targets.
        target: "label", "multilabel" or "regression", see `cl.data.target`.
        scenario: "class", "task" or "domain"; None means "class" if no class is in two tasks, else "domain".
        val_fraction: Share of each task's training examples that becomes the validation set, in [0, 1).
        normalize: Whether to subtract `mean` and divide by `std`; else pixels are only divided by 255.
        mean: Mean of each channel (axis 1), for images in units of [0, 1]; None computes it from the training images,
            and does not change the mean of float inputs.
        std: Standard deviation of each channel, in the same form.
        augment: Train-time augmentation of raw batches, or None.
        name: Name of the stream in reports.
        order: The order of the tasks, see `Stream`.
        seed: Seed of the validation sets and of a shuffled order.

    Raises:
        InputError: If types or lengths do not fit, a value is not finite, a test label is never trained, or a task
            has no training or test row.

    Example:
        >>> x, y = np.random.rand(6, 3), np.array([3, 3, 7, 7, 9, 9])
        >>> stream = from_arrays(x, y, x, y, num_tasks=2)
        >>> [task.classes for task in stream], stream.class_names
        ([(0, 1), (2,)], ('3', '7', '9'))
        >>> when = np.array([2023, 2024] * 3)
        >>> stream = from_arrays(x, y, x, y, when, when)
        >>> stream.task_names, stream.scenario
        (['2023', '2024'], 'domain')
    """
    arrays: dict[str, Any] = {"train_x": _inputs("train_x", train_x), "test_x": _inputs("test_x", test_x)}
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    columns = _column("train_y", train_y), _column("test_y", test_y)
    train, test, known = _labels(*columns) if target == "label" else _vectors(*columns)
    names = known if class_names is None else [str(each) for each in class_names]
    if len(names) != len(known):
        raise InputError(f"class_names has {len(names)} names where train_y has {len(known)} classes: give one each.")
    arrays |= {"train_y": train, "test_y": test}
    dataset = make_dataset(name, arrays, names, normalize, mean, std, augment, target)
    if (train_task is None) != (test_task is None):
        raise InputError("One of train_task and test_task is missing: give both, or neither to split the classes.")
    if train_task is None:
        dataset, tasks, task_names = _split(dataset, num_tasks, scenario)
    else:
        tasks, task_names = _tasks(dataset, _column("train_task", train_task), _column("test_task", test_task))
        if num_tasks not in (None, len(task_names)):
            raise InputError(
                f"num_tasks={num_tasks}, but train_task names {len(task_names)} tasks: leave num_tasks out."
            )
    return by_task(dataset, *tasks, task_names, None, scenario, val_fraction, order, seed)


def _inputs(what: str, given: Given) -> Rows:
    x = _open(what, given)
    if x.dtype in (torch.float64, torch.float16, torch.bfloat16):
        return x.to(torch.float32) if isinstance(x, Tensor) else Float32(x)
    shape = tuple(x.shape)
    if x.dtype not in (torch.uint8, torch.float32):
        raise InputError(f"{what} holds {str(x.dtype)[6:]}: give uint8 images (N, C, H, W) or floats (N, *shape).")
    if x.dtype == torch.uint8 and len(shape) == 3:
        raise InputError(f"{what} has shape {shape}, images without channels: give (N, 1, H, W), by x[:, None].")
    if x.dtype == torch.uint8 and len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise InputError(
            f"{what} has shape {shape}, which looks like (N, H, W, C): give (N, C, H, W), by x.transpose(0, 3, 1, 2)."
        )
    return x


def _open(what: str, given: Given) -> Rows:
    if isinstance(given, str | os.PathLike):
        return open_array(str(given))
    check_plain(given, what)
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        return torch.from_numpy(np.atleast_1d(np.require(given, requirements=["C", "W"])))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is not an array of numbers ({error}): give one, a tensor or a .npy file.") from error


def _column(what: str, given: Given) -> Array:
    x = _open(what, given)
    return (x if isinstance(x, Tensor) else x[torch.arange(len(x))]).numpy()


def _integers(what: str, values: Array) -> Array:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(f"{what} holds {values.dtype} of shape {values.shape}: give integers (N,).")
    return values


def _labels(train: Array, test: Array) -> tuple[Tensor, Tensor, list[str]]:
    """Return training and test labels 0..C-1, and the old label of each class as text."""
    classes, y = np.unique(_integers("train_y", train), return_inverse=True)
    untrained = np.flatnonzero(~np.isin(_integers("test_y", test), classes))
    if len(untrained):
        raise InputError(
            f"Row {untrained[0]} of test_y has label {test[untrained[0]]}, which train_y never has: "
            "leave the row out or give training rows."
        )
    return torch.from_numpy(y), torch.from_numpy(np.searchsorted(classes, test)), [str(c) for c in classes]


def _vectors(train: Array, test: Array) -> tuple[Tensor, Tensor, list[str]]:
    columns = [torch.from_numpy(y.astype(np.float32)) for y in (train, test)]
    y, other = (column[:, None] if column.ndim == 1 else column for column in columns)
    return y, other, [str(k) for k in range(y.shape[1])]


def _split(
    dataset: Dataset, num_tasks: int | None, scenario: Scenario | None
) -> tuple[Dataset, tuple[Tensor, Tensor], list[str]]:
    if dataset.target != "label":
        raise InputError(f"Rows of target={dataset.target} cannot be split by class: give train_task and test_task.")
    count = min(5, dataset.num_classes) if num_tasks is None else num_tasks
    if not 1 <= count <= dataset.num_classes:
        raise InputError(f"num_tasks={count} for {dataset.num_classes} classes: give 1 to {dataset.num_classes}.")
    parts = np.array_split(np.arange(dataset.num_classes), count)
    owner = torch.from_numpy(np.repeat(np.arange(count), [len(part) for part in parts]))
    tasks = owner[dataset.train_y], owner[dataset.test_y]
    known = [[dataset.class_names[c] for c in part] for part in parts]
    names = ["+".join(part) if len(part) <= 3 else f"{part[0]} … {part[-1]}" for part in known]
    if scenario == "domain":
        position = torch.from_numpy(np.concatenate([part - part[0] for part in parts]))
        own_names = tuple(str(k) for k in range(len(parts[0])))
        train, test = position[dataset.train_y], position[dataset.test_y]
        dataset = replace(dataset, train_y=train, test_y=test, class_names=own_names)
    return dataset, tasks, names


def _tasks(dataset: Dataset, train: Array, test: Array) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Return the task of each training and test row, from 0 on, and the old values as names."""
    for part, task, y in (("train", train, dataset.train_y), ("test", test, dataset.test_y)):
        if len(_integers(f"{part}_task", task)) != len(y):
            raise InputError(f"{part}_task has {len(task)} rows for {len(y)} of {part}_x: give each row its task.")
    values = np.unique(np.concatenate([train, test]))
    first, second = (torch.from_numpy(np.searchsorted(values, task)) for task in (train, test))
    return (first, second), [str(value) for value in values]
