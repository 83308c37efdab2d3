"""A class-balanced memory with the logits of each exemplar, which are renewed for classes that come later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cl.data.task import TaskData
from cl.engine.batch import Batch
from cl.engine.loader import evaluation
from cl.random import Random
from cl.toolkit.memory import Memory, Rows

if TYPE_CHECKING:
    from cl.data.task import Stream, Task
    from cl.engine.strategy import LearnerLike


def renewed(stored: Tensor, fresh: Tensor, y: Tensor, columns: Tensor, gamma: float) -> Tensor:
    """Return stored logits (B, C), those of some columns (C,) replaced by fresh ones, at most gamma times that of y.

    Example:
        >>> stored, fresh = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[9.0, -1.0, 4.0]])
        >>> renewed(stored, fresh, torch.tensor([0]), torch.tensor([False, True, True]), 0.5)
        tensor([[ 2.0000, -0.2500,  1.0000]])
    """
    truth = stored.gather(1, y[:, None])
    largest = fresh.masked_fill(~columns, -torch.inf).amax(1, keepdim=True)
    over = (largest > truth) & (largest > 0)
    return torch.where(columns, torch.where(over, gamma * truth.clamp_min(0) / largest, 1) * fresh, stored)


def balanced(old: Tensor, new: Tensor, capacity: int, random: Random) -> tuple[Tensor, Tensor]:
    """Return which old exemplars to keep and which new examples to add, for as many exemplars of each class.

    The first `capacity // K` exemplars of each old class stay, with K classes in all. The rest of the capacity is
    divided among the new classes, whose examples are drawn at random; some of them get one more.

    Args:
        old: Labels of the exemplars, (n,).
        new: Labels of the examples of a task, whose classes are new, (m,).
        capacity: Largest number of exemplars.
        random: The generator of the draws.

    Returns:
        Positions of old exemplars and of new examples, int64.

    Example:
        >>> kept, added = balanced(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1, 2, 2, 2]), 5, Random())
        >>> kept.tolist(), len(added)
        ([0], 4)
    """
    before, fresh = old.unique().tolist(), new.unique().tolist()
    each = capacity // (len(before) + len(fresh))
    none = torch.zeros(0, dtype=torch.int64)
    kept = torch.cat([none, *((old == c).nonzero().flatten().cpu()[:each] for c in before)])
    share, more = divmod(capacity - len(kept), len(fresh))
    order = torch.from_numpy(random.generator.permutation(len(new)))
    size = dict.fromkeys(fresh, share) | dict.fromkeys(random.generator.permutation(fresh)[:more].tolist(), share + 1)
    return kept, torch.cat([order[(new.cpu()[order] == c).nonzero().flatten()[: size[c]]] for c in fresh])


class LogitMemory(Memory):
    """Examples of earlier tasks with C logits each, and a count of how often a task has drawn them.

    Each task has classes of its own. Logits of classes that were learned before an example was stored stay; those of
    the present task's classes and of later ones are renewed (Boschini et al. 2022, section 4).

    Args:
        capacity: Total number of exemplars.
        stream: The stream.
        gamma: Largest renewed logit as a multiple of that of the label.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> from cl.testing import toy_stream
        >>> LogitMemory(20, toy_stream(2), 0.85)
        Memory(0 of 20 exemplars, reservoir)
    """

    def __init__(self, capacity: int, stream: Stream, gamma: float, storage: str = "device") -> None:
        extras: dict[str, tuple[int, ...]] = {"logits": (stream.num_classes,), "count": ()}
        super().__init__(capacity, stream, extras=extras, storage=storage)
        self.gamma = gamma

    def renew(self, learner: LearnerLike, rows: Rows, fresh: Tensor) -> None:
        """Renew the logits of exemplars at some positions by those that the learner gives now, (n, C)."""
        held, past = self.at(rows), learner.membership[: learner.task_index].any(0)
        self.overwrite("logits", rows, renewed(held.extras["logits"], fresh.float(), held.y, ~past, self.gamma))

    def renew_some(self, learner: LearnerLike, drawn: Sequence[tuple[Rows, Tensor]], random: Random) -> None:
        """Renew exemplars that a step has drawn, with probability 1/k where it is the k-th step of the task to do so.

        Args:
            learner: The learner.
            drawn: For each draw, the positions and the logits that the learner gave, (n, C).
            random: The generator of the draws.
        """
        rows, first = np.unique(np.concatenate([where for where, _ in drawn]), return_index=True)
        fresh = torch.cat([logits for _, logits in drawn])
        count = self.at(rows).extras["count"].cpu().float() + 1
        self.overwrite("count", rows, count)
        chosen = np.flatnonzero(random.generator.random(len(rows)) * count.numpy() < 1)
        self.renew(learner, rows[chosen], fresh[torch.from_numpy(first[chosen]).to(fresh.device)])

    @torch.no_grad()
    def take_in(self, learner: LearnerLike, task: Task, random: Random) -> None:
        """Renew all logits, and take in examples of a task that ends, so that each class has as many exemplars."""
        old = self.rows()
        if len(old):
            self.renew(learner, np.arange(len(old)), _logits(learner, TaskData(old.x, old.y, old.task)))
        kept, added = balanced(old.y, task.train.labels, self.capacity, random)
        x, y, label = (column.to(learner.device) for column in task.train.take(added).tensors())
        fresh, past = _logits(learner, TaskData(x, y, label)), learner.membership[: task.index].any(0)
        held = self.at(kept.numpy())
        both = held.append(Batch(x, y, label))
        both.extras["logits"] = torch.cat([held.extras["logits"], renewed(fresh, fresh, y, past, self.gamma)])
        both.extras["count"] = torch.zeros(len(both), device=learner.device)
        self.fill(both)


def _logits(learner: LearnerLike, data: TaskData) -> Tensor:
    """Return the logits of examples in evaluation mode, (n, C)."""
    with learner.evaluating():
        parts = evaluation(learner, [data])
        return torch.cat([learner(learner.prepare(part.x), part.task).float() for part in parts])
