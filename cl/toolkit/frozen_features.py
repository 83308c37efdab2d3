"""What methods on the features of a frozen backbone share: to freeze it, and to read a task's features once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl.engine.loader import EvalLoader
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Task
    from cl.engine.strategy import LearnerLike, Strategy


def freeze_trunk(learner: LearnerLike, strategy: Strategy) -> int:
    """Freeze backbone and head, so that nothing is trained, and return the width of the features, D.

    Args:
        learner: The learner.
        strategy: The strategy that reads the backbone's features.

    Raises:
        InputError: If another strategy implements `encode`, whose features this one would ignore.

    Example:
        >>> from cl.engine.strategy import Strategy
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner()
        >>> freeze_trunk(learner, Strategy()), any(p.requires_grad for p in learner.parameters())
        (16, False)
    """
    if learner.strategies.owned("encode"):
        name = type(strategy).__name__
        raise InputError(f"{name} reads the backbone's features, but another strategy owns encode: drop one of them.")
    learner.trunk().requires_grad_(False).eval()
    return int(learner.backbone.num_features)  # type: ignore[arg-type]


@torch.no_grad()
def training_features(learner: LearnerLike, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features (B, D) and labels (B,) of a task's training examples, in order, in minibatches.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner(eval_batch_size=40)
        >>> [tuple(features.shape) for features, _ in training_features(learner, stream[0])]
        [(40, 16), (8, 16)]
    """
    with learner.evaluating():
        for batch in EvalLoader([task.train], learner.device, learner.eval_batch_size):
            yield learner.backbone(learner.prepare(batch.x)), batch.y
