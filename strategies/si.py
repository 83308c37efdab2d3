r"""Synaptic Intelligence (Zenke, Poole and Ganguli 2017, equations 3-5).

During training, each weight is credited with its share of the decrease of the loss, summed over the steps:

.. math:: \omega_i = -\sum_{\text{steps}} g_i \, (\theta_i^{\text{after}} - \theta_i^{\text{before}}) \tag{3}

where g is the gradient of the loss without the penalty. When a task ends, :math:`\omega_i` is divided by the square of
the distance :math:`\Delta_i` that the weight has moved in the task, and added to its importance :math:`\Omega_i`. Later
tasks are held near the weights :math:`\tilde\theta` at the end of the task:

.. math:: \Omega_i \leftarrow \max\Big(0, \; \Omega_i + \frac{\omega_i}{(\Delta_i)^2 + \xi}\Big) \tag{5}
.. math:: L(\theta) = L_t(\theta) + c \sum_i \Omega_i (\theta_i - \tilde\theta_i)^2 \tag{4}

Other strategies take part in g: their loss terms count, and so do gradient projections by strategies that stand before
this one in the configuration. Clipping comes after g is read.

Defaults: c = 0.1 and :math:`\xi` = 0.1 are those of the paper's Permuted-MNIST; its other benchmarks have
:math:`\xi` = 0.001.
Differences from the paper: Omega is clamped at 0. Otherwise momentum or noise could make it negative, and the penalty
would push the weight away from its old value.
Differences from the reference code (pathint): none known. It clamps Omega, too, and starts Adam afresh with each task,
as every optimizer does here by default. Mammoth, whose figures are those of the DER paper, clips the gradient of loss
and penalty to [-1, 1], accumulates its square in place of the products of equation 3, and does not clamp Omega.

State: five vectors of the size of the weights, however many tasks there are: Omega, the anchor :math:`\tilde\theta`,
omega, and the weights and gradient of the last step. Scenarios: all; in the class-incremental one without exemplars a
remark says that it ends near fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import remark_without
from cl.toolkit.weights import check_encode, check_held, flat, held

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class SI(Strategy):
    """Holds each weight near its old value, in proportion to how much it has lowered the loss of old tasks.

    Args:
        weight: c, the strength of the penalty, which has no factor 1/2.
        damping: xi, which limits the importance of weights that have hardly moved.

    Raises:
        InputError: If another strategy implements `encode`, or no weight is trainable.

    Example:
        >>> SI(weight=1.0)
        SI(weight=1.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    importance: Tensor
    anchor: Tensor
    path: Tensor
    before: Tensor
    gradient: Tensor

    def __init__(self, weight: Annotated[float, Ge(0)] = 0.1, damping: Annotated[float, Gt(0)] = 0.1) -> None:
        super().__init__()
        self.weight, self.damping = weight, damping

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("SI", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate Omega, the anchor, omega, and the weights and gradient of the last step."""
        check_encode("SI", learner)
        size = sum(p.numel() for p in held(learner))
        for name in ("importance", "anchor", "path", "before", "gradient"):
            self.register_buffer(name, torch.zeros(size))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Set the anchor to the present weights, and omega to 0."""
        check_held("SI", learner, len(self.anchor))
        self.anchor.copy_(self._theta(learner))
        self.before.copy_(self.anchor)
        self.path.zero_()
        self.gradient.zero_()

    def _theta(self, learner: LearnerLike) -> Tensor:
        return flat([p.detach() for p in held(learner)])

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 4), a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight * (self.importance * drift.square()).sum()

    def project_gradients(self, learner: LearnerLike) -> None:
        """Add the last step to omega, and record weights and gradient before the next step; no gradient changes."""
        theta = self._theta(learner)
        self._add_step(theta)
        gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in held(learner)])
        self.gradient.copy_(gradient - 2 * self.weight * self.importance * (theta - self.anchor))
        self.before.copy_(theta)

    def _add_step(self, theta: Tensor) -> None:
        """Add the contribution of the step to the weights theta to omega (equation 3)."""
        self.path -= self.gradient * (theta - self.before)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the last step to omega, and update the importance Omega (equation 5)."""
        theta = self._theta(learner)
        self._add_step(theta)
        relative = self.path / ((theta - self.anchor).square() + self.damping)
        self.importance.copy_((self.importance + relative).clamp_min(0))
