"""Losses that draw vectors together and others apart: of examples with their labels, and of classes in two views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_contrastive(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    r"""Return the loss of Khosla et al. 2020, equation 2, for unit vectors (N, D) with labels (N,), a scalar.

    With P(i) the other vectors with the label of i, and A(i) all but i:

    .. math:: L = \frac{1}{N} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \in A(i)} \exp(z_i \cdot z_a / \tau)}

    A vector whose label no other has adds 0.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> round(float(supervised_contrastive(z, torch.tensor([0, 0, 1, 1]), 0.5)), 4)
        0.5276
    """
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (y[:, None] == y) & ~itself
    return -((log_p * positive).sum(1) / positive.sum(1).clamp_min(1)).mean()


def prototype_contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return L_OPE of the classes' mean projections in two views, (K, d) each; 0 for one class.

    Example:
        >>> round(float(prototype_contrast(torch.eye(2), torch.eye(2), 0.5)), 6)
        0.239545
    """
    p = F.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(p), dtype=torch.bool, device=p.device)
    same_class = torch.arange(len(p), device=p.device).roll(len(first))
    return F.cross_entropy((p @ p.T / temperature).masked_fill(itself, -torch.inf), same_class)
