"""Entries of R from the predictions on all tasks' test sets: counts where they do, else the predictions themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cl.strategy import Batch
from cl.target import Target
from cl.task import Stream
from cl.transfer import TransferMatrix

Mask = Callable[[Tensor, Tensor, str], Tensor]


def matrices(stream: Stream) -> nn.ModuleDict:
    """Return the R that a stream is scored by: labels under every mask, other targets by every metric.

    Example:
        >>> from cl.testing import toy_stream
        >>> list(matrices(toy_stream()))
        ['class', 'task']
    """
    scenario, (first, *others) = stream.scenario, stream.target.metrics
    scored: dict[str, tuple[str, str]] = {scenario: (scenario, first)} | {
        f"{scenario}_{metric}": (scenario, metric) for metric in others
    }
    if stream.target.name == "label" and scenario != "domain":
        other = "task" if scenario == "class" else "class"
        scored[other] = (other, first)
    return nn.ModuleDict({key: TransferMatrix(len(stream), *pair) for key, pair in scored.items()})


def start(target: Target, keys: Sequence[str], mask: Mask, membership: Tensor) -> Accuracy | Collected:
    """Return the empty scores of a row of R."""
    if target.name == "label":
        return Accuracy(len(membership), keys, mask, membership.device)
    return Collected(target, keys, membership)


class Accuracy:
    """Counts the right answers of each task under every mask; nothing waits for the device.

    Args:
        num_tasks: T.
        masks: Names of the masks that are scored.
        mask: (logits, task labels, name) to masked logits.
        device: Where the counts lie.

    Example:
        >>> score = Accuracy(2, ["domain"], lambda logits, task, name: logits, torch.device("cpu"))
        >>> y = torch.tensor([0, 1])
        >>> score.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), Batch(torch.zeros(2, 1), y, torch.zeros(2).long()))
        >>> score.rows()["domain"].tolist()
        [0.5, nan]
    """

    def __init__(self, num_tasks: int, masks: Sequence[str], mask: Mask, device: torch.device) -> None:
        self._mask = mask
        self._correct = {name: torch.zeros(num_tasks, device=device) for name in masks}
        self._total = torch.zeros(num_tasks, device=device)

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch."""
        self._total.index_add_(0, batch.task, torch.ones_like(batch.task, dtype=self._total.dtype))
        for name, correct in self._correct.items():
            right = self._mask(logits, batch.task, name).argmax(1) == batch.y
            correct.index_add_(0, batch.task, right.to(correct.dtype))

    def rows(self) -> dict[str, Tensor]:
        """Return a row of R (T,) by mask; a task without test rows divides 0 by 0 and is NaN."""
        return {name: correct / self._total for name, correct in self._correct.items()}


class Collected:
    """Keeps the predictions, for metrics that are no means over rows.

    Args:
        target: Tells the metrics.
        keys: Under which names their rows are returned.
        membership: Classes of each task, bool (T, C).

    Example:
        >>> from cl.target import TARGETS
        >>> score = Collected(TARGETS["regression"], ["domain"], torch.ones(2, 1, dtype=torch.bool))
        >>> y = torch.tensor([[0.0], [2.0]])
        >>> score.update(y, Batch(y, y, torch.tensor([1, 1])))
        >>> score.rows()["domain"].tolist()
        [nan, 1.0]
    """

    def __init__(self, target: Target, keys: Sequence[str], membership: Tensor) -> None:
        self._target, self._keys, self._membership = target, keys, membership
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Keep a batch."""
        self._kept.append((logits, batch.y, batch.task))

    def rows(self) -> dict[str, Tensor]:
        """Return a row of R (T,) by key."""
        logits, y, task = (torch.cat(column) for column in zip(*self._kept, strict=True))
        found = {key: torch.full((len(self._membership),), torch.nan, device=y.device) for key in self._keys}
        for t in torch.unique(task).tolist():
            own = task == t
            scores = self._target.scores(logits[own], y[own], self._membership[t].nonzero().flatten())
            for key, metric in zip(self._keys, self._target.metrics, strict=True):
                found[key][t] = scores[metric]
        return found
