r"""Learning without Forgetting (Li and Hoiem 2017, equations 1-3).

A frozen copy of the network as it was before the task, the teacher, is evaluated on the new data, and the outputs for
old classes are kept near the teacher's. Both are softened by a temperature T:

.. math:: L = \mathrm{CE}(f(x), y) + \alpha T^2 \, \mathrm{KL}\big(\mathrm{softmax}(f^{old}(x)/T) \,\|\,
          \mathrm{softmax}(f(x)/T)\big)

The softmax runs over the classes that competed in the loss when the teacher was trained (`train_mask`, by default the
scenario). "task": over the classes of each old task, and the divergences are summed; "class": over all old classes
together; "domain": over all classes. For multi-label targets the second term is the binary cross-entropy with the
teacher's sigmoids; for regression, the squared distance from the teacher's outputs.

Defaults: alpha = 1 and T = 2, as in the paper.
Differences from the paper: the paper's softened cross-entropy is written as the divergence, which has the same
gradient, with the factor T^2 of Hinton et al. 2015, so that alpha keeps its meaning when T changes. The new outputs are
not trained alone first (warm-up).
Differences from reference code: the teacher sees the same augmented batch as the student; Mammoth records the teacher's
outputs once on images without augmentation, and first trains the new outputs alone for an epoch. Neither Mammoth nor
the code of van de Ven et al. has the factor T^2 (`scaled=false`). In the latter the loss is CE + KD in the
class-incremental scenario, where all outputs compete in both terms (`train_mask=domain`), and CE + (t - 1) KD in task t
of the other two scenarios. In the task-incremental one that is the sum over old tasks above; for the domain-incremental
one there is `per_task=true`.

State: the teacher, which is as large as backbone and head. Scenarios: all; in the class-incremental one without
exemplars a remark says that it ends near fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import remark_without
from cl.toolkit.teacher import Teacher

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def distillation(student: Tensor, teacher: Tensor, temperature: float, scaled: bool = True) -> Tensor:
    """Return T^2 KL(teacher || student) of softened logits (B, K), averaged over examples; `scaled=False` omits T^2.

    Example:
        >>> loss = distillation(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]]), 2.0)
        >>> round(float(loss), 4)
        0.3851
    """
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return (temperature**2 if scaled else 1.0) * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def imitation(student: Tensor, teacher: Tensor, target: str) -> Tensor:
    """Return the distance of outputs (B, K) from the teacher's: BCE for multi-label targets, MSE for regression."""
    if target == "multilabel":
        return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    return F.mse_loss(student, teacher)


class LwF(Strategy):
    """Distils the network as it was before the task into the present network, on the data of the task.

    Args:
        alpha: Weight of the distillation term.
        temperature: T, by which logits are divided.
        scaled: Whether the divergence has the factor T^2.
        per_task: Whether a divergence over classes of several tasks is multiplied by the number of old tasks.

    Raises:
        InputError: If another strategy implements `encode`, which the teacher would lack.

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
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("LwF", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the teacher as a frozen copy."""
        self.teacher = Teacher(learner, "LwF")

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy backbone and head into the teacher, and list the groups of classes that are distilled."""
        self.teacher.copy_from(learner)
        together = {"class": learner.seen, "domain": torch.ones_like(learner.seen)}.get(learner.train_mask)
        old = list(learner.membership[: task.index]) if together is None else [together]
        self._groups = [classes.nonzero().flatten() for classes in old]
        self._times = task.index if self.per_task and together is not None else 1

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the distillation term on the incoming examples, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        assert batch.view is not None
        n = batch.num_incoming
        taught = self.teacher(batch.view[:n])
        pairs = [(logits[:n, group], taught[:, group]) for group in self._groups]
        if learner.target.name == "label":
            terms = [distillation(*pair, self.temperature, self.scaled) for pair in pairs]
        else:
            terms = [imitation(*pair, learner.target.name) for pair in pairs]
        return self.alpha * self._times * torch.stack(terms).sum()
