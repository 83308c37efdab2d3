"""Blocks that change labels or choose examples: other, wrong and missing labels, and fewer training examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.compose.base import Source, as_stream, choose, generator, labels_only
from cl.data.task import Order, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


def relabel(source: Source, labels: Sequence[int] | Mapping[int, Sequence[int]]) -> Stream:
    """Replace labels in training, validation and test sets.

    Args:
        source: Stream or dataset with labels.
        labels: The new label of each old one; or such a list for each of some tasks, by position.

    Raises:
        InputError: If a list does not give a label in 0..C-1 for each class.

    Example:
        >>> from cl.data.sources import synthetic
        >>> data = synthetic(num_classes=3)
        >>> y = relabel(data, [2, 0, 1])[0].train.labels
        >>> bool((y == (data.train_y - 1) % 3).all())
        True
    """
    stream = as_stream(source)
    labels_only(stream, "relabel")
    tables = dict(labels) if isinstance(labels, Mapping) else {t: labels for t in range(len(stream))}
    for t, table in tables.items():
        if len(table) != stream.num_classes or not set(table) <= set(range(stream.num_classes)):
            raise InputError(
                f"labels={list(table)} for task {t} of {stream.name!r}: give one of 0..{stream.num_classes - 1} for "
                f"each of the {stream.num_classes} classes."
            )

    def build(t: int) -> Task:
        if t not in tables:
            return stream[t]
        table = torch.tensor([int(c) for c in tables[t]])
        return stream[t].each(lambda part: replace(part, y=table[part.y]))

    return stream.derive(build, class_names=())


@checked
def label_noise(
    source: Source,
    fraction: Annotated[float, Interval(ge=0, le=1)] = 0.2,
    kind: str = "symmetric",
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Replace a share of the training labels by wrong ones (Patrini et al. 2017, section 5).

    Args:
        source: Stream or dataset with labels.
        fraction: Share of each task's training examples, rounded to a whole number, in [0, 1].
        kind: "symmetric" draws another class of the task uniformly; "pairflip" takes the task's next class.
        order: See `Stream`.
        seed: Seed of the choice of examples and of their labels.

    Raises:
        InputError: If the share is outside [0, 1], the kind is unknown, or a task has one class.

    Example:
        >>> from cl.data.sources import synthetic
        >>> data = synthetic(num_train=100)
        >>> int((label_noise(data, 0.3)[0].train.labels != data.train_y).sum())
        30
    """
    stream = as_stream(source)
    labels_only(stream, "label_noise")
    if kind not in ("symmetric", "pairflip"):
        raise InputError(f"kind={kind!r} of label noise is unknown: use symmetric or pairflip.")

    def build(t: int) -> Task:
        task, draw = stream[t], generator(seed, "label noise", t)
        y = task.train.labels.clone()
        rows = torch.from_numpy(draw.permutation(len(y))[: round(fraction * len(y))])
        classes = torch.unique(y)
        if len(classes) < 2 and len(rows):
            raise InputError(f"Task {t} of {stream.name!r} has one class, so no label of it can be wrong.")
        step = draw.integers(1, max(2, len(classes)), len(rows)) if kind == "symmetric" else np.ones(len(rows), int)
        position = (torch.searchsorted(classes, y[rows]) + torch.from_numpy(step)) % len(classes)
        y[rows] = classes[position]
        return replace(task, train=_with_labels(task.train, y))

    return stream.derive(build, name=f"{stream.name}, {fraction:.0%} label noise", order=order, seed=seed)


def _with_labels(data: TaskData, labels: Tensor) -> TaskData:
    y = data.y.clone()
    y[slice(None) if data.index is None else data.index] = labels
    return replace(data, y=y)


def hide_labels(source: Source, tasks: Sequence[int] | None = None) -> Stream:
    """Hide the labels of training and validation examples from strategies, which then see -1.

    This is the setting of test-time adaptation and of active learning: the learner receives the inputs alone, and
    instruments and R still use the labels. Only strategies with `needs_labels = False` can learn such a stream.

    Args:
        source: A stream, or a dataset.
        tasks: Positions of the tasks, from 0; None means all but the first.

    Raises:
        InputError: If a position does not exist.

    Example:
        >>> from cl.compose import copies
        >>> from cl.data.sources import digits
        >>> stream = hide_labels(copies(digits(), num_tasks=2))
        >>> [task.hidden for task in stream], stream[1].without_hidden_labels().train.labels.unique()
        ([False, True], tensor([-1]))
    """
    stream = as_stream(source)
    labels_only(stream, "hide_labels")
    those = range(1, len(stream)) if tasks is None else tasks
    for task in those:
        if task not in range(len(stream)):
            raise InputError(f"hide_labels: there is no task {task} in {stream.name!r}: use 0 to {len(stream) - 1}.")
    hidden = set(those)
    return stream.derive(
        lambda t: replace(stream[t], hidden=t in hidden), name=f"{stream.name}, labels of {len(hidden)} tasks hidden"
    )


@checked
def label_scarcity(
    source: Source,
    fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Keep a share of the training labels; the other training examples become the task's `unlabelled` ones.

    Args:
        source: Stream or dataset with labels.
        fraction: Share of each class that stays labelled, in (0, 1]; at least one example.
        order: See `Stream`.
        seed: Seed of the choice of examples.

    Example:
        >>> from cl.data.sources import synthetic
        >>> task = label_scarcity(synthetic(num_classes=10, num_train=1000), 0.1)[0]
        >>> len(task.train), len(task.unlabelled), task.unlabelled.labels.unique().tolist()
        (100, 900, [-1])
    """
    stream = as_stream(source)

    def build(t: int) -> Task:
        task = stream[t]
        kept = choose(task.train.labels, lambda _, size: max(1, round(fraction * size)), seed, "label scarcity", t)
        other = torch.ones(len(task.train), dtype=torch.bool)
        other[kept] = False
        rest = task.train.take(other.nonzero().flatten())
        blank = replace(rest, y=torch.full((len(rest.y),), -1))
        return replace(task, train=task.train.take(kept), unlabelled=blank if len(rest) else None)

    labels_only(stream, "label_scarcity")
    return stream.derive(build, name=f"{stream.name}, {fraction:.0%} labelled", order=order, seed=seed)


@checked
def subsample(
    source: Source,
    fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    max_per_class: Annotated[int, Ge(1)] | None = None,
    tasks: Sequence[int] | None = None,
    seed: int = 0,
) -> Stream:
    """Keep some of the training examples of each class.

    Args:
        source: Stream or dataset with labels.
        fraction: Share of each class to keep, in (0, 1]; at least one example.
        max_per_class: Largest number of examples of a class to keep; None sets no limit.
        tasks: The tasks whose examples are reduced; None means all.
        seed: Seed of the choice of examples.

    Example:
        >>> from cl.data.sources import synthetic
        >>> len(subsample(synthetic(num_classes=10), max_per_class=3)[0].train)
        30
    """
    stream = as_stream(source)
    labels_only(stream, "subsample")
    most = max_per_class if max_per_class is not None else 2**62

    def build(t: int) -> Task:
        if tasks is not None and t not in tasks:
            return stream[t]
        train = stream[t].train
        kept = choose(train.labels, lambda _, size: min(most, max(1, round(fraction * size))), seed, "subsample", t)
        return replace(stream[t], train=train.take(kept))

    return stream.derive(build)


@checked
def long_tail(
    source: Source,
    imbalance: Annotated[float, Ge(1)] = 100.0,
    shuffled: bool = True,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    r"""Reduce the training sets of the classes to exponentially decreasing sizes (Cui et al. 2019, section 5.1).

    The class of rank r keeps the share :math:`\rho^{-r/(C-1)}` of its examples, at least one. Liu et al. 2022
    ("Long-tailed class incremental learning") call this ordered if ranks follow the order of classes, else shuffled.

    Args:
        source: Stream or dataset with labels.
        imbalance: rho, the ratio of the largest and the smallest share, 1 or more.
        shuffled: Whether ranks are drawn at random; else class 0 keeps most.
        order: See `Stream`.
        seed: Seed of the ranks and of the choice of examples.

    Example:
        >>> from cl.data.sources import synthetic
        >>> long_tail(synthetic(num_classes=3, num_train=300), 100, shuffled=False)[0].train.labels.bincount().tolist()
        [100, 10, 1]
    """
    stream = as_stream(source)
    labels_only(stream, "long_tail")
    rank = np.arange(stream.num_classes)
    if shuffled:
        rank = np.random.default_rng(derive(seed, "long tail")).permutation(stream.num_classes)
    share = imbalance ** (-rank / max(1, stream.num_classes - 1))

    def build(t: int) -> Task:
        train = stream[t].train
        kept = choose(train.labels, lambda c, size: max(1, round(share[c] * size)), seed, "long tail", t)
        return replace(stream[t], train=train.take(kept))

    return stream.derive(build, name=f"long-tailed {stream.name}", order=order, seed=seed)
