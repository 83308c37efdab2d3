"""Minibatches on the training device: the examples of a chunk are gathered by one index and then split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cl.backbones.blocks import depends_on_batch
from cl.data.rows import row_bytes
from cl.data.task import TaskData
from cl.distributed import deal, everywhere
from cl.engine.batch import Batch, Labels
from cl.random import derive

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike

_LARGEST, _BRISK = 64, 0.1  # an automatic chunk size doubles up to 64 steps, while a chunk takes less than 0.1 s
_AHEAD = 2**25  # bytes of a chunk that is read in the background


class TrainLoader:
    """Shuffled minibatches in chunks of K, as lists of `Batch`.

    A chunk is one "batch" for Lightning, so that its overhead is paid once in K steps. The order of the examples is a
    function of (seed, task, epoch) alone, and the minibatches are the same for every K. If the data stay in their file,
    the next chunk is read while the present one is trained on. The loader has no `__len__`: an epoch that is resumed
    has fewer chunks than the next one, and Lightning, which asks for the length once, would skip its validation.

    Args:
        data: The examples, on the training device or in their file.
        batch_size: Examples of a minibatch; the last one of an epoch may be smaller.
        chunk_size: Minibatches of a chunk, K; None starts with one and doubles it while a chunk takes less than 0.1 s,
            so that progress bars move even where a step is slow.
        num_steps: Minibatches of an epoch, at most as many as the examples fill.
        seed: Seed of the task's order; None keeps the order of the data.
        step: Returns how many minibatches of the task are done; iteration starts there.
        device: The device of the minibatches.

    Example:
        >>> data, cpu = TaskData(torch.arange(10.0), torch.arange(10)), torch.device("cpu")
        >>> loader = TrainLoader(data, 4, chunk_size=2, num_steps=3, seed=0, step=lambda: 0, device=cpu)
        >>> [[len(batch) for batch in chunk] for chunk in loader]
        [[4, 4], [2]]
    """

    def __init__(
        self,
        data: TaskData,
        batch_size: int,
        chunk_size: int | None,
        num_steps: int,
        seed: int | None,
        step: Callable[[], int],
        device: torch.device,
    ) -> None:
        self.data, self.batch_size, self.chunk_size = data, batch_size, chunk_size
        self.num_steps, self.seed, self.step, self.device = num_steps, seed, step, device
        self._host = [column.cpu().numpy() for column in (data.labels, data.tasks)]

    def __iter__(self) -> Iterator[list[Batch]]:
        order = np.arange(len(self.data))
        epoch, done = divmod(self.step(), self.num_steps)
        if self.seed is not None:
            order = np.random.default_rng(derive(self.seed, "order", epoch)).permutation(len(self.data))
        order = order[done * self.batch_size : self.num_steps * self.batch_size]
        return self._from_device(order) if self.data.resident else self._from_file(order)

    def _from_device(self, order: Labels) -> Iterator[list[Batch]]:
        size = self.chunk_size or 1
        while len(order):
            began = time.perf_counter()
            rows, order = order[: size * self.batch_size], order[size * self.batch_size :]
            yield self._chunk(rows)
            if self.chunk_size is None and everywhere(time.perf_counter() - began < _BRISK):
                size = min(2 * size, _LARGEST)

    def _from_file(self, order: Labels) -> Iterator[list[Batch]]:
        held = _AHEAD // max(1, self.batch_size * row_bytes(self.data.x))
        step = (self.chunk_size or min(max(held, 1), _LARGEST)) * self.batch_size
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._chunk, order[:step])
            for start in range(step, len(order) + step, step):
                chunk = ahead.result()
                if start < len(order):
                    ahead = reader.submit(self._chunk, order[start : start + step])
                yield chunk

    def _chunk(self, rows: Labels) -> list[Batch]:
        rows, size, idle = deal(rows, self.batch_size)
        columns = self.data.take(torch.from_numpy(rows).to(self.data.y.device)).tensors()
        parts = (column.to(self.device, non_blocking=True).split(size) for column in columns)
        cuts = range(size, len(rows), size)
        host = (np.split(labels[rows], cuts) for labels in self._host)
        found = zip(zip(*parts, strict=True), zip(*host, strict=True), np.split(rows, cuts), strict=True)
        batches = [Batch(x, y, task, host=labels, rows=positions) for (x, y, task), labels, positions in found]
        batches[-1].idle = idle
        return batches


class EvalLoader:
    """Minibatches for evaluation, in order, each a `Batch`; it serves the test sets of all tasks in one pass.

    Args:
        parts: The datasets, such as the test set of each task. They are moved to the device once, unless they lie in
            files of more than 1 GiB together.
        device: The device of the minibatches.
        batch_size: Examples of a minibatch; None means 256 on a CPU, which fits its cache, and 1024 elsewhere.
        apart: For networks whose outputs depend on the other examples of a minibatch: whether each minibatch holds
            examples of one part only, in a fixed random order, and all minibatches of a part have nearly the same size.

    Example:
        >>> data = TaskData(torch.arange(10.0), torch.arange(10))
        >>> [len(batch) for batch in EvalLoader([data], torch.device("cpu"), batch_size=8)]
        [8, 2]
    """

    def __init__(
        self, parts: Sequence[TaskData], device: torch.device, batch_size: int | None = None, apart: bool = False
    ) -> None:
        self.device, self.apart = device, apart
        self.batch_size = batch_size or (256 if device.type == "cpu" else 1024)
        held = TaskData.fit(parts)
        if apart:
            draw = torch.Generator().manual_seed(0)
            parts = [part.take(torch.randperm(len(part), generator=draw)) for part in parts]
        elif held:
            parts = [TaskData.concat(parts)]
        self.parts = [part.on(device) if held else part for part in parts]

    def __len__(self) -> int:
        return sum(-(-len(part) // self.batch_size) for part in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts:
            if part.index is None and part.transform is None and part.resident:
                columns = (self._split(column.to(self.device)) for column in part.tensors())
                yield from (Batch(*rows) for rows in zip(*columns, strict=True))
                continue
            for rows in self._split(torch.arange(len(part))):
                x, y, task = (column.to(self.device) for column in part.take(rows).tensors())
                yield Batch(x, y, task)

    def _split(self, column: Tensor) -> Sequence[Tensor]:
        count = -(-len(column) // self.batch_size)
        return column.tensor_split(count) if self.apart and count else column.split(self.batch_size)


def evaluation(learner: LearnerLike, parts: Sequence[TaskData], device: torch.device | None = None) -> EvalLoader:
    """Return the `EvalLoader` with which to evaluate a learner on some datasets.

    Args:
        learner: Gives the batch size, and by its backbone whether parts are kept apart.
        parts: The datasets.
        device: The device of the minibatches; None means that of the learner.
    """
    return EvalLoader(parts, device or learner.device, learner.eval_batch_size, depends_on_batch(learner.backbone))
