"""What methods on the features of a backbone share: to freeze it, to read a task's features once, and class means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones.blocks import freeze
from cl.engine.loader import EvalLoader
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Task
    from cl.engine.strategy import LearnerLike, Strategy


def feature_width(learner: LearnerLike, strategy: Strategy) -> int:
    """Return the width of the backbone's features, D, which a strategy reads.

    Args:
        learner: The learner.
        strategy: The strategy.

    Raises:
        InputError: If another strategy implements `encode`, whose features this one would ignore.

    Example:
        >>> from cl.engine.strategy import Strategy
        >>> from cl.testing import toy_learner
        >>> feature_width(toy_learner()[0], Strategy())
        16
    """
    if learner.strategies.owned("encode"):
        name = type(strategy).__name__
        raise InputError(f"{name} reads the backbone's features, but another strategy owns encode: drop one of them.")
    return int(learner.backbone.num_features)  # type: ignore[arg-type]


def freeze_trunk(learner: LearnerLike, strategy: Strategy) -> int:
    """Freeze backbone and head, so that nothing is trained, and return the width of the features; see `feature_width`.

    Example:
        >>> from cl.engine.strategy import Strategy
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner()
        >>> freeze_trunk(learner, Strategy()), any(p.requires_grad for p in learner.parameters())
        (16, False)
    """
    width = feature_width(learner, strategy)
    freeze(learner.trunk())
    return width


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


def add_to_sums(total: Tensor, count: Tensor, features: Tensor, y: Tensor) -> None:
    """Add features (B, D) of labels (B,) to the sum (C, D) and the number (C, 1) of examples of their classes.

    Example:
        >>> total, count = torch.zeros(2, 1), torch.zeros(2, 1)
        >>> add_to_sums(total, count, torch.tensor([[3.0], [4.0]]), torch.tensor([1, 1]))
        >>> total.tolist(), count.tolist()
        ([[0.0], [7.0]], [[0.0], [2.0]])
    """
    total.index_add_(0, y, features.to(total.dtype))
    count[:, 0] += torch.bincount(y, minlength=len(count))


def cosine_to_means(features: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return the cosines (B, C) of features (B, D) to class means, given by `add_to_sums`; -1 to a class without one.

    Example:
        >>> total, count = torch.tensor([[0.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0], [0.0]])
        >>> cosine_to_means(torch.tensor([[0.0, 2.0]]), total, count)
        tensor([[ 1., -1.]])
    """
    means = F.normalize(total, dim=1)  # scaled to length 1, the sum equals the mean
    cosine = F.normalize(features.to(means.dtype), dim=1) @ means.T
    return torch.where(count.T > 0, cosine, -1.0)
