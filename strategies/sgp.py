r"""Scaled Gradient Projection (Saha and Roy 2023, algorithm 1).

Like GPM, but a direction :math:`b_i` of old inputs is removed from the gradient only in proportion to its importance.
After each task the basis M is extended by GPM's criterion. The energy of each direction in the task's representation
R (columns: inputs of the layer) gives its importance in [0, 1] (equation 2), with
:math:`\sigma_i = \lVert b_i^\top R \rVert`; the largest is 1:

.. math:: \lambda_i = \frac{(\alpha + 1) \sigma_i}{\alpha \sigma_i + \max_j \sigma_j}

For a new direction this is its importance; for an older one it is added to the importance it has, up to 1
(equations 4-6). Later gradients are scaled down along the directions:

.. math:: \nabla_W L \leftarrow \nabla_W L - (\nabla_W L) M \operatorname{diag}(\lambda) M^\top

Defaults: alpha = 10, epsilon = 0.97, increased by 0.003 after each task, and 125 examples, as for CIFAR-100 in the
released code. Its learning rate there is five times that of GPM.
Differences from the paper: as for GPM, biases and norms get no gradient after the first task, and the head is
projected, too, unless task labels give each task outputs of its own. :math:`\sigma_i` is written as a norm: the paper's
:math:`\sum_k (b_i^\top u_k)^2 s_k^2` over the singular vectors of :math:`M M^\top R` is its square.
Differences from the reference code: at the first task the code takes one vector fewer than the criterion says, and its
representation is measured on batches in training mode.

State: for a layer with d inputs the basis M (d, d), of which r columns are used, and :math:`\lambda` (d,).
Scenarios: all. Refused, as in GPM: optimizers other than plain SGD, batch norm with running statistics.
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
    """Return the importance of each direction, (r,), in [0, 1] (equation 2).

    Args:
        sigma: Norm of the representation along each direction, (r,).
        scale: alpha. With 0 the importance is proportional to sigma; with a large alpha all are near 1, as in GPM.

    Example:
        >>> [round(float(value), 4) for value in importance(torch.tensor([3.0, 2.0, 1.0]), 10)]
        [1.0, 0.9565, 0.8462]
    """
    return (scale + 1) * sigma / (scale * sigma + sigma.max()).clamp_min(torch.finfo(sigma.dtype).tiny)


class SGP(Strategy):
    """Scales the gradient of each layer down along the directions of its old inputs, by their importance.

    Args:
        threshold: epsilon, the share of the inputs' energy that the basis covers; one for all layers or one per layer.
        increment: Added to the threshold after each task; the sum is at most 1.
        scale: alpha, which raises the importance of the less important directions.
        num_samples: Training examples of each task on which the representation is measured.

    Raises:
        InputError: If the optimizer is not plain SGD, or batch norm keeps running statistics.

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
        """Allocate basis and importance for each layer; refuse settings under which steps leave the protected space."""
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
        """Compute the matrices M diag(lambda) M^T, which do not change in the task."""
        indices = range(len(self._thresholds))
        pairs = [(self.get_buffer(f"basis_{i}"), self.get_buffer(f"importance_{i}")) for i in indices]
        self._projectors = [(M * weight) @ M.T for M, weight in pairs]

    def project_gradients(self, learner: LearnerLike) -> None:
        """Scale each layer's gradient down; remove that of the other protected parameters (biases, norms)."""
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
        """Extend each layer's basis by the main directions of its inputs, and update the importance of all."""
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            M, weight = self.get_buffer(f"basis_{i}"), self.get_buffer(f"importance_{i}")
            threshold = min(self._thresholds[i] + self.increment * task.index, 1.0)
            join_basis(M, new_directions(R, M @ M.T, threshold))
            added = importance((M.T @ R).norm(dim=1), self.scale)
            weight.copy_((weight + added).clamp_max(1))
