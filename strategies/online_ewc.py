r"""Online EWC (Schwarz et al. 2018, "Progress & Compress", the section on online EWC).

Elastic weight consolidation with one Gaussian in place of one a task: its precision fades by :math:`\gamma` at each new
task, and its mean is the last optimum, which was found near the ones before it.

.. math:: F^*_i = \gamma F^*_{i-1} + F_i \tag{1}
.. math:: L(\theta) = L_i(\theta) + \frac{\lambda}{2} \sum_j \gamma F^*_{i-1,j} (\theta_j - \theta^*_{i-1,j})^2 \tag{2}

State: two vectors of the weights' size (F* and the mean). Scenarios: all, but without exemplars see the remark in the
class-incremental one. EWC keeps the sum over tasks exactly, in as much memory (see there); the difference is where the
penalty pulls to. With gamma = 1 and two tasks the two are the same.

Differences from the paper: lambda, which is 1 there; F_i is not normalised over the tasks, which the paper does where
rewards differ in scale; there the method protects a distilled knowledge base, here the network that learns.
Differences from reference code: no code was released. Mammoth has neither the 1/2 nor gamma in the penalty, and weighs
the squared gradient of an example's label by the probability of that label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.fisher import check_fisher, check_labels, check_single, task_fisher
from cl.toolkit.memory import remark_without
from cl.toolkit.weights import check_encode, check_held, flat, held

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class OnlineEWC(Strategy):
    """Holds each weight near the last optimum, as firmly as old tasks need it, the older the less.

    Args:
        weight: lambda.
        gamma: What is kept of the old Fisher at each new task.
        fisher: Labels in the Fisher: "true" (summed over p(y|x)), "sampled" (one drawn), "empirical" (the data's).
        num_samples: Training examples that it is measured on; None means all.
        batch_size: Examples whose mean gradient is squared; 1 is the Fisher's definition. See `cl.toolkit.fisher`.

    Raises:
        InputError: If a kind of Fisher is unknown, another strategy owns `encode`, nothing is trainable, or single
            examples are to pass batch norm of batches.

    Example:
        >>> OnlineEWC(weight=50.0)
        OnlineEWC(weight=50.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    precision: Tensor
    mean: Tensor

    def __init__(
        self,
        weight: Annotated[float, Ge(0)] = 100.0,
        gamma: Annotated[float, Interval(ge=0, le=1)] = 0.95,
        fisher: str = "true",
        num_samples: Annotated[int, Ge(1)] | None = 1000,
        batch_size: Annotated[int, Ge(1)] = 1,
    ) -> None:
        super().__init__()
        check_fisher(fisher, batch_size)
        self.weight, self.gamma = weight, gamma
        self.fisher, self.num_samples, self.batch_size = fisher, num_samples, batch_size

    def remark(self, learner: LearnerLike) -> str | None:
        """Say so where the method cannot work."""
        return remark_without("Online EWC", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the Gaussian: F* and the mean as vectors."""
        check_encode("OnlineEWC", learner)
        check_labels("online_ewc", self.fisher, stream)
        if self.batch_size == 1:
            check_single("OnlineEWC", learner, "set its batch_size=20 and fisher=empirical")
        size = sum(p.numel() for p in held(learner))
        self.register_buffer("precision", torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse what would measure nothing."""
        check_held("OnlineEWC", learner)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 2), from the second task on."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.mean
        return self.weight / 2 * (self.gamma * self.precision * drift.square()).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Fade F*, add the Fisher at the new optimum (equation 1), and move the mean there."""
        new = task_fisher(learner, task, self.fisher, self.num_samples, self.batch_size, self.random)
        self.precision.copy_(self.gamma * self.precision + new)
        self.mean.copy_(flat([p.detach() for p in held(learner)]))
