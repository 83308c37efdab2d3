r"""Online EWC (Schwarz et al. 2018, "Progress & Compress", the section on online EWC).

EWC holds the weights by one Gaussian per task; online EWC has a single one. Its precision :math:`F^*` is multiplied by
:math:`\gamma` at each new task i before the Fisher information :math:`F_i` of that task is added, and its mean is
:math:`\theta^*_i`, the weights at the end of the task:

.. math:: F^*_i = \gamma F^*_{i-1} + F_i \tag{1}
.. math:: L(\theta) = L_i(\theta) + \frac{\lambda}{2} \sum_j \gamma F^*_{i-1,j} (\theta_j - \theta^*_{i-1,j})^2 \tag{2}

Here EWC takes as much memory (see `ewc`), and keeps the exact sum over tasks; the two differ in how old tasks fade and
in the point that the penalty pulls to. With gamma = 1 and two tasks they are the same.

Defaults: gamma = 0.95, lambda = 100 and 1000 examples for the Fisher are choices of this project.
Differences from the paper: lambda, which is 1 in the paper. The paper normalises :math:`F_i` over tasks whose rewards
differ in scale; here it is not normalised. In the paper the method protects a distilled knowledge base; here it
protects the network that learns.
Differences from reference code: the authors released none. Mammoth has neither the factor 1/2 nor gamma in the penalty,
and weighs the squared gradient of an example's label by the probability of that label.

State: F* and the mean, two vectors of the size of the weights. Scenarios: all; in the class-incremental one without
exemplars a remark says that it ends near fine-tuning.
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
    """Holds each weight near its last value, in proportion to a Fisher information in which old tasks fade.

    Args:
        weight: lambda, the strength of the penalty.
        gamma: Factor by which the precision is multiplied at each new task.
        fisher: Labels y of the Fisher: "true" (expectation over p(y|x)), "sampled" (one drawn from it) or "empirical"
            (those of the data).
        num_samples: Training examples on which the Fisher is measured; None means all.
        batch_size: Examples whose gradients are averaged before squaring; the definition of the Fisher has 1. See
            `cl.toolkit.fisher`.

    Raises:
        InputError: If the kind of Fisher is unknown, arguments exclude each other, no weight is trainable, another
            strategy implements `encode`, which the Fisher would ignore, or `batch_size` is 1 and batch norm has no
            running statistics, so that it cannot process single examples.

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
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("Online EWC", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the precision F* and the mean, one entry per weight."""
        check_encode("OnlineEWC", learner)
        check_labels("online_ewc", self.fisher, stream)
        if self.batch_size == 1:
            check_single("OnlineEWC", learner, "set its batch_size=20 and fisher=empirical")
        size = sum(p.numel() for p in held(learner))
        self.register_buffer("precision", torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse to train if no weight is trainable, so that there would be nothing to protect."""
        check_held("OnlineEWC", learner, len(self.mean))

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 2), a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.mean
        return self.weight / 2 * (self.gamma * self.precision * drift.square()).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Update the precision F* (equation 1), and move the mean to the present weights."""
        new = task_fisher(learner, task, self.fisher, self.num_samples, self.batch_size, self.random)
        self.precision.copy_(self.gamma * self.precision + new)
        self.mean.copy_(flat([p.detach() for p in held(learner)]))
