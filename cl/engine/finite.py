"""Weights that are numbers: what a checkpoint of a finished task keeps must be worth going on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cl.errors import DivergenceError

if TYPE_CHECKING:
    from cl.engine.learner import Learner


def check_finite(learner: Learner) -> None:
    """Refuse weights that the last step of a task made NaN or infinite, which no loss has shown yet.

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
