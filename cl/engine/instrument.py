"""What is measured of a run beside R: curves inside tasks, resources, probes of the features, forecasts of transfer.

An instrument watches from outside: it draws nothing from the run's generators, leaves no mode changed, and its state
travels in the checkpoint. `Instruments` calls them, and takes the time that they spend, which is not the method's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
    """Base of all instruments: every hook does nothing until it is overridden, and then costs nothing.

    What it measures it keeps by `add`, one record a row of its table; or in transfer matrices, which stand beside R.

    Attributes:
        file: Name of the table that its records are written to in the run's directory, without its ending; empty where
            it has none.
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

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Allocate what has one entry a task, such as a `TransferMatrix`, and refuse what cannot be measured; once."""

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

    def after_step(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        """Measure after a training step, and after what the strategies do then.

        The logits are those of the step's own forward pass, so under the weights before the step and in training mode:
        inputs augmented, dropout drawn, batch norm over the rows of this step, replayed ones among them. Nothing is
        computed again for it. With `accumulate_grad_batches` each minibatch is a step, and weights change on the last.
        A strategy that trains on other examples than the task's (joint training, a memory alone) shows those, and one
        that learns without gradient steps, such as a nearest-class-mean classifier, has no step to show.

        Args:
            learner: With the weights after the step; `learner.step` counts it.
            batch: The rows that came in, (B, *input), without replayed ones: `x` as stored, `y`, `task`, `view` as the
                backbone saw them, and `rows`, their positions in the training data. Of several processes each has its
                own.
            logits: (B, C), unmasked and detached; valid until the hook returns, so clone what is kept.
        """

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure after a task has been consolidated."""

    def row(self, learner: Learner, after_task: int) -> None:
        """Measure beside a row of R (0: the untrained learner)."""

    def add(self, record: Record) -> None:
        """Keep one record, one value a column; NaN is unmeasured.

        Raises:
            InputError: If it has not as many values as there are columns, or one is no plain number or text.
        """
        if len(record) != len(self.columns) or not all(type(value) in (int, float, str) for value in record):
            raise InputError(
                f"{type(self).__name__} adds the record {record!r}: give a plain number (float(...), int(...)) or text "
                f"for each of its columns {', '.join(self.columns) or '(it names none)'}."
            )
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


HOOKS = ("setup", "begin", "steps", "before_task", "look", "after_step", "after_task", "row")


class Instruments(nn.ModuleDict):
    """The instruments of a run, called in order.

    Args:
        instruments: By name.

    Attributes:
        seconds: What all of them have taken so far.

    Raises:
        InputError: If one is no instrument, its name cannot be one, a hook's is misspelt, or two have one file.

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
        """Let each instrument allocate; return R by mask, and beside it the transfer matrices of all of them.

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
        """Call one hook of every instrument that has it, and take the time."""
        for instrument in self.values():
            if _overrides(instrument, hook):
                self._timed(getattr(instrument, hook))(learner, *arguments)

    def schedule(self, learner: Learner) -> None:
        """Tell the learner before which steps of the present task somebody looks."""
        learner.looks = {}
        for instrument in self.values():
            for step in instrument.steps(learner):  # type: ignore[operator]
                learner.looks.setdefault(int(step), []).append(self._timed(instrument.look))

    @contextmanager
    def after_steps(self, learner: Learner) -> Iterator[None]:
        """Let those that override `after_step` see each training step for a while, behind the strategies."""
        chain = learner.strategies.chains["after_step"]
        theirs = list(chain)
        chain += [(n, self._timed(i.after_step, wait=False)) for n, i in self.items() if _overrides(i, "after_step")]
        try:
            yield
        finally:
            chain[:] = theirs

    def _timed(self, hook: Any, wait: bool = True) -> Callable[..., None]:
        """Return a hook whose time counts as measuring; where it waits, the device has finished before and after."""

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


def _overrides(instrument: Any, hook: str) -> bool:
    return getattr(type(instrument), hook) is not getattr(Instrument, hook)


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
