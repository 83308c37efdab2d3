"""Probes of the features, independent of the head: classifiers on the frozen backbone after each task, and CKA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl.data.task import Stream
from cl.engine.instrument import Instrument, features, own_examples, subset, watching
from cl.engine.learner import Learner
from cl.errors import InputError, unknown
from cl.metrics.features import knn_probe, linear_cka, ridge_probe
from cl.metrics.transfer import TransferMatrix

PROBES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None] = {
    "ridge": ridge_probe,
    "knn": knn_probe,
    "cka": None,
}


class Probes(Instrument):
    """Measures a matrix P (T + 1, T) for each probe, beside R.

    `ridge` and `knn`: P[i, j] is the test accuracy on task j, among its classes, of a probe that is fitted to the
    features of task j's training examples under the backbone after i tasks (Davari et al. 2022; Bornschein et al.
    2022). A fall below the diagonal is what the representation has lost; a rise above it, what it has gained for a task
    to come. `cka`: linear CKA (Kornblith et al. 2019, debiased) between the features of task j's test examples after i
    tasks and right after task j was learned, for i >= j: 1 on the diagonal, less as the representation drifts.

    Args:
        stream: The stream to learn.
        kinds: Of `ridge`, `knn`, `cka`.
        rows: The most training and test examples of each task to use, the same in every run.

    Raises:
        InputError: If a probe is unknown, or the targets are no labels.

    Example:
        >>> from cl.testing import toy_stream
        >>> list(Probes(toy_stream(), ["ridge"]).matrices)
        ['ridge']
    """

    def __init__(self, stream: Stream, kinds: Sequence[str], rows: int = 1000) -> None:
        super().__init__()
        others = [kind for kind in kinds if kind not in PROBES]
        if others:
            raise unknown("probe", others[0], PROBES)
        if stream.target.name != "label":
            raise InputError(f"probes={list(kinds)} classify, and {stream.name!r} has no labels: leave them out.")
        metric = {"cka": "cka"}
        self.matrices = nn.ModuleDict(
            {kind: TransferMatrix(len(stream), kind, metric.get(kind, "accuracy")) for kind in dict.fromkeys(kinds)}
        )
        self._stream, self._rows = stream, rows
        self._learned: dict[int, Tensor] = {}  # for cka: features of a task's test examples right after it was learned

    def transfer_matrices(self) -> dict[str, TransferMatrix]:
        """Return the matrix P of each probe."""
        return dict(self.matrices.items())  # type: ignore[arg-type]

    def row(self, learner: Learner, after_task: int) -> None:
        """Measure row `after_task` of every P."""
        found = {kind: torch.full((len(self._stream),), torch.nan, device=learner.device) for kind in self.matrices}
        for task in self._stream:
            with watching(learner):
                test = subset(task.test, self._rows)
                test_x = features(learner, test)
                if any(PROBES[kind] for kind in found):
                    train = subset(own_examples(task), self._rows)
                    train_x = features(learner, train)
            for kind, row in found.items():
                fit = PROBES[kind]
                if fit is not None:
                    labels = train.labels.to(learner.device), test.labels.to(learner.device)
                    row[task.index] = fit(train_x, labels[0], test_x, labels[1])
                elif task.index < after_task:
                    row[task.index] = linear_cka(self._first(task.index, test_x), test_x, debiased=True)
        for kind, row in found.items():
            self.matrices[kind].record(after_task, row)  # type: ignore[operator]

    def _first(self, task: int, now: Tensor) -> Tensor:
        return self._learned.setdefault(task, now.cpu()).to(now.device)

    def get_extra_state(self) -> Any:
        """Return the features of each task right after it was learned."""
        return dict(self._learned)

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned."""
        self._learned = dict(state)
