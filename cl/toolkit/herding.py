"""Herding, which chooses a few examples that represent a class, and prediction by the nearest class mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.data.task import TaskData
from cl.engine.loader import EvalLoader

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


def herding(features: Tensor, size: int) -> Tensor:
    r"""Choose examples whose mean feature is near that of all (Welling 2009; Rebuffi et al. 2017, algorithm 4).

    With the mean :math:`\mu` of all features, the k-th example is, among those not chosen yet,

    .. math:: p_k = \arg\min_x \left\lVert \mu - \frac1k \Big(\phi(x) + \sum_{i<k} \phi(p_i)\Big) \right\rVert

    Of examples that are as near up to rounding, as two alone always are, the first is chosen.

    Args:
        features: The features phi, (n, D).
        size: Number of examples to choose; at most n are chosen.

    Returns:
        Their positions in the order of choice, int64 (min(size, n),); the first m are those that size m would choose.

    Example:
        >>> herding(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.96, 0.28]]), 3).tolist()
        [2, 3, 1]
    """
    rounding, features = 16 * torch.finfo(features.dtype).eps, features.double()
    mean, squares = features.mean(0), features.square().sum(1)
    positions, ties = torch.arange(len(features), device=features.device), rounding * squares.mean()
    rest, chosen = torch.zeros_like(mean), []
    for _ in range(min(size, len(features))):
        rest = rest + mean  # k mu minus the features chosen so far; k times the norm above is |rest - phi(x)|
        gaps = squares - 2 * (features @ rest)
        best = positions.where(gaps <= gaps.min() + ties, len(features)).min().view(1)
        squares = squares.index_fill(0, best, torch.inf)
        rest = rest - features.index_select(0, best)[0]
        chosen.append(best)
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=features.device)


@torch.no_grad()
def unit_features(learner: LearnerLike, data: TaskData) -> Tensor:
    """Return the features of examples, normalised to length 1, (n, D); without augmentation, in evaluation mode."""
    with learner.evaluating():
        batches = EvalLoader([data], learner.device, learner.eval_batch_size)
        return torch.cat([F.normalize(learner.features(batch.x, batch.task).float(), dim=1) for batch in batches])


def class_means(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return the mean feature of each class, normalised to length 1, (C, D); zeros for a class without examples.

    Example:
        >>> class_means(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1]), 2)
        tensor([[0.0000, 0.0000],
                [0.7071, 0.7071]])
    """
    total = features.new_zeros(num_classes, features.shape[1]).index_add_(0, y, features)
    return F.normalize(total, dim=1)


def nearness(features: Tensor, means: Tensor) -> Tensor:
    """Return the negative squared distances (B, C) of features (B, D), normalised to length 1, from unit means (C, D).

    A class whose mean is zero gets -4, the largest distance of two unit vectors.

    Example:
        >>> nearness(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        tensor([[ 0., -2., -4.]])
    """
    cosine = F.normalize(features.to(means.dtype), dim=1) @ means.T
    return torch.where(means.any(1), 2 * cosine - 2, -4.0)
