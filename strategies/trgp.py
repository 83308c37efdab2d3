r"""Trust Region Gradient Projection (Lin, Yang, Fan and Zhang 2022, algorithm 1).

As GPM, gradients are kept orthogonal to the inputs of all earlier tasks, whose directions are the columns of O (1). A
new task may use what that closes: before it begins, the gradient :math:`G_l` of each layer tells the earlier tasks j
whose inputs' subspace :math:`B_j` holds a large part of it (2), and of the two that hold most the weight is scaled
there by a matrix :math:`Q_j` of the new task's own, learned with the rest from the identity on (3):

.. math:: \nabla_W L \leftarrow \nabla_W L - (\nabla_W L) O O^\top
.. math:: \lVert G_l B_j B_j^\top \rVert_F > \epsilon_1 \lVert G_l \rVert_F
.. math:: \tilde W = W + \sum_j W B_j (Q_j - I) B_j^\top

The old tasks' weights are as they were, so nothing is forgotten; their rows pass through :math:`\tilde W` of their own.
When the task ends its own subspace is chosen among the columns of O and new directions
(`cl.toolkit.subspace.task_directions`).

Differences from the paper: biases and norms get no gradient after the first task. Of all Q of a task one matrix A is
kept, in the coordinates of O (`cl.toolkit.subspace.Subspaces`), which under SGD is the same. Where tasks share outputs,
as in its Permuted-MNIST (`stream.shared_labels=true`), the head is a layer like the others.
Differences from the reference code: a new direction is never lost to an index off by one, batch norm's affine
parameters do not move, the gradient is measured in evaluation mode, and the second and third task select as the others
do. In its networks no layer is scaled unless the first one has selected a task. Its Permuted-MNIST has
:math:`\epsilon_1` = 0.2.
State: a layer with d inputs has O and A (d, d), A of each task (T, d, d), and T rows of d that say whose a column is.
Scenarios: task-incremental; R under the mask of all classes is measured with each task's own weights, too, and is no
class-incremental figure. Refused: the others, optimizers but plain SGD, running statistics of batch norm.
Rows of several tasks are told apart on the host, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.toolkit.subspace import ScaledByTask, protected_layers, sampled_gradients, sampled_inputs, silence_others

if TYPE_CHECKING:
    from cl.data.task import Task
    from cl.engine.strategy import LearnerLike


def trusted(energies: Tensor, total: Tensor, trust: float, max_tasks: int) -> Tensor:
    r"""Return the tasks whose subspace is scaled, bool (T,), by equation 2.

    Args:
        energies: :math:`\lVert G B_j \rVert_F^2`, (T,), 0 for tasks to come.
        total: :math:`\lVert G \rVert_F^2`.
        trust: :math:`\epsilon_1`.
        max_tasks: How many at most, those of most energy.

    Example:
        >>> trusted(torch.tensor([0.5, 0.3, 0.1, 0.0]), torch.tensor(1.0), 0.5, 2).tolist()
        [True, True, False, False]
    """
    first = torch.zeros_like(energies, dtype=torch.bool)
    first[energies.topk(min(max_tasks, len(energies))).indices] = True
    return first & (energies > trust**2 * total)


class TRGP(ScaledByTask):
    """Keeps gradients orthogonal to old inputs, and scales old weights for a new task where its gradient lies in them.

    Args:
        threshold: epsilon, the share of the inputs' energy that a task's subspace holds; one for all layers or one a
            layer.
        increment: Added to it after each task.
        trust: Of the gradient's norm, the least part in an old task's subspace that makes it scaled.
        max_tasks: Old tasks that a layer scales, at most.
        num_samples: Training examples that inputs and gradients are measured on.

    Raises:
        InputError: If the scenario is not task-incremental, the optimizer is not plain SGD, nothing of the backbone is
            trainable, all classes compete in the loss (`train_mask`), or batch norm keeps statistics, which drift.

    Example:
        >>> TRGP(threshold=0.95)
        TRGP(threshold=0.95)
    """

    def __init__(
        self,
        threshold: Annotated[float, Interval(ge=0, le=1)] | Sequence[Annotated[float, Interval(ge=0, le=1)]] = 0.97,
        increment: Annotated[float, Interval(ge=0, le=1)] = 0.003,
        trust: Annotated[float, Ge(0)] = 0.5,
        max_tasks: Annotated[int, Ge(1)] = 2,
        num_samples: Annotated[int, Ge(1)] = 125,
    ) -> None:
        super().__init__()
        self.threshold, self.increment, self.num_samples = threshold, increment, num_samples
        self.trust, self.max_tasks = trust, max_tasks

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Select the old tasks whose subspaces this one scales, layer by layer."""
        gradients = sampled_gradients(learner, task, self.num_samples, self.random)
        for subspaces, G in zip(self.subspaces, gradients, strict=True):
            subspaces.begin(trusted(subspaces.energies(G), G.square().sum(), self.trust, self.max_tasks))

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project each layer's gradient; silence everything else that old tasks rest on."""
        if learner.tasks_learned == 0:
            return
        layers = protected_layers(learner)
        for layer, subspaces in zip(layers, self.subspaces, strict=True):
            if layer.weight.grad is not None:
                subspaces.project(layer.weight.grad)
        silence_others(learner, layers)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Keep this task's scaling, and the main directions of its inputs."""
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            self.subspaces[i].end(task.index, R, min(self.thresholds[i] + self.increment * task.index, 1.0))
