r"""Riemannian Walk (RWalk; Chaudhry et al. 2018, ECCV, section 4).

EWC and SI in one: weights are held near their old values where the Fisher information F at the end of the task or the
score s of their path is large. With the gradient g of the loss without the penalty, F is a running mean over intervals
of `interval` steps, in each of which the weights move by :math:`\Delta` and the loss falls by
:math:`\Delta L = -\sum_{\text{steps}} g \, (\theta^{\text{after}} - \theta^{\text{before}})`:

.. math:: F \leftarrow \alpha \, \overline{g^2} + (1 - \alpha) F \tag{10}
.. math:: s' = \sum_{\text{intervals}} \Big[ \frac{\Delta L}{\frac12 F \Delta^2 + \epsilon} \Big]_+ \tag{8}

The divisor is the distance that the interval has moved the predictions, the KL divergence to second order. When a task
ends, its scores s' and those before are averaged, :math:`s \leftarrow (s + s') / 2` (after the first task s = s'), and
with F and s each scaled to [0, 1] over all weights, later tasks are held near the weights :math:`\tilde\theta`:

.. math:: L(\theta) = L_t(\theta) + \lambda \sum_i (F_i + s_i) (\theta_i - \tilde\theta_i)^2 \tag{9}

With `scores=false` it is EWC++ of the same paper: online EWC with a running Fisher.

Published, quoted from memory: 85.7 % on Permuted-MNIST in one pass (the average over tasks; Chaudhry et al. 2019,
"Efficient Lifelong Learning with A-GEM"). The setting is from their code: 17 tasks, two layers of 256 units, batches of
10, SGD with rate 0.1, lambda = 1. Avalanche's reproductions (github.com/ContinualAI/continual-learning-baselines) list
99 % on Split-MNIST with task labels for the paper and for themselves.

Defaults: alpha = 0.9 and epsilon = 1e-3 are those of the released code, intervals of 10 steps and lambda = 1 those of
its Permuted-MNIST; for images its intervals have 50 steps.
Differences from the paper: its optional exemplars are another strategy's (`strategy=[er,rwalk]`). Squares are those of
mean gradients of minibatches, as in the released code. F starts as the square of the first gradient.
Differences from the reference code (the authors' A-GEM): it adds half of old and new scores to the old ones instead of
averaging, its mean of squares sums over all steps since the task began, and its divisor lacks the 1/2; an interval that
a task cuts short counts here.

State: ten vectors of the size of the weights, however many tasks there are. Scenarios: all; in the class-incremental
one without exemplars a remark says that it ends near fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import remark_without
from cl.toolkit.weights import check_encode, check_held, flat, held

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

_VECTORS = ("fisher", "score", "importance", "anchor", "path", "new_score", "squares", "start", "before", "gradient")


def unit_range(x: Tensor) -> Tensor:
    """Return a vector scaled to [0, 1] by its smallest and largest entry; zeros if all are equal.

    Example:
        >>> unit_range(torch.tensor([1.0, 3.0, 2.0])).tolist()
        [0.0, 1.0, 0.5]
    """
    return (x - x.min()) / (x.max() - x.min()).clamp_min(1e-32)


class RWalk(Strategy):
    """Holds each weight near its old value by its Fisher information and by the fall of the loss on its path.

    Args:
        weight: lambda, the strength of the penalty, which has no factor 1/2.
        alpha: Weight of the last interval in the running Fisher.
        interval: Steps between updates of Fisher and scores.
        damping: epsilon, which limits the score of weights that have hardly moved.
        scores: Whether the scores of paths count; False is EWC++.

    Raises:
        InputError: If another strategy implements `encode`, or no weight is trainable.

    Example:
        >>> RWalk(weight=2.0)
        RWalk(weight=2.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    fisher: Tensor
    score: Tensor
    importance: Tensor
    anchor: Tensor
    path: Tensor
    new_score: Tensor
    squares: Tensor
    start: Tensor
    before: Tensor
    gradient: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Annotated[float, Ge(0)] = 1.0,
        alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9,
        interval: Annotated[int, Ge(1)] = 10,
        damping: Annotated[float, Gt(0)] = 1e-3,
        scores: bool = True,
    ) -> None:
        super().__init__()
        self.weight, self.alpha, self.interval = weight, alpha, interval
        self.damping, self.scores = damping, scores

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn where the method ends near fine-tuning: class-incremental, without exemplars."""
        return remark_without("RWalk", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate Fisher, scores, the anchor and what is summed in an interval."""
        check_encode("RWalk", learner)
        for name in _VECTORS:
            self.register_buffer(name, torch.zeros(sum(p.numel() for p in held(learner))))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of the present interval

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Set the anchor to the present weights, and begin an interval and the scores of the task."""
        check_held("RWalk", learner, len(self.anchor))
        self.anchor.copy_(self._theta(learner))
        self._begin(self.anchor)
        self.new_score.zero_()

    def _theta(self, learner: LearnerLike) -> Tensor:
        return flat([p.detach() for p in held(learner)])

    def _begin(self, theta: Tensor) -> None:
        self.start.copy_(theta)
        self.before.copy_(theta)
        for sum_of in (self.path, self.squares, self.gradient, self.steps):
            sum_of.zero_()

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty (equation 9), a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(held(learner)) - self.anchor
        return self.weight * (self.importance * drift.square()).sum()

    def project_gradients(self, learner: LearnerLike) -> None:
        """Add the last step to the path, end an interval that is full, and note the gradient; none changes."""
        theta = self._theta(learner)
        self._add_step(theta)
        if int(self.steps) == self.interval:
            self._end(theta)
        gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in held(learner)])
        self.gradient.copy_(gradient - 2 * self.weight * self.importance * (theta - self.anchor))
        self.squares += self.gradient.square()
        self.steps += 1
        if not self.fisher.any():
            self.fisher.copy_(self.squares)

    def _add_step(self, theta: Tensor) -> None:
        self.path -= self.gradient * (theta - self.before)
        self.before.copy_(theta)

    def _end(self, theta: Tensor) -> None:
        """End an interval: update the task's scores (equation 8), then the running Fisher (equation 10)."""
        distance = self.fisher * (theta - self.start).square() / 2
        self.new_score += (self.path / (distance + self.damping)).clamp_min(0)
        self.fisher.lerp_(self.squares / self.steps, self.alpha)
        self._begin(theta)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """End the last interval, average the scores, and compute the importance of each weight."""
        theta = self._theta(learner)
        self._add_step(theta)
        if int(self.steps):
            self._end(theta)
        self.score.lerp_(self.new_score, 0.5 if learner.tasks_learned else 1.0)
        self.importance.copy_(unit_range(self.fisher) + (unit_range(self.score) if self.scores else 0))
