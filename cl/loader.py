"""Batches on the training device: one index, one gather, and slices of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cl.random import derive
from cl.strategy import Batch, Labels

Columns = tuple[Tensor, Tensor, Tensor]
_LARGEST, _BRISK = 64, 0.1  # steps of a chunk that chooses its size; seconds that it should not take


class TrainLoader:
    """Shuffled minibatches in chunks of K, as lists of `Batch`.

    A Lightning "batch" is a chunk, so that its cost a step is paid once in K steps. The order of the examples is a
    function of (seed, task, epoch) alone, and the minibatches are the same for every K.

    Args:
        columns: Inputs (N, *input), labels (N,) and task labels (N,) on the training device.
        batch_size: Rows of a minibatch; the last one of an epoch may be smaller.
        chunk_size: Minibatches a chunk, K; None begins with one and doubles while a chunk is brisk, so that bars move
            where a step is slow. Then there is no length to tell.
        num_steps: Minibatches an epoch, at most what the rows give.
        seed: Seed of the task's order.
        epoch: Tells the present epoch.

    Example:
        >>> y = torch.arange(10)
        >>> loader = TrainLoader((y.float(), y, y), batch_size=4, chunk_size=2, num_steps=3, seed=0, epoch=lambda: 0)
        >>> [[len(batch) for batch in chunk] for chunk in loader]
        [[4, 4], [2]]
    """

    def __init__(
        self,
        columns: Columns,
        batch_size: int,
        chunk_size: int | None,
        num_steps: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.columns, self.batch_size, self.chunk_size = columns, batch_size, chunk_size
        self.num_steps, self.seed, self.epoch = num_steps, seed, epoch
        self._host = [column.cpu().numpy() for column in columns[1:]]

    def __len__(self) -> int:
        if self.chunk_size is None:
            raise TypeError("The chunks choose their size as they go.")
        return -(-self.num_steps // self.chunk_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        draw = np.random.default_rng(derive(self.seed, "order", self.epoch()))
        order = draw.permutation(len(self.columns[1]))[: self.num_steps * self.batch_size]
        size = self.chunk_size or 1
        while len(order):
            began = time.perf_counter()
            rows, order = order[: size * self.batch_size], order[size * self.batch_size :]
            yield self._chunk(rows)
            if self.chunk_size is None and time.perf_counter() - began < _BRISK:
                size = min(2 * size, _LARGEST)

    def _chunk(self, rows: Labels) -> list[Batch]:
        index = torch.from_numpy(rows).to(self.columns[1].device)
        columns = (column[index].split(self.batch_size) for column in self.columns)
        cuts = range(self.batch_size, len(rows), self.batch_size)
        host = (np.split(labels[rows], cuts) for labels in self._host)
        pairs = zip(zip(*columns, strict=True), zip(*host, strict=True), strict=True)
        return [Batch(x, y, task, host=labels) for (x, y, task), labels in pairs]


class EvalLoader:
    """Minibatches in order, each one `Batch`; all tasks' test sets stand here as one.

    Args:
        columns: As in `TrainLoader`.
        batch_size: Rows of a minibatch; None means 256 on a CPU, whose cache they fit, and 1024 elsewhere.

    Example:
        >>> y = torch.arange(10)
        >>> [len(batch) for batch in EvalLoader((y.float(), y, y), batch_size=8)]
        [8, 2]
    """

    def __init__(self, columns: Columns, batch_size: int | None = None) -> None:
        self.columns, self.batch_size = columns, batch_size or (256 if columns[1].device.type == "cpu" else 1024)

    def __len__(self) -> int:
        return -(-len(self.columns[1]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(*rows) for rows in zip(*(c.split(self.batch_size) for c in self.columns), strict=True))
