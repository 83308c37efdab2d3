"""What is measured of a run beside R: curves inside tasks, resources, probes of the features, forecasts of transfer.

An instrument watches from outside: it draws nothing from the run's generators, leaves no mode changed, and its state
travels in the checkpoint. `Instruments` calls them, and takes the time that they spend, which is not the method's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cl.data.task import Task, TaskData
from cl.engine.learner import Learner
from cl.metrics.transfer import TransferMatrix
from cl.random import derive

Record = tuple[float | int | str, ...]


class Instrument(nn.Module):
    """Base of all instruments: every hook does nothing until it is overridden.

    Attributes:
        file: Name of the table that its records are written to, without its ending.
        columns: The columns of that table.

    Example:
        >>> class Losses(Instrument):
        ...     file, columns = "losses", ("task", "loss")
        ...     def after_task(self, learner, task):
        ...         self.add((task.index + 1, float(learner.last_loss)))
        >>> len(Losses())
        0
    """

    file: str = ""
    columns: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Record] = []

    def transfer_matrices(self) -> dict[str, TransferMatrix]:
        """Return transfer matrices of its own, by what stands in the place of a mask; reports show them beside R."""
        return {}

    def watch(self, instruments: Instruments) -> None:
        """Take note of all instruments of the run, whose time is not the method's, before the first task."""

    def begin(self, learner: Learner) -> None:
        """Act when a task begins, before the `before_task` of the strategies."""

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the steps of the present task, 0 to `learner.num_steps`, before which to `look`."""
        return ()

    def before_task(self, learner: Learner, task: Task) -> None:
        """Measure before a task is trained, its strategies' hooks done."""

    def look(self, learner: Learner) -> None:
        """Measure inside a task, `learner.step` steps after its start."""

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure after a task has been consolidated."""

    def row(self, learner: Learner, after_task: int) -> None:
        """Measure beside a row of R (0: the untrained learner)."""

    def add(self, record: Record) -> None:
        """Keep one record, one value a column."""
        self._records.append(tuple(record))  # plain, so that a checkpoint loads as data

    def __len__(self) -> int:
        return len(self._records)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Return the records from the one at `start`; NaN means unmeasured and is left out of files."""
        yield from self._records[start:]

    def get_extra_state(self) -> list[Record]:
        """Return the records, as plain numbers."""
        return list(self._records)

    def set_extra_state(self, state: list[Record]) -> None:
        """Restore what `get_extra_state` returned."""
        self._records = list(state)


class Instruments(nn.ModuleDict):
    """The instruments of a run, called in order.

    Args:
        instruments: By name.

    Attributes:
        seconds: What all of them have taken so far.

    Example:
        >>> Instruments({"nothing": Instrument()}).seconds
        0.0
    """

    def __init__(self, instruments: dict[str, Instrument]) -> None:
        super().__init__(instruments)
        self.seconds = 0.0
        for instrument in instruments.values():
            instrument.watch(self)

    def transfer_matrices(self) -> dict[str, TransferMatrix]:
        """Return the transfer matrices of all instruments."""
        return {k: m for instrument in self.values() for k, m in instrument.transfer_matrices().items()}  # type: ignore[operator]

    def call(self, hook: str, learner: Learner, *arguments: Any) -> None:
        """Call one hook of every instrument that has it, and take the time."""
        for instrument in self.values():
            if getattr(type(instrument), hook) is not getattr(Instrument, hook):
                with self.timed(learner):
                    getattr(instrument, hook)(learner, *arguments)

    def schedule(self, learner: Learner) -> None:
        """Tell the learner before which steps of the present task somebody looks."""
        learner.looks = {}
        for instrument in self.values():
            for step in instrument.steps(learner):  # type: ignore[operator]
                learner.looks.setdefault(int(step), []).append(self._look(instrument.look))  # type: ignore[arg-type]

    def _look(self, look: Callable[[Learner], None]) -> Callable[[Learner], None]:
        def timed(learner: Learner) -> None:
            with self.timed(learner):
                look(learner)

        return timed

    @contextmanager
    def timed(self, learner: Learner) -> Iterator[None]:
        """Count what happens inside as measuring; the device has finished before and after."""
        _finish(learner.device)
        began = time.perf_counter()
        try:
            yield
        finally:
            _finish(learner.device)
            self.seconds += time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watching(learner: Learner) -> Iterator[None]:
    """Evaluate for a while in the middle of anything: no gradient, no mode, no draw is left behind.

    Batch-norm statistics stay (evaluation mode), and so does torch's generator.
    """
    modes = [(module, module.training) for module in learner.modules()]
    learner.eval()
    device = [learner.device] if learner.device.type == "cuda" else []
    trainer = getattr(learner, "_trainer", None)
    context = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
    try:
        with torch.random.fork_rng(device), torch.inference_mode(), context:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def own_examples(task: Task) -> TaskData:
    """Return the training examples that are a task's own, where those of others come with it; all where none is."""
    own = task.train.of_tasks([task.index])
    return own if len(own) else task.train


def subset(data: TaskData, rows: int) -> TaskData:
    """Return a fixed random part of some examples, all of them where there are no more.

    Args:
        data: Examples.
        rows: How many at most; the draw depends on nothing else, so that every run looks at the same ones.

    Example:
        >>> data = TaskData(torch.arange(9.0), torch.arange(9))
        >>> subset(data, 4).labels.equal(subset(data, 4).labels), len(subset(data, 99))
        (True, 9)
    """
    if len(data) <= rows:
        return data
    draw = torch.Generator().manual_seed(derive(0, "subset", len(data), rows))
    return data.take(torch.randperm(len(data), generator=draw)[:rows].sort().values)


def features(learner: Learner, data: TaskData, size: int = 256) -> Tensor:
    """Return the backbone's features of raw examples, (n, D), as float32 on the device; call it while `watching`."""
    if data.resident:
        data = data.on(learner.device)
    found = []
    for rows in torch.arange(len(data)).split(size):
        x, _, task = data.take(rows).tensors()
        found.append(learner.features(x.to(learner.device), task.to(learner.device)).float())
    return torch.cat(found)
