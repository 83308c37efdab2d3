"""Joint training: one training on the union of all tasks, before the first row of R; the upper bound of every table.

With E epochs a task, the union is passed over E times. All classes compete from the start, so all rows of R are alike
and forward transfer has no meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl.data.task import TaskData
from cl.engine.strategy import LearnerLike, Strategy

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class Joint(Strategy):
    """Trains on every task's data in the first task, and on nothing afterwards.

    Example:
        >>> from cl.testing import toy_run
        >>> R = toy_run(Joint()).matrices["class"].R
        >>> bool((R[1] == R[-1]).all())
        True
    """

    targets = ("label", "multilabel", "regression")
    bound = "upper"

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Keep the union as views until it is needed."""
        self._parts = [task.train for task in stream]

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the union, once."""
        return TaskData.concat(self._parts) if task.index == 0 else task.train.take(task.train.labels[:0])
