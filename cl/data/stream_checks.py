"""Check that a stream fulfils its contract; `cl.testing` offers `check_stream` to authors of streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl.data.rows import Mapped
from cl.data.target import classes_of
from cl.data.task import Stream, Task, TaskData


def check_stream(stream: Stream | Callable[[], Stream]) -> None:
    """Check that a stream fulfils the contract of streams.

    The stream can be iterated twice and nested. Its examples are the same at each reading and whenever the stream is
    built. Labels, task labels and inputs are in range. No test example is in a training or validation set, and no
    validation example in its task's training set. Augmentation and normalisation do not change their input in place.

    Args:
        stream: A stream, or the function that builds it, which is then called twice.

    Raises:
        InputError: From `Stream.check`.
        AssertionError: If a condition fails; one sentence says which, and how to mend it.

    Example:
        >>> from cl.testing import toy_stream
        >>> check_stream(toy_stream)
    """
    stream, again = (stream, None) if isinstance(stream, Stream) else (stream(), stream())
    stream.check()
    _check_iteration(stream)
    for task in stream:
        for part in ("train", "val", "test"):
            if getattr(task, part) is not None:
                _check_part(f"The {part} set of task {task.index} of {stream.name!r}", stream, task, part)
                if again is not None:
                    same = _equal(getattr(task, part).tensors(), getattr(again[task.index], part).tensors())
                    assert same, f"{stream.name!r} differs when built twice: draw from its seed alone."
    _check_leaks(stream)
    x = stream[0].train.take(torch.arange(min(8, len(stream[0].train)))).tensors()[0]
    if stream.augment is not None:
        augment = stream.augment
        views = [_apply("augment", lambda rows: augment(rows, np.random.default_rng(0)), x) for _ in range(2)]
        assert torch.equal(*views), "augment differs for one generator state: draw from the generator it is given."
        unchanged = views[0].shape == x.shape and views[0].dtype == x.dtype
        assert unchanged, (
            f"augment gives {views[0].dtype} {tuple(views[0].shape)} for {x.dtype} {tuple(x.shape)}: keep both."
        )
    if stream.normalize is not None:
        view = _apply("normalize", stream.normalize, x)
        assert view.is_floating_point() and bool(view.isfinite().all()), "normalize does not give finite floats."


def _check_iteration(stream: Stream) -> None:
    pairs = [(a.index, b.index) for a in stream for b in stream]
    expected = list(itertools.product(range(len(stream)), repeat=2))
    assert pairs == expected, f"Nested iteration of {stream.name!r} gives {pairs[:5]}: return a new iterator each time."
    assert stream[-1].index == len(stream) - 1, f"stream[-1] of {stream.name!r} is not its last task."
    names = len(stream.class_names)
    assert names in (0, stream.num_classes), f"{stream.name!r} names {names} of {stream.num_classes} classes: name all."


def _check_part(what: str, stream: Stream, task: Task, part: str) -> None:
    data: TaskData = getattr(task, part)
    first = [column.clone() for column in data.tensors()]  # a transform in place would change both readings
    assert _equal(first, data.tensors()), (
        f"{what} differs when read twice: draw from a fixed seed, copy before changing."
    )
    lengths = {len(column) for column in (*first, data.labels)}
    assert lengths == {len(data)}, f"{what} has columns of lengths {sorted(lengths)} and says {len(data)}."
    shape, dtype = stream.target.row(stream.num_classes)
    assert (first[1].dtype, first[1].shape[1:]) == (dtype, shape), (
        f"{what} has labels of {first[1].dtype}: make them {dtype}."
    )
    labels = first[2].unique().tolist()
    if part != "train" or not stream.repeats:
        assert labels == [task.index], f"{what} carries the task labels {labels}: give its rows the task's index."
    for label in labels:  # an example that appears in another task carries the label of its own task
        foreign = set(classes_of(first[1][first[2] == label])) - set(stream[label].classes)
        assert not foreign, (
            f"{what} has rows of classes {sorted(foreign)} labelled as task {label}, which does not have them."
        )
    if first[0].is_floating_point():
        assert bool(torch.isfinite(first[0]).all()), f"{what} has NaN or infinity: clean the data."


def _equal(a: Any, b: Any) -> bool:
    return all(same(left, right) for left, right in zip(a, b, strict=True))


def _apply(what: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    before = x.clone()
    out = function(x)
    assert torch.equal(x, before), f"{what} changes its input in place, which memories store raw: work on a copy."
    return out


def _check_leaks(stream: Stream) -> None:
    """Refuse sets that share examples: the same rows of one array, or, in more than half of a test set, equal inputs.

    Fewer equal inputs are allowed, since real datasets contain some duplicates.
    """
    trained = torch.cat([_addresses(task.train) for task in stream])
    for task in stream:
        test = _addresses(task.test)
        shared = int(torch.isin(test, trained).sum())
        if not shared and _copies(task.test, task.train) > len(task.test) / 2:
            shared = _copies(task.test, task.train)
        assert not shared, f"{shared} test examples of task {task.index} are trained on: keep them apart."
        if task.val is not None:
            val = _addresses(task.val)
            shared = int(torch.isin(val, _addresses(task.train)).sum())
            assert not shared, f"{shared} validation examples of task {task.index} are trained on: keep them apart."
            shared = int(torch.isin(val, torch.cat([_addresses(t.test) for t in stream])).sum())
            assert not shared, f"{shared} validation examples of task {task.index} are tested on: take them from train."


def _addresses(data: TaskData) -> Tensor:
    """Return for each example the address of its row in memory, (n,), or a hash of its file or dataset plus its row."""
    index = torch.arange(len(data.y)) if data.index is None else data.index.cpu()
    if isinstance(data.x, Tensor):
        return data.x.data_ptr() + index * data.x.stride(0) * data.x.element_size()
    source = data.x.path.resolve() if isinstance(data.x, Mapped) else id(getattr(data.x, "dataset", data.x))
    return (hash(source) % 2**31 << 32) + index


def _copies(a: TaskData, b: TaskData) -> int:
    known = {row.numpy().tobytes() for row in b.tensors()[0]}
    return sum(row.numpy().tobytes() in known for row in a.tensors()[0])


def same(a: Any, b: Any) -> bool:
    """Return whether two states, nested dicts of tensors and plain values, are equal; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if a.is_floating_point() else torch.equal(a, b)
    return bool(a == b)
