r"""Scaled Gradient Projection (Saha and Roy 2023, algorithm 1).

As GPM, but a direction :math:`b_i` of old inputs is closed only as far as it was important. After each task the basis M
takes new directions by GPM's criterion, and each direction's part of the task's representation R,
:math:`\sigma_i = \lVert b_i^\top R \rVert`, gives an importance (equation 2; the largest is 1):

.. math:: \lambda_i = \frac{(\alpha + 1) \sigma_i}{\alpha \sigma_i + \max_j \sigma_j}

New directions keep theirs, those of before add it to what they have, up to 1 (equations 4-6). Later gradients are

.. math:: \nabla_W L \leftarrow \nabla_W L - (\nabla_W L) M \operatorname{diag}(\lambda) M^\top

Differences from the paper: those of GPM: biases and norms get no gradient after the first task, and the head is
projected too unless task labels give each task outputs of its own. :math:`\sigma_i` is written as a norm; the paper's
:math:`\sum_k (b_i^\top u_k)^2 s_k^2` over the singular vectors of :math:`M M^\top R` is its square.
Differences from the reference code: it takes one vector fewer at the first task than the criterion says, and its
representation is of batches in training mode. Its learning rate is five times that of GPM.
State: a layer with d inputs has M (d, d), its first r columns used, and :math:`\lambda` (d,).
Scenarios: all. Refused: as GPM, optimizers but plain SGD and running statistics of batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.subspace import (
    check_plain_sgd,
    check_statistics,
    join_basis,
    new_directions,
    one_each,
    protected_layers,
    sampled_inputs,
    silence_others,
)

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def importance(sigma: Tensor, scale: float) -> Tensor:
    """Return the importance of directions, in [0, 1], from their parts of a representation (r,), by the formula above.

    Args:
        sigma: Norms of the representation along each direction.
        scale: alpha; 0 is in proportion to them, and what is large brings all near 1, which is GPM.

    Example:
        >>> [round(float(value), 4) for value in importance(torch.tensor([3.0, 2.0, 1.0]), 10)]
        [1.0, 0.9565, 0.8462]
    """
    return (scale + 1) * sigma / (scale * sigma + sigma.max()).clamp_min(torch.finfo(sigma.dtype).tiny)


class SGP(Strategy):
    """Scales gradients down along the directions of earlier tasks' inputs, by their importance.

    Args:
        threshold: epsilon, one for all layers or one a layer.
        increment: Added to it after each task.
        scale: alpha.
        num_samples: Training examples that the representation is measured on.

    Raises:
        InputError: If the optimizer is not plain SGD, or batch norm keeps running statistics, which drift anyway.

    Example:
        >>> SGP(threshold=0.95)
        SGP(threshold=0.95)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries", "sgd")

    def __init__(
        self,
        threshold: Annotated[float, Interval(ge=0, le=1)] | Sequence[Annotated[float, Interval(ge=0, le=1)]] = 0.97,
        increment: Annotated[float, Interval(ge=0, le=1)] = 0.003,
        scale: Annotated[float, Ge(0)] = 10.0,
        num_samples: Annotated[int, Ge(1)] = 125,
    ) -> None:
        super().__init__()
        self.threshold, self.increment, self.scale, self.num_samples = threshold, increment, scale, num_samples

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate a basis and importances for each layer; refuse what leaves the protected space."""
        check_plain_sgd(learner, "SGP")
        check_statistics(learner, "SGP")
        self.random = Random()
        layers = protected_layers(learner)
        self._thresholds = one_each("sgp.threshold", self.threshold, len(layers))
        for i, layer in enumerate(layers):
            size = layer.weight[0].numel()
            self.register_buffer(f"basis_{i}", torch.zeros(size, size))
            self.register_buffer(f"importance_{i}", torch.zeros(size))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Multiply the projectors out."""
        indices = range(len(self._thresholds))
        pairs = [(self.get_buffer(f"basis_{i}"), self.get_buffer(f"importance_{i}")) for i in indices]
        self._projectors = [(M * weight) @ M.T for M, weight in pairs]

    def project_gradients(self, learner: LearnerLike) -> None:
        """Scale each layer's gradient down; silence everything else that old tasks rest on."""
        if learner.tasks_learned == 0:
            return
        layers = protected_layers(learner)
        for layer, projector in zip(layers, self._projectors, strict=True):
            if layer.weight.grad is not None:
                g = layer.weight.grad
                g -= (g.flatten(1) @ projector).view_as(g)
        silence_others(learner, layers)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the main directions of this task's inputs to each layer's basis, and weigh all of them anew."""
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            M, weight = self.get_buffer(f"basis_{i}"), self.get_buffer(f"importance_{i}")
            threshold = min(self._thresholds[i] + self.increment * task.index, 1.0)
            join_basis(M, new_directions(R, M @ M.T, threshold))
            added = importance((M.T @ R).norm(dim=1), self.scale)
            weight.copy_((weight + added).clamp_max(1))
