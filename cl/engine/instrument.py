"""Measurements beside R: curves inside tasks, resources, probes of the features, forecasts of transfer.

An instrument does not change the run: it draws nothing from the run's generators and restores every mode that it
changes. Its state is part of the checkpoint. `Instruments` calls all of them and adds up the time that they take, so
that it is not counted as the method's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import misspelt
from cl.errors import InputError
from cl.metrics.transfer import TransferMatrix
from cl.random import derive

Record = tuple[float | int | str, ...]


class Instrument(nn.Module):
    """Base class of all instruments. Every hook does nothing by default, and one that is not overridden costs nothing.

    An instrument stores its measurements by `add`, which appends a record to its table, or in transfer matrices.

    Attributes:
        file: Name, without the ending .csv, of the table in the run's directory that the records are written to; empty
            for an instrument without a table.
        columns: The columns of that table.
        needs_inputs: Whether it uses inputs, or layers of the backbone; see `Strategy.needs_inputs`.

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
    needs_inputs: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Record] = []

    def transfer_matrices(self) -> dict[str, TransferMatrix]:
        """Return the instrument's transfer matrices, by a name that is used like that of a mask; reports show them."""
        return {}

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Allocate what depends on the stream, such as a `TransferMatrix`, and refuse what cannot be measured.

        Called once, before the run starts or resumes.

        Raises:
            InputError: If this stream or learner cannot be measured.
        """

    def watch(self, instruments: Instruments) -> None:
        """Receive all instruments of the run, once, to read `seconds`, the time that they have taken."""

    def begin(self, learner: Learner) -> None:
        """Act when a task begins, before the `before_task` of the strategies."""

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the steps of the present task, 0 to `learner.num_steps`, before which `look` is called."""
        return ()

    def before_task(self, learner: Learner, task: Task) -> None:
        """Measure before a task is trained, after the `before_task` of the strategies."""

    def look(self, learner: Learner) -> None:
        """Measure inside a task, after `learner.step` steps of it."""

    def before_step(self, learner: Learner, batch: Batch) -> None:
        """Measure before a training step.

        Args:
            learner: With the weights before the step.
            batch: The incoming examples, without `view`; in several processes each receives its own share, which may
                have no weight (`idle`).
        """

    def after_step(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        """Measure after a training step, and after the strategies' `after_step`.

        The logits are those of the forward pass of the step: under the weights before the step and in training mode,
        with augmented inputs, dropout, and batch norm over all examples of the step, replayed ones included. Nothing is
        computed again. With `accumulate_grad_batches` each minibatch is a step, and the weights change on the last one
        of each group. If a strategy trains on other examples than the task's (joint training, a memory alone), the
        batch holds those; if it learns without gradient steps, such as a nearest-class-mean classifier, the hook is
        not called.

        Args:
            learner: With the weights after the step; `learner.step` includes it.
            batch: The incoming examples, (B, *input), without replayed ones: `x` as stored, `y`, `task`, `view` as the
                backbone received it, and `rows`, their positions in the training data. In several processes each
                receives its own share.
            logits: (B, C), unmasked and detached. Clone them to retain them: they are valid until the hook returns.
        """

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure after a task has been consolidated."""

    def row(self, learner: Learner, after_task: int) -> None:
        """Measure right after a row of R (0: the untrained learner)."""

    def add(self, record: Record) -> None:
        """Append a record with a value for each column; NaN means unmeasured.

        Raises:
            InputError: If the number of values is not that of the columns, or a value is no plain number or text.
        """
        if len(record) != len(self.columns) or not all(type(value) in (int, float, str) for value in record):
            raise InputError(
                f"{type(self).__name__} adds the record {record!r}: give a plain number (float(...), int(...)) or text "
                f"for each of its columns {', '.join(self.columns) or '(it names none)'}."
            )
        self._records.append(tuple(record))  # plain data, which loads with weights_only=True

    def __len__(self) -> int:
        return len(self._records)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield the records from number `start` on; NaN means unmeasured and is left out of files."""
        yield from self._records[start:]

    def get_extra_state(self) -> list[Record]:
        """Return the records, as plain numbers."""
        return list(self._records)

    def set_extra_state(self, state: list[Record]) -> None:
        """Restore what `get_extra_state` returned."""
        self._records = list(state)


HOOKS = ("setup", "begin", "steps", "before_task", "look", "before_step", "after_step", "after_task", "row")


class Instruments(nn.ModuleDict):
    """The instruments of a run, called in order.

    Args:
        instruments: By name.

    Attributes:
        seconds: The time that all instruments have taken so far.

    Raises:
        InputError: If one is no instrument, its name is not allowed, the name of a hook is misspelt, or two instruments
            have the same file.

    Example:
        >>> Instruments({"nothing": Instrument()}).seconds
        0.0
    """

    def __init__(self, instruments: Mapping[str, Instrument]) -> None:
        super().__init__()
        self.seconds = 0.0
        for name, instrument in instruments.items():
            self._check(name, instrument)
            self[name] = instrument
        for instrument in instruments.values():
            instrument.watch(self)

    def _check(self, name: str, instrument: Any) -> None:
        if not isinstance(instrument, Instrument):
            raise InputError(f"The instrument {name!r} is {instrument!r}: derive its class from cl.Instrument.")
        if not re.fullmatch(r"[\w-]+", name) or hasattr(self, name):
            raise InputError(f"An instrument cannot be called {name!r}: choose another word of letters and digits.")
        said = misspelt(type(instrument), Instrument, HOOKS)
        if said is not None:
            raise InputError(said)
        file = instrument.file
        if file and (not re.fullmatch(r"[\w-]+", file) or file in [other.file for other in self.values()]):
            raise InputError(
                f"The instrument {name!r} cannot write {file!r}.csv: give its class a `file` of letters, digits, _ and "
                "- that no other instrument has."
            )

    def setup(self, learner: Learner, stream: Stream) -> dict[str, TransferMatrix]:
        """Call `setup` of each instrument; return R by mask, and the transfer matrices of all instruments by name.

        Raises:
            InputError: If a matrix has the name of another.
        """
        found: dict[str, Any] = dict(learner.matrices.items())
        for name, instrument in self.items():
            instrument.setup(learner, stream)  # type: ignore[operator]
            for mask, matrix in instrument.transfer_matrices().items():  # type: ignore[operator]
                if mask in found:
                    raise InputError(
                        f"The instrument {name!r} has a transfer matrix called {mask!r}, as another is: rename it."
                    )
                found[mask] = matrix
        return found

    def call(self, hook: str, learner: Learner, *arguments: Any) -> None:
        """Call one hook of every instrument that overrides it, and add up the time."""
        for instrument in self.values():
            if overrides(type(instrument), hook):
                self._timed(getattr(instrument, hook))(learner, *arguments)

    def schedule(self, learner: Learner) -> None:
        """Give the learner the calls of `look` in the present task, by the step before which they are due."""
        learner.looks = {}
        for instrument in self.values():
            for step in instrument.steps(learner):  # type: ignore[operator]
                learner.looks.setdefault(int(step), []).append(self._timed(instrument.look))

    @contextmanager
    def around_steps(self, learner: Learner) -> Iterator[None]:
        """In this context, call `before_step` of the instruments, and `after_step` after that of the strategies."""
        chain = learner.strategies.chains["after_step"]
        of_strategies = list(chain)
        learner.before_step = [hook for _, hook in self._hooks("before_step")]
        chain += self._hooks("after_step")
        try:
            yield
        finally:
            chain[:], learner.before_step = of_strategies, []

    def _hooks(self, hook: str) -> list[tuple[str, Callable[..., None]]]:
        those = [(name, getattr(each, hook)) for name, each in self.items() if overrides(type(each), hook)]
        return [(name, self._timed(_with_truth(method), wait=False)) for name, method in those]

    def _timed(self, hook: Any, wait: bool = True) -> Callable[..., None]:
        """Return a hook whose time is added to `seconds`; with `wait`, the device is synchronised before and after."""

        def timed(learner: Learner, *arguments: Any) -> None:
            if wait:
                _finish(learner.device)
            began = time.perf_counter()
            try:
                hook(learner, *arguments)
            finally:
                if wait:
                    _finish(learner.device)
                self.seconds += time.perf_counter() - began

        return timed


def _with_truth(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook of a step that sees the labels of a task that hides them from strategies."""

    def seeing(learner: Learner, batch: Batch, *arguments: Any) -> None:
        if learner.truth is not None and batch.rows is not None:
            batch = replace(batch, y=learner.truth[torch.from_numpy(batch.rows)].to(batch.y.device))
        hook(learner, batch, *arguments)

    return seeing


def overrides(kind: type, hook: str) -> bool:
    """Return whether a class of instruments overrides a hook."""
    return getattr(kind, hook) is not getattr(Instrument, hook)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watching(learner: Learner) -> Iterator[None]:
    """In this context, evaluate the learner without changing it, at any point of a run.

    The learner is in evaluation mode, under the run's precision and without gradients. On exit, the mode of each module
    and the state of torch's generator are restored.
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
    """Return the training examples of a task that carry its task label, where tasks blend; all if none does."""
    own = task.train.of_tasks([task.index])
    return own if len(own) else task.train


def subset(data: TaskData, rows: int) -> TaskData:
    """Return a fixed random subset of some examples, or all if there are not more than `rows`.

    Args:
        data: The examples.
        rows: How many at most. The draw depends only on this and on the number of examples, so every run has the same.

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
    """Return the backbone's features of examples, float32 (n, D) on the device; call it inside `watching`.

    Args:
        learner: With the backbone.
        data: n examples, as stored.
        size: Examples of a minibatch.
    """
    if data.resident:
        data = data.on(learner.device)
    found = []
    for rows in torch.arange(len(data)).split(size):
        x, _, task = data.take(rows).tensors()
        found.append(learner.features(x.to(learner.device), task.to(learner.device)).float())
    return torch.cat(found)
