"""What an optimizer and its schedule take along from one task to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike

STATES = ("reset", "keep")
_MOVED = ("lr", "momentum", "betas")  # what schedules change of an optimizer's options
State = dict[str, Any]


class Carried:
    """The state of the last optimizer, for the next one.

    Every task has an optimizer of its own. With `state="keep"` it goes on with what the last one held of the weights
    (momentum, Adam's moments and its count of steps), while the schedule begins anew with the task. Where a stream has
    no boundaries there are no tasks to tell apart, only places where the learner is evaluated: there optimizer and
    schedule go on as one, whatever `state` says.

    Args:
        state: What happens at a boundary between tasks: "reset" or "keep".
        boundaries: Whether the stream has any.

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
        """Let the next optimizer begin anew: for a strategy that goes back to initial weights."""
        self._live, self._found = None, {}

    def take_over(self, learner: LearnerLike, optimizer: Optimizer, schedule: LRScheduler | None) -> None:
        """Give a new optimizer and its schedule what the last ones held; of the same kind, weight by weight."""
        if not self.on:
            return
        found = self.state(learner)
        if found.get("kind") == type(optimizer).__name__:
            names = [name for name, _ in _by_place(learner, optimizer)]
            own = optimizer.state_dict()
            own["state"] = {i: found["weights"][name] for i, name in enumerate(names) if name in found["weights"]}
            if not self.boundaries and schedule is not None and found["schedule"] is not None:
                for group, options in zip(own["param_groups"], found["options"], strict=True):
                    group.update(options)
                schedule.load_state_dict(found["schedule"])
            optimizer.load_state_dict(own)
        self._live = optimizer, schedule

    def state(self, learner: LearnerLike) -> State:
        """Return what goes on, as plain data: the optimizer's state by the names of weights, and the schedule's."""
        if not self.on or self._live is None:
            return self._found
        optimizer, schedule = self._live
        return {
            "kind": type(optimizer).__name__,
            "weights": {n: dict(optimizer.state[p]) for n, p in _by_place(learner, optimizer) if p in optimizer.state},
            "options": [{key: g[key] for key in _MOVED if key in g} for g in optimizer.param_groups],
            "schedule": None if schedule is None else schedule.state_dict(),
        }

    def load(self, state: State) -> None:
        """Take what `state` returned, of a checkpoint."""
        self._live, self._found = None, state


def _by_place(learner: LearnerLike, optimizer: Optimizer) -> list[tuple[str, Any]]:
    """Return the weights of an optimizer by name, in its order."""
    names = {id(p): name for name, p in learner.named_parameters()}
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return [(names.get(id(p), f"weight {i}"), p) for i, p in enumerate(weights)]  # some may not be the learner's
