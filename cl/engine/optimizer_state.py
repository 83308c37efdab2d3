"""The state of optimizer and schedule that carries over from one task to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.learner import Learner
    from cl.engine.strategy import LearnerLike

STATES = ("reset", "keep")
_MOVED = ("lr", "momentum", "betas")  # what schedules change of an optimizer's options
State = dict[str, Any]


class Carried:
    """The state of the last optimizer, for the next one.

    Every task has its own optimizer. With `state="keep"` it starts with the state that the last one held for each
    weight (momentum, Adam's moments and step count), and the schedule starts afresh with each task. A stream without
    boundaries has no tasks, only points at which the learner is evaluated: there both optimizer and schedule continue
    across these points, for every value of `state`.

    Args:
        state: "reset" or "keep": whether the state carries over at a boundary between tasks.
        boundaries: Whether the stream has boundaries.

    Attributes:
        on: Whether state carries over.

    Raises:
        InputError: If `state` is neither.

    Example:
        >>> Carried("keep", boundaries=True).on, Carried("reset", boundaries=True).on, Carried("reset", False).on
        (True, False, True)
    """

    def __init__(self, state: str, boundaries: bool) -> None:
        if state not in STATES:
            raise InputError(f"optimizer_state={state!r} is unknown: use reset or keep.")
        self.on, self.boundaries = state == "keep" or not boundaries, boundaries
        self._live: tuple[Optimizer, LRScheduler | None] | None = None
        self._found: State = {}

    def forget(self) -> None:
        """Let the next optimizer start without state: for a strategy that resets the weights."""
        self._live, self._found = None, {}

    def take_over(self, learner: LearnerLike, optimizer: Optimizer, schedule: LRScheduler | None) -> None:
        """Load into a new optimizer and schedule the state of the last ones, weight by weight.

        An optimizer of another class starts without state.
        """
        if not self.on:
            return
        found = self.state(learner)
        if found.get("kind") == type(optimizer).__name__:
            names = [name for name, _ in _named_weights(learner, optimizer)]
            own = optimizer.state_dict()
            own["state"] = {i: found["weights"][name] for i, name in enumerate(names) if name in found["weights"]}
            if not self.boundaries and schedule is not None and found["schedule"] is not None:
                for group, options in zip(own["param_groups"], found["options"], strict=True):
                    group.update(options)
                schedule.load_state_dict(found["schedule"])
            optimizer.load_state_dict(own)
        self._live = optimizer, schedule

    def state(self, learner: LearnerLike) -> State:
        """Return the state that carries over, as plain data: the optimizer's by name of weight, and the schedule's."""
        if not self.on or self._live is None:
            return self._found
        optimizer, schedule = self._live
        return {
            "kind": type(optimizer).__name__,
            "weights": {
                n: dict(optimizer.state[p]) for n, p in _named_weights(learner, optimizer) if p in optimizer.state
            },
            "options": [{key: g[key] for key in _MOVED if key in g} for g in optimizer.param_groups],
            "schedule": None if schedule is None else schedule.state_dict(),
        }

    def load(self, state: State) -> None:
        """Restore what `state` returned, from a checkpoint."""
        self._live, self._found = None, state


def _named_weights(learner: LearnerLike, optimizer: Optimizer) -> list[tuple[str, Any]]:
    """Return the weights of an optimizer with their names, in its order."""
    names = {id(p): name for name, p in learner.named_parameters()}
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return [(names.get(id(p), f"weight {i}"), p) for i, p in enumerate(weights)]  # some may not be the learner's


def restart(learner: Learner, step: int | None = None) -> None:
    """Give the trainer a new optimizer and a new schedule for the rest of the task.

    Args:
        learner: At the end of an epoch; or one that resumes.
        step: For one that resumes, the step of the task at which the optimizer was restarted.

    Raises:
        InputError: Inside of an epoch, outside of training, or if the stream has no boundaries.
    """
    if step is None and (not learner.step or learner.step % learner.steps_per_epoch or learner.in_step):
        raise InputError("restart_optimizer() is for after_epoch: call it there.")
    if not learner.shuffle:
        raise InputError("restart_optimizer() needs tasks with boundaries, and this stream has none.")
    learner.restarted_at = learner.step if step is None else step
    learner.forget_optimizer()
    learner.trainer.strategy.optimizers = [learner.configure_optimizers()]
