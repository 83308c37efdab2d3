"""Checkpoints inside a task: when they are written, what they hold, and how a signal stops a run."""

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
from cl.engine.optimizer_state import restart
from cl.errors import InputError, Preempted

State = dict[str, Any]
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")  # from job schedulers and Ctrl-C; Windows lacks some
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def cadence(every: int | str | None) -> tuple[int | None, float | None]:
    """Return the interval between two checkpoints inside a task as (steps, None) or (None, seconds).

    Args:
        every: A number of steps, a time such as "30s", "10min" or "2h", or None, which gives (None, None).

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
    """Saves a task in training, at an interval and when a signal stops the run, and restores it on resume.

    It saves only at the ends of chunks, where the losses have been checked to be finite. The saved state does not
    depend on the chunk size. At the end of a task's training it saves only if a checkpoint is due.

    Args:
        every: The interval, as `cadence` takes it.
        save: Writes a checkpoint; its argument is the training state that no state dict holds.

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
        self._listening = False  # whether a task trains, so that a signal can wait for the next save
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
        """In this context, a signal during training saves the task and then stops the run; else it stops at once."""
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
        """Call the handler that was installed before, such as one that requeues the job, then raise `Preempted`.

        The signal stays recorded: Python drops an exception that is raised in a finalizer, and then the next save stops
        the run.
        """
        number = self._signal or signal.SIGTERM  # SIGTERM where only another process has received a signal
        handler = self._previous.get(number)
        if callable(handler):
            handler(number, None)
        raise Preempted(number, saved)

    # ---- saving -------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save inside an epoch, but not after its last chunk, when the hooks of its end have not run yet."""
        self._step = pl_module.step
        if self._wanted() and self._step % pl_module.steps_per_epoch:
            self._save_now(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save between two epochs, after the hooks of the end of the epoch."""
        if self._wanted() and self._step < pl_module.num_steps:
            self._save_now(trainer, pl_module)

    def trained(self, trainer: pl.Trainer, learner: Learner) -> None:
        """Save when all steps of a task are done, before the strategies' `after_task`; called by the experiment."""
        self._listening, self._step = False, learner.step
        if self._wanted():
            self._save_now(trainer, learner)

    def _wanted(self) -> bool:
        """Say whether in any process a signal has arrived or a checkpoint is due."""
        return distributed.anywhere(self._signal is not None or self.due)

    def _save_now(self, trainer: pl.Trainer, learner: Learner) -> None:
        self._save(_state(trainer, learner))
        self._saved_at, self._saved_step = time.monotonic(), learner.step
        if distributed.anywhere(self._signal is not None):
            self._stop(saved=True)

    # ---- resuming -----------------------------------------------------------------------------------------------

    def begin(self, trainer: pl.Trainer, learner: Learner, found: State) -> None:
        """Prepare a task's training: from its start if `found` is empty, else from that state of a checkpoint."""
        self._found, self._listening = found, True
        self._saved_at, self._saved_step = time.monotonic(), learner.step
        self._step = learner.step
        if found:
            torch.set_rng_state(found["draws"])  # for the case that no step is left and the hooks of the end follow
            waiting = found["waiting"]
            learner._curves.waiting = [{k: v.to(learner.device) for k, v in terms.items()} for terms in waiting]
            learner._curves.between = [tuple(point) for point in found.get("between", ())]
            epochs = trainer.fit_loop.epoch_progress
            for count in (epochs.current, epochs.total):
                for name in vars(count):  # ready, started, processed, completed
                    setattr(count, name, learner.step // learner.steps_per_epoch)
            steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
            steps.ready = steps.completed = found["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Restore optimizer, schedule, precision, callbacks and gradients; take SIGTERM back from Lightning.

        Lightning's own handler ends a run at the next end of an epoch or validation, without saving and with status 0.
        """
        if signal.SIGTERM in self._previous:
            signal.signal(signal.SIGTERM, self._receive)
            trainer._signal_connector.received_sigterm = False
        found = self._found
        if not found:
            return
        if "trainable" in found:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(name in found["trainable"])
        if found.get("restarted_at"):
            restart(pl_module, found["restarted_at"])
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
        """Restore torch's generators, which the start of the epoch has seeded again."""
        if self._found and pl_module.step % pl_module.steps_per_epoch:
            torch.set_rng_state(self._found["draws"])
            if pl_module.device.type == "cuda" and "cuda_draws" in self._found:
                torch.cuda.set_rng_state(self._found["cuda_draws"], pl_module.device)
        self._found = {}


def _state(trainer: pl.Trainer, learner: Learner) -> State:
    """Return the state of the present task's training that is not in the learner's state dict."""
    schedule = learner._schedule
    state = {
        "step": learner.step,
        "stopped": trainer.should_stop,  # before all epochs were over
        "global_step": trainer.global_step,
        "restarted_at": learner.restarted_at,
        "trainable": [name for name, parameter in learner.named_parameters() if parameter.requires_grad],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedule": None if schedule is None else schedule.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {c.state_key: state for c in _others(trainer) if (state := c.state_dict())},
        "waiting": learner._curves.waiting,
        "between": learner._curves.between,
        "gradients": {},
        "summed": learner.summed,
        "draws": torch.get_rng_state(),
    }
    if learner.accumulate > 1:  # some minibatches of one update may come before the checkpoint, others after it
        state["gradients"] = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    if learner.device.type == "cuda":
        state["cuda_draws"] = torch.cuda.get_rng_state(learner.device)
    return state


def _others(trainer: pl.Trainer) -> list[pl.Callback]:
    return [callback for callback in trainer.callbacks if not isinstance(callback, TaskCheckpoints)]  # type: ignore[attr-defined]
