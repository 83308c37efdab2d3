"""Prequential accuracy: each example of the stream is predicted before the step that learns it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from cl.data.task import Stream, Task
from cl.distributed import total
from cl.engine.batch import Batch
from cl.engine.instrument import Instrument, watching
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.ranges import checked


@checked
class Prequential(Instrument):
    r"""Records the accuracy of the predictions of incoming examples before they are learned (test, then train).

    .. math:: A_n = \frac{1}{n} \sum_{k \le n} [\hat y_k = y_k], \quad \hat y_k = \arg\max f_{\theta_{k-1}}(x_k)

    with the weights :math:`\theta_{k-1}` before the step of example k, over the n examples so far (Gama et al. 2013,
    "On evaluating stream learning algorithms", section 3; "online accuracy" in Cai et al. 2021). In [0, 1]. It is
    measured in the first epoch of each task, where every example is new; the classes compete as they do at test. It is
    written to `prequential.csv` and, for the examples since the last record and for all so far, to the training curves.

    The predictions are the logits of the training step, which are there already: in training mode, on the augmented
    view, with batch norm over all examples of the step. If a strategy has a prediction of its own (`predict`), whose
    training logits may mean nothing, or with `evaluation=true`, the incoming examples are predicted as at test, in a
    further forward pass before the step.

    Args:
        every: Steps between two records.
        evaluation: Predict in evaluation mode, by a further forward pass.

    Raises:
        InputError: If the targets are no labels.

    Example:
        >>> import cl
        >>> from cl.testing import toy_stream
        >>> run = cl.run(toy_stream(2), [], epochs=1, instruments={"prequential": Prequential()}, progress=False)
        >>> [record[:4] for record in run.instruments["prequential"].records()]
        [(1, 5, 5, 48), (2, 5, 10, 48)]
    """

    file = "prequential"
    columns = ("task", "step", "total_step", "rows", "accuracy", "accuracy_in_task", "accuracy_so_far")
    right: Tensor

    def __init__(self, every: Annotated[int, Ge(1)] = 50, evaluation: bool = False) -> None:
        super().__init__()
        self.every, self.evaluation = every, evaluation
        self.register_buffer("right", torch.zeros((), dtype=torch.int64))  # since the last record, on the device
        self.rows = 0  # the examples since the last record
        self.in_task, self.so_far = [0, 0], [0, 0]  # right predictions and examples

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Refuse targets that are no labels; see whether the training logits are predictions."""
        if stream.target.name != "label":
            raise InputError(
                f"prequential counts right labels, and the targets of {stream.name!r} are {stream.target.name}: leave "
                "the instrument out."
            )
        self._apart = self.evaluation or learner.strategies.owned("predict")

    def begin(self, learner: Learner) -> None:
        """Begin to count the task."""
        self.in_task, self.rows = [0, 0], 0
        self.right.zero_()

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the steps of the first epoch at which a record is made."""
        last = learner.steps_per_epoch
        return [*range(self.every, last, self.every), last]

    def before_step(self, learner: Learner, batch: Batch) -> None:
        """Predict the incoming examples as at test."""
        if self._apart and learner.current_epoch == 0 and not batch.idle:
            with watching(learner):
                self._count(learner, batch, learner.predict(batch))

    def after_step(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        """Count the right predictions among the logits of the step."""
        if not self._apart and learner.current_epoch == 0 and learner.update_index == 0:
            self._count(learner, batch, logits)

    def _count(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        self.right += (learner.mask(logits, batch.task).argmax(1) == batch.y).sum()
        self.rows += len(batch)

    def look(self, learner: Learner) -> None:
        """Make a record of the steps since the last one."""
        right, rows = map(int, total(torch.stack([self.right, torch.full_like(self.right, self.rows)])))
        self.right.zero_()
        self.rows = 0
        if not rows:
            return
        for count in (self.in_task, self.so_far):
            count[0] += right
            count[1] += rows
        where = learner.task_index + 1, learner.step, learner.total_steps
        accuracies = (right / rows, self.in_task[0] / self.in_task[1], self.so_far[0] / self.so_far[1])
        self.add((*where, rows, *accuracies))
        learner.record("prequential/recent", accuracies[0])
        learner.record("prequential/so_far", accuracies[2])

    def after_task(self, learner: Learner, task: Task) -> None:
        """Make a record of the rest, of a task that was stopped inside its first epoch."""
        self.look(learner)

    def get_extra_state(self) -> Any:
        """Return the records and the counts on the host."""
        return {"records": super().get_extra_state(), "rows": self.rows, "in_task": self.in_task, "so_far": self.so_far}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned."""
        super().set_extra_state(state["records"])
        self.rows, self.in_task, self.so_far = state["rows"], list(state["in_task"]), list(state["so_far"])
