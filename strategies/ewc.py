r"""Elastic Weight Consolidation (Kirkpatrick et al. 2017, equation 3).

After task k the diagonal Fisher information :math:`F_k` is measured at the weights :math:`\theta^*_k` that the task
ended with. Later tasks are trained with a quadratic penalty that holds each weight near them, in proportion to its
Fisher information:

.. math:: L(\theta) = L_t(\theta) + \frac{\lambda}{2} \sum_{k<t} \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

The sum over tasks equals a single quadratic up to a constant, with :math:`F = \sum_k F_k` and the anchor
:math:`\bar\theta = \sum_k F_k \theta^*_k / F`. So only F and the anchor are stored, however many tasks there are, and
the gradient is the same.

Defaults: lambda = 100 and 1000 examples for the Fisher are choices of this project; the paper tunes lambda.
Differences from the paper: the penalty lacks the constant above. `merge="mean"` averages F over the tasks and uses the
last weights as the anchor. For a Fisher that fades with time, see online EWC.
Differences from reference code: the default Fisher is the true one, of single examples: the squared gradient of
log p(y|x) is averaged over labels y of the model's own distribution. HAT's EWC, Avalanche and CLArena square the mean
gradient of a batch of labelled examples (`fisher="empirical"`, with `batch_size=20` in HAT), which is smaller by a
factor of about the batch size. HAT averages F over tasks, and measures it in training mode, with dropout. Avalanche and
Mammoth omit the factor 1/2. So values of lambda do not carry over from one library to another.

Under SGD a weight diverges from its anchor if learning rate * lambda * F > 2, and one bad last step of a task suffices:
on Permuted-MNIST a last batch of a few examples left a task at 57 % accuracy with a Fisher a hundred times as large.
The trainer of the reference code returns to the task's best epoch on validation data, and ends at 90.3 %. Without that
it ends at 89.5 and 87.6 % (two seeds), and this implementation at 88.7 % (mean of three seeds).

State: F and the anchor, two vectors of the size of the weights. Scenarios: all; in the class-incremental one without
exemplars a remark says that it ends near fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.fisher import check_fisher, check_labels, check_single, task_fisher
from cl.toolkit.memory import remark_without
from cl.toolkit.weights import check_encode, check_held, flat, held

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

MERGES = ("sum", "mean")


class EWC(Strategy):
    """Holds each weight near those of earlier tasks, in proportion to its Fisher information.

    Args:
        weight: lambda, the strength of the penalty.
        fisher: Labels y of the Fisher: "true" (expectation over p(y|x)), "sampled" (one drawn from it) or "empirical"
            (those of the data).
        num_samples: Training examples on which the Fisher is measured; None means all.
        batch_size: Examples whose gradients are averaged before squaring; the definition of the Fisher has 1. See
            `cl.toolkit.fisher`.
        merge: How the Fishers of several tasks are combined: by "sum", as in the paper, or "mean".

    Raises:
        InputError: If the kind of Fisher or of merge is unknown, arguments exclude each other, no weight is trainable,
            another strategy implements `encode`, which the Fisher would ignore, or `batch_size` is 1 and batch norm
            has no running statistics, so that it cannot process single examples.

    Example:
        >>> EWC(weight=50.0)
        EWC(weight=50.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    importance: Tensor
    anchor: Tensor

    def __init__(
        self,
        weight: Annotated[float, Ge(0)] = 100.0,
        fisher: str = "true",
        num_samples: Annotated[int, Ge(1)] | None = 1000,
        batch_size: Annotated[int, Ge(1)] = 1,
        merge: str = "sum",
    ) -> None:
        super().__init__()
        check_fisher(fisher, batch_size)
        if merge not in MERGES:
            raise unknown("merge of Fishers", merge, MERGES)
        self.weight, self.fisher, self.num_samples = weight, fisher, num_samples
        self.batch_size, self.merge = batch_size, merge

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("EWC", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate F and the anchor, one entry per weight."""
        check_encode("EWC", learner)
        check_labels("ewc", self.fisher, stream)
        if self.batch_size == 1:
            check_single("EWC", learner, "set its batch_size=20 and fisher=empirical")
        size = sum(p.numel() for p in held(learner))
        self.register_buffer("importance", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse to train if no weight is trainable, so that there would be nothing to protect."""
        check_held("EWC", learner, len(self.anchor))

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty, a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight / 2 * (self.importance * drift.square()).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Measure the Fisher at the present weights, and merge both into F and the anchor."""
        new = task_fisher(learner, task, self.fisher, self.num_samples, self.batch_size, self.random)
        theta = flat([p.detach() for p in held(learner)])
        t = learner.tasks_learned
        keep, add = (t / (t + 1), 1 / (t + 1)) if self.merge == "mean" else (1.0, 1.0)
        old, new = keep * self.importance, add * new
        mean = (old * self.anchor + new * theta) / (old + new).clamp_min(torch.finfo(new.dtype).tiny)
        self.anchor.copy_(mean if self.merge == "sum" else theta)  # where F is 0, the anchor has no effect
        self.importance.copy_(old + new)
