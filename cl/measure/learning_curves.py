"""Evaluation inside tasks: the accuracy on every task so far at chosen steps, for curves and the stability gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from cl.data.task import Stream, Task, shard
from cl.engine.instrument import Instrument, Record, subset, watching
from cl.engine.learner import Learner
from cl.engine.loader import EvalLoader, evaluation
from cl.engine.score import start
from cl.errors import InputError
from cl.ranges import checked
from cl.rundir import LEARNING_CURVES, CurvePoint


@checked
class LearningCurves(Instrument):
    """Measures all tasks seen so far, the present one included, at step 0, at chosen steps, and after the task.

    Each test set is cut to a fixed subset, the same in every run (De Lange et al. 2023, section 4: 1,000 examples).
    Report the interval of the points together with min-ACC, which can only fall if there are more of them.

    Args:
        stream: The stream to learn.
        every: Steps between two points; give this or `points`.
        points: The number of points in a task after the one at step 0.
        rows: The most examples of each task's test set to use.

    Raises:
        InputError: If both or neither of every and points are given, or an argument is below 1.

    Attributes:
        at: For each evaluation, the task in training (from 1), the step in the task, and the step of the run.

    Example:
        >>> from cl.testing import toy_stream
        >>> curves = LearningCurves(toy_stream(), points=4)
        >>> curves.columns
        ('task', 'step', 'total_step', 'tested', 'mask', 'metric', 'value')
    """

    file = LEARNING_CURVES.stem
    columns = LEARNING_CURVES.columns

    def __init__(
        self,
        stream: Stream,
        every: Annotated[int, Ge(1)] | None = None,
        points: Annotated[int, Ge(1)] | None = None,
        rows: Annotated[int, Ge(1)] = 1000,
    ) -> None:
        super().__init__()
        if (every is None) == (points is None):
            raise InputError(f"report.every={every} and report.points={points}: give one of them.")
        self.every, self.points, self.rows = every, points, rows
        self._stream = stream
        self._loader: EvalLoader | None = None
        self._names: list[tuple[str, str]] = []
        self.at: list[tuple[int, int, int]] = []  # task, step, total step of each evaluation
        self._values: list[Tensor] = []  # (masks, T) each, on the device until somebody reads them

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the steps of the points: step 0, then at the interval; the last point is measured by `after_task`."""
        last = learner.num_steps
        if self.points is None:
            return range(0, last, self.every or 1)
        points = min(self.points, max(last, 1))  # more would be the same steps
        return sorted({round(i * last / points) for i in range(points)})

    def before_task(self, learner: Learner, task: Task) -> None:
        """Gather the subsets of the test sets of the tasks seen so far."""
        seen = self._stream[: task.index + 1]
        parts = [shard(subset(t.test, self.rows)) for t in seen]
        self._loader = evaluation(learner, parts)

    def look(self, learner: Learner) -> None:
        """Measure one point of every curve."""
        assert self._loader is not None
        self._names = [(m.mask, m.metric) for m in learner.matrices.values()]  # type: ignore[misc]
        score = start(learner.target, list(learner.matrices), learner.mask, learner.membership)
        with watching(learner):
            for batch in self._loader:
                score.update(learner.predict(batch), batch)
        self.at.append((learner.task_index + 1, learner.step, learner.total_steps))
        self._values.append(torch.stack(list(score.rows().values())))

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure the last point, after the strategies' `after_task`, and free the test sets."""
        if learner.step:
            self.look(learner)
        self._loader = None

    def values(self, mask: int = 0) -> Tensor:
        """Return the curves under the mask of an index: float32 (N, T), NaN for tasks not seen yet."""
        if not self._values:
            return torch.zeros(0, len(self._stream))
        return torch.stack([value[mask].cpu() for value in self._values])

    def own(self, mask: int = 0) -> list[list[float]]:
        """Return the curve of each task while it is trained, from step 0, under the mask of an index."""
        values = self.values(mask)
        own: list[list[float]] = [[] for _ in range(values.shape[1])]
        for n, (task, _, _) in enumerate(self.at):
            own[task - 1].append(float(values[n, task - 1]))
        return own

    def __len__(self) -> int:
        return len(self.at)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield one record for each mask and task seen so far, from evaluation number `start` on."""
        for at, values in zip(self.at[start:], self._values[start:], strict=True):
            for (mask, metric), row in zip(self._names, values.cpu().numpy(), strict=True):
                for tested, value in enumerate(row[: at[0]], start=1):
                    yield CurvePoint(*at, tested, mask, metric, value)

    def get_extra_state(self) -> Any:
        """Return the evaluations so far."""
        values = torch.stack([value.cpu() for value in self._values]) if self._values else torch.zeros(0)
        return {"at": list(self.at), "names": list(self._names), "values": values}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned."""
        self.at = [tuple(at) for at in state["at"]]
        self._names = [tuple(name) for name in state["names"]]
        self._values = list(state["values"])
