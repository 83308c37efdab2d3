"""Checks that losses and weights are finite: a run that diverges stops with a message and keeps its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl.errors import DivergenceError

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


def check_losses(learner: LearnerLike, losses: Tensor) -> None:
    """Stop the run if a loss of the last steps is NaN or infinite.

    Args:
        learner: Gives the task, epoch and step for the message.
        losses: The losses of the last n steps, (n,).

    Raises:
        DivergenceError: Naming the first such step.
    """
    if not bool(torch.isfinite(losses).all()):  # the only synchronisation with the device in a chunk
        first = int((~torch.isfinite(losses)).nonzero()[0])
        raise DivergenceError(
            f"The loss is {float(losses[first])} in task {learner.task_index + 1} of {learner.num_tasks}, epoch "
            f"{learner.current_epoch + 1}, step {learner.step - len(losses) + first + 1} of the task: lower the "
            "learning rate or the strategy's weight. The checkpoint of the last finished task is kept."
        )


def check_finite(learner: LearnerLike) -> None:
    """Stop the run if a trained weight is NaN or infinite after the last step of a task, which no later loss shows.

    Raises:
        DivergenceError: Naming the first such parameter.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner()
        >>> check_finite(learner)
        >>> _ = learner.head.weight.data.fill_(float("inf"))
        >>> check_finite(learner)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        cl.errors.DivergenceError: ...
    """
    trained = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    if not trained:
        return
    finite = torch.stack([torch.isfinite(p.detach()).all() for _, p in trained]).tolist()
    if not all(finite):
        raise DivergenceError(
            f"The weights of {trained[finite.index(False)][0]} are not finite after task {learner.task_index + 1} of "
            f"{learner.num_tasks}: lower the learning rate or the strategy's weight. The checkpoint of the last "
            "finished task before it is kept."
        )
