"""Checkpoints inside a task: when they are written, what they hold, and stopping on a signal."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from cl import distributed
from cl.engine.learner import Learner
from cl.errors import InputError, Preempted

State = dict[str, Any]
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")  # of schedulers and of people; a system may lack some
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def cadence(every: int | str | None) -> tuple[int | None, float | None]:
    """Return steps or seconds between two checkpoints inside a task, (None, None) for none.

    Args:
        every: A number of steps, a time such as "30s", "10min" or "2h", or None.

    Raises:
        InputError: If it is neither, or not positive.

    Example:
        >>> cadence(500), cadence("10min")
        ((500, None), (None, 600.0))
    """
    if every is None:
        return None, None
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", str(every))
    if found is None:
        raise InputError(
            f"checkpoint.every={every!r} is no cadence: give steps (500), a time (30s, 10min, 2h) or null."
        )
    return None, float(found.group(1)) * _UNITS[found.group(2)]


class TaskCheckpoints(pl.callbacks.Checkpoint):
    """Saves a task in training, at a cadence and before a signal stops the run, and takes it up again.

    What it sees are the ends of chunks, where the losses have been found finite; there the run is what it would be for
    every other size of chunk. It saves nothing at the end of a task's training unless that is due, too.

    Args:
        every: As `cadence` takes it.
        save: Writes what belongs to the training of the present task beside all else.

    Example:
        >>> TaskCheckpoints("10min", lambda state: None).due
        False
    """

    def __init__(self, every: int | str | None, save: Callable[[State], object]) -> None:
        super().__init__()
        self.steps, self.seconds = cadence(every)
        self._save, self._found = save, State()
        self._saved_at, self._saved_step, self._step = time.monotonic(), 0, 0
        self._signal: int | None = None
        self._listening = False  # whether a place to save is near
        self._previous: dict[int, Any] = {}

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        if self.steps is not None:
            return self._step // self.steps > self._saved_step // self.steps
        return self.seconds is not None and time.monotonic() - self._saved_at >= self.seconds

    # ---- signals ------------------------------------------------------------------------------------------------

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the signals that end a run while it trains; elsewhere they end it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        numbers = [n for n in numbers if n != getattr(signal, "SIGUSR2", None) or callable(signal.getsignal(n))]
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous, self._signal = {}, None

    def _receive(self, number: int, frame: Any) -> None:
        again, self._signal = self._signal is not None, number
        if not self._listening or again:
            self._stop(saved=False)

    def _stop(self, saved: bool) -> None:
        """Do what the signal does without us: others' handlers first, such as the one that puts a job back.

        The signal is remembered: Python drops an exception where it comes within a finalizer, and the next place to
        save then stops the run.
        """
        number = self._signal or signal.SIGTERM  # another process's, where none came here
        handler = self._previous.get(number)
        if callable(handler):
            handler(number, None)
        raise Preempted(number, saved)

    # ---- saving -------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save inside an epoch; what belongs to its end has not happened yet on its last chunk."""
        self._step = pl_module.step
        if self._wanted() and self._step % pl_module.steps_per_epoch:
            self._keep(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save between two epochs, after everybody's hooks."""
        if self._wanted() and self._step < pl_module.num_steps:
            self._keep(trainer, pl_module)

    def trained(self, trainer: pl.Trainer, learner: Learner) -> None:
        """Save when all steps of a task are done, before the strategies' `after_task`; called by the experiment."""
        self._listening, self._step = False, learner.step
        if self._wanted():
            self._keep(trainer, learner)

    def _wanted(self) -> bool:
        """Say whether any of the processes has been told to stop, or finds that it is time."""
        return distributed.anywhere(self._signal is not None or self.due)

    def _keep(self, trainer: pl.Trainer, learner: Learner) -> None:
        self._save(_state(trainer, learner))
        self._saved_at, self._saved_step = time.monotonic(), learner.step
        if distributed.anywhere(self._signal is not None):
            self._stop(saved=True)

    # ---- going on -----------------------------------------------------------------------------------------------

    def begin(self, trainer: pl.Trainer, learner: Learner, found: State) -> None:
        """Prepare a task's training, from its start or from what a checkpoint inside it holds."""
        self._found, self._listening = found, True
        self._saved_at, self._saved_step = time.monotonic(), learner.step
        self._step = learner.step
        if found:
            torch.set_rng_state(found["draws"])  # where no step is left, for what comes after them
            waiting = found["waiting"]
            learner._curves.waiting = [{k: v.to(learner.device) for k, v in terms.items()} for terms in waiting]
            epochs = trainer.fit_loop.epoch_progress
            for count in (epochs.current, epochs.total):
                for name in vars(count):  # ready, started, processed, completed
                    setattr(count, name, learner.step // learner.steps_per_epoch)
            steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
            steps.ready = steps.completed = found["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Give optimizer, schedule, precision and gradients what they had; take SIGTERM back from Lightning.

        Its own handler ends a run at the next end of an epoch or in a validation: unsaved, and with status 0.
        """
        if signal.SIGTERM in self._previous:
            signal.signal(signal.SIGTERM, self._receive)
            trainer._signal_connector.received_sigterm = False
        found = self._found
        if not found:
            return
        for optimizer, state in zip(trainer.optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if found["schedule"] is not None:
            pl_module._schedule.load_state_dict(found["schedule"])
        trainer.precision_plugin.load_state_dict(found["precision"])
        for callback in _others(trainer):
            if callback.state_key in found["callbacks"]:
                callback.load_state_dict(found["callbacks"][callback.state_key])
        pl_module.summed = found["summed"]
        for name, parameter in pl_module.named_parameters():
            if name in found["gradients"]:
                parameter.grad = found["gradients"][name].to(parameter.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Go on with torch's generators, which the epoch's start has seeded anew."""
        if self._found and pl_module.step % pl_module.steps_per_epoch:
            torch.set_rng_state(self._found["draws"])
            if pl_module.device.type == "cuda" and "cuda_draws" in self._found:
                torch.cuda.set_rng_state(self._found["cuda_draws"], pl_module.device)
        self._found = {}


def _state(trainer: pl.Trainer, learner: Learner) -> State:
    """Return what belongs to the training of the present task and is not in the learner's state dict."""
    schedule = learner._schedule
    state = {
        "step": learner.step,
        "stopped": trainer.should_stop,  # before all epochs were over
        "global_step": trainer.global_step,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedule": None if schedule is None else schedule.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {c.state_key: state for c in _others(trainer) if (state := c.state_dict())},
        "waiting": learner._curves.waiting,
        "gradients": {},
        "summed": learner.summed,
        "draws": torch.get_rng_state(),
    }
    if learner.accumulate > 1:  # the steps of one update may lie on both sides
        state["gradients"] = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    if learner.device.type == "cuda":
        state["cuda_draws"] = torch.cuda.get_rng_state(learner.device)
    return state


def _others(trainer: pl.Trainer) -> list[pl.Callback]:
    return [callback for callback in trainer.callbacks if not isinstance(callback, TaskCheckpoints)]  # type: ignore[attr-defined]
