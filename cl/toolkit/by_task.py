"""Run a batch with examples of several tasks, each under the weights of its own task."""

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
    """Refuse a stream whose tasks contain examples of several tasks, for a method that learns tasks one by one.

    Raises:
        InputError: If they do; names method and stream.
    """
    if learner.mixed:
        raise InputError(
            f"{name} learns tasks one by one, but in {stream.name!r} examples of several tasks come "
            "together: choose another stream, or another strategy."
        )


def run_by_task(
    learner: LearnerLike, module: nn.Module, inputs: Tensor, weights: Callable[[int], Mapping[str, Tensor]]
) -> Tensor:
    """Return the outputs of a module, for each example under the weights of its task; for `encode` and `classify`.

    Args:
        learner: The learner, which has the task labels of the examples.
        module: Backbone or head.
        inputs: The inputs of the module, (B, ...).
        weights: Maps the index of a task to the parameters that replace the module's own.
    """
    return rows_by_task(learner, inputs, lambda rows, task: functional_call(module, dict(weights(task)), (rows,)))


def rows_by_task(learner: LearnerLike, inputs: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the outputs of a function of examples of one task and that task's index, for examples of any tasks.

    Examples without a task label are taken as those of the present task. In training with a single strategy, which
    replays no others, all examples are of the present task; their labels are then not read, which would wait for the
    device.

    Args:
        learner: The learner, which has the task labels of the examples.
        inputs: The inputs, (B, ...).
        run: Maps examples (b, ...) and the index of their task to outputs (b, ...).
    """
    labels = learner.task_labels
    alone = learner.backbone.training and learner.told is None and len(learner.strategies) == 1 and not learner.mixed
    if labels is None or alone:
        return run(inputs, learner.task_index)
    tasks = labels.unique().tolist()
    rows = [(labels == task).nonzero().flatten() for task in tasks]
    parts = [run(inputs[some], task) for task, some in zip(tasks, rows, strict=True)]
    return torch.cat(parts)[torch.cat(rows).argsort()]
