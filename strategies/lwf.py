r"""Learning without Forgetting (Li and Hoiem 2017, equations 1-3).

The network of before the task, frozen, teaches its outputs on the new data, softened by a temperature T:

.. math:: L = \mathrm{CE}(f(x), y) + \alpha T^2 \, \mathrm{KL}\big(\mathrm{softmax}(f^{old}(x)/T) \,\|\,
          \mathrm{softmax}(f(x)/T)\big) \text{ over the old classes}

In the task-incremental scenario the divergence is taken within each old task and summed; else over all old classes at
once (in the domain-incremental one over all classes). Targets that are no single label are distilled by the binary
cross-entropy with the teacher's sigmoids (multi-label) or the squared distance (regression).

Differences from the paper: the softened cross-entropy is written as the divergence (same gradient) with the factor T^2
of Hinton et al. 2015, so that alpha keeps its meaning when T changes; no warm-up of the new outputs.
Differences from reference code: the teacher sees the same augmented batch, while Mammoth records its outputs once on
plain images, and has no factor T^2.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.errors import InputError, check_range
from cl.memory import remark_without
from cl.strategy import Batch, Strategy

if TYPE_CHECKING:
    from cl.learner import Learner
    from cl.task import Stream, Task


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of softened logits (B, K), the mean over rows.

    Example:
        >>> loss = distillation(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]]), 2.0)
        >>> round(float(loss), 4)
        0.3851
    """
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def imitation(student: Tensor, teacher: Tensor, target: str) -> Tensor:
    """Return how far outputs (B, K) are from the teacher's where no softmax joins them: BCE of sigmoids, or MSE."""
    if target == "multilabel":
        return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    return F.mse_loss(student, teacher)


class LwF(Strategy):
    """Distils the network of before the task into the present one, on the present data.

    Args:
        alpha: Weight of the distillation.
        temperature: T.

    Raises:
        InputError: If another strategy owns `encode`, which the teacher would not have.

    Example:
        >>> from cl.testing import check_strategy
        >>> check_strategy(LwF)
    """

    targets = ("label", "multilabel", "regression")

    def __init__(self, alpha: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        check_range("lwf", 0, alpha=alpha)
        check_range("lwf", 0, above=True, temperature=temperature)
        self.alpha, self.temperature = alpha, temperature

    def remark(self, learner: Learner) -> str | None:
        """Say so where the method cannot work."""
        return remark_without("LwF", learner)

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Allocate the teacher as a frozen copy."""
        if learner.strategies.owned("encode"):
            raise InputError("LwF distils backbone and head, but another strategy owns encode: drop one of the two.")
        self.teacher = deepcopy(learner.trunk()).requires_grad_(False)

    def before_task(self, learner: Learner, task: Task) -> None:
        """Copy what has been learned into the teacher, and list what it knows."""
        self.teacher.load_state_dict(learner.trunk().state_dict())
        self.teacher.eval()
        old = list(learner.membership[: task.index]) if learner.scenario == "task" else [learner.seen]
        self._groups = [classes.nonzero().flatten() for classes in old]

    def loss(self, learner: Learner, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the distillation of the incoming rows, from the second task on."""
        if learner.tasks_learned == 0:
            return None
        assert batch.view is not None
        n = batch.num_incoming
        with torch.no_grad():
            taught = self.teacher["head"](self.teacher["backbone"](batch.view[:n]))
        pairs = [(logits[:n, group], taught[:, group]) for group in self._groups]
        if learner.target.name == "label":
            terms = [distillation(*pair, self.temperature) for pair in pairs]
        else:
            terms = [imitation(*pair, learner.target.name) for pair in pairs]
        return self.alpha * torch.stack(terms).sum()
