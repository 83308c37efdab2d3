"""Rows of R from the predictions on the tasks' test sets: from counts for labels, else from all predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cl.data.target import Target
from cl.data.task import Stream
from cl.distributed import gathered, total
from cl.engine.batch import Batch
from cl.metrics.calibration import ece_from_bins
from cl.metrics.transfer import TransferMatrix

Mask = Callable[[Tensor, Tensor, str], Tensor]
_BINS = 15  # intervals of confidence, as in Guo et al. 2017


def matrices(stream: Stream) -> nn.ModuleDict:
    """Return the transfer matrices of a stream: for labels one R per mask, for other targets one per metric.

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
    """Return the matrices of expected calibration errors, one for each R; none unless targets are labels.

    Example:
        >>> from cl.testing import toy_stream
        >>> calibrations(toy_stream())["task"].metric
        'ece'
    """
    masks = list(matrices(stream)) if stream.target.name == "label" else []
    return nn.ModuleDict({mask: TransferMatrix(len(stream), mask, "ece") for mask in masks})


def start(target: Target, keys: Sequence[str], mask: Mask, membership: Tensor) -> Accuracy | Collected:
    """Return an object that scores a row of R from batches of predictions.

    Args:
        target: The kind of the targets.
        keys: The keys of `matrices`.
        mask: (logits, task labels, name of the mask) to masked logits.
        membership: Classes of each task, bool (T, C).
    """
    if target.name == "label":
        return Accuracy(len(membership), keys, mask, membership.device)
    return Collected(target, keys, membership)


class Accuracy:
    """The accuracy and the calibration error of each task under every mask, without synchronising with the device.

    Several processes may each score a part (`cl.data.task.shard`): counts are summed, and all get the same rows.

    Args:
        num_tasks: T.
        masks: Names of the masks.
        mask: (logits, task labels, name of the mask) to masked logits.
        device: The device of the counts.

    Example:
        >>> score = Accuracy(2, ["domain"], lambda logits, task, name: logits, torch.device("cpu"))
        >>> y = torch.tensor([0, 1])
        >>> score.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), Batch(torch.zeros(2, 1), y, torch.zeros(2).long()))
        >>> score.rows()["domain"].tolist()
        [0.5, nan]
    """

    def __init__(self, num_tasks: int, masks: Sequence[str], mask: Mask, device: torch.device) -> None:
        self._mask, self._num_tasks, self._device = mask, num_tasks, device
        self._task: list[Tensor] = []
        self._right: dict[str, list[Tensor]] = {name: [] for name in masks}
        self._confidence: dict[str, list[Tensor]] = {name: [] for name in masks}

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Store whether each prediction is right, and its confidence; `rows` and `errors` count them."""
        self._task.append(batch.task)
        for name, right in self._right.items():
            masked = self._mask(logits, batch.task, name)
            right.append(masked.argmax(1) == batch.y)
            self._confidence[name].append(masked.softmax(1).amax(1).float())

    def rows(self) -> dict[str, Tensor]:
        """Return a row of R (T,) by mask; a task without scored examples is NaN, as 0 / 0."""
        task = torch.cat(self._task)
        rows = self._sum(task, torch.ones_like(task, dtype=torch.float32))
        return {name: self._sum(task, torch.cat(right).float()) / rows for name, right in self._right.items()}

    def errors(self) -> dict[str, Tensor]:
        """Return the expected calibration error of each task (T,) by mask."""
        task, found = torch.cat(self._task), {}
        for name, right in self._right.items():
            confidence = torch.cat(self._confidence[name])
            interval = (confidence * _BINS).ceil_().sub_(1).nan_to_num_().clamp_(0, _BINS - 1).long()
            columns = torch.stack([torch.ones_like(confidence), confidence, torch.cat(right).float()])
            found[name] = ece_from_bins(*(self._sum(task * _BINS + interval, c, _BINS) for c in columns))
        return found

    def _sum(self, slot: Tensor, values: Tensor, bins: int | None = None) -> Tensor:
        """Return the sums of values over all processes by task (T,), or by task and interval (T, bins)."""
        sums = total(torch.zeros(self._num_tasks * (bins or 1), device=self._device).index_add_(0, slot, values))
        return sums if bins is None else sums.view(-1, bins)


class Collected:
    """Scores by metrics that are no means over examples, and so need all predictions of a task at once.

    Args:
        target: Gives the metrics.
        keys: The names under which the rows are returned, one for each metric.
        membership: Classes of each task, bool (T, C).

    Example:
        >>> from cl.data.target import TARGETS
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
        """Store the predictions of a batch."""
        self._kept.append((logits, batch.y, batch.task))

    def rows(self) -> dict[str, Tensor]:
        """Return a row of R (T,) by key."""
        logits, y, task = gathered([torch.cat(column) for column in zip(*self._kept, strict=True)])
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
