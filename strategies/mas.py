r"""Memory Aware Synapses (Aljundi et al. 2018, equations 1-5).

A weight is important if the outputs F of the network are sensitive to it; labels are not used. After each task the
sensitivity on its N examples is added to the importance:

.. math:: \Omega_i \leftarrow \Omega_i + \frac1N \sum_{n=1}^N
          \Big| \frac{\partial \lVert F(x_n; \theta) \rVert_2^2}{\partial \theta_i} \Big| \tag{2, 3}

Later tasks are held near the weights :math:`\theta^*` at the end of the last task:

.. math:: L(\theta) = L_t(\theta) + \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2 \tag{4}

F consists of the outputs that compete in training: those of the task, of all classes seen, or all of them.

Defaults: lambda = 0.1 and 1000 examples for the sensitivity are choices of this project.
Differences from the paper: lambda is 1 in the paper, with which training diverges here at learning rates above about
0.02. The paper's local version, which uses the correlation between the units of each layer (equation 5), is left out.
The method could measure the sensitivity on any unlabelled data; here it uses the training examples of the task.
Differences from the reference code: the code takes the absolute value of the gradient summed over a batch, in which
contributions of different sign cancel; here the absolute value is taken for each example, as in equation 3. Avalanche
does as the code does, and averages Omega over tasks by a moving mean.

State: Omega and :math:`\theta^*`, two vectors of the size of the weights. Scenarios: all; in the class-incremental one
without exemplars a remark says that it ends near fine-tuning.
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
    """Return the mean over examples of |d ||F(x)||^2 / d theta_i| for each weight, as one vector (P,).

    Args:
        module: Maps inputs (B, ...) to outputs (B, C).
        x: Inputs (n, ...).
        classes: Indices of the outputs F, (K,), or for each example which outputs belong to F, bool (n, C).

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
    """Holds each weight near its old value, in proportion to the sensitivity of the outputs to it.

    Args:
        weight: lambda, the strength of the penalty, which has no factor 1/2.
        num_samples: Training examples on which the sensitivity is measured; None means all.

    Raises:
        InputError: If another strategy implements `encode`, no weight is trainable, or batch norm has no running
            statistics, so that it cannot process single examples.

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
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("MAS", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate Omega and the anchor, one entry per weight."""
        check_encode("MAS", learner)
        check_single("MAS", learner, "use a backbone without batch norm, or whose batch norm keeps statistics")
        size = sum(p.numel() for p in held(learner))
        self.register_buffer("importance", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse to train if no weight is trainable, so that there would be nothing to protect."""
        check_held("MAS", learner, len(self.anchor))

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 4), a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight * (self.importance * drift.square()).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the sensitivity at the present weights to Omega (equation 3), and move the anchor there."""
        view, _, classes = sampled_inputs(learner, task, self.num_samples, self.random)
        with learner.evaluating():
            module = nn.Sequential(learner.backbone, learner.head)
            self.importance += sensitivity(module, view, classes)
        self.anchor.copy_(flat([p.detach() for p in held(learner)]))
