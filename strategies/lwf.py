r"""Learning without Forgetting (Li and Hoiem 2017, equations 1-3).

The network of before the task, frozen, teaches its outputs on the new data, softened by a temperature T:

.. math:: L = \mathrm{CE}(f(x), y) + \alpha T^2 \, \mathrm{KL}\big(\mathrm{softmax}(f^{old}(x)/T) \,\|\,
          \mathrm{softmax}(f(x)/T)\big)

The classes are those that competed in the loss when the teacher was trained (`train_mask`, by default the scenario):
the divergence is taken within each old task and summed ("task"), over all old classes at once ("class"), or over all
that there are ("domain"). Targets that are no single label are distilled by the binary
cross-entropy with the teacher's sigmoids (multi-label) or the squared distance (regression).

Differences from the paper: the softened cross-entropy is written as the divergence (same gradient) with the factor T^2
of Hinton et al. 2015, so that alpha keeps its meaning when T changes; no warm-up of the new outputs.
Differences from reference code: the teacher sees the same augmented batch, while Mammoth records its outputs once on
plain images, and first trains the new outputs alone for an epoch. Neither Mammoth nor van de Ven's code has the factor
T^2 (`scaled=false`). Van de Ven's loss is CE + KD in the class-incremental scenario, where all outputs compete in both
(`train_mask=domain`), and CE + (t - 1) KD in the t-th task in the other two: within tasks the sum is that already, for
the domain-incremental one there is `per_task=true`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.memory import remark_without

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def distillation(student: Tensor, teacher: Tensor, temperature: float, scaled: bool = True) -> Tensor:
    """Return T^2 KL(teacher || student) of softened logits (B, K), the mean over rows; or without T^2.

    Example:
        >>> loss = distillation(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]]), 2.0)
        >>> round(float(loss), 4)
        0.3851
    """
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return (temperature**2 if scaled else 1.0) * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


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
        scaled: Whether the divergence has the factor T^2.
        per_task: Whether one divergence over all classes counts once for each old task.

    Raises:
        InputError: If another strategy owns `encode`, which the teacher would not have.

    Example:
        >>> LwF(alpha=0.5)
        LwF(alpha=0.5)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)

    def __init__(
        self,
        alpha: Annotated[float, Ge(0)] = 1.0,
        temperature: Annotated[float, Gt(0)] = 2.0,
        scaled: bool = True,
        per_task: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.temperature, self.scaled, self.per_task = alpha, temperature, scaled, per_task

    def remark(self, learner: LearnerLike) -> str | None:
        """Say so where the method cannot work."""
        return remark_without("LwF", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the teacher as a frozen copy."""
        if learner.strategies.owned("encode"):
            raise InputError("LwF distils backbone and head, but another strategy owns encode: drop one of the two.")
        self.teacher = deepcopy(learner.trunk()).requires_grad_(False)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy what has been learned into the teacher, and list what it knows."""
        self.teacher.load_state_dict(learner.trunk().state_dict())
        self.teacher.eval()
        together = {"class": learner.seen, "domain": torch.ones_like(learner.seen)}.get(learner.train_mask)
        old = list(learner.membership[: task.index]) if together is None else [together]
        self._groups = [classes.nonzero().flatten() for classes in old]
        self._times = task.index if self.per_task and together is not None else 1

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the distillation of the incoming rows, from the second task on."""
        if learner.tasks_learned == 0:
            return None
        assert batch.view is not None
        n = batch.num_incoming
        with torch.no_grad():
            taught = self.teacher["head"](self.teacher["backbone"](batch.view[:n]))
        pairs = [(logits[:n, group], taught[:, group]) for group in self._groups]
        if learner.target.name == "label":
            terms = [distillation(*pair, self.temperature, self.scaled) for pair in pairs]
        else:
            terms = [imitation(*pair, learner.target.name) for pair in pairs]
        return self.alpha * self._times * torch.stack(terms).sum()
