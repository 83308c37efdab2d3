"""A memory of the exemplars that herding chooses when a task ends, with as many of each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl.data.target import classes_of
from cl.data.task import TaskData
from cl.distributed import gathered, own
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.toolkit.herding import herding, unit_features
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task
    from cl.engine.strategy import LearnerLike


class Exemplars(Memory):
    r"""A memory with :math:`\lfloor K / t \rfloor` ranked exemplars of each of the t classes seen.

    Args:
        capacity: Total number of exemplars, K.
        stream: The stream.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> from cl.testing import toy_stream
        >>> len(Exemplars(20, toy_stream(2)).with_exemplars(toy_stream(2)[0].train))
        48
    """

    def __init__(self, capacity: int, stream: Stream, storage: str = "device") -> None:
        super().__init__(capacity, stream, extras={"rank": ()}, storage=storage)
        self.total = capacity

    def ranked(self) -> list[Tensor]:
        """Return inputs, labels, task labels and ranks of the exemplars of all processes."""
        held = self.rows()
        return gathered([held.x, held.y, held.task, held.extras["rank"]])

    def with_exemplars(self, data: TaskData) -> TaskData:
        """Return examples together with all exemplars."""
        if len(self) == 0:
            return data
        x, y, task, _ = self.ranked()
        return TaskData.concat([data, TaskData(x.cpu(), y.cpu(), task.cpu())])

    @torch.no_grad()
    def renew(self, learner: LearnerLike, data: TaskData) -> TaskData:
        """Drop exemplars beyond the first m of each class, and choose m of the classes in `data` (algorithms 4 and 5).

        A class that comes again is treated as new: its exemplars are chosen among its present examples.

        Args:
            learner: At the end of a task, with the classes seen, of which each has m exemplars afterwards.
            data: Examples of the task.

        Returns:
            All exemplars, on the learner's device.
        """
        labels, features = data.labels, unit_features(learner, data)
        size = self.total // int(learner.seen.sum())
        rows = [(labels == c).nonzero().flatten() for c in classes_of(labels)]
        chosen = [some[herding(features[some.to(features.device)], size).cpu()] for some in rows]
        ranks = torch.cat([torch.arange(len(some), dtype=torch.float32) for some in chosen])
        new = [column.to(learner.device) for column in (*data.take(torch.cat(chosen)).tensors(), ranks)]
        old = self.ranked()
        kept = (old[3] < size) & ~torch.isin(old[1], new[1])
        x, y, task, rank = (torch.cat([a[kept], b]) for a, b in zip(old, new, strict=True))
        self.fill(Batch(x, y, task, {"rank": rank}).take(own(len(y)).to(y.device)))
        return TaskData(x, y, task)


def check_room(key: str, memory_size: int, stream: Stream, each: int = 1) -> None:
    """Refuse a memory of less than some number of exemplars for each class.

    Args:
        key: The setting that gives the size.
        memory_size: Total number of exemplars.
        stream: The stream.
        each: The least number of exemplars of each class.

    Raises:
        InputError: Naming setting, value and the least size.
    """
    if memory_size < each * stream.num_classes:
        lack = "without an exemplar" if each == 1 else f"with less than {each} exemplars"
        raise InputError(
            f"{key}={memory_size} leaves some of the {stream.num_classes} classes {lack}: set it to "
            f"{each * stream.num_classes} or more."
        )


def old_classes(learner: LearnerLike, task: Task) -> Tensor:
    """Return which classes were seen before a task and do not come again in it, bool (C,); to call in `before_task`.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner(num_tasks=2)
        >>> learner.before_task(stream[0])
        >>> old_classes(learner, stream[1]).tolist()
        [True, True, False, False]
    """
    old = learner.seen.clone()
    old[list(classes_of(task.train.labels))] = False
    return old
