r"""Synaptic Intelligence (Zenke, Poole and Ganguli 2017, equations 3-5).

Along the path of training, each weight is credited with its share of the fall of the loss:

.. math:: \omega_i = -\sum_{\text{steps}} g_i \, (\theta_i^{\text{after}} - \theta_i^{\text{before}}) \tag{3}

where g is the gradient of the loss without the penalty. When a task ends, that becomes an importance, relative to how
far the weight moved in it, and later tasks are held near the weights :math:`\tilde\theta` that it ended with:

.. math:: \Omega_i \leftarrow \max\Big(0, \; \Omega_i + \frac{\omega_i}{(\Delta_i)^2 + \xi}\Big) \tag{5}
.. math:: L(\theta) = L_t(\theta) + c \sum_i \Omega_i (\theta_i - \tilde\theta_i)^2 \tag{4}

State: five vectors of the weights' size (Omega, anchor, omega, and the last step's weights and gradient), whatever the
number of tasks. Scenarios: all, but without exemplars see the remark in the class-incremental one.

Differences from the paper: Omega is clamped at 0, without which a momentum or a noisy path could reward drifting.
Differences from the reference code (pathint): none known; it clamps likewise, and with Adam starts afresh with each
task, as every optimizer does here by default. Mammoth, whose figures are those of the DER paper, clips gradients to
[-1, 1], takes for the path the square of that clipped gradient of loss and penalty, and does not clamp Omega.
The gradient is that of before clipping, with what other strategies add to the loss, and projected by those in front of
this one.
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
    """Holds each weight as firmly as it has lowered the loss of old tasks on its way.

    Args:
        weight: c; there is no factor 1/2.
        damping: xi, which bounds the importance of weights that hardly moved.

    Raises:
        InputError: If another strategy owns `encode`, or nothing is trainable.

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
        """Say so where the method cannot work."""
        return remark_without("SI", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate Omega, the anchor, omega, and what the last step started from."""
        check_encode("SI", learner)
        size = sum(p.numel() for p in held(learner))
        for name in ("importance", "anchor", "path", "before", "gradient"):
            self.register_buffer(name, torch.zeros(size))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Start the path from here."""
        check_held("SI", learner)
        self.anchor.copy_(self._theta(learner))
        self.before.copy_(self.anchor)
        self.path.zero_()
        self.gradient.zero_()

    def _theta(self, learner: LearnerLike) -> Tensor:
        return flat([p.detach() for p in held(learner)])

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 4), from the second task on."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight * (self.importance * drift.square()).sum()

    def project_gradients(self, learner: LearnerLike) -> None:
        """Add the last step to the path, and keep what the next one starts from; no gradient is changed."""
        theta = self._theta(learner)
        self._add_step(theta)
        gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in held(learner)])
        self.gradient.copy_(gradient - 2 * self.weight * self.importance * (theta - self.anchor))
        self.before.copy_(theta)

    def _add_step(self, theta: Tensor) -> None:
        """Add what the step to theta contributes to omega (equation 3)."""
        self.path -= self.gradient * (theta - self.before)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Turn the path into importance (equation 5)."""
        theta = self._theta(learner)
        self._add_step(theta)
        relative = self.path / ((theta - self.anchor).square() + self.damping)
        self.importance.copy_((self.importance + relative).clamp_min(0))
