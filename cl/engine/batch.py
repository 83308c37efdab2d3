"""`Batch`: the examples of one training or evaluation step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl.data.rows import kind_of

Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class Batch:
    """Examples of a stream as they are stored, with their labels and task labels.

    Args:
        x: Raw inputs (B, *input), uint8 where the data are images.
        y: Stream-wide labels, int64 (B,); or other targets, float32 (B, C).
        task: Task labels, int64 (B,).
        extras: Named tensors with one entry for each example, such as stored logits (B, C).
        num_incoming: How many examples come from the stream. They are the first ones; `extend_batch` appended the
            others. By default all of them.
        view: The augmented, normalised inputs that the backbone receives, (B, *input); set by the learner.
        host: Labels and task labels of the incoming examples as numpy arrays, so that a decision on the host does not
            wait for the device.
        rows: Positions of the incoming examples in the training data of the task, int64 on the host.
        idle: Whether the examples have no weight in the update. A process that has no example of a short last minibatch
            of an epoch receives such a batch.
        again: Whether a further update on the same incoming examples follows; a memory takes them in at the last one.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    num_incoming: int = -1
    view: Tensor | None = None
    host: tuple[Labels, Labels] | None = None
    idle: bool = False
    rows: Labels | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if self.num_incoming < 0:
            self.num_incoming = len(self.y)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        extras = f", with {', '.join(self.extras)}" if self.extras else ""
        return f"Batch({len(self)} rows of {kind_of(self.x)}, {self.num_incoming} incoming{extras})"

    def append(self, other: Batch) -> Batch:
        """Return this batch with the examples of another one after its own; extras are dropped.

        Example:
            >>> one = Batch(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 0]))
            >>> both = one.append(one)
            >>> len(both), both.num_incoming
            (4, 2)
        """
        pairs = ((self.x, other.x), (self.y, other.y), (self.task, other.task))
        x, y, task = (torch.cat(pair) for pair in pairs)
        return replace(self, x=x, y=y, task=task, extras={}, view=None)

    def take(self, rows: slice | Tensor) -> Batch:
        """Return some of the examples, with their extras, as a new batch.

        Args:
            rows: The positions of the examples in this batch: a slice, or an int64 tensor.

        Example:
            >>> batch = Batch(torch.zeros(3, 1), torch.tensor([4, 5, 6]), torch.zeros(3, dtype=torch.int64))
            >>> batch.take(slice(1, None)).y.tolist(), batch.take(torch.tensor([2, 0])).y.tolist()
            ([5, 6], [6, 4])
        """
        extras = {name: values[rows] for name, values in self.extras.items()}
        return Batch(self.x[rows], self.y[rows], self.task[rows], extras)

    def part(self, rows: Tensor) -> Batch:
        """Return some examples of a training step for `learner.closure`: with their view, the incoming ones first.

        Args:
            rows: Whether each example is taken, bool (B,).

        Example:
            >>> batch = Batch(torch.zeros(3, 1), torch.tensor([4, 5, 6]), torch.tensor([1, 0, 1]), num_incoming=2)
            >>> batch.view = batch.x
            >>> some = batch.part(batch.task == 1)
            >>> some.y.tolist(), some.num_incoming
            ([4, 6], 1)
        """
        some = self.take(rows.nonzero().flatten())
        some.view = None if self.view is None else self.view[rows]
        some.num_incoming = int(rows[: self.num_incoming].sum())
        return some
