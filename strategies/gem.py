r"""Gradient Episodic Memory (Lopez-Paz and Ranzato 2017, equations 8 and 11).

The gradient g of the incoming batch may not raise the loss on the memory of any earlier task k, whose gradient
:math:`g_k` is row k of G. Where some product :math:`\langle g, g_k \rangle` is negative, g gives way to the nearest
vector without one, found by the dual problem:

.. math:: \min_v \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v
          \quad \text{subject to } v \ge \gamma, \qquad \tilde g = G^\top v + g

The margin :math:`\gamma > 0` acts on every constraint, violated or not, which favours backward transfer.

Differences from the paper: a task's exemplars are drawn at random from its training set when it ends, where the paper
keeps the last ones that passed; the last task's are not kept, since nobody uses them. :math:`\epsilon` is not in the
paper. Differences from the reference code: an active-set method in place of quadprog, of the same solution;
`memory_size` counts all tasks' exemplars, there `n_memories` those of one.
The k products reach the host once a step, where the problem is solved in double precision.
State: the memory. Each step costs a forward and a backward pass over it, task by task.
Scenarios: all; outputs that do not compete are masked, as in the reference code. Other optimizers than SGD rescale what
is projected, which a remark says.
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

    The active-set method of Lawson and Hanson (1974, chapter 23): what may leave its bound with most gain does, and
    what would pass it on the way to the free minimum stays there.

    Example:
        >>> bounded_minimum(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([-1.0, -0.5]), 0.0).tolist()
        [1.0, 0.0]
    """
    scale = 1 / np.sqrt(np.diag(A))  # of unit diagonal, so that one tolerance serves all
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
    """Return the gradient (P,) that gives way to those of earlier tasks (k, P); g itself where none is violated.

    Args:
        g: Gradient of the incoming batch.
        G: Gradients of the earlier tasks.
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
    """Projects gradients against those of every earlier task's exemplars.

    Args:
        memory_size: Exemplars in all, shared out evenly among the tasks.
        margin: gamma, the least that each earlier task's gradient weighs in a projection.
        ridge: epsilon.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If there is less than one exemplar a task.

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
        """Say so where steps do not follow the projected gradient."""
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
        """Project the whole gradient, as one vector."""
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
        """Remember examples of the task, unless nobody comes after it."""
        if task.index + 1 == learner.num_tasks:
            return
        memory: Memory = self.memories[task.index]  # type: ignore[assignment]
        size = min(self.memory_size // learner.num_tasks, len(task.train))
        rows = from_first(lambda: memory.random.generator.choice(len(task.train), size, replace=False))
        some = task.train.take(torch.from_numpy(rows)[own(size)])
        x, y, label = (column.to(learner.device) for column in some.tensors())
        memory.insert(Batch(x, y, label))
