"""Centres of features."""

from __future__ import annotations

import torch
from torch import Tensor


def centres(features: Tensor, number: int, seed: int) -> Tensor:
    """Return the centres that k-means finds, the best of ten attempts, float32 (number, D), on the host.

    Args:
        features: The features, (n, D). Of fewer than `number` each is a centre, and centres are repeated.
        number: The number of centres.
        seed: The seed of the first centres.

    Example:
        >>> found = centres(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2, seed=0)
        >>> sorted(found.flatten().tolist()), len(centres(torch.zeros(1, 1), 3, seed=0))
        ([0.5, 8.5], 3)
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    found = min(number, len(features))
    with threadpool_limits(1):  # several threads add in varying order, so that the last bits vary
        fitted = KMeans(found, n_init=10, random_state=seed).fit(features.float().cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_)[torch.arange(number) % found]
