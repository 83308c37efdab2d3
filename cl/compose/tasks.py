"""Blocks that change the sequence of tasks: reorder and repeat tasks, concatenate streams, cut tasks into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from cl.compose.base import Source, as_stream, labels_only
from cl.data.class_names import join, move
from cl.data.task import MOST_TASKS, Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError, unknown
from cl.random import derive
from cl.ranges import checked

Match = Literal["name", "position"]


def reorder(source: Source, order: Order, seed: int = 0) -> Stream:
    """Return a stream with the tasks in another order, which it stores as its `order`.

    Example:
        >>> from cl.compose import copies, permute
        >>> from cl.data.sources import digits
        >>> stream = reorder(permute(copies(digits(), 3)), [2, 0, 1])
        >>> stream[0].name, stream.order
        ('permutation 3', (2, 0, 1))
    """
    stream = as_stream(source)
    return stream.derive(lambda t: stream[t], order=order, seed=seed)


@checked
def repeat(
    source: Source,
    times: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 2,
    visits: Sequence[int] | None = None,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Repeat tasks: the whole stream several times, or the tasks in any sequence.

    Args:
        source: Stream or dataset.
        times: Number of times to learn the whole stream.
        visits: Positions of the tasks to learn, one after another, instead of `times`; a task may come again.
        order: See `Stream`.
        seed: Seed of a shuffled order.

    Raises:
        InputError: If there is no task to learn, or a position is not in the stream.

    Example:
        >>> from cl.data.sources import synthetic
        >>> len(repeat(synthetic(), times=3))
        3
    """
    stream = as_stream(source)
    path = list(range(len(stream))) * times if visits is None else [int(t) for t in visits]
    outside = [t for t in path if not 0 <= t < len(stream)]
    if not path or outside:
        raise InputError(
            f"repeat visits {outside[0] if outside else 'no task'} of {stream.name!r}: give positions in "
            f"0..{len(stream) - 1}, or times of 1 or more."
        )

    def build(t: int) -> Task:
        task, more = stream[path[t]], " again" * (path[t] in path[:t])
        name = task.name or f"task {path[t] + 1}"
        return task.each(lambda part: part.renumbered(t), index=t, name=f"{name}{more}")

    again = stream.repeats or len(set(path)) < len(path)
    return stream.derive(build, len(path), repeats=again, order=order, seed=seed)


def resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize images (N, C, H, W) to a shape (C, H, W), by bilinear interpolation; grey is repeated for colour.

    Example:
        >>> resize(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), (3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    if x.shape[2:] != tuple(shape[1:]):
        resized = F.interpolate(x.float(), size=tuple(shape[1:]), mode="bilinear", antialias=True)
        x = resized.round().clamp(0, 255).to(torch.uint8) if x.dtype == torch.uint8 else resized
    return x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else x


def concat(
    streams: Sequence[Source] | Mapping[str, Source],
    scenario: Scenario | None = None,
    input_shape: Sequence[int] | None = None,
    order: Order = None,
    seed: int = 0,
    match: Match = "name",
) -> Stream:
    """Concatenate streams: learn one after the other.

    Args:
        streams: Streams or datasets, in order; or a mapping from names to them.
        scenario: "domain": streams share labels; "class" and "task": each has labels of its own. None means "domain" if
            the streams have equally many classes, and either unnamed ones or some names in common; else "class".
        input_shape: The shape (C, H, W) to resize all images to; None requires that all have one shape.
        order: See `Stream`.
        seed: Seed of a shuffled order.
        match: Which classes are the same if labels are shared. "name": those of one name; "position": the k-th of each
            stream, whatever its name, and all streams must have equally many. If a stream does not name its classes,
            they are matched by position.

    Raises:
        InputError: If shapes or targets differ; or if labels are shared, but the streams have no name in common or, by
            position, different numbers of classes.

    Example:
        >>> from cl.data.sources import digits, synthetic
        >>> other = synthetic(num_classes=4, input_shape=(1, 8, 8), image=True)
        >>> concat({"digits": digits(), "blobs": other}).num_classes
        14
    """
    named = isinstance(streams, Mapping)
    names = list(streams) if isinstance(streams, Mapping) else []
    parts = [as_stream(part) for part in (streams.values() if isinstance(streams, Mapping) else streams)]
    if not parts:
        raise InputError("There is nothing to concatenate: name at least one stream or dataset.")
    names = names or [part.name for part in parts]
    shape = _one_shape(parts, names, input_shape)
    scenario, columns, own_names, width = _label_space(parts, names, scenario, match)
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    later = [torch.arange(len(part)) + start for part, start in zip(parts, starts, strict=False)]
    sources = [(k, t) for k, part in enumerate(parts) for t in range(len(part))]

    def build(position: int) -> Task:
        k, t = sources[position]
        task = parts[k][t]

        def change(part: TaskData) -> TaskData:
            moved = replace(part, y=move(part.y, columns[k], width)).renumbered(position, later[k])
            return moved if parts[k].input_shape == shape else moved.then(partial(resize, shape=shape))

        name = names[k] if named and len(parts[k]) == 1 else task.name
        return task.each(change, index=position, name=name)

    return parts[0].derive(
        build,
        len(sources),
        scenario=scenario,
        num_classes=width,
        class_names=own_names if len(own_names) == width else (),
        name=" → ".join(names),
        repeats=any(part.repeats or (part.scenario == "domain" and len(part) > 1) for part in parts),
        boundaries=all(part.boundaries for part in parts),
        order=order,
        seed=seed,
    )


def _label_space(
    parts: Sequence[Stream], names: Sequence[str], scenario: Scenario | None, match: Match
) -> tuple[Scenario, list[list[int]], list[str], int]:
    """Return the scenario, the new label of each class of each stream, the names of the classes, and their number."""
    if match not in get_args(Match):
        raise unknown("match", match, get_args(Match))
    counts = [part.num_classes for part in parts]
    known = [list(part.class_names) for part in parts]
    named = all(len(set(own)) == count for own, count in zip(known, counts, strict=True)) and match == "name"
    together = join(known) if named else None
    alone = together is not None and len(parts) > 1 and len(together[1]) == sum(counts)
    scenario = scenario or ("domain" if len(set(counts)) == 1 and not alone else "class")
    if scenario != "domain":
        starts = [sum(counts[:k]) for k in range(len(counts))]
        columns = [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
        return scenario, columns, [name for own in known for name in own], sum(counts)
    if alone:
        raise InputError(
            f"The classes of {names[0]!r} ({known[0][0]}, ...) and of {names[1]!r} ({known[1][0]}, ...) have no name "
            "in common, which scenario=domain needs: use scenario=task or class, or match=position if the k-th classes "
            "are meant to be the same."
        )
    if together is not None:
        return scenario, *together, len(together[1])
    if len(set(counts)) > 1:
        raise InputError(
            f"The datasets have {counts} classes, which scenario=domain would share: use scenario=task or class."
        )
    return scenario, [list(range(counts[0]))] * len(parts), known[0], counts[0]


def _one_shape(parts: Sequence[Stream], names: Sequence[str], wanted: Sequence[int] | None) -> tuple[int, ...]:
    shape = tuple(wanted or parts[0].input_shape)
    for name, part in zip(names, parts, strict=True):
        can = wanted and len(shape) == 3 and len(part.input_shape) == 3 and part.input_shape[0] in (1, shape[0])
        if part.input_shape != shape and not can:
            raise InputError(f"Inputs of {name!r} have shape {part.input_shape}, not {shape}: set stream.input_shape.")
        if part.target is not parts[0].target:
            raise InputError(
                f"Targets of {name!r} are {part.target.name}, not {parts[0].target.name}: use streams with one kind."
            )
    return shape


@checked
def partition(
    source: Source,
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    seed: int = 0,
) -> Stream:
    """Cut each task into several with the same classes: new instances, no new classes (data-incremental learning).

    Validation and test sets are cut in the same way, so each column of R is measured on a part of the whole test set.

    Args:
        source: A dataset, or a stream, each of whose tasks is cut.
        num_tasks: Number of parts of each task.
        seed: Seed of the parts.

    Raises:
        InputError: If a class has fewer examples than there are parts.

    Example:
        >>> from cl.data.sources import synthetic
        >>> stream = partition(synthetic(num_train=1000), 4)
        >>> [len(task.train) for task in stream]
        [250, 250, 250, 250]
    """
    stream = as_stream(source)
    labels_only(stream, "partition")

    def build(t: int) -> Task:
        task, k = stream[t // num_tasks], t % num_tasks

        def part(data: TaskData) -> TaskData:
            return data.take(_kth(data.labels, k, num_tasks, seed)).renumbered(t)

        name = task.name or f"task {t // num_tasks + 1}"
        return task.each(part, index=t, name=f"part {t + 1}" if len(stream) == 1 else f"{name}, part {k + 1}")

    whole = len(stream) * num_tasks
    return stream.derive(build, whole, repeats=num_tasks > 1, name=f"{stream.name} in {whole} parts")


def _kth(y: Tensor, k: int, num_parts: int, seed: int) -> Tensor:
    """Return the positions of the examples in the k-th part of each class, ascending."""
    labels, kept = y.numpy(), []
    for label in np.unique(labels):
        rows = np.random.default_rng(derive(seed, "partition", int(label))).permutation(np.flatnonzero(labels == label))
        if len(rows) < num_parts:
            raise InputError(f"Class {label} has {len(rows)} rows for {num_parts} parts: ask for fewer.")
        kept.append(np.array_split(rows, num_parts)[k])
    return torch.from_numpy(np.sort(np.concatenate(kept)))
