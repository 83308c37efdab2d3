"""The rows of a linear head as vectors that represent their classes, and the angles between them and features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


def check_proxies(learner: LearnerLike, name: str) -> None:
    """Refuse a head that does not have one row of weights for each class.

    Args:
        learner: With the head.
        name: The name of the method in messages.

    Raises:
        InputError: Naming the method and the head.
    """
    weight, shape = getattr(learner.head, "weight", None), (learner.num_classes, learner.backbone.num_features)
    if not isinstance(weight, Tensor) or weight.shape != shape:
        raise InputError(
            f"{name} compares features with one row of weights for each class, and the head "
            f"{type(learner.head).__name__} has no weight of shape {shape}: use head=linear."
        )


def proxies(learner: LearnerLike) -> Tensor:
    """Return the weight of the head, (C, D), one row for each class; its bias is not used.

    Example:
        >>> from cl.testing import toy_learner
        >>> proxies(toy_learner(num_tasks=2)[0]).shape
        torch.Size([4, 16])
    """
    weight = learner.head.weight
    assert isinstance(weight, Tensor)
    return weight


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    r"""Return :math:`s \cos\theta_c`, the scaled cosines of features (B, D) and the rows of a weight (C, D), (B, C).

    A vector shorter than 1e-6 is divided by 1e-6 instead of by its length.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> [round(float(value), 4) for value in cosine_logits(torch.tensor([[3.0, 4.0]]), weight, 10.0)[0]]
        [8.0, 6.0]
    """
    return scale * F.linear(F.normalize(features, dim=1, eps=1e-6), F.normalize(weight, dim=1, eps=1e-6))


def proxy_contrast(logits: Tensor, y: Tensor) -> Tensor:
    r"""Return the proxy-based contrastive loss of a batch (Lin et al. 2023, "PCR"), a scalar.

    Let :math:`s_{ic}` be the scaled cosine of example i and the weight of class c. The example is contrasted with the
    classes of all examples of the batch, itself included; P(i) are those of the label of i:

    .. math:: L = \frac{1}{N} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp s_{i y_p}}{\sum_j \exp s_{i y_j}}

    With :math:`n_c` examples of class c this is a cross-entropy over the classes in the batch, of the logits
    :math:`s_{ic} + \log n_c`, plus :math:`\log n_{y_i}`. So it is computed in O(N C) operations instead of O(N^2).

    Args:
        logits: Scaled cosines (N, C).
        y: Labels (N,).

    Example:
        >>> import torch
        >>> logits = cosine_logits(torch.eye(2)[[0, 1, 0]], torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 2.0)
        >>> round(float(proxy_contrast(logits, torch.tensor([0, 1, 0]))), 4)
        0.7103
    """
    counts = F.one_hot(y, logits.shape[1]).sum(0).to(logits.dtype)
    return F.cross_entropy(logits + counts.log(), y) + counts[y].log().mean()
