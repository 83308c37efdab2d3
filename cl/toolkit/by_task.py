"""Rows of several tasks in one batch, each under the weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream
    from cl.engine.strategy import LearnerLike


def check_apart(name: str, learner: LearnerLike, stream: Stream) -> None:
    """Refuse a stream in which examples of several tasks come together, where each task is learned in its turn.

    Raises:
        InputError: Naming method and stream.
    """
    if learner.mixed:
        raise InputError(
            f"{name} learns something for each task in its turn, but in {stream.name!r} examples of several tasks come "
            "together: choose another stream, or another strategy."
        )


def run_by_task(
    learner: LearnerLike, module: nn.Module, inputs: Tensor, weights: Callable[[int], Mapping[str, Tensor]]
) -> Tensor:
    """Return what each row (B, ...) gets from a module with the weights of its task; for `encode` and `classify`.

    Args:
        learner: Knows the labels.
        module: Backbone or head.
        inputs: Its inputs (B, ...).
        weights: Index of a task to parameters in place of the module's own.
    """
    return rows_by_task(learner, inputs, lambda rows, task: functional_call(module, dict(weights(task)), (rows,)))


def rows_by_task(learner: LearnerLike, inputs: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return what each row (B, ...) gets from a function of rows of one task and the task's index.

    Rows without a label are of the present task. So are, in training, those of a strategy that is alone, where nobody
    replays others: there the device is not waited for.
    """
    labels = learner.task_labels
    alone = learner.backbone.training and learner.told is None and len(learner.strategies) == 1 and not learner.mixed
    if labels is None or alone:
        return run(inputs, learner.task_index)
    tasks = labels.unique().tolist()
    rows = [(labels == task).nonzero().flatten() for task in tasks]
    parts = [run(inputs[some], task) for task, some in zip(tasks, rows, strict=True)]
    return torch.cat(parts)[torch.cat(rows).argsort()]
