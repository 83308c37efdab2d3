"""What each candidate is worth to a nearest-neighbour classifier: its Shapley value, exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cl.random import Random
from cl.toolkit.memory import Rows


def knn_shapley(features: Tensor, y: Tensor, candidates: Tensor, labels: Tensor, k: int) -> Tensor:
    r"""Return the Shapley value of each candidate for the classification of each example by k neighbours, (n, m).

    The worth of a set of candidates for an example is the number of its k nearest ones with the example's label, over
    k. With the candidates in order of their distance, :math:`\alpha_1, ..., \alpha_m`, and :math:`a_j` = 1 if
    :math:`\alpha_j` has the example's label (Jia et al. 2019, theorem 1):

    .. math:: s(\alpha_m) = a_m \frac{\min(k, m)}{k m}, \qquad
              s(\alpha_j) = s(\alpha_{j+1}) + \frac{a_j - a_{j+1}}{k} \frac{\min(k, j)}{j}

    Args:
        features: Features of the examples, (n, D).
        y: Their labels, (n,).
        candidates: Features of the candidates, (m, D).
        labels: Their labels, (m,).
        k: Number of neighbours.

    Example:
        >>> x, y = torch.tensor([[0.0]]), torch.tensor([1])
        >>> knn_shapley(x, y, torch.tensor([[2.0], [1.0]]), torch.tensor([1, 0]), k=1)
        tensor([[ 0.5000, -0.5000]])
    """
    order = torch.cdist(features, candidates).argsort(dim=1, stable=True)
    same = (labels[order] == y[:, None]).to(features)
    rank = torch.arange(1, len(labels) + 1, device=y.device)
    factor = rank.clamp(max=k) / (k * rank)
    steps = (same - torch.cat([same[:, 1:], torch.zeros_like(same[:, :1])], dim=1)) * factor
    return torch.empty_like(steps).scatter_(1, order, steps.flip(1).cumsum(1).flip(1))


def some_of_each(labels: np.ndarray, size: int, random: Random, without: Rows | None = None) -> Rows:
    """Return random positions of up to `size` examples of each class, except given ones.

    Example:
        >>> found = some_of_each(np.array([0, 0, 0, 1]), 2, Random())
        >>> sorted(np.array([0, 0, 0, 1])[found].tolist())
        [0, 0, 1]
    """
    order = random.generator.permutation(len(labels))
    if without is not None:
        order = order[~np.isin(order, without)]
    parts = [order[labels[order] == c][:size] for c in np.unique(labels)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
