r"""Continual learning with Backward knowledge transfer (CUBER; Lin, Yang, Fan and Zhang 2022, algorithm 1).

TRGP with a third regime, in which old weights are changed on purpose where an old task should gain. Of each earlier
task j two things are stored for each layer: the subspace of its inputs, with the basis :math:`B_j`, and the gradient
:math:`G_j` of its own loss at the end of the task. Before a new task begins, its gradient g is tested against both:
whether a large part of it lies in the subspace (sufficient projection, 1), and whether it points in the same direction
as the gradient of task j (positive correlation, 2):

.. math:: \lVert g B_j B_j^\top \rVert_F \ge \epsilon_1 \lVert g \rVert_F
.. math:: \langle G_j, g \rangle \ge \epsilon_2 \lVert G_j \rVert_F \lVert g \rVert_F

- Regime 1, if (1) fails: steps are orthogonal to :math:`B_j`.
- Regime 2, if (1) holds and (2) fails: steps are orthogonal to :math:`B_j`, and the weight is scaled there by a matrix
  Q, as in TRGP.
- Regime 3, if both hold: the weight is scaled there, and steps in :math:`B_j` are allowed under the penalty (3).

.. math:: L_t(\tilde W) + \lambda \sum_l \sum_{j \in 3} \lVert (W_l - W_l^{t-1}) B_{l,j} B_{l,j}^\top \rVert_F

As soon as (2) fails during training, task j is in regime 2 for the rest of the task.

Defaults: :math:`\epsilon_1` = 0.5 and :math:`\epsilon_2` = 0 are the paper's. :math:`\lambda` is not in the paper's
text; 1 is a guess. The others are those of TRGP.
Differences from the paper: during training (2) is tested on a running mean of gradients, since the gradient of one
minibatch is mostly noise (`smoothing=0` tests the minibatch). The penalty is added as a gradient, so that (2) is tested
without it; the training curves do not include it either. In regimes 1 and 2 steps are orthogonal to the span of the
subspaces; the paper subtracts each projection, which counts directions that two subspaces share twice. Biases and norms
get no gradient after the first task. Where tasks share outputs, the head is treated like the other layers.
Differences from the reference code: there is no public code. Subspaces are chosen as in TRGP.

State: that of TRGP, and for each layer the gradients of all tasks, scaled to length 1, (T, out, d), the weight at the
beginning of the task and the mean gradient, (out, d) each, and the regimes (T,).
Scenarios: task-incremental. R under the mask of all classes is measured with the weights of each example's own task,
too, so it is not a class-incremental result. Refused: the other scenarios, optimizers other than plain SGD, batch norm
with running statistics.
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
    """Return the cosine (T,) of a gradient g (out, d) with each old gradient (T, out, d), which has length 1 or is 0.

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
        cosine: Cosine of g and :math:`G_j`, (T,).
        sufficient: :math:`\epsilon_1`.
        positive: :math:`\epsilon_2`.
        most: Largest number of tasks in regimes 2 and 3; those with the most energy are considered.

    Example:
        >>> regimes(torch.tensor([0.64, 0.1]), torch.tensor(1.0), torch.tensor([0.14, 0.9]), 0.5, 0.0, 2).tolist()
        [3, 1]
    """
    first = torch.zeros_like(energies, dtype=torch.bool)
    first[energies.topk(min(most, len(energies))).indices] = True
    enough = first & (energies >= sufficient**2 * total)
    return 1 + enough.long() + (enough & (cosine >= positive)).long()


class CUBER(ScaledByTask):
    """Keeps gradients orthogonal to old inputs, except where the old task is expected to gain.

    Args:
        threshold: epsilon, the share of the inputs' energy that a task's subspace contains; one for all layers or one
            per layer.
        increment: Added to the threshold after each task; the sum is at most 1.
        sufficient: epsilon_1, the smallest share of the gradient's norm in an old task's subspace for regimes 2 and 3.
        positive: epsilon_2, the smallest cosine with the old task's gradient for regime 3.
        penalty: lambda, the weight of the penalty on changes in regime 3.
        smoothing: Decay of the running mean of gradients that (2) is tested on; 0 tests the minibatch's gradient.
        max_tasks: Largest number of old tasks in regimes 2 and 3 of a layer.
        num_samples: Training examples of each task on which inputs and gradients are measured.

    Raises:
        InputError: If the scenario is not task-incremental, the optimizer is not plain SGD, no weight of the backbone
            is trainable, all classes compete in the loss (`train_mask`), or batch norm keeps running statistics.

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
        """Allocate subspaces, gradients and regimes of each layer; refuse settings that would break the method."""
        super().setup(learner, stream)
        shapes = [layer.weight.flatten(1).shape for layer in protected_layers(learner)]
        for i, shape in enumerate(shapes):
            self.register_buffer(f"gradients_{i}", torch.zeros(len(stream), *shape))
            self.register_buffer(f"anchor_{i}", torch.zeros(shape))
            self.register_buffer(f"mean_{i}", torch.zeros(shape))
            self.register_buffer(f"regime_{i}", torch.ones(len(stream), dtype=torch.int64))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Determine the regimes of each layer; record its weight and gradient for use during training."""
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
        """Test (2) again, add the penalty's gradient, project, and remove the gradient of biases and norms."""
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
        """Return the change of the gradient g (out, d): the penalty's gradient (3), minus the projection of g.

        Args:
            own: Subspaces of the layer.
            g: Gradient of the layer's weight, (out, d).
            change: Change of the weight since the task began, (out, d).
            free: Which tasks are in regime 3, bool (T,).
        """
        basis, member = own.directions, own.columns
        inside, moved = g @ basis, change @ basis
        lengths = (member @ moved.square().sum(0)).sqrt()
        share = torch.where(free & (lengths > 0), self.penalty / lengths, 0.0) @ member
        held = (~free).to(g.dtype) @ member > 0
        return torch.where(held, -inside, moved * share) @ basis.T

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store this task's scaling and gradient and, for each layer, the main directions of its inputs."""
        found = sampled_gradients(learner, task, self.num_samples, self.random)
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            self.get_buffer(f"gradients_{i}")[task.index] = found[i] / found[i].norm().clamp_min(1e-12)
            self.subspaces[i].end(task.index, R, min(self.thresholds[i] + self.increment * task.index, 1.0))
