"""Forecasts of transfer: estimators of transferability, computed for each task before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl.data.task import Stream, Task
from cl.engine.instrument import Instrument, features, own_examples, subset, watching
from cl.engine.learner import Learner
from cl.errors import InputError, unknown
from cl.metrics.transferability import ESTIMATORS, covariance_similarity
from cl.rundir import ESTIMATES, Estimate

COVARIANCE = "covariance"


class Estimates(Instrument):
    """Scores the features of each task's training examples under the backbone that is about to learn it.

    `covariance` is the mean similarity of the task's feature covariance to those of the earlier tasks (Wu, Zhang & Re
    2020), all under the present backbone. The other estimators use the features and labels of the task alone; see
    `cl.metrics.transferability`.

    Args:
        stream: The stream to learn.
        kinds: Keys of `cl.metrics.transferability.ESTIMATORS`, or `covariance`.
        rows: The most training examples of a task to use, the same in every run.

    Raises:
        InputError: If an estimator is unknown, or the targets are no labels.

    Example:
        >>> from cl.testing import toy_stream
        >>> Estimates(toy_stream(), ["vci"]).columns
        ('task', 'estimator', 'value')
    """

    file = ESTIMATES.stem
    columns = ESTIMATES.columns

    def __init__(self, stream: Stream, kinds: Sequence[str], rows: int = 1000) -> None:
        super().__init__()
        names = (*ESTIMATORS, COVARIANCE)
        others = [kind for kind in kinds if kind not in names]
        if others:
            raise unknown("estimator", others[0], names)
        if stream.target.name != "label":
            raise InputError(f"estimators={list(kinds)} read labels, and {stream.name!r} has none: leave them out.")
        self._stream, self.kinds, self._rows = stream, list(dict.fromkeys(kinds)), rows

    def before_task(self, learner: Learner, task: Task) -> None:
        """Compute the estimators for the present task."""
        with watching(learner):
            Z, y = self._features(learner, task)
            earlier = [self._features(learner, t)[0] for t in self._stream[: task.index] if COVARIANCE in self.kinds]
        for kind in self.kinds:
            if kind == COVARIANCE:
                similar = [float(covariance_similarity(Z, other)) for other in earlier]
                value = sum(similar) / len(similar) if similar else float("nan")
            else:
                value = float(ESTIMATORS[kind].function(Z, y))
            self.add(Estimate(task.index + 1, kind, value))

    def _features(self, learner: Learner, task: Task) -> tuple[Tensor, Tensor]:
        data = subset(own_examples(task), self._rows)
        return features(learner, data).cpu().to(torch.float64), data.labels.cpu()

    def column(self, kind: str) -> list[float]:
        """Return the values of one estimator, with one entry per task; NaN for tasks to come."""
        found: dict[Any, float] = {task: value for task, name, value in self.records() if name == kind}  # type: ignore[misc]
        return [found.get(t + 1, float("nan")) for t in range(len(self._stream))]
