r"""Tasks that fade into each other without boundaries (the linear decay of Shanahan et al. 2021 and Avalanche).

With time s from 0 to T and tasks of equal size, the share of task t among the examples at time s is 1 in its middle and
falls linearly to 0 over a zone of width o around each of its ends; all shares add up to 1. An example of task t comes
at the time

.. math:: s = t + u + o\,(v - 1/2), \qquad u, v \sim U[0, 1]

(whose density is that trapezoid), reflected at 0 and T. Sorted by s, the examples are cut into T pieces of equal size.
A row of R is measured after each piece, and its column t on the test set of task t.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval

from cl.compose import reorder
from cl.data.task import Order, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


@checked
def boundary_free(
    source: Stream,
    overlap: Annotated[float, Interval(ge=0, le=1)] = 1.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Blend each task of a stream into the next.

    Args:
        source: Any stream with boundaries; examples keep the label of the task that they come from.
        overlap: o, the width of the zone in which two tasks mix, in units of a task, in [0, 1]; with 0 tasks do not
            mix.
        order: The order of the tasks before they are blended, see `Stream`.
        seed: Seed of the times and of a shuffled order.

    Raises:
        InputError: If the overlap is outside [0, 1], or a task hides its labels.

    Example:
        >>> from cl.compose import copies, permute
        >>> from cl.data.sources import digits
        >>> drifting = boundary_free(permute(copies(digits(), 3)))
        >>> drifting.boundaries, drifting[0].train.tasks.unique().tolist(), drifting[1].train.tasks.unique().tolist()
        (False, [0, 1], [0, 1, 2])
    """
    stream = reorder(source, order, seed)
    if any(task.hidden for task in stream):
        raise InputError(
            f"{stream.name!r} hides the labels of some tasks, and boundary_free blends the examples of all: hide none."
        )

    @cache
    def whole() -> tuple[TaskData, list[torch.Tensor]]:
        sizes = [len(task.train) for task in stream]
        draw = np.random.default_rng(derive(seed, "boundary free"))
        own = np.repeat(np.arange(len(stream)), sizes)
        time = own + draw.random(len(own)) + overlap * (draw.random(len(own)) - 0.5)
        time = np.abs(time)
        time = np.minimum(time, 2 * len(stream) - time)
        pieces = np.array_split(np.argsort(time, kind="stable"), len(stream))
        return TaskData.concat([task.train for task in stream]), [torch.from_numpy(piece) for piece in pieces]

    def build(t: int) -> Task:
        union, pieces = whole()
        return Task(t, union.take(pieces[t]), stream[t].test, stream[t].val, name=stream[t].name)

    return stream.derive(build, name=f"drifting {stream.name}", repeats=True, boundaries=False)
