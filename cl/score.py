"""Entries of R from the predictions on all tasks' test sets: counts where they do, else the predictions themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cl.metrics.calibration import ece_from_bins
from cl.strategy import Batch
from cl.target import Target
from cl.task import Stream
from cl.transfer import TransferMatrix

Mask = Callable[[Tensor, Tensor, str], Tensor]
_BINS = 15  # intervals of confidence, as in Guo et al. 2017


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


def calibrations(stream: Stream) -> nn.ModuleDict:
    """Return the matrices of expected calibration errors, one for each R of labels; lower is better.

    Example:
        >>> from cl.testing import toy_stream
        >>> calibrations(toy_stream())["task"].metric
        'ece'
    """
    masks = list(matrices(stream)) if stream.target.name == "label" else []
    return nn.ModuleDict({mask: TransferMatrix(len(stream), mask, "ece") for mask in masks})


def start(target: Target, keys: Sequence[str], mask: Mask, membership: Tensor) -> Accuracy | Collected:
    """Return the empty scores of a row of R."""
    if target.name == "label":
        return Accuracy(len(membership), keys, mask, membership.device)
    return Collected(target, keys, membership)


class Accuracy:
    """Counts the right answers of each task under every mask, by confidence; nothing waits for the device.

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
        # of each task and interval of confidence: rows, right answers, sum of confidences
        self._counts = {name: torch.zeros(num_tasks * _BINS, 3, device=device) for name in masks}

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch."""
        for name, counts in self._counts.items():
            masked = self._mask(logits, batch.task, name)
            guess = masked.argmax(1)
            confidence = (masked.gather(1, guess[:, None])[:, 0] - masked.logsumexp(1)).exp().float()
            interval = (confidence * _BINS).ceil_().sub_(1).nan_to_num_().clamp_(0, _BINS - 1).long()
            columns = torch.ones_like(confidence), (guess == batch.y).to(confidence), confidence
            counts.index_add_(0, batch.task * _BINS + interval, torch.stack(columns, 1))

    def rows(self) -> dict[str, Tensor]:
        """Return a row of R (T,) by mask; a task without test rows divides 0 by 0 and is NaN."""
        tasks = {name: counts.view(-1, _BINS, 3).sum(1) for name, counts in self._counts.items()}
        return {name: sums[:, 1] / sums[:, 0] for name, sums in tasks.items()}

    def errors(self) -> dict[str, Tensor]:
        """Return the expected calibration error of each task (T,) by mask."""
        return {
            name: ece_from_bins(*counts.view(-1, _BINS, 3)[..., [0, 2, 1]].unbind(-1))
            for name, counts in self._counts.items()
        }


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

    def errors(self) -> dict[str, Tensor]:
        """Return nothing: other targets than labels have no confidence."""
        return {}
