r"""Memory Aware Synapses (Aljundi et al. 2018, equations 1-5).

A weight is as important as the network's outputs are sensitive to it, whatever the labels. After each task, over its
examples,

.. math:: \Omega_i \leftarrow \Omega_i + \frac1N \sum_{n=1}^N
          \Big| \frac{\partial \lVert F(x_n; \theta) \rVert_2^2}{\partial \theta_i} \Big| \tag{2, 3}

and later tasks are held near the weights :math:`\theta^*` that the last one ended with:

.. math:: L(\theta) = L_t(\theta) + \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2 \tag{4}

State: two vectors of the weights' size. Scenarios: all, but without exemplars see the remark in the class-incremental
one. F are the outputs that compete in training: those of the task, of all classes seen, or all.

Differences from the paper: lambda is 0.1 by default, not 1, at which learning rates above about 0.02 diverge; its local
version, by the correlation of the units of each layer (equation 5), is left out; it could measure on any unlabelled
data, and here measures on the task's own.
Differences from the reference code: it takes the absolute value of the summed gradient of a batch, in which the signs
of examples cancel; here each example counts by itself, as in equation 3. Avalanche does as the code does, and averages
Omega over tasks by a moving mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.fisher import check_single, gradient_sum, sampled_inputs
from cl.toolkit.memory import remark_without
from cl.toolkit.weights import check_encode, check_held, flat, held

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def sensitivity(module: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Return the mean absolute gradient of the squared norm of outputs by each weight, as one vector.

    Args:
        module: Inputs (B, ...) to outputs (B, C).
        x: Inputs (n, ...).
        classes: The outputs that count, (K,), or which of all count for each row, bool (n, C).

    Example:
        >>> w = nn.Linear(1, 1, bias=False)
        >>> _ = w.weight.data.fill_(1.5)
        >>> sensitivity(w, torch.tensor([[1.0], [-2.0]]), torch.tensor([0]))  # 3 x^2
        tensor([7.5000])
    """
    if classes.dtype != torch.bool:
        classes = torch.zeros(len(x), int(classes.max()) + 1, dtype=torch.bool, device=x.device).index_fill(
            1, classes, True
        )

    def energy(outputs: Tensor, among: Tensor) -> Tensor:
        return (outputs[:, : len(among)].float().square() * among).sum()

    rows = torch.arange(len(x), device=x.device)[:, None]
    weights = torch.full((len(x),), 1 / len(x), device=x.device)
    return gradient_sum(module, energy, torch.abs, x, rows, weights, classes)


class MAS(Strategy):
    """Holds each weight as firmly as the outputs are sensitive to it.

    Args:
        weight: lambda; there is no factor 1/2.
        num_samples: Training examples that the sensitivity is measured on; None means all.

    Raises:
        InputError: If another strategy owns `encode`, nothing is trainable, or there is batch norm of batches alone,
            which single examples cannot pass.

    Example:
        >>> MAS(weight=1.0)
        MAS(weight=1.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    importance: Tensor
    anchor: Tensor

    def __init__(self, weight: Annotated[float, Ge(0)] = 0.1, num_samples: Annotated[int, Ge(1)] | None = 1000) -> None:
        super().__init__()
        self.weight, self.num_samples = weight, num_samples

    def remark(self, learner: LearnerLike) -> str | None:
        """Say so where the method cannot work."""
        return remark_without("MAS", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate Omega and the anchor as vectors."""
        check_encode("MAS", learner)
        check_single("MAS", learner, "use a backbone without batch norm, or whose batch norm keeps statistics")
        size = sum(p.numel() for p in held(learner))
        self.register_buffer("importance", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse what would measure nothing."""
        check_held("MAS", learner)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 4), from the second task on."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight * (self.importance * drift.square()).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the sensitivity at the new weights (equation 3)."""
        view, _, classes = sampled_inputs(learner, task, self.num_samples, self.random)
        with learner.evaluating():
            module = nn.Sequential(learner.backbone, learner.head)
            self.importance += sensitivity(module, view, classes)
        self.anchor.copy_(flat([p.detach() for p in held(learner)]))
