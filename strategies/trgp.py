r"""Trust Region Gradient Projection (Lin, Yang, Fan and Zhang 2022, algorithm 1).

As in GPM, the gradient of each layer is kept orthogonal to the inputs of all earlier tasks, whose directions are the
columns of O (1). TRGP lets a new task use these directions nevertheless, by scaling. Before the task begins, the
gradient :math:`G_l` of each layer is measured. The earlier tasks j are selected whose input subspace, with the basis
:math:`B_j`, contains a large part of it (2), at most the two with the largest parts. In their subspaces the weight is
scaled by matrices :math:`Q_j` of the new task, which start as the identity and are trained with the weights (3):

.. math:: \nabla_W L \leftarrow \nabla_W L - (\nabla_W L) O O^\top
.. math:: \lVert G_l B_j B_j^\top \rVert_F > \epsilon_1 \lVert G_l \rVert_F
.. math:: \tilde W = W + \sum_j W B_j (Q_j - I) B_j^\top

Old tasks are computed with the weights :math:`\tilde W` of their own matrices, which no longer change, so they are not
forgotten. When the task ends, its own subspace is chosen among the columns of O and new directions
(`cl.toolkit.subspace.task_directions`).

Defaults: :math:`\epsilon_1` = 0.5, two tasks, epsilon = 0.97, increased by 0.003 after each task, and 125 examples, as
for CIFAR-100 in the paper and its code. Its Permuted-MNIST has :math:`\epsilon_1` = 0.2.
Differences from the paper: biases and norms get no gradient after the first task. The matrices Q of a task are stored
as a single matrix A in the coordinates of O (`cl.toolkit.subspace.Subspaces`), which is the same under SGD. Where tasks
share outputs, as in the paper's Permuted-MNIST (`stream.shared_labels=true`), the head is treated like the other
layers.
Differences from the reference code: an error of one in an index of the code loses a new direction; here none is lost.
The affine parameters of batch norm do not change after the first task, the gradient is measured in evaluation mode, and
the second and third task select earlier tasks in the same way as all others. In the code's networks no layer is scaled
unless the first layer has selected a task.

State: for a layer with d inputs O and A (d, d), A of each task (T, d, d), and which columns belong to each task (T, d).
A minibatch with examples of several tasks is split by task, which copies its task labels to the CPU once per step.
Scenarios: task-incremental. R under the mask of all classes is measured with the weights of each example's own task,
too, so it is not a class-incremental result. Refused: the other scenarios, optimizers other than plain SGD, batch norm
with running statistics.
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
    r"""Return the earlier tasks that are selected, bool (T,), by condition 2.

    Args:
        energies: :math:`\lVert G B_j \rVert_F^2`, (T,), 0 for tasks to come.
        total: :math:`\lVert G \rVert_F^2`.
        trust: :math:`\epsilon_1`.
        max_tasks: Largest number of selected tasks; those with the most energy are considered.

    Example:
        >>> trusted(torch.tensor([0.5, 0.3, 0.1, 0.0]), torch.tensor(1.0), 0.5, 2).tolist()
        [True, True, False, False]
    """
    first = torch.zeros_like(energies, dtype=torch.bool)
    first[energies.topk(min(max_tasks, len(energies))).indices] = True
    return first & (energies > trust**2 * total)


class TRGP(ScaledByTask):
    """Keeps gradients orthogonal to old inputs, and scales weights in the old subspaces that a new task can use.

    Args:
        threshold: epsilon, the share of the inputs' energy that a task's subspace contains; one for all layers or one
            per layer.
        increment: Added to the threshold after each task; the sum is at most 1.
        trust: epsilon_1, the share of the gradient's norm in an old task's subspace above which the task is selected.
        max_tasks: Largest number of old tasks that are selected in a layer.
        num_samples: Training examples of each task on which inputs and gradients are measured.

    Raises:
        InputError: If the scenario is not task-incremental, the optimizer is not plain SGD, no weight of the backbone
            is trainable, all classes compete in the loss (`train_mask`), or batch norm keeps running statistics.

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
        """Select, for each layer, the old tasks in whose subspaces this task scales the weight."""
        gradients = sampled_gradients(learner, task, self.num_samples, self.random)
        for subspaces, G in zip(self.subspaces, gradients, strict=True):
            subspaces.begin(trusted(subspaces.energies(G), G.square().sum(), self.trust, self.max_tasks))

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project each layer's gradient; remove that of the other protected parameters (biases, norms)."""
        if learner.tasks_learned == 0:
            return
        layers = protected_layers(learner)
        for layer, subspaces in zip(layers, self.subspaces, strict=True):
            if layer.weight.grad is not None:
                subspaces.project(layer.weight.grad)
        silence_others(learner, layers)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store this task's scaling and, for each layer, the main directions of its inputs."""
        for i, R in enumerate(sampled_inputs(learner, task, self.num_samples, self.random)):
            self.subspaces[i].end(task.index, R, min(self.thresholds[i] + self.increment * task.index, 1.0))
