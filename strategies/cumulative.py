"""Cumulative training: at task t, train on the union of the tasks 1..t; the upper bound of the sequential protocol.

The training starts from the weights of task t-1 or, with `restart`, from the initial weights; the latter gives the
accuracies a*_k against which intransigence is measured (Chaudhry et al. 2018). The cost grows linearly with t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from cl.data.task import TaskData
from cl.engine.strategy import LearnerLike, Strategy

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class Cumulative(Strategy):
    """Trains on every task seen so far.

    Args:
        restart: Start each task from the initial weights instead of those of the last task.

    Example:
        >>> Cumulative(restart=True)
        Cumulative(restart=True)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    bound = "upper"

    def __init__(self, restart: bool = False) -> None:
        super().__init__()
        self.restart = restart

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Collect the training data of all tasks, as views; with `restart`, copy the initial weights."""
        from copy import deepcopy

        self._parts = [task.train for task in stream]
        self.initial: nn.Module | None = deepcopy(learner.trunk()).requires_grad_(False) if self.restart else None

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """With `restart`, return to the initial weights and a new optimizer."""
        if self.initial is not None:
            learner.trunk().load_state_dict(self.initial.state_dict())
            learner.forget_optimizer()

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the union of the tasks so far."""
        return TaskData.concat(self._parts[: task.index + 1])
