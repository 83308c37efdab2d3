r"""Continual learning with Backward knowledge transfer (CUBER; Lin, Yang, Fan and Zhang 2022, algorithm 1).

TRGP with a third regime, in which old weights are changed on purpose. Of each earlier task j its inputs' subspace
:math:`B_j` and the gradient :math:`G_j` of its own loss at its end are kept for each layer. Before a new task begins
its gradient g is asked whether much of it lies in that subspace (sufficient projection, 1), and whether it points where
task j's own would (positive correlation, 2):

.. math:: \lVert g B_j B_j^\top \rVert_F \ge \epsilon_1 \lVert g \rVert_F
.. math:: \langle G_j, g \rangle \ge \epsilon_2 \lVert G_j \rVert_F \lVert g \rVert_F

Regime 1, not (1): steps are orthogonal to :math:`B_j`. Regime 2, (1) but not (2): they are, and the weight is scaled
there by a matrix Q, as in TRGP. Regime 3, both: it is scaled, and steps in :math:`B_j` are free under a penalty (3):

.. math:: L_t(\tilde W) + \lambda \sum_l \sum_{j \in 3} \lVert (W_l - W_l^{t-1}) B_{l,j} B_{l,j}^\top \rVert_F

As soon as (2) fails in training, task j falls back to regime 2 for the rest of the task.

Differences from the paper: (2) is asked in training of a running mean of gradients, since that of one minibatch is
mostly noise (`smoothing=0` asks the minibatch); the penalty enters by its gradient, so that (2) sees the loss alone and
the curves do not show it; steps are orthogonal to the span of the subspaces in regimes 1 and 2, where the paper takes
off each projection, which counts twice what two subspaces share. Biases and norms get no gradient after the first task.
:math:`\lambda` is not in the paper's text: 1 is a guess. Where tasks share outputs the head is a layer like the others.
Differences from the reference code: there is none in public; subspaces are those of TRGP's.
State: that of TRGP, and for each layer the gradients of all tasks, at length 1, (T, out, d), W at the beginning of the
task and the mean gradient (out, d), and the regimes (T,).
Scenarios: task-incremental; R under the mask of all classes is measured with each task's own weights, too, and is no
class-incremental figure. Refused: the others, optimizers but plain SGD, running statistics of batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from cl.toolkit.subspace import (
    ScaledByTask,
    Subspaces,
    protected_layers,
    sampled_gradients,
    sampled_inputs,
    silence_others,
)

if TYPE_CHECKING:
    from cl.data.task import Stream, Task
    from cl.engine.strategy import LearnerLike


def correlation(old: Tensor, g: Tensor) -> Tensor:
    """Return the cosine (T,) of a gradient (out, d) with each of several of length 1 or 0 (T, out, d).

    Example:
        >>> old = torch.tensor([[[1.0, -1.0]]]) / 2**0.5
        >>> round(float(correlation(old, torch.tensor([[0.8, 0.6]]))), 4)
        0.1414
    """
    return old.flatten(1) @ F.normalize(g.flatten(), dim=0)


def regimes(energies: Tensor, total: Tensor, cosine: Tensor, sufficient: float, positive: float, most: int) -> Tensor:
    r"""Return the regime of each earlier task, 1, 2 or 3, (T,).

    Args:
        energies: :math:`\lVert g B_j \rVert_F^2`, (T,), 0 for tasks to come.
        total: :math:`\lVert g \rVert_F^2`.
        cosine: Of g and :math:`G_j`, (T,).
        sufficient: :math:`\epsilon_1`.
        positive: :math:`\epsilon_2`.
        most: Tasks beyond regime 1, those of most energy.

    Example:
        >>> regimes(torch.tensor([0.64, 0.1]), torch.tensor(1.0), torch.tensor([0.14, 0.9]), 0.5, 0.0, 2).tolist()
        [3, 1]
    """
    first = torch.zeros_like(energies, dtype=torch.bool)
    first[energies.topk(min(most, len(energies))).indices] = True
    enough = first & (energies >= sufficient**2 * total)
    return 1 + enough.long() + (enough & (cosine >= positive)).long()


class CUBER(ScaledByTask):
    """Keeps gradients orthogonal to old inputs, except where the old task would gain.

    Args:
        threshold: epsilon, the share of the inputs' energy that a task's subspace holds; one for all layers or one a
            layer.
        increment: Added to it after each task.
        sufficient: Of the gradient's norm, the least part in an old task's subspace for regime 2.
        positive: The least cosine with the old task's gradient for regime 3.
        penalty: lambda.
        smoothing: Weight of the past in the mean gradient whose cosine is watched in training; 0 is the minibatch's.
        max_tasks: Old tasks in regimes 2 and 3 of a layer, at most.
        num_samples: Training examples that inputs and gradients are measured on.

    Raises:
        InputError: If the scenario is not task-incremental, the optimizer is not plain SGD, nothing of the backbone is
            trainable, all classes compete in the loss (`train_mask`), or batch norm keeps statistics, which drift.

    Example:
        >>> CUBER(threshold=0.95)
        CUBER(threshold=0.95)
    """

    def __init__(
        self,
        threshold: Annotated[float, Interval(ge=0, le=1)] | Sequence[Annotated[float, Interval(ge=0, le=1)]] = 0.97,
        increment: Annotated[float, Interval(ge=0, le=1)] = 0.003,
        sufficient: Annotated[float, Ge(0)] = 0.5,
        positive: Annotated[float, Ge(-1)] = 0.0,
        penalty: Annotated[float, Ge(0)] = 1.0,
        smoothing: Annotated[float, Interval(ge=0, le=1)] = 0.9,
        max_tasks: Annotated[int, Ge(1)] = 2,
        num_samples: Annotated[int, Ge(1)] = 125,
    ) -> None:
        super().__init__()
        self.threshold, self.increment, self.num_samples = threshold, increment, num_samples
        self.sufficient, self.positive, self.max_tasks = sufficient, positive, max_tasks
        self.penalty, self.smoothing = penalty, smoothing

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate subspaces, gradients and regimes of each layer; refuse what leaves the protected space."""
        super().setup(learner, stream)
        shapes = [layer.weight.flatten(1).shape for layer in protected_layers(learner)]
        for i, shape in enumerate(shapes):
            self.register_buffer(f"gradients_{i}", torch.zeros(len(stream), *shape))
            self.register_buffer(f"anchor_{i}", torch.zeros(shape))
            self.register_buffer(f"mean_{i}", torch.zeros(shape))
            self.register_buffer(f"regime_{i}", torch.ones(len(stream), dtype=torch.int64))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Find the regimes, layer by layer, and take what they are measured from in training."""
        found = sampled_gradients(learner, task, self.num_samples, self.random)
        for i, (layer, g) in enumerate(zip(protected_layers(learner), found, strict=True)):
            own, cosine = self.subspaces[i], correlation(self.get_buffer(f"gradients_{i}"), g)
            limits = self.sufficient, self.positive, self.max_tasks
            regime = regimes(own.energies(g), g.square().sum(), cosine, *limits)
            own.begin(regime > 1)
            now = {"regime": regime, "mean": g, "anchor": layer.weight.detach().flatten(1)}
            for name, value in now.items():
                self.get_buffer(f"{name}_{i}").copy_(value)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Look whether old tasks still gain; add the penalty's gradient; project; silence everything else."""
        if learner.tasks_learned == 0:
            return
        layers = protected_layers(learner)
        for i, (layer, own) in enumerate(zip(layers, self.subspaces, strict=True)):
            if layer.weight.grad is None:
                continue
            g, regime = layer.weight.grad.flatten(1), self.get_buffer(f"regime_{i}")
            mean = self.get_buffer(f"mean_{i}").lerp_(g, 1 - self.smoothing)
            cosine = correlation(self.get_buffer(f"gradients_{i}"), mean)
            regime.sub_(((regime == 3) & (cosine < self.positive)).long())
            change = layer.weight.detach().flatten(1) - self.get_buffer(f"anchor_{i}")
            layer.weight.grad += self._change(own, g, change, regime == 3).view_as(layer.weight)
        silence_others(learner, layers)

    def _change(self, own: Subspaces, g: Tensor, change: Tensor, free: Tensor) -> Tensor:
        """Return what a gradient (out, d) gains by the penalty (3) and loses to tasks not in regime 3, bool (T,)."""
        basis, member = own.directions, own.columns
        inside, moved = g @ basis, change @ basis
        lengths = (member @ moved.square().sum(0)).sqrt()
        share = torch.where(free & (lengths > 0), self.penalty / lengths, 0.0) @ member
        held = (~free).to(g.dtype) @ member > 0
        return torch.where(held, -inside, moved * share) @ basis.T

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Keep this task's scaling, its gradient, and the main directions of its inputs."""
        found = sampled_gradients(learner, task, self.num_samples, self.random)
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            self.get_buffer(f"gradients_{i}")[task.index] = found[i] / found[i].norm().clamp_min(1e-12)
            self.subspaces[i].end(task.index, R, min(self.thresholds[i] + self.increment * task.index, 1.0))
