r"""Gradient Episodic Memory (Lopez-Paz and Ranzato 2017, equations 8 and 11).

A step may not, to first order, raise the loss on the exemplars of any earlier task k. Let g be the gradient of the
incoming batch and :math:`g_k`, row k of G, the gradient on the exemplars of task k. If some product
:math:`\langle g, g_k \rangle` is negative, g is replaced by the nearest vector that has no negative product with any
:math:`g_k`, found by the dual problem:

.. math:: \min_v \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v
          \quad \text{subject to } v \ge \gamma, \qquad \tilde g = G^\top v + g

The margin :math:`\gamma > 0` adds at least :math:`\gamma g_k` for every task k, whether its constraint is violated or
not, which favours backward transfer.

Defaults: :math:`\gamma = 0.5` and :math:`\epsilon = 10^{-3}` are those of the released code.
Differences from the paper: when a task ends, its exemplars are drawn at random from its training set, where the paper
stores the last examples of the task; no exemplars of the last task are stored, since no later step would use them.
:math:`\epsilon`, which makes the problem strictly convex, is in the released code but not in the paper.
Differences from the reference code: an active-set method solves the dual problem in place of quadprog, with the same
solution. `memory_size` counts the exemplars of all tasks; `n_memories` of the released code counts those of one task.

State: the memory. Each step costs a forward and a backward pass over it, task by task, and one copy of the products of
gradients to the CPU, where the problem is solved in double precision. Scenarios: all; outputs that do not compete are
masked, as in the reference code. Optimizers other than SGD rescale the projected gradient, so that a step may still
raise the loss on the memory; a remark beside the results says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from cl.distributed import from_first, mean_gradients, own
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.memory import Memory
from cl.toolkit.subspace import remark_rescaled
from cl.toolkit.weights import flat

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

Array = np.ndarray[Any, np.dtype[np.float64]]


def bounded_minimum(A: Array, b: Array, low: float) -> Array:
    """Return the v that minimises v'Av / 2 + b'v subject to v >= low, for a positive definite A (k, k), b (k,).

    The active-set method of Lawson and Hanson (1974, chapter 23): free the variable at its bound whose increase lowers
    the objective fastest, move to the minimum over the free variables, and fix again those that reach their bound on
    the way; repeat until no variable at its bound can lower the objective.

    Example:
        >>> bounded_minimum(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([-1.0, -0.5]), 0.0).tolist()
        [1.0, 0.0]
    """
    scale = 1 / np.sqrt(np.diag(A))  # A then has a unit diagonal, so that one tolerance suits all
    A, b = A * np.outer(scale, scale), (b + A.sum(1) * low) * scale
    u, free, size = np.zeros(len(b)), np.zeros(len(b), dtype=bool), 1e-12 * (1 + np.abs(b).max())
    for _ in range(10 * len(b)):
        gain = np.where(free, -np.inf, -(b + A @ u))
        if gain.max() <= size:
            break
        free[gain.argmax()] = True
        while True:
            target = np.zeros(len(b))
            target[free] = np.linalg.solve(A[np.ix_(free, free)], -b[free])
            out = free & (target <= 0)
            if not out.any():
                break
            u += (u[out] / (u[out] - target[out])).min() * (target - u)
            free &= u > size
            u[~free] = 0
        u = target
    return low + u * scale


def project(g: Tensor, G: Tensor, margin: float, ridge: float) -> Tensor:
    """Return the projected gradient (P,), which is g itself if its product with each row of G is 0 or positive.

    Args:
        g: Gradient of the incoming batch, (P,).
        G: Gradients on the exemplars of the earlier tasks, (k, P).
        margin: gamma.
        ridge: epsilon.

    Example:
        >>> G = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> project(torch.tensor([-1.0, 0.5]), G, 0.5, 1e-3).tolist()
        [0.0, 1.0]
    """
    wide = G.double()
    products = torch.cat([wide @ wide.T, (wide @ g.double())[:, None]], dim=1).cpu().numpy()
    A, b = products[:, :-1] + ridge * np.eye(len(G)), products[:, -1]
    if (b >= 0).all():
        return g
    v = torch.from_numpy(bounded_minimum(A, b, margin)).to(g.device)
    return (g + v @ wide).to(g.dtype)


class GEM(Strategy):
    """Projects the gradient so that a step does not raise the loss on the exemplars of any earlier task.

    Args:
        memory_size: Total number of exemplars, divided evenly among the tasks.
        margin: gamma, the least weight v of each earlier task's gradient in a projection.
        ridge: epsilon, added to the diagonal of the products of gradients.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the memory cannot hold one exemplar of each task.

    Example:
        >>> GEM(memory_size=30)
        GEM(memory_size=30)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory", "boundaries")

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        margin: Annotated[float, Ge(0)] = 0.5,
        ridge: Annotated[float, Gt(0)] = 1e-3,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.margin, self.ridge, self.storage = memory_size, margin, ridge, storage

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn if the optimizer rescales gradients, so that steps do not follow the projected one."""
        return remark_rescaled("GEM", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate a memory for each task but the last."""
        if self.memory_size < len(stream):
            raise InputError(
                f"gem.memory_size={self.memory_size} is less than one exemplar for each of {len(stream)} tasks: set it "
                f"to {len(stream)} or more."
            )
        check_draws("gem", learner, stream, len(stream), memory_size=self.memory_size)
        size = self.memory_size // len(stream)
        self.memories = nn.ModuleList(Memory(size, stream, storage=self.storage) for _ in range(len(stream) - 1))

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project the gradient of all parameters, taken as one vector."""
        if learner.tasks_learned == 0:
            return
        parameters = [p for p in learner.parameters() if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        earlier = []
        for memory in list(self.memories)[: learner.tasks_learned]:
            assert isinstance(memory, Memory)
            batch = memory.sample(len(memory))
            loss = learner.criterion(learner(learner.prepare(batch.x, True), batch.task), batch)
            own_part = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            earlier.append(flat(list(mean_gradients(own_part, len(batch)))))
        projected = project(flat(grads), torch.stack(earlier), self.margin, self.ridge)
        for grad, part in zip(grads, projected.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store a random sample of the task as exemplars, unless it is the last task."""
        if task.index + 1 == learner.num_tasks:
            return
        memory: Memory = self.memories[task.index]  # type: ignore[assignment]
        size = min(self.memory_size // learner.num_tasks, len(task.train))
        rows = from_first(lambda: memory.random.generator.choice(len(task.train), size, replace=False))
        some = task.train.take(torch.from_numpy(rows)[own(size)])
        x, y, label = (column.to(learner.device) for column in some.tensors())
        memory.insert(Batch(x, y, label))
