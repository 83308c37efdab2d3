"""Joint training: one training on the union of all tasks, in place of the first; the upper bound of every table.

With E epochs per task, the union is passed over E times while the first task is trained; the later tasks train nothing.
So all rows of R but row 0 are equal, and forward transfer has no meaning. All classes compete from the start.
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
        """Collect the training data of all tasks, as views."""
        self._parts = [task.train for task in stream]

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the union of all tasks in the first task, and no examples afterwards."""
        return TaskData.concat(self._parts) if task.index == 0 else task.train.take(task.train.labels[:0])
